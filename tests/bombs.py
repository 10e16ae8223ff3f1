"""Small files that promise, or expand to, far more than they are."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 1 << 20


def gzip_bomb(head: bytes, chunk: bytes, times: int) -> bytes:
    """`head`, then `chunk` so many times: a gzip file may have many members, all alike here."""
    return gzip.compress(head) + gzip.compress(chunk, 9) * times


def dictionary_bomb(value: str, num_rows: int) -> bytes:
    """A Parquet file whose one value stands in every row and once in the file."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), [value])
    sink = pa.BufferOutputStream()
    # without the Arrow schema it is read as plain strings
    pq.write_table(pa.table({"text": column}), sink, compression="zstd", store_schema=False)
    return bytes(sink.getvalue())


def forged_rows(claimed: int) -> bytes:
    """A whole Parquet file of a few rows, but for a footer that claims more of them."""
    num_rows = 12_345
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["words"] * num_rows}), sink)
    content = bytes(sink.getvalue())
    length = int.from_bytes(content[-8:-4], "little")
    pages, footer = content[: -8 - length], content[-8 - length : -8]
    footer = footer.replace(_varint(_zigzag(num_rows)), _varint(_zigzag(claimed)))
    return pages + footer + len(footer).to_bytes(4, "little") + b"PAR1"


# As Thrift's compact protocol writes numbers.
# https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md


def _zigzag(number: int) -> int:
    return 2 * number if number >= 0 else -2 * number - 1


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def page_bomb(page_bytes: int) -> bytes:
    """A Parquet file with one value, in a page that is hardly there until it is decompressed."""
    sink = pa.BufferOutputStream()
    table = pa.table({"text": pa.array(["a" * page_bytes], pa.large_string())})
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue())
