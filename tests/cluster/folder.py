"""Where the harness keeps things: what is costly under the home folder, what belongs to a checkout inside it."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-cluster"
"""What takes minutes to make and stays: binaries, base image, node image, installed packages."""

BIN = CACHE / "bin"
WORK = CACHE / "docker"
"""The state of a Docker daemon that the harness started; gone when it is stopped."""

STATE = ROOT / ".cluster"
KUBECONFIG = STATE / "kubeconfig"


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """Return twelve characters that change with any text, any file and any file below a folder in ``parts``."""
    total = hashlib.sha256()
    for part in parts:
        match part:
            case Path():
                for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
                    if file.is_file() and "__pycache__" not in file.parts:
                        total.update(str(file.relative_to(part)).encode() + b"\0" + file.read_bytes() + b"\0")
            case str():
                total.update(part.encode() + b"\0")
            case bytes():
                total.update(part + b"\0")
    return total.hexdigest()[:12]


def keep(made: Path, kept: Path) -> None:
    """Move ``made`` to ``kept``, a name that ends with a digest, in the place of what has another one."""
    for outdated in CACHE.glob(f"{kept.stem.rpartition('-')[0]}-*{kept.suffix}"):
        outdated.unlink()
    made.replace(kept)


@contextmanager
def alone() -> Iterator[None]:
    """Let one process of this machine at a time make things here; the next finds them made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
