"""What people run in place of batchclf, each as `bench` measures it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from batchclf.checkpoint import Build, Checkpoint, find_build, load
from batchclf.compute import Compute
from batchclf.packed import can_pack
from batchclf.text import TextEncoder

# Articles/s of a way to label, given the model, the articles, tokens of one at most, and where.
Peer = Callable[[str, Sequence[str], int, Compute], float]


def _pipeline(
    model: str,
    texts: Sequence[str],
    max_length: int,
    compute: Compute,
    *,
    dtype: torch.dtype,
    batch_size: int,
) -> float:
    """Articles/s of what a script would do: `pipeline("text-classification")`."""
    from transformers import pipeline
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    classify = pipeline("text-classification", model=model, device=compute.device, dtype=dtype)
    options = {"batch_size": batch_size, "truncation": True, "max_length": max_length}
    classify(list(texts[:2]), **options)
    began = time.perf_counter()
    found = classify(list(texts), **options)
    return len(found) / (time.perf_counter() - began)


def _sorted_forward(
    model: str, texts: Sequence[str], max_length: int, compute: Compute, *, batch_size: int
) -> float:
    """Articles/s of a careful script: sorted by length, transformers' own forward, bfloat16."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.bfloat16)
    classifier.to(compute.device).eval()

    def classify(chosen: Sequence[str]) -> None:
        encoded = tokenizer(list(chosen), truncation=True, max_length=max_length)["input_ids"]
        encoded.sort(key=len)
        for first in range(0, len(encoded), batch_size):
            batch = tokenizer.pad(
                {"input_ids": encoded[first : first + batch_size]}, return_tensors="pt"
            )
            classifier(**batch.to(compute.device)).logits.cpu()

    with torch.inference_mode():
        classify(texts[:2])
        began = time.perf_counter()
        classify(texts)
        return len(texts) / (time.perf_counter() - began)


def _openvino_static(
    model: str, texts: Sequence[str], max_length: int, _compute: Compute, *, build: Build | None
) -> float:
    """Articles/s of OpenVINO at its best: one article at a time a core, all of one fixed shape."""
    import openvino as ov

    from batchclf.openvino_graph import build_graph, inputs_of

    checkpoint = load(model, max_length=max_length)
    encoder = TextEncoder(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)
    core = ov.Core()
    graph = core.read_model(build.graph) if build else build_graph(checkpoint.build_model())
    one = [1, checkpoint.max_length]
    is_flatten = checkpoint.config.head == "flatten"
    graph.reshape({graph.inputs[0]: one, graph.inputs[1]: one if is_flatten else [1]})
    hint = "bf16" if can_pack(torch.bfloat16) else "f32"
    options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
    requests = ov.AsyncInferQueue(core.compile_model(graph, "CPU", options))

    def classify(chosen: Sequence[str]) -> None:
        for row in filter(None, encoder.encode(list(chosen)).row_bytes()):
            ids = np.frombuffer(row, np.int32)
            requests.start_async(inputs_of(ids, checkpoint.config, checkpoint.max_length))
        requests.wait_all()

    classify(texts[:2])
    began = time.perf_counter()
    classify(texts)
    return len(texts) / (time.perf_counter() - began)


def find_peers(checkpoint: Checkpoint) -> dict[str, Peer]:
    """What people would otherwise run, on the same articles in the same run."""
    peers: dict[str, Peer] = {
        "pipeline_float32": partial(_pipeline, dtype=torch.float32, batch_size=16),
        "pipeline_bfloat16": partial(_pipeline, dtype=torch.bfloat16, batch_size=32),
        "sorted_bfloat16": partial(_sorted_forward, batch_size=16),
    }
    if find_spec("openvino"):
        peers["openvino_static"] = partial(_openvino_static, build=None)
        build = find_build(checkpoint)
        if build is not None:
            peers["openvino_static_int8"] = partial(_openvino_static, build=build)
    return peers
