"""How fast `batchclf verify` proves many small shards: `python tests/speed_verify.py [SHARDS]`.

Prints one JSON object: seconds of wall clock and of processor, and the most memory held.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchclf.notes import NOTE_FORMAT
from batchclf.predictions import Predictions
from batchclf.shards import Shard
from batchclf.sink import ShardWriter
from batchclf.source.base import record_batch
from batchclf.store import Scratch, Source
from batchclf.verify import verify

LABELS = ("business", "entertainment", "politics", "sport", "tech")
FINGERPRINT = "0" * 32
ROWS = 100


def write_shards(folder: Path, num_shards: int) -> None:
    """A whole output of one source, as `classify` would have left it."""
    folder.mkdir(parents=True)
    source = Source("file:///archive/news.parquet", "sha256:0", 1 << 30)
    rng = np.random.default_rng(0)
    names = []
    for index in range(num_shards):
        shard = Shard(source, index * ROWS, (index + 1) * ROWS)
        names.append(shard.name)
        with (folder / shard.name).open("w+b") as file:
            kept = pa.schema({"id": pa.string()})
            ids = pa.array([f"article-{shard.start + row}" for row in range(ROWS)])
            writer = ShardWriter(Scratch(shard.name, file), shard, kept, LABELS, probs=True)
            probs = rng.dirichlet(np.ones(len(LABELS)), ROWS).astype(np.float32)
            predictions = Predictions(
                probs.argmax(axis=1),
                probs,
                np.zeros(ROWS, np.bool_),
                np.full(ROWS, 128, np.int32),
                np.ones(ROWS, np.bool_),
                {},
            )
            writer.write(shard.start, record_batch([ids], kept, ROWS), predictions)
            writer.finish(FINGERPRINT)
    note = {"format": NOTE_FORMAT, "fingerprint": FINGERPRINT, "plan": "", "shards": names}
    (folder / "_SUCCESS.json").write_text(json.dumps(note))


def main() -> None:
    """Write, prove, print."""
    num_shards = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out" / f"fp={FINGERPRINT}"
        write_shards(folder, num_shards)
        before, began = time.process_time(), time.perf_counter()
        verdict = verify(str(folder.parent))
        seconds, busy = time.perf_counter() - began, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    found = {
        "num_shards": verdict.num_shards,
        "num_rows": verdict.counts.num_rows,
        "num_problems": len(verdict.problems),
        "seconds": round(seconds, 2),
        "processor_s": round(busy, 2),
        "num_cores": len(os.sched_getaffinity(0)),
        "peak_rss_mib": peak,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
