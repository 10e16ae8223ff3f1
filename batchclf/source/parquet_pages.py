"""How large the pages of a Parquet file become, from their headers alone.

A page is decompressed whole, and a page of two gigabytes of one letter is a file of some kilobytes.
pyarrow neither asks before it does so nor tells the sizes without decoding the pages, so the few
numbers that are needed are read here.

https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_FOOTER_BYTES = 16 << 20  # thousands of row groups of tens of columns

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # the length of the footer, and the magic bytes
_FIRST_HEADER_BYTES = 1 << 10
_MOST_HEADER_BYTES = 16 << 20  # as in Arrow; statistics may hold long values
_MOST_DEPTH = 16  # of structures in each other; the footer of a Parquet file has eight

# Numbers of the fields that are read, by structure.
_FILE_ROW_GROUPS = 4
_GROUP_COLUMNS = 1
_GROUP_ROWS = 3
_CHUNK_METADATA = 3
_COLUMN_PATH = 3
_COLUMN_COMPRESSED_BYTES = 7
_COLUMN_DATA_OFFSET = 9
_COLUMN_DICTIONARY_OFFSET = 11
_PAGE_BYTES = 2
_PAGE_COMPRESSED_BYTES = 3

# Types of the compact protocol; Parquet has no maps.
_STOP = 0
_TRUE, _FALSE, _BYTE = 1, 2, 3
_INTEGERS = (4, 5, 6)  # of 16, 32 and 64 bits
_DOUBLE = 7
_BINARY = 8
_LISTS = (9, 10)  # and sets
_STRUCT = 12
_DOUBLE_BYTES = 8
_LONG_LIST = 15


class PagesError(Exception):
    """Bytes that are no footer or no pages, or too large a footer."""


@dataclass(frozen=True)
class Chunk:
    """Where the pages of one column in one row group lie."""

    start: int
    stop: int


def check_footer(file: BinaryIO) -> int:
    """How many bytes the footer has.

    Raises:
        PagesError: there is none, or it is larger than any that is read here.
    """
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(size_bytes - _TAIL_BYTES, 0))
    tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length + _TAIL_BYTES > size_bytes:
        raise PagesError("it has no footer")
    if length > MAX_FOOTER_BYTES:
        raise PagesError(f"its footer has {length:,} bytes, more than {MAX_FOOTER_BYTES:,}")
    return length


def find_chunks(file: BinaryIO, columns: Collection[str]) -> list[list[Chunk]]:
    """The chunks of each row group that belong to some columns, or to what is nested in them.

    A row group without rows has none.

    Raises:
        PagesError: the footer is none.
    """
    length = check_footer(file)
    file.seek(-_TAIL_BYTES - length, io.SEEK_END)
    wanted = {name.encode() for name in columns}
    try:
        footer = _Compact(file.read(length)).struct()
        return [_chunks(group, wanted) for group in footer[_FILE_ROW_GROUPS]]
    except EOFError as error:
        raise PagesError("its footer ends too soon") from error
    except (KeyError, IndexError, TypeError) as error:
        raise PagesError("its footer does not say where the columns are") from error


def largest_page_bytes(file: BinaryIO, chunks: Iterable[Chunk]) -> int:
    """Bytes of the largest page of some chunks once it is decompressed.

    Raises:
        PagesError: the pages do not follow each other.
    """
    largest = 0
    size_bytes = file.seek(0, io.SEEK_END)
    for chunk in chunks:
        if not 0 <= chunk.start <= chunk.stop <= size_bytes:
            raise PagesError("a column lies outside the file")
        position = chunk.start
        while position < chunk.stop:
            header, header_bytes = _page_header(file, position)
            sizes = header.get(_PAGE_BYTES), header.get(_PAGE_COMPRESSED_BYTES)
            if not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise PagesError(f"no page begins at byte {position}")
            largest = max(largest, header[_PAGE_BYTES])
            position += header_bytes + header[_PAGE_COMPRESSED_BYTES]
    return largest


def _chunks(group: dict[int, Any], wanted: Collection[bytes]) -> list[Chunk]:
    if not group[_GROUP_ROWS]:
        return []
    columns = [column[_CHUNK_METADATA] for column in group[_GROUP_COLUMNS]]
    return [_chunk(column) for column in columns if column[_COLUMN_PATH][0] in wanted]


def _chunk(column: dict[int, Any]) -> Chunk:
    start: int = column[_COLUMN_DATA_OFFSET]
    dictionary = column.get(_COLUMN_DICTIONARY_OFFSET, 0)
    if 0 < dictionary < start:
        start = dictionary
    return Chunk(start, start + column[_COLUMN_COMPRESSED_BYTES])


def _page_header(file: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """A page header, and how many bytes it takes."""
    wanted = _FIRST_HEADER_BYTES
    while True:
        file.seek(position)
        reader = _Compact(file.read(wanted))
        try:
            return reader.struct(), reader.position
        except EOFError as error:
            if wanted > _MOST_HEADER_BYTES:
                raise PagesError("a page header without an end") from error
            wanted *= 16


class _Compact:
    """Thrift's compact protocol: structures as dictionaries from the number of a field.

    Raises:
        EOFError, PagesError: the bytes end too soon, or are none of that protocol.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MOST_DEPTH:
            raise PagesError("nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) & 0x0F != _STOP:
            kind, step = head & 0x0F, head >> 4
            number = number + step if step else self._integer()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # in a list, true and false take a byte too
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind == _DOUBLE:
            return self._bytes(_DOUBLE_BYTES)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in _LISTS:
            return self._list(depth)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise PagesError(f"a field of type {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        length, kind = head >> 4, head & 0x0F
        if length == _LONG_LIST:
            length = self._varint()
        if depth > _MOST_DEPTH:
            raise PagesError("nested too deeply")
        return [self._value(kind, depth + 1) for _ in range(length)]

    def _integer(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - the high bit says that more follow
                return value
        raise PagesError("a number of more than 64 bits")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        found = self._content[self.position : self.position + count]
        if len(found) < count:
            raise EOFError("ends too soon")
        self.position += count
        return found
