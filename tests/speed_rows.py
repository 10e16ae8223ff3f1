"""What many short rows cost `batchclf classify`, and what one huge article among them costs.

    python tests/speed_rows.py --model data/models/bbc-small --rows 1000000

Four archives of made-up texts, each labelled by a process of its own: all the rows of 20 tokens or
so; a tenth of them; the first 10,000 of them; and those with an article of 1 MiB among them. The
processor time of each kind of thread, the cores that were busy, and the ratios. The last line of
standard output is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from models import CORPUS

from batchclf.bench import _machine

WORDS = 14
FEW_ROWS = 10_000
HUGE_BYTES = 1 << 20
# Who computes, by the names of the threads: tokenizers runs in threads that Python does not know.
FORWARD, TOKENISE = "compute", ("tokenise", "other")
_SAMPLE_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="of the small archives")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, *options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(options, Path(folder))))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = made_up(options.rows)
    huge = " ".join(made_up(HUGE_BYTES // 80))[:HUGE_BYTES]
    few = texts[:FEW_ROWS]
    archives = {
        "rows": texts,
        "a tenth": texts[: options.rows // 10],
        "few": few,
        "few and one of 1 MiB": [*few[: FEW_ROWS // 2], huge, *few[FEW_ROWS // 2 :]],
    }
    for name, rows in archives.items():
        table = pa.table({"id": np.arange(len(rows)), "text": rows})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=100_000)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in archives}
    for repeat in range(options.repeats):
        for name in archives:
            if repeat == 0 or name.startswith("few"):
                runs[name].append(_in_a_process(options.model, folder, name, repeat))
    few_s, huge_s = (
        statistics.median(run["predict_cpu_s"] for run in runs[name])
        for name in ("few", "few and one of 1 MiB")
    )
    return {
        "what": "short rows, classify",
        "model": Path(options.model).name,
        "runs": runs,
        "ten_times_the_rows": round(runs["rows"][0]["wall_s"] / runs["a tenth"][0]["wall_s"], 2),
        "one_of_1_mib": round(huge_s / few_s, 4),
        "machine": _machine(),
    }


def made_up(count: int) -> list[str]:
    chance = random.Random(0)
    words = " ".join(CORPUS).split()
    return [f"{' '.join(chance.choices(words, k=WORDS))} {number}" for number in range(count)]


def _in_a_process(model: str, folder: Path, name: str, repeat: int) -> dict[str, Any]:
    source, output = folder / f"{name}.parquet", folder / f"{name} {repeat}"
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--measure", source, output],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr)
    return found


def measure(model: str, source: str, output: str) -> dict[str, Any]:
    """Label one file in this process; processor seconds by kind of thread."""
    from batchclf.cli import cli

    threads: dict[int, tuple[str, float]] = {}
    ending = threading.Event()
    watch = threading.Thread(target=_watch, args=(threads, ending), name="watch", daemon=True)
    watch.start()
    started_s = time.process_time()  # what this script itself imports is not the command's
    began = time.perf_counter()
    cli.main(
        ["classify", source, "--model", model, "--output", output, "--no-progress"],
        standalone_mode=False,
    )
    wall_s, total_s = time.perf_counter() - began, time.process_time() - started_s
    ending.set()
    watch.join()
    cpu_s: dict[str, float] = defaultdict(float)
    for name, seconds in threads.values():
        cpu_s[name.rstrip("0123456789_-")] += seconds
    note = json.loads(next(Path(output).glob("fp=*/_runs/*.json")).read_text())
    work_s = cpu_s[FORWARD] + sum(cpu_s[name] for name in TOKENISE)
    return {
        "rows": note["counts"]["num_rows"],
        "wall_s": round(wall_s, 2),
        "labelling_s": round(note["seconds"], 2),
        "cpu_s": round(total_s, 2),
        "busy_cores": round(total_s / wall_s / len(os.sched_getaffinity(0)), 4),
        "predict_cpu_s": round(work_s, 2),
        "tokeniser_and_forward": round(work_s / total_s, 4),
        "busy_stages": note["busy"],
        "cpu_s_of_threads": {
            name: round(seconds, 2) for name, seconds in sorted(cpu_s.items()) if seconds > 0.1
        },
        "peak_rss_mib": note["peak_rss_mib"],
    }


def _watch(threads: dict[int, tuple[str, float]], ending: threading.Event) -> None:
    per_s = os.sysconf("SC_CLK_TCK")
    over = False
    while not over:
        over = ending.wait(_SAMPLE_S)
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        for task in Path("/proc/self/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(") ")[2].split()
            except OSError:  # it has ended since
                continue
            number = int(task.name)
            known = threads.get(number, ("other", 0.0))[0]
            seconds = (int(fields[11]) + int(fields[12])) / per_s
            threads[number] = (names.get(number, known), seconds)


if __name__ == "__main__":
    main()
