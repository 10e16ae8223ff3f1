"""How far off `batchclf plan` is: its predicted time against that of `batchclf classify`, in turns.

    python tests/speed_plan.py --pairs 5 --copies 400

On the sample archive as it is, and on a larger one: so many copies of it, in each of which the
words of every article stand in another order, so that no text repeats another. Times are those of
the whole process, from its start to its end, as somebody waits for it. The last line of standard
output is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from e2e import archives

from batchclf.bench import _machine

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "data/sample"
MODEL = REPOSITORY / "data/models/bbc-small"
COMMAND = (sys.executable, "-m", "batchclf")
BAR = 0.15  # a prediction may be off by so much


def main() -> None:
    """Plan, label, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--copies", type=int, default=400, help="in the larger archive; 0: none")
    parser.add_argument("--no-sample", action="store_true", help="the larger archive alone")
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()

    found: dict[str, Any] = {"what": "time that plan predicts, and that classify takes"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not options.no_sample:
            found["sample"] = compare(SAMPLE, options, folder)
        if options.copies:
            found["larger"] = compare(write_copies(folder, options.copies), options, folder)
    print(json.dumps({**found, "machine": _machine()}))


def compare(archive: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pairs of a plan and the run that it is of."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    pairs = []
    for number in range(options.pairs):
        output = folder / f"{archive.name}-{number}"
        asked = (str(archive), "--model", str(options.model), "--log-format", "json")
        plan, plan_s = run("plan", *asked, environment=environment)
        labelled, real_s = run(
            *("classify", *asked, "--output", str(output), "--no-progress"), environment=environment
        )
        forecast = plan["time"]
        predicted_s = forecast["start_s"] + forecast["run_s"]["value"]
        pair = {
            "predicted_s": round(predicted_s, 2),
            "real_s": round(real_s, 2),
            "off": round(predicted_s / real_s - 1, 3),
            "predicted_start_s": round(forecast["start_s"], 2),
            "real_start_s": round(real_s - labelled["seconds"], 2),
            "predicted_run_s": round(forecast["run_s"]["value"], 2),
            "real_run_s": labelled["seconds"],
            "plan_took_s": round(plan_s, 2),
        }
        print(json.dumps({**pair, "speed": plan["speed"], "busy": labelled["busy"]}), flush=True)
        pairs.append(pair)
    return {
        "num_rows": plan["num_rows"],
        "num_sampled": plan["num_sampled"],
        "within_bar": sum(abs(pair["off"]) <= BAR for pair in pairs),
        "median_off": statistics.median(pair["off"] for pair in pairs),
        "pairs": pairs,
    }


def run(*arguments: str, environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """What a command prints last, and the seconds of its process."""
    began = time.perf_counter()
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed, seconds


def write_copies(folder: Path, num_copies: int) -> Path:
    """Copies of the sample, in files of its four formats."""
    archive = folder / "copies"
    archive.mkdir()
    columns = ("id", "title", "text")
    newlines = pa.csv.ParseOptions(newlines_in_values=True)
    for path in sorted(SAMPLE.glob("news-*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        elif path.suffix == ".jsonl":
            table = pa.json.read_json(path)
        else:
            table = pa.csv.read_csv(path, parse_options=newlines)
        chance = random.Random(path.name)
        rows = table.select(columns).to_pylist() * num_copies
        for row in rows:
            words = row["text"].split()
            row["text"] = " ".join(chance.sample(words, len(words)))
        archives.write(archive / path.name, rows)
    return archive


if __name__ == "__main__":
    main()
