"""Files that survive a crash, and disk errors that say what to do. Knows nothing of jobs, models or stores."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_trainer.errors import StorageError

PARTIAL_SUFFIX = ".partial"
"""Ends the name of every file or folder that is still being written; readers pass over such names."""

_FULL = "The disk is full: free space there or choose another place."
_NOT_ALLOWED = "This process may not write or read there: mend the owner or mode, or choose another place."
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "The quota is used up: free space there, raise the quota or choose another place.",
    errno.EFBIG: "The file system does not take files of this size: choose another place.",
    errno.EROFS: "The file system is read-only: mount it writable or choose another place.",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.ENOENT: "It does not exist (any more): check the path, and that no other run writes to the same place.",
    errno.ENOTDIR: "A part of the path is a file or a link, not a folder: remove it or choose another place.",
    errno.EISDIR: "It is a folder where a file is expected: remove it or choose another place.",
    errno.EEXIST: "Something else stands there already: remove it or choose another place.",
    errno.ENOTEMPTY: "Something else stands there already: remove it or choose another place.",
    errno.ELOOP: "It is a symbolic link, and links are not followed here: put a real file or folder in its place.",
    errno.ENAMETOOLONG: "The path is too long for this file system: choose a shorter one.",
    errno.EIO: "The disk or the network behind it reports a fault: try again, then look at the machine's log.",
    errno.ESTALE: "The network volume was lost under the process: try again.",
}


@contextmanager
def disk_errors(action: str, place: object) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError: ``cannot <action> <place>: <reason>. <remedy>``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error.filename, str) and error.filename not in str(place):
            reason += f" ({error.filename})"
        remedy = _REMEDIES.get(error.errno or 0, "Try again; if it stays, look at the disk or volume behind the path.")
        raise StorageError(f"cannot {action} {place}: {reason}. {remedy}") from error


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: readers see the old or the new file, also after a power cut."""
    partial = path.with_name(partial_name(path.name))
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(name: str) -> str:
    """Return a fresh hidden name beside ``name`` for what is still being written."""
    return f".{_stem(name)}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"


def is_partial(name: str) -> bool:
    """Whether ``name`` was made by ``partial_name``: unfinished, or left behind by a crash."""
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


def is_partial_of(partial: str, name: str) -> bool:
    """Whether ``partial`` was made by ``partial_name(name)``."""
    return is_partial(partial) and partial.rsplit(".", 2)[0] == f".{_stem(name)}"


def _stem(name: str) -> str:
    # 255 bytes is the limit of a name on every common file system, and a character may take four.
    return name[:56]
