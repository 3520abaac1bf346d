"""Rows as records of bytes, unpacked when they are asked for. Pure: where records lie, others say."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Records(Protocol):
    """Bytes that are appended, then read by their number or in their order."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> bytes: ...

    def append(self, record: bytes) -> None:
        """Add ``record`` behind the others."""
        ...

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the records from number ``first`` to before ``last``."""
        ...

    def empty(self) -> "Records":
        """Return others of the same kind, none so far."""
        ...

    def numbers(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return ``count`` zeros to be written over, which lie where records of this kind lie."""
        ...


class ListRecords(list[bytes]):
    """Records in memory."""

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """See `Records`."""
        return iter(self[first:last])

    def empty(self) -> "ListRecords":
        """See `Records`."""
        return ListRecords()

    def numbers(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """See `Records`."""
        return np.zeros(count, dtype)


class StoredRows(Sequence[T], Generic[T]):
    """Rows that lie in records and are unpacked when they are asked for; a slice of them is no copy."""

    def __init__(self, records: Records, unpack: Callable[[bytes], T], places: Sequence[int] | None = None) -> None:
        """Look at ``places`` of ``records``, or at all; ``unpack`` is a function of a module where rows travel."""
        self._records = records
        self._unpack = unpack
        self._places: Sequence[int] = range(len(records)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRows[T]": ...
    def __getitem__(self, index: int | slice) -> "T | StoredRows[T]":
        if isinstance(index, slice):
            return StoredRows(self._records, self._unpack, self._places[index])
        return self._unpack(self._records[self._places[index]])

    def at(self, places: Sequence[int]) -> "StoredRows[T]":
        """Return the rows at ``places``, in that order; no copy either."""
        return StoredRows(self._records, self._unpack, array("q", (self._places[place] for place in places)))

    def __add__(self, others: "StoredRows[T]") -> "StoredRows[T]":
        if not others:
            return self
        both = self._records.empty()
        for record in chain(self.packed(), others.packed()):
            both.append(record)
        return StoredRows(both, self._unpack)

    def __iter__(self) -> Iterator[T]:
        return map(self._unpack, self.packed())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (list(self.packed()), self._unpack)

    def packed(self) -> Iterator[bytes]:
        """Yield the rows as they lie in their records."""
        places = self._places
        if isinstance(places, range) and places.step == 1:
            return self._records.records(places.start, places.stop)
        return (self._records[place] for place in places)


def _rebuilt(packed: list[bytes], unpack: Callable[[bytes], T]) -> StoredRows[T]:
    return StoredRows(ListRecords(packed), unpack)
