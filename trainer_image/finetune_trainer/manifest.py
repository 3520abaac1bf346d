"""Say what a folder holds, file by file, and that it is whole.

``MANIFEST.json`` lists every file with its size and sha256; ``COMPLETE`` holds the sha256 of the manifest and is
written last. A folder without a fitting ``COMPLETE`` is unfinished and must not be used.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from finetune_api.model import ApiModel
from finetune_trainer.durable import disk_errors, is_partial, write_file
from finetune_trainer.errors import DataError

MANIFEST_NAME = "MANIFEST.json"
COMPLETE_NAME = "COMPLETE"
VERSION = 1

T = TypeVar("T")
Found = TypeVar("Found")

_MOST_READ_AT_ONCE = 8
"""Beyond it disks are slower than processors, which hash a gigabyte or two a second."""
_MOST_SHOWN = 10
"""Mismatches named in one message."""


class FileEntry(ApiModel):
    """One file of the folder."""

    path: str
    """Relative to the folder, parts joined by ``/``."""
    sha256: str
    bytes: int


class _Document(ApiModel):
    """The form of MANIFEST.json."""

    version: int = VERSION
    about: dict[str, str] = Field(default_factory=dict)
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds. Equal content gives equal bytes: no time, machine or path of the writer is in it."""

    files: tuple[FileEntry, ...]
    about: Mapping[str, str] = field(default_factory=dict)
    """Facts for the reader, such as kind and specHash; part of the manifest's sha256."""

    def to_bytes(self) -> bytes:
        """Return the content of MANIFEST.json."""
        document = _Document(about=dict(self.about), files=self.files)
        return json.dumps(document.model_dump(by_alias=True), indent=1, sort_keys=True).encode() + b"\n"

    @property
    def sha256(self) -> str:
        """Hash of MANIFEST.json, and so of everything in the folder."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Size of all listed files together."""
        return sum(entry.bytes for entry in self.files)

    @property
    def marker(self) -> bytes:
        """The content of COMPLETE."""
        return f"{self.sha256}\n".encode()


def write_manifest(folder: Path, about: Mapping[str, str] | None = None) -> Manifest:
    """Hash every file below ``folder``, then write MANIFEST.json and, last of all, COMPLETE."""
    with disk_errors("remove", folder / COMPLETE_NAME):
        (folder / COMPLETE_NAME).unlink(missing_ok=True)
    files = tuple(_of_many(lambda path: _entry(folder, path), content_files(folder)))
    manifest = Manifest(files=files, about=dict(about or {}))
    write_file(folder / MANIFEST_NAME, manifest.to_bytes())
    write_file(folder / COMPLETE_NAME, manifest.marker)
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether the folder's COMPLETE fits its manifest. Reads no other file: ``verify_manifest`` does."""
    with disk_errors("read", folder):
        try:
            marker = (folder / COMPLETE_NAME).read_bytes()
            manifest = (folder / MANIFEST_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return marker.decode("ascii", "replace").strip() == hashlib.sha256(manifest).hexdigest()


def verify_manifest(folder: Path) -> Manifest:
    """Return the manifest when every file is what it says; DataError names each file that is not.

    Raises:
        DataError: the folder is unfinished, or files are missing, changed or not listed.
        StorageError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    listed = {entry.path: entry for entry in manifest.files}
    found = {_relative(folder, path): path for path in content_files(folder)}
    problems = [f"{name}: listed but missing" for name in sorted(listed.keys() - found.keys())]
    problems += [f"{name}: present but not listed" for name in sorted(found.keys() - listed.keys())]
    both = sorted(listed.keys() & found.keys())
    differences = _of_many(lambda name: _difference(listed[name], folder, found[name]), both)
    problems += [f"{name}: {problem}" for name, problem in zip(both, differences, strict=True) if problem]
    if problems:
        shown = "; ".join(problems[:_MOST_SHOWN])
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise DataError(f"{folder} is not what its {MANIFEST_NAME} says: {shown}{more}. Fetch or publish it again.")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read MANIFEST.json of a complete folder without looking at the files it lists."""
    if not is_complete(folder):
        raise DataError(
            f"{folder} is unfinished: it has no {COMPLETE_NAME} that fits its {MANIFEST_NAME}. "
            "Whoever wrote it was interrupted; write it again."
        )
    content = (folder / MANIFEST_NAME).read_bytes()
    try:
        document = _Document.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{folder / MANIFEST_NAME} is no manifest of version {VERSION}: {error.errors()[0]['msg']}. "
            "Publish the folder again."
        ) from error
    if document.version != VERSION:
        raise DataError(
            f"{folder / MANIFEST_NAME} has version {document.version}, this program reads {VERSION}. "
            "Use the program version that wrote it."
        )
    return Manifest(files=document.files, about=document.about)


def content_files(folder: Path) -> Iterator[Path]:
    """Yield every regular file below ``folder``, sorted by relative path; manifest, marker and partials are left out.

    Raises:
        DataError: something below is neither file nor folder: a link could lead anywhere.
    """
    with disk_errors("list", folder):
        paths = sorted(folder.rglob("*"), key=lambda path: _relative(folder, path))
    for path in paths:
        with disk_errors("read", path):
            mode = path.lstat().st_mode
        name = _relative(folder, path)
        if stat.S_ISDIR(mode) or name in (MANIFEST_NAME, COMPLETE_NAME) or is_partial(path.name):
            continue
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise DataError(f"{path} is {kind}; only plain files can be published. Put the file itself in its place.")
        yield path


def marker_files(folder: Path) -> Iterator[Path]:
    """Yield what ``content_files`` leaves out and a published folder needs; the marker last."""
    for name in (MANIFEST_NAME, COMPLETE_NAME):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            yield folder / name


def file_hashes(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the hex sha256 of each file's content."""
    return _of_many(file_sha256, paths)


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with disk_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_many(look: Callable[[T], Found], files: Iterable[T]) -> Iterator[Found]:
    """Yield what ``look`` finds in each of ``files``, of which several are read at once: GPUs wait for checkpoints."""
    with ThreadPoolExecutor(min(_MOST_READ_AT_ONCE, len(os.sched_getaffinity(0))), "hash") as pool:
        yield from pool.map(look, files)


def _entry(folder: Path, path: Path) -> FileEntry:
    return FileEntry(path=_relative(folder, path), sha256=file_sha256(path), bytes=path.stat().st_size)


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _difference(entry: FileEntry, folder: Path, path: Path) -> str | None:
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{size:,} bytes instead of {entry.bytes:,}"
    actual = file_sha256(path)
    if actual != entry.sha256:
        return f"sha256 {actual[:12]}… instead of {entry.sha256[:12]}…"
    return None
