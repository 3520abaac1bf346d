"""Read from a Parquet file's end how many values each of its columns has.

pyarrow tells it as well, but ends the program where the description of a column is damaged. The end is a struct of
parquet.thrift, written in Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift).
"""

import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa

_MAGIC = b"PAR1"
# Fields of parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES = 4, 1, 3, 5
# Types of the protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_INTEGERS = (4, 5, 6)


def values_of_columns(path: Path) -> list[list[int]]:
    """Return, for each group of rows, how many values each column has, those in lists counted one by one.

    Raises:
        ArrowInvalid: the end is broken.
    """
    try:
        groups = _Compact(_end_of(path)).struct()[_ROW_GROUPS]
        return [[int(chunk[_META_DATA][_NUM_VALUES]) for chunk in group[_COLUMNS]] for group in groups]
    except (LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise pa.ArrowInvalid(f"a broken end: {error!r}") from error


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic != _MAGIC or length > size - 8:
            raise ValueError(magic)
        file.seek(size - 8 - length)
        return file.read(length)


class _Compact:
    """Thrift's compact protocol: structs as what their fields' numbers lead to."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            # The truth of a field is its type; that of a list's part is a byte.
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
        if kind == _BINARY:
            return self._skip(self._unsigned())
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._skip(1)
        return self._skip({_DOUBLE: 8, _UUID: 16}[kind])

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError(count)

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
