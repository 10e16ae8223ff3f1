"""Small archives of made-up articles, in every input format."""

import csv
import gzip
import io
import json
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from models import CORPUS

Row = Mapping[str, Any]
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "title": pa.string(),
        "text": pa.string(),
        "published": pa.timestamp("us", "UTC"),
        "url": pa.string(),
    }
)


def articles(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose texts have 1 to 60 words; the ids count from a-0000."""
    chance = random.Random(seed)
    words = " ".join(CORPUS).split()
    first_day = datetime(2024, 1, 1, tzinfo=UTC)
    return [
        {
            "id": f"a-{number:04}",
            "title": " ".join(chance.choices(words, k=4)),
            "text": " ".join(chance.choices(words, k=chance.randint(1, 60))),
            "published": first_day + timedelta(hours=number),
            "url": f"https://news.example/{number}",
        }
        for number in range(count)
    ]


def write(path: Path, rows: Sequence[Row], row_group_rows: int | None = None) -> Path:
    """Write rows in the format that the name promises; returns the path."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        table = pa.Table.from_pylist(list(rows), SCHEMA)
        pq.write_table(table, path, row_group_size=row_group_rows)
        return path
    content = _csv(rows) if name.endswith(".csv") else _json_lines(rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, SCHEMA.names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _json_lines(rows: Sequence[Row]) -> bytes:
    return b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows)
