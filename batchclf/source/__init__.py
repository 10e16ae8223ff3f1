"""A source as record batches: Parquet, CSV and JSON lines, read forward, some rows at a time.

Every row that can be told apart arrives, with its position; what is wrong with it travels beside
it. Columns of CSV and JSON lines are strings: in JSON lines, values that are not strings are kept
as their JSON text.
"""

from typing import BinaryIO, cast

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.source.articles import QueuedArticle, article_batches, article_schema
from batchclf.source.base import Reader, RowBatch
from batchclf.source.csv_reader import CsvReader
from batchclf.source.jsonl_reader import JsonLinesReader
from batchclf.source.lines import GzipFile
from batchclf.source.parquet_reader import ParquetReader
from batchclf.store import Source, source_suffix

__all__ = [
    "QueuedArticle",
    "Reader",
    "RowBatch",
    "article_batches",
    "article_schema",
    "open_reader",
]

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def open_reader(file: BinaryIO, source: Source, settings: ReadSettings) -> Reader:
    """The reader for a source, by the ending of its name. Closing it closes the file.

    Raises:
        InputError: the content is not what the name says, or a column is missing.
    """
    suffix = source_suffix(source.uri) or ""
    magic = file.read(4)
    file.seek(0)
    _check_magic(magic, suffix, source)
    if suffix == ".parquet":
        return ParquetReader(file, source, settings)
    if suffix.endswith(".gz"):
        file = cast("BinaryIO", GzipFile(file))
    kind = CsvReader if suffix.startswith(".csv") else JsonLinesReader
    return kind(file, source, settings)


def _check_magic(magic: bytes, suffix: str, source: Source) -> None:
    if suffix == ".parquet":
        return  # pyarrow says it well
    found = None
    if magic == _PARQUET_MAGIC:
        found = "Parquet"
    elif magic[:2] == _GZIP_MAGIC and not suffix.endswith(".gz"):
        found = "gzip"
    elif magic[:2] in _UTF16_BOMS:
        found = "UTF-16 text, and UTF-8 is wanted"
    elif suffix.endswith(".gz") and magic[:2] != _GZIP_MAGIC:
        found = "not gzip" if magic else "an empty file, not gzip"
    if found:
        raise InputError(f"{source}: its name ends in {suffix}, but it is {found}")
