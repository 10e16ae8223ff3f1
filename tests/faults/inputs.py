"""Inputs built on the spot."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("bank", "shares", "film", "award", "minister", "vote", "cup", "goal", "phone", "virus")
PARTS_BYTES = 40 << 20  # an output of this size goes up to S3 in parts


def articles(count: int, *, seed: int = 0) -> pa.Table:
    """`count` short articles with the columns `id` and `text`, no two of them alike."""
    chance = random.Random(seed)
    return pa.table(
        {
            "id": [f"{seed}-{number:06d}" for number in range(count)],
            "text": [
                f"{number} {' '.join(chance.choices(WORDS, k=chance.randint(3, 20)))}"
                for number in range(count)
            ],
        }
    )


def as_parquet(table: pa.Table, *, rows_per_group: int | None = None) -> bytes:
    """With page checksums."""
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows_per_group, write_page_checksum=True)
    return file.getvalue()


def as_csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.column_names)
    writer.writerows(zip(*table.to_pydict().values(), strict=True))
    return text.getvalue().encode()


def as_csv_gz(table: pa.Table) -> bytes:
    return gzip.compress(as_csv(table), mtime=0)


def as_jsonl(table: pa.Table) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in table.to_pylist()).encode()


FORMATS: dict[str, Callable[[pa.Table], bytes]] = {
    "parquet": as_parquet,
    "csv": as_csv,
    "csv.gz": as_csv_gz,
    "jsonl": as_jsonl,
}


def with_blob(num_bytes: int) -> pa.Table:
    """Sixteen articles and a column `blob` that no codec makes smaller, `num_bytes` in all."""
    chance = random.Random(0)
    table = articles(16)
    blobs = [chance.randbytes(num_bytes // table.num_rows) for _ in range(table.num_rows)]
    return table.append_column("blob", pa.array(blobs, pa.binary()))


def flip_byte(content: bytes, index: int) -> bytes:
    """The same bytes with one bit of one of them turned over."""
    flipped = bytearray(content)
    flipped[index] ^= 1
    return bytes(flipped)
