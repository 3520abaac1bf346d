"""Folders as stores: of the local file system, or of a volume that is mounted into the pod.

Links below the root are never followed, and no half-written file is ever seen under its final name.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.durable import disk_errors, is_partial, is_partial_of, partial_name, sync_folder
from finetune_trainer.errors import DataError, StorageError
from finetune_trainer.manifest import COMPLETE_NAME, content_files, marker_files, verify_manifest
from finetune_trainer.store import key_parts

_COPY_BYTES = 1 << 20
_SWAP_ATTEMPTS = 20
"""How often a writer steps aside for another one that publishes to the same prefix at the same moment."""


class FileStore:
    """A folder of the local file system or of a mounted volume.

    Paths are walked by directory descriptors that refuse links, so a link put into a shared volume, even at the last
    moment, leads nowhere. The root itself may be reached through links: the user named it.
    """

    def __init__(self, root: Path, uri: str = "") -> None:
        self._root = root
        self._uri = (uri or root.as_uri()).rstrip("/")

    @property
    def uri(self) -> str:
        """The root as ``file:///path``, or as the user named it."""
        return self._uri

    def check_writable(self) -> None:
        """Prove with a real file, removed again, that outputs can be written."""
        content = secrets.token_bytes(4096)
        name = partial_name("write-test")
        with disk_errors("write to", self._root), self._folder((), create=True) as folder:
            try:
                _write_new(folder, name, content)
                with _open(folder, name, os.O_RDONLY) as file:
                    read_back = file.read()
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
        if read_back != content:
            raise StorageError(f"{self._root} gave back other bytes than were written. Check the volume behind it.")

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Return all keys below the folder ``prefix``, sorted; none when there is no such folder."""
        parts = key_parts(prefix) if prefix else ()
        with disk_errors("list", self._path(parts)):
            try:
                with self._folder(parts) as folder:
                    return tuple(sorted("/".join((*parts, name)) for name in _names_below(folder)))
            except FileNotFoundError:
                return ()

    def exists(self, key: str) -> bool:
        """Whether a file stands under ``key``."""
        *above, name = key_parts(key)
        with disk_errors("look for", self._path(key_parts(key))):
            try:
                with self._folder(tuple(above)) as folder:
                    return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                return False

    def get_bytes(self, key: str) -> bytes:
        """Return the content of one file."""
        *above, name = key_parts(key)
        with (
            disk_errors("read", self._path(key_parts(key))),
            self._folder(tuple(above)) as folder,
            _open(folder, name, os.O_RDONLY) as file,
        ):
            return file.read()

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write one file, replacing an older one in one step."""
        *above, name = key_parts(key)
        with disk_errors("write", self._path(key_parts(key))), self._folder(tuple(above), create=True) as folder:
            partial = partial_name(name)
            try:
                _write_new(folder, partial, content)
                os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(partial, dir_fd=folder)
                raise
            os.fsync(folder)

    def get_tree(self, prefix: str, folder: Path) -> None:
        """Fetch everything below ``prefix`` into ``folder``; see ``Store.get_tree``."""
        parts = key_parts(prefix)
        if not self.list(prefix):
            raise DataError(f"there is nothing at {self._path(parts)}. Check the path and that it was published.")
        partial = folder.with_name(partial_name(folder.name))
        try:
            with disk_errors(f"copy {self._path(parts)} to", folder):
                partial.mkdir(parents=True)
                with self._folder(parts) as source:
                    _copy_out(source, partial)
            if (partial / COMPLETE_NAME).exists():
                verify_manifest(partial)
            with disk_errors("create", folder):
                # An empty folder is replaced by the rename, a full one makes it fail.
                partial.rename(folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def put_tree(self, folder: Path, prefix: str) -> None:
        """Make ``prefix`` hold exactly the files of ``folder``; see ``Store.put_tree``.

        The tree is built under a hidden name beside its place, then takes the place by a rename: each tree that is
        ever visible was written by one writer, to its end.
        """
        *above, name = key_parts(prefix)
        files = [*content_files(folder), *marker_files(folder)]
        place = self._path(key_parts(prefix))
        with disk_errors("write", place), self._folder(tuple(above), create=True) as parent:
            _remove_leftovers(parent, name)
            partial = partial_name(name)
            os.mkdir(partial, dir_fd=parent)
            try:
                # One descriptor for all files: when a newer writer clears the folder away, this one must not make it
                # again by name and go on with half of its files.
                with _walk(os.dup(parent), (partial,), create=False) as target:
                    for path in files:
                        _copy_in(path, target, path.relative_to(folder).parts)
                    os.fsync(target)
                _swap_in(parent, partial, name)
            finally:
                _remove(parent, partial, owner=name)

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below ``prefix``; nothing happens when there is nothing."""
        *above, name = key_parts(prefix)
        with disk_errors("remove", self._path(key_parts(prefix))):
            try:
                with self._folder(tuple(above)) as parent:
                    _remove_leftovers(parent, name)
                    _remove(parent, name, owner=name)
            except FileNotFoundError:
                return

    def _make_root(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            # Its parents were just made: /proc answers so, and a volume that was unmounted meanwhile.
            raise StorageError(
                f"cannot create {self._root}: no folder can be made there. Choose a place on a disk or volume."
            ) from error

    def _path(self, parts: tuple[str, ...]) -> Path:
        """The path to show in messages; never opened."""
        return self._root.joinpath(*parts)

    @contextmanager
    def _folder(self, parts: tuple[str, ...], *, create: bool = False) -> Iterator[int]:
        """Open ``root/parts`` one part after the other, following no link below the root."""
        if create:
            self._make_root()
        with _walk(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY), parts, create=create) as descriptor:
            yield descriptor


@contextmanager
def _walk(descriptor: int, parts: tuple[str, ...], *, create: bool) -> Iterator[int]:
    """Yield a descriptor of the folder ``parts`` below ``descriptor``, which is closed in the end."""
    try:
        for part in parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
                    os.fsync(descriptor)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _open(folder: int, name: str, flags: int) -> BinaryIO:
    """Open a regular file of ``folder``; links, devices and pipes are refused (a pipe would block for ever)."""
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode=0o666, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file", name)
        return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "wb")
    except BaseException:
        os.close(descriptor)
        raise


def _create(folder: int, name: str) -> BinaryIO:
    return _open(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_new(folder: int, name: str, content: bytes) -> None:
    with _create(folder, name) as file:
        file.write(content)
        _sync(file)


def _names_below(folder: int) -> Iterator[str]:
    """Yield relative names of all files below a folder's descriptor."""
    for parent, folders, files, descriptor in os.fwalk(dir_fd=folder, follow_symlinks=False, onerror=_raise):
        folders[:] = [name for name in folders if not is_partial(name)]
        for name in [*folders, *files]:
            mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
            if stat.S_ISREG(mode) and not is_partial(name):
                yield Path(parent, name).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _copy_out(source: int, folder: Path) -> None:
    """Copy all files below a descriptor into a local folder."""
    for name in _names_below(source):
        *above, last = name.split("/")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            _walk(os.dup(source), tuple(above), create=False) as descriptor,
            _open(descriptor, last, os.O_RDONLY) as reader,
            target.open("xb") as writer,
        ):
            shutil.copyfileobj(reader, writer, _COPY_BYTES)
            _sync(writer)


