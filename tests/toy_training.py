"""A toy task: which of two sets of words a text is made of."""

import random
from typing import Any

import numpy as np
import torch

from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.train import Examples, Fitted, Surroundings, TrainSettings, fit, train_tokenizer

WORDS = ("goal match cup striker league", "budget vote minister party bill")
SETTINGS: dict[str, Any] = {
    "max_length": 16,
    "epochs": 4,
    "batch_tokens": 128,
    "learning_rate": 3e-3,
    "precision": "float32",
}

# every option that changes the numbers, none of which hinders learning
BUSY: dict[str, Any] = {
    "crop_share": 0.5,
    "noise_share": 0.1,
    "accumulate": 2,
    "schedule": "linear",
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "lm_weight": 0.2,
    "average": 0.5,
    "dropout": 0.2,
}


def toy_examples(count: int, seed: int) -> Examples:
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    texts = [" ".join(rng.choices(WORDS[label].split(), k=rng.randint(1, 12))) for label in labels]
    return Examples(texts, labels)


TRAIN, VAL = toy_examples(64, seed=0), toy_examples(32, seed=1)
TOKENIZER = train_tokenizer(TRAIN.texts, 300)


def new_model(seed: int = 0, **changes: Any) -> GPT2Classifier:
    shape = {
        "vocab_size": TOKENIZER.get_vocab_size(),
        "max_positions": 16,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "inner_size": 32,
        "num_labels": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = GPT2Classifier(ModelConfig(**(shape | changes)))
    model.init_weights()
    return model


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**(SETTINGS | changes))


def train(
    model: GPT2Classifier | None = None,
    *,
    examples: Examples = TRAIN,
    surroundings: Surroundings | None = None,
    **changes: Any,
) -> Fitted:
    return fit(model or new_model(), TOKENIZER, examples, VAL, settings(**changes), surroundings)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return fitted.model.state_dict()


def same(one: Fitted, other: Fitted) -> bool:
    """Whether two runs ended with the same bits."""
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def ids_of(examples: Examples) -> list[Any]:
    return [np.array(TOKENIZER.encode(text).ids[:16], np.int32) for text in examples.texts]
