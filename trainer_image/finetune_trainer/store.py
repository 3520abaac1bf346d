"""What every store of outputs promises, whatever its scheme.

A store maps keys (``team/job-1a2b3c4d/model/README.md``) to files. It never leaves its root and never shows a
half-written file under its final name. A new scheme is one class, one line in ``storage`` and one parameter of the
contract tests.
"""

from pathlib import Path
from typing import Protocol

from finetune_trainer.durable import is_partial
from finetune_trainer.errors import SpecError


class Store(Protocol):
    """Files under keys. Every method raises StorageError when the store refuses, SpecError for a key that escapes."""

    @property
    def uri(self) -> str:
        """Where the store's root is, without a slash at the end."""
        ...

    def check_writable(self) -> None:
        """Prove with a real file, removed again, that outputs can be written."""
        ...

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Return all keys below the folder ``prefix``, sorted; none when there is no such folder."""
        ...

    def exists(self, key: str) -> bool:
        """Whether a file stands under ``key``."""
        ...

    def get_bytes(self, key: str) -> bytes:
        """Return the content of one file."""
        ...

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write one file, replacing an older one in one step."""
        ...

    def get_tree(self, prefix: str, folder: Path) -> None:
        """Fetch everything below ``prefix`` into ``folder``, which must be absent or empty.

        A tree with a COMPLETE marker is verified against its manifest first; on any error ``folder`` stays as it was.

        Raises:
            DataError: there is nothing below ``prefix``, or it is not what its manifest says.
        """
        ...

    def put_tree(self, folder: Path, prefix: str) -> None:
        """Make ``prefix`` hold exactly the files of ``folder``.

        Whoever finds a COMPLETE marker and verifies the files against it, as ``get_tree`` does, never takes a mixture
        of two trees for one: neither after a crash nor with two writers at once.
        """
        ...

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below ``prefix``; nothing happens when there is nothing."""
        ...


def key_parts(key: str) -> tuple[str, ...]:
    """Split a key into names, each of which stays inside its folder."""
    parts = tuple(key.split("/"))
    for part in parts:
        if part in ("", ".", "..") or "\0" in part or "\\" in part:
            raise SpecError(
                f"{key!r} is no key of a store: {part!r} is not a plain name. "
                "Use names joined by '/', without '..', empty parts, backslashes or a leading slash."
            )
        if is_partial(part):
            raise SpecError(f"{key!r} is no key of a store: names like {part!r} are kept for unfinished files.")
    return parts
