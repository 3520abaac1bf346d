"""Records in a file without a name: memory holds where every block of them begins, and the disk the rest.

A block is records one behind the other, then where each of them ends, counted from the block's beginning.

The file is gone with the object, or with the process, however that ends. Knows nothing of what the records are.
"""

import mmap
import os
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.durable import disk_errors

_BUFFER_BYTES = 1 << 16
_END_BYTES = 8


class RecordFile:
    """`Records` on a disk."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open an empty file on the disk of ``folder``; absent: where the machine keeps temporary files.

        Raises:
            StorageError: nothing can be written there.
        """
        self._folder = folder
        self._place = str(folder or tempfile.gettempdir())
        with disk_errors("write rows to", self._place):
            self._file = _unnamed_file(folder)
        weakref.finalize(self, os.close, self._file)
        self._firsts, self._starts = array("Q"), array("Q")
        self._pending, self._ends = bytearray(), array("Q")
        self._kept = self._written = 0

    def __len__(self) -> int:
        return self._kept + len(self._ends)

    def empty(self) -> "RecordFile":
        """Return a file on the same disk, with nothing in it."""
        return RecordFile(self._folder)

    def numbers(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return ``count`` zeros in another such file: the machine may take their memory for itself at any time.

        Raises:
            StorageError: nothing can be written there.
        """
        size = count * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(count, dtype)
        with disk_errors("write rows to", self._place):
            file = _unnamed_file(self._folder)
            try:
                # With a hole in the file, a disk that is full later would end the process by a signal.
                os.posix_fallocate(file, 0, size)
                return np.frombuffer(mmap.mmap(file, size), dtype)
            finally:
                os.close(file)

    def append(self, record: bytes) -> None:
        """Add ``record`` behind the others.

        Raises:
            StorageError: the disk is full or broken.
        """
        self._pending += record
        self._ends.append(len(self._pending))
        if len(self._pending) + _END_BYTES * len(self._ends) >= _BUFFER_BYTES:
            self._flush()

    def __getitem__(self, number: int) -> bytes:
        self._flush()
        if not 0 <= number < self._kept:
            raise IndexError(number)
        block = bisect_right(self._firsts, number) - 1
        place, start = number - self._firsts[block], self._starts[block]
        ends = self._block_ends(block)
        first = max(0, place - 1)
        found = self._read(ends + _END_BYTES * first, ends + _END_BYTES * (place + 1))
        bounds = array("Q", found)
        return self._read(start + (bounds[0] if place else 0), start + bounds[-1])

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the records from number ``first`` to before ``last``, reading many at once."""
        self._flush()
        block = bisect_right(self._firsts, first) - 1
        while first < min(last, self._kept):
            base, start = self._firsts[block], self._starts[block]
            ends = self._block_ends(block) - start
            content = self._read(start, self._block_stop(block))
            bounds = array("Q", [0])
            bounds.frombytes(content[ends:])
            for place in range(first - base, min(last - base, len(bounds) - 1)):
                yield content[bounds[place] : bounds[place + 1]]
            first = base + len(bounds) - 1
            block += 1

    def _block_stop(self, block: int) -> int:
        return self._starts[block + 1] if block + 1 < len(self._starts) else self._written

    def _block_ends(self, block: int) -> int:
        """Return where the ends of the block's records are kept."""
        stop = self._firsts[block + 1] if block + 1 < len(self._firsts) else self._kept
        return self._block_stop(block) - _END_BYTES * (stop - self._firsts[block])

    def _flush(self) -> None:
        if not self._ends:
            return
        content = memoryview(self._pending + self._ends.tobytes())
        start = self._written
        with disk_errors("write rows to", self._place):
            while content:
                count = os.pwrite(self._file, content, self._written)
                self._written += count
                content = content[count:]
        self._firsts.append(self._kept)
        self._starts.append(start)
        self._kept += len(self._ends)
        self._pending, self._ends = bytearray(), array("Q")

    def _read(self, start: int, end: int) -> bytes:
        with disk_errors("read rows from", self._place):
            return os.pread(self._file, end - start, start)


def _unnamed_file(folder: Path | None) -> int:
    file, path = tempfile.mkstemp(prefix=".rows-", dir=folder)
    os.unlink(path)  # noqa: PTH108 - mkstemp gives a string
    return file
