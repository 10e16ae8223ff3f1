"""`batchclf build`: an int8 graph of a model for OpenVINO, and proof that it agrees with float32.

Shape suffixes: N texts, C classes.
"""
# ruff: noqa: N803, N806 - names of arrays end in their shape, in capitals

import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from batchclf.batching import spread
from batchclf.checkpoint import Build, Checkpoint, load, write_build
from batchclf.compute import Compute, choose_compute
from batchclf.config import CutSettings, ReadSettings
from batchclf.engine import Engine, build_model
from batchclf.errors import DisagreementError, InputError
from batchclf.labelled import read_shards
from batchclf.log import fields
from batchclf.openvino_model import check_installed
from batchclf.planning import make_plan
from batchclf.predictions import softmax
from batchclf.text import TextEncoder

log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "int8"]
CALIBRATION_TEXTS = 300  # as NNCF recommends
_MOST_SHARDS = 32  # that the sample is taken from
_LEAST_TEXTS = 10

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BuildSettings:
    """What to build.

    Attributes:
        precision: of the products; int8 is kept in the model directory, the others need no build
            and are measured alone.
        inputs: articles like those that will be labelled; they need no labels.
        num_rows: articles to compare on. int8 is calibrated on up to CALIBRATION_TEXTS others.
        min_agreement: share of labels that must be those of float32.
    """

    model: str
    inputs: tuple[str, ...]
    precision: Precision = "int8"
    text_columns: tuple[str, ...] = ("text",)
    delimiter: str = ","
    num_rows: int = 500
    min_agreement: float = 0.995
    max_length: int | None = None
    endpoint_url: str | None = None


@dataclass(frozen=True)
class Agreement:
    """How close a precision comes to float32 with torch, on texts that it was not calibrated on.

    Attributes:
        labels: share of texts with the same label.
        max_change, mean_change: of a probability, over all texts and labels.
    """

    labels: float
    max_change: float
    mean_change: float
    num_texts: int

    @classmethod
    def between(cls, exact_NC: FloatArray, found_NC: FloatArray) -> "Agreement":
        """Of probabilities, [N, C] each."""
        change_NC = np.abs(exact_NC - found_NC)
        return cls(
            labels=round(float((exact_NC.argmax(1) == found_NC.argmax(1)).mean()), 6),
            max_change=float(change_NC.max()),
            mean_change=float(change_NC.mean()),
            num_texts=len(exact_NC),
        )


def build(settings: BuildSettings) -> dict[str, Any]:
    """Build, compare, and keep the build if it agrees.

    Returns:
        What the last line of `batchclf build` says.

    Raises:
        ConfigError: OpenVINO or NNCF is not installed, or the model directory cannot be written.
        CheckpointError: the model cannot be loaded.
        InputError: an input cannot be read, or holds too few articles.
        DisagreementError: too many labels differ; an older build stays as it was.
    """
    dtype: str = settings.precision
    if settings.precision == "int8":
        check_installed("openvino", "nncf")
        dtype = "auto"  # of the rest
    compute = choose_compute("cpu", dtype, "openvino")
    checkpoint = load(settings.model, settings.max_length, settings.endpoint_url)
    compared, calibration = _sample(settings, checkpoint)
    log.info("comparing on %d articles with float32", len(compared))
    exact_NC = _probs(checkpoint, choose_compute("cpu", "float32"), compared)
    with tempfile.TemporaryDirectory(prefix="batchclf-build-") as scratch:
        if settings.precision == "int8":
            log.info("calibrating on %d articles", len(calibration))
            compute = _quantize(checkpoint, compute, calibration, Path(scratch))
        agreement = Agreement.between(exact_NC, _probs(checkpoint, compute, compared))
        log.info(
            "%.2f%% of labels agree with float32; probabilities move by %.2g at most, %.2g on "
            "average",
            100 * agreement.labels,
            agreement.max_change,
            agreement.mean_change,
            extra=fields(**asdict(agreement)),
        )
        if agreement.labels < settings.min_agreement:
            raise DisagreementError(
                f"{agreement.labels:.2%} of the labels of {agreement.num_texts} articles are those "
                f"of float32, fewer than --min-agreement {settings.min_agreement}; nothing was "
                f"kept. Use another precision, or articles that are more like those to be labelled"
            )
        note = {
            "precision": settings.precision,
            "agreement": asdict(agreement),
            "calibration_texts": len(calibration),
            "max_length": checkpoint.max_length,
            "versions": {name: version(name) for name in ("batchclf", "openvino", "torch")},
        }
        if compute.build is not None:
            write_build(checkpoint, compute.build.graph, note)
    kept = str(checkpoint.path) if compute.build is not None else None
    return {"model": str(checkpoint.path), "kept_in": kept, **note}