def _copy_in(path: Path, parent: int, parts: tuple[str, ...]) -> None:
    """Copy one local file to ``parts`` below a folder's descriptor."""
    *above, name = parts
    with (
        _walk(os.dup(parent), tuple(above), create=True) as descriptor,
        path.open("rb") as reader,
        _create(descriptor, name) as writer,
    ):
        shutil.copyfileobj(reader, writer, _COPY_BYTES)
        _sync(writer)
        os.fsync(descriptor)


def _swap_in(parent: int, partial: str, name: str) -> None:
    """Give the finished tree ``partial`` its final name; the tree that had it is removed."""
    for _ in range(_SWAP_ATTEMPTS):
        old = partial_name(name)
        with suppress(FileNotFoundError):
            os.rename(name, old, src_dir_fd=parent, dst_dir_fd=parent)
        try:
            os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            # Put back what was there, unless yet another tree has taken the place: this writer did not replace it.
            with suppress(OSError):
                os.rename(old, name, src_dir_fd=parent, dst_dir_fd=parent)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            os.fsync(parent)
            return
        finally:
            _remove(parent, old, owner=name)
    raise StorageError(f"another run keeps writing to {name!r} at the same time. Stop it, then try again.")


def _remove_leftovers(parent: int, name: str) -> None:
    """Remove what crashed writers of ``name`` left; one that still runs finds its files gone and fails: newest wins."""
    for leftover in os.listdir(parent):
        if is_partial_of(leftover, name):
            _remove(parent, leftover, owner=name)


def _remove(parent: int, name: str, owner: str) -> None:
    """Remove ``name``, a file, link or tree that belongs to the tree ``owner``; nothing happens when it is not there.

    It gets out of sight by one rename first: a tree that is half removed must not be taken for a whole one, nor be
    given its final name by a writer that still runs. What resists waits for the next ``_remove_leftovers``.
    """
    trash = partial_name(owner)
    with suppress(FileNotFoundError):
        os.rename(name, trash, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)
        if stat.S_ISDIR(os.stat(trash, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(trash, ignore_errors=True, dir_fd=parent)
        else:
            os.unlink(trash, dir_fd=parent)
