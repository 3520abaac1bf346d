"""How much a fetch may write: of a file what was announced of it, of all together what the disk has room for.

Knows nothing of hubs or stores.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_trainer.errors import StorageError


@dataclass
class Allowance:
    """What one fetch may write; several threads may ask at once."""

    start: str
    """Of its messages: what cannot be read, and who sends it."""
    folder: Path
    """Where it is written."""
    remedy: str
    """What to look at where more comes than was announced."""
    room: int
    """Bytes that are free and that no file has been begun with."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of_disk(cls, start: str, folder: Path, remedy: str) -> "Allowance":
        """Return what the disk of ``folder`` has room for; it must exist."""
        return cls(start, folder, remedy, shutil.disk_usage(folder).free)

    def begin(self, name: str, announced: int) -> None:
        """Set room for a file aside."""
        with self.lock:
            if announced > self.room:
                raise StorageError(
                    f"{self.start} announces {announced:,} bytes for {name!r}, and the disk of {self.folder} has room "
                    f"for {self.room:,}. Free space there or choose another place."
                )
            self.room -= announced

    def intake(self, name: str, announced: int) -> Callable[[int], None]:
        """Return what is told of bytes of a file before they are written; below zero are those that come again."""
        came = 0

        def take(count: int) -> None:
            nonlocal came
            with self.lock:
                came += count
                if came > announced:
                    raise StorageError(
                        f"{self.start} announces {announced:,} bytes for {name!r} and sends more; ended after "
                        f"{came:,}. {self.remedy}, then try again."
                    )

        return take
