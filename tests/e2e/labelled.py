"""Labelled files of a task that is learnt in a second."""

import csv
import json
from pathlib import Path

WORDS = {"sport": "goal match cup team", "tech": "phone software chip web"}
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows(rows)
    return path


def articles(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Two labels that no word is shared by."""
    rows = []
    for number in range(start, start + count):
        label = ("sport", "tech")[number % 2]
        words = WORDS[label].split()
        text = " ".join(words[(number + step * (1 + number % 3)) % 4] for step in range(12))
        rows.append((f"{text} {number}", label))
    return rows


def arguments(folder: Path) -> tuple[str | Path, ...]:
    """Files in a folder, and what `batchclf train` needs to know of them; the model is `model`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return (
        *("--train", write(folder / "train.csv", articles(120))),
        *("--val", write(folder / "val.csv", articles(40, start=120))),
        *("--base-model", folder / "config.json", "--vocab-size", "300", "--max-length", "32"),
        *("--learning-rate", "0.003", "--epochs", "6", "--output", folder / "model"),
    )
