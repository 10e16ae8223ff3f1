"""The four functions that AWS's own PyTorch container calls, for those who do not use ours.

In and out as the original project's endpoint: `{"text": ...}` -> an object from label to
probability, the most probable first. The probabilities are those of `batchclf classify`.
https://sagemaker.readthedocs.io/en/stable/frameworks/pytorch/using_pytorch.html#serve-a-pytorch-model
"""

import json
import os

from batchclf.classifier import Classifier
from batchclf.config import ModelSettings
from batchclf.errors import InputError

JSON = "application/json"


def model_fn(model_dir: str) -> Classifier:
    """Load the model. `BATCHCLF_SERVE_DTYPE` and `BATCHCLF_SERVE_DEVICE` count as for `serve`.

    Raises:
        CheckpointError: the folder is no model directory.
    """
    settings = ModelSettings(
        model_dir,
        dtype=os.environ.get("BATCHCLF_SERVE_DTYPE", "auto"),
        device=os.environ.get("BATCHCLF_SERVE_DEVICE", "auto"),
    )
    return Classifier(settings, min_score=0.0)


def input_fn(request_body: str | bytes, request_content_type: str = JSON) -> str:
    """The text of a request.

    Raises:
        InputError: the body is not `{"text": ...}` in JSON.
    """
    if request_content_type.partition(";")[0].strip().lower() != JSON:
        raise InputError(f"the content type is {request_content_type!r}; send {JSON}")
    try:
        body = json.loads(request_body)
    except ValueError as error:
        raise InputError(f"the body is not JSON: {error}") from error
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError('the body has no text; send {"text": "..."}')
    return text


def predict_fn(text: str, model: Classifier) -> dict[str, float]:
    """Probability of each label, the most probable first.

    Raises:
        InputError: nothing in the text can be read.
    """
    predictions = model.predict([text])
    if predictions.errors:
        raise InputError(predictions.errors[0])
    ranked = sorted(zip(model.labels, predictions.probs[0].tolist(), strict=True), key=_probability)
    return dict(reversed(ranked))


def output_fn(prediction: dict[str, float], accept: str = JSON) -> str:
    """The answer as JSON.

    Raises:
        InputError: the client takes something else only.
    """
    if not {JSON, "application/*", "*/*", ""} & {
        wanted.partition(";")[0].strip().lower() for wanted in accept.split(",")
    }:
        raise InputError(f"the client accepts {accept!r}; the answer is {JSON}")
    return json.dumps(prediction, ensure_ascii=False)


def _probability(ranked: tuple[str, float]) -> float:
    return ranked[1]