def _quantize(
    checkpoint: Checkpoint, compute: Compute, texts: Sequence[IntArray], scratch: Path
) -> Compute:
    """With an int8 graph that lies in `scratch`."""
    import openvino as ov

    from batchclf.openvino_graph import build_graph
    from batchclf.quantization import quantize

    graph = quantize(build_graph(checkpoint.build_model()), texts, checkpoint.config)
    path = scratch / "graph.xml"
    ov.save_model(graph, path, compress_to_fp16=False)
    return replace(compute, build=Build(path, "", {}))


def _probs(checkpoint: Checkpoint, compute: Compute, texts: Sequence[IntArray]) -> FloatArray:
    """Calibrated probabilities, [N, C]."""
    engine = Engine(build_model(checkpoint, compute), compute)
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids in texts])))
    try:
        logits = engine.predict(np.concatenate(texts), offsets, lambda _examples, _tokens: None)
    finally:
        engine.close()
    return softmax(logits.logits_NC / checkpoint.temperature)


def _sample(
    settings: BuildSettings, checkpoint: Checkpoint
) -> tuple[list[IntArray], list[IntArray]]:
    """Token ids of articles to compare on, and of others to calibrate with."""
    wanted = settings.num_rows + (CALIBRATION_TEXTS if settings.precision == "int8" else 0)
    encoder = TextEncoder(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)
    encoded = encoder.encode(list(itertools.islice(_texts(settings, wanted), wanted)))
    rows = [np.frombuffer(row, np.int32) for row in dict.fromkeys(encoded.row_bytes()) if row]
    if len(rows) < _LEAST_TEXTS:
        raise InputError(
            f"{', '.join(settings.inputs)}: {len(rows)} different articles, but a comparison "
            f"needs at least {_LEAST_TEXTS}"
        )
    if settings.precision != "int8":
        return rows, []
    # Every so many calibrates, so that both come from all over the input.
    num_calibrating = min(CALIBRATION_TEXTS, len(rows) // 2)
    places = set(spread(len(rows), num_calibrating).tolist())
    compared = [row for place, row in enumerate(rows) if place not in places]
    return compared, [rows[place] for place in sorted(places)]


def _texts(settings: BuildSettings, wanted: int) -> Iterator[str]:
    """The first rows of shards from all over the inputs, about as many as are wanted."""
    read = ReadSettings(settings.text_columns, keep="none", delimiter=settings.delimiter)
    plan = make_plan(settings.inputs, read, CutSettings(), settings.endpoint_url)
    if plan.unreadable:
        raise plan.unreadable[0]
    shards = [shard for shard in plan.shards if shard.num_rows]
    places = spread(len(shards), _MOST_SHARDS)
    chosen = []
    for left, place in zip(range(len(places), 0, -1), places, strict=True):
        shard = shards[place]
        num_rows = min(-(-wanted // left), shard.num_rows)
        wanted -= num_rows
        chosen.append(replace(shard, stop=shard.start + num_rows))
    for _, _, texts in read_shards(chosen, read, settings.endpoint_url):
        yield from (text for text in texts if text is not None)
