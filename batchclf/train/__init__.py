"""Training on texts and labels in memory: tokenizer, weights, and going on after a stop."""

from batchclf.train.display import TrainingDisplay
from batchclf.train.examples import Examples
from batchclf.train.history import Epoch, History
from batchclf.train.loop import Fitted, Surroundings, fit
from batchclf.train.prediction import predict
from batchclf.train.settings import TrainSettings
from batchclf.train.tokenizer import train_tokenizer
from batchclf.train.training_state import TrainingCheckpoints

__all__ = [
    "Epoch",
    "Examples",
    "Fitted",
    "History",
    "Surroundings",
    "TrainSettings",
    "TrainingCheckpoints",
    "TrainingDisplay",
    "fit",
    "predict",
    "train_tokenizer",
]
