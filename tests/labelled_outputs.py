"""Labelled outputs made on the spot, as a run would leave them, without a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchclf.notes import NOTE_FORMAT
from batchclf.predictions import Predictions
from batchclf.shards import Shard
from batchclf.sink import Sink
from batchclf.store import Source, open_folder

FINGERPRINT = "0123456789abcdef0123456789abcdef"
LABELS = ("business", "sport", "tech")
PROBS = (0.9, 0.65, 0.55)  # of the labelled rows, in turn


def open_sink(output: Path, labels: Sequence[str] = LABELS, fingerprint: str = FINGERPRINT) -> Sink:
    folder = open_folder(str(output))
    folder.prepare()
    return Sink(folder, fingerprint, labels, probs=True)


def predictions(
    given: Sequence[int], num_labels: int, errors: Mapping[int, str], min_score: float = 0.0
) -> Predictions:
    """Rows with these labels, -1 where they failed; every third has 5, 6 and 64 tokens."""
    label = np.array(given, np.int64)
    rows = np.arange(len(label))
    score = np.array(PROBS, np.float32)[rows % len(PROBS)]
    probs = np.repeat((1 - score)[:, None] / max(num_labels - 1, 1), num_labels, axis=1)
    probs[rows, label] = score
    probs[label < 0] = 0
    tokens = np.array([5, 6, 64], np.int32)[rows % 3]
    tokens[label < 0] = 0
    return Predictions(
        label=label,
        probs=probs.astype(np.float32),
        abstained=(label >= 0) & (score < min_score),
        num_tokens=tokens,
        truncated=tokens == 64,
        errors=errors,
    )


def commit(
    sink: Sink,
    uri: str,
    kept: Mapping[str, Any],
    labels: Sequence[int],
    *,
    errors: Mapping[int, str] | None = None,
    num_labels: int = len(LABELS),
    min_score: float = 0.0,
    start: int = 0,
    version: str = '"etag"',
) -> str:
    """One shard; returns its name without the folder of the fingerprint."""
    columns = pa.record_batch(dict(kept))
    shard = Shard(Source(uri, version, 0), start, start + len(labels))
    with sink.writer(shard, columns.schema) as writer:
        writer.write(start, columns, predictions(labels, num_labels, errors or {}, min_score))
        sink.commit(writer)
    return shard.name


def note_run(
    sink: Sink, labels: Sequence[str] = LABELS, number: int = 0, **changes: object
) -> None:
    """What a run of `classify` writes down."""
    counts = ("num_rows", "num_labelled", "num_abstained", "num_failed", "num_truncated")
    note: dict[str, object] = {
        "format": NOTE_FORMAT,
        "fingerprint": sink.fingerprint,
        "finished_at": f"2026-01-0{number + 1}T10:11:12+00:00",
        "settings": {"inputs": ["news files"], "output": "out"},
        "model": {"path": "/nowhere/model", "labels": list(labels)},
        "device": "cpu",
        "dtype": "bfloat16",
        "complete": True,
        "num_shards": {"planned": 2, "mine": 2, "committed": 2, "done_before": 0},
        "counts": {**dict.fromkeys(counts, 6), "num_tokens": 60},
        "labels": {},
        "errors": [],
        "seconds": 2.0,
        "articles_per_s": 3.0,
        "tokens_per_s": 30.0,
        "busy": {"read": 0.1, "predict": 0.8},
        "peak_rss_mib": 300,
        "versions": {"batchclf": "0.1.0"},
        **changes,
    }
    name = f"{sink.prefix}_runs/2026010{number + 1}T101112Z-0000000{number}.json"
    sink.folder.put(name, json.dumps(note).encode())


def note_success(sink: Sink, shards: Sequence[str]) -> None:
    note = {"format": NOTE_FORMAT, "shards": list(shards)}
    sink.folder.put(f"{sink.prefix}_SUCCESS.json", json.dumps(note).encode())
