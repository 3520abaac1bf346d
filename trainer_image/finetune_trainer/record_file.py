"""Records in a file without a name: memory holds where each of them ends, 8 bytes, and the disk the rest.

The file is gone with the object, or with the process, however that ends. Knows nothing of what the records are.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.durable import disk_errors

_BUFFER_BYTES = 1 << 18


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
            self._file, path = tempfile.mkstemp(prefix=".rows-", dir=folder)
            os.unlink(path)  # noqa: PTH108 - mkstemp gives a string
        weakref.finalize(self, os.close, self._file)
        self._ends = array("Q", [0])
        self._pending = bytearray()
        self._written = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def empty(self) -> "RecordFile":
        """Return a file on the same disk, with nothing in it."""
        return RecordFile(self._folder)

    def append(self, record: bytes) -> None:
        """Add ``record`` behind the others.

        Raises:
            StorageError: the disk is full or broken.
        """
        self._pending += record
        self._ends.append(self._ends[-1] + len(record))
        if len(self._pending) >= _BUFFER_BYTES:
            self._flush()

    def __getitem__(self, number: int) -> bytes:
        self._flush()
        return self._read(self._ends[number], self._ends[number + 1])

    def records(self, first: int, last: int) -> Iterator[bytes]:
        """Yield the records from number ``first`` to before ``last``, reading many at once."""
        self._flush()
        while first < last:
            stop = first + 1
            while stop < last and self._ends[stop + 1] - self._ends[first] <= _BUFFER_BYTES:
                stop += 1
            start = self._ends[first]
            block = self._read(start, self._ends[stop])
            for number in range(first, stop):
                yield block[self._ends[number] - start : self._ends[number + 1] - start]
            first = stop

    def _flush(self) -> None:
        with disk_errors("write rows to", self._place):
            while self._pending:
                count = os.pwrite(self._file, self._pending, self._written)
                self._written += count
                del self._pending[:count]

    def _read(self, start: int, end: int) -> bytes:
        with disk_errors("read rows from", self._place):
            return os.pread(self._file, end - start, start)
