"""Rows as records of bytes, unpacked when they are asked for. Pure: where records lie, others say."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class KeptRecords(Protocol):
    """Bytes that are read by their number or in their order."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> bytes: ...

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the records from number ``first`` to before ``last``."""
        ...

    def empty(self) -> "Records":
        """Return others that lie where these do, none so far."""
        ...

    def numbers(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return ``count`` zeros to be written over, which lie where records of this kind lie."""
        ...


class Records(KeptRecords, Protocol):
    """Bytes that are appended, then read by their number or in their order."""

    def append(self, record: bytes) -> None:
        """Add ``record`` behind the others."""
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


class SentRecords:
    """Records one behind the other, as they travel: processes of one node that Ray sends them to share their memory."""

    def __init__(self, content: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        """Look at ``content``, in which the records end at ``ends``."""
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        return self._content[start : self._ends[number]].tobytes()

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """See `KeptRecords`."""
        return (self[number] for number in range(first, min(last, len(self))))

    def empty(self) -> ListRecords:
        """See `KeptRecords`."""
        return ListRecords()

    def numbers(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """See `KeptRecords`."""
        return np.zeros(count, dtype)


class StoredRows(Sequence[T], Generic[T]):
    """Rows that lie in records and are unpacked when they are asked for; a slice of them is no copy."""

    def __init__(self, records: KeptRecords, unpack: Callable[[bytes], T], places: Sequence[int] | None = None) -> None:
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
        ends = np.fromiter(map(len, self.packed()), np.int64, len(self)).cumsum()
        content = self._records.numbers(int(ends[-1]) if len(ends) else 0, np.uint8)
        for record, end in zip(self.packed(), ends, strict=True):
            content[end - len(record) : end] = np.frombuffer(record, np.uint8)
        return _received, (content, ends, self._unpack)

    def packed(self) -> Iterator[bytes]:
        """Yield the rows as they lie in their records."""
        places = self._places
        if isinstance(places, range) and places.step == 1:
            return self._records.records(places.start, places.stop)
        return (self._records[place] for place in places)


def _received(
    content: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], unpack: Callable[[bytes], T]
) -> StoredRows[T]:
    return StoredRows(SentRecords(content, ends), unpack)
