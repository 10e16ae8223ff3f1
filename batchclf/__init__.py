"""Label a news archive with a fine-tuned GPT-2 classifier: files in, labelled Parquet out.

The command line is `batchclf`; from Python, `batchclf.load` gives a model that labels texts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from batchclf.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    model: str | Path,
    *,
    max_length: int | None = None,
    min_score: float = 0.0,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto",
    backend: Literal["torch", "openvino"] = "torch",
    max_batch_tokens: int | None = None,
    endpoint_url: str | None = None,
) -> "Classifier":
    """A model to label texts with, as `batchclf classify` does.

        with batchclf.load("model") as classifier:
            table = classifier.classify(["Shares fell.", None])

    Args:
        model: a model directory, an `s3://` prefix that holds one, or a name on the Hugging Face
            hub.
        max_length: tokens of a text that the model sees; None: as many as it was made for.
        min_score: below this probability the label is null.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` is bfloat16 where the device is fast at it, else float32; under `openvino` it
            is int8 where the model has a build.
        backend: what computes.
        max_batch_tokens: longest row times rows of one batch; None: as suits the device.
        endpoint_url: another server of the S3 protocol.

    Returns:
        An object with `labels`, `max_length` and `classify(texts)`, which gives a pyarrow.Table
        with a row for each text.

    Raises:
        batchclf.errors.CheckpointError: it is no model directory, or cannot be had.
        batchclf.errors.ConfigError: the options make no sense together, or not on this machine.
        batchclf.errors.StoreError: S3 kept failing; try again.
    """
    from batchclf.classifier import Classifier
    from batchclf.config import ModelSettings

    settings = ModelSettings(str(model), max_length, max_batch_tokens, dtype, device, backend)
    return Classifier(settings, min_score, endpoint_url)
