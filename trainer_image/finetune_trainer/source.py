"""Find the files that a source means, one or many, and read their rows.

A broken file is named, with the place and a remedy; no guesses.
"""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from finetune_api.spec import SecretRef
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.excerpt import listed
from finetune_trainer.row_format import KNOWN_ENDINGS, format_of, read_file
from finetune_trainer.row_limit import Row

__all__ = ["Fetch", "Row", "choose_files", "fetch_local", "is_pattern", "read_rows"]

Fetch = Callable[[str, str, SecretRef | None, str | None], Path]
"""Returns the local file, folder or pattern of a source, given its URI, the setting that names it, its Secret
and its revision."""

_MOST_FILES = 10_000

# As hubs name files: train-00000-of-00002.parquet, data/test/rows.jsonl.
_SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"} | {
    "val": "validation",
    "test": "test",
}


def fetch_local(uri: str, field: str, secret_ref: SecretRef | None = None, revision: str | None = None) -> Path:
    """Return the path behind a plain path or ``file:///path``; `finetune_trainer.storage` knows the other schemes.

    Raises:
        SpecError: it is neither.
    """
    if "://" not in uri:
        return Path(uri)
    scheme, rest = uri.split("://", 1)
    if scheme != "file":
        raise SpecError(f"{field}: {scheme}:// in {uri!r} is not read here. Use file:///path or a plain path.")
    if not rest.startswith("/"):
        raise SpecError(f"{field}: {uri!r} must be absolute: file:///path with three slashes.")
    # A folder may well be called "100%": what exists under the literal name is what was meant.
    return Path(rest) if os.path.lexists(rest) else Path(unquote(rest))


def is_pattern(path: str) -> bool:
    """Whether ``path`` has wildcards: ``*``, ``?`` or ``[…]``."""
    return glob.has_magic(path)


def read_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a file, of all files of a folder, or of all that match a pattern, in the order of their names.

    ``field`` is the path of the setting that named it, for messages.

    Raises:
        SpecError: its ending says no format that is read here.
        DataError: a file is missing, unreadable, empty, truncated or broken, or lies outside the folder.
    """
    files = _files_of(path, field)
    for file in files:
        _refuse_unreadable(file, field)
    return _at_least_one(chain.from_iterable(_guarded(file, field) for file in files), path, field)


def choose_files(names: Collection[str], where: str, field: str) -> list[str]:
    """Return those of ``names``, relative paths, that hold rows, sorted; hidden files and other formats are none.

    Raises:
        DataError: there is none, or they are of different splits.
    """
    chosen = sorted(
        name for name in names if format_of(name) and not any(part.startswith((".", "_")) for part in name.split("/"))
    )
    if not chosen:
        raise DataError(
            f"{field}: {where} holds no file of rows ({', '.join(KNOWN_ENDINGS)}) but "
            f"{listed(sorted(names)) or 'nothing'}. Correct the path."
        )
    if len(chosen) > _MOST_FILES:
        raise DataError(f"{field}: {where} holds {len(chosen):,} files; at most {_MOST_FILES:,} are read. Join them.")
    splits = {split for name in chosen if (split := _split_word(name))}
    if len(splits) > 1:
        raise DataError(
            f"{field}: {where} holds files of different splits ({', '.join(sorted(splits))}): {listed(chosen)}. Name "
            f"those that are meant, e.g. with train* at the end, and the others in validationSource and testSource."
        )
    return chosen


def _split_word(name: str) -> str | None:
    path = PurePosixPath(name.lower())
    words = [*path.parent.parts, *re.split(r"[-_.]", path.name)]
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _files_of(path: Path, field: str) -> list[Path]:
    # What cannot be looked at is told by opening it.
    if "\0" in str(path) or os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where this says no
        return [_known(path, field)]
    if os.path.isdir(path):  # noqa: PTH112 - likewise
        return _inside(path, [file for file in path.rglob("*") if file.is_file()], field)
    if is_pattern(str(path)):
        root = next(parent for parent in path.parents if not is_pattern(str(parent)))
        matches = list(root.glob(path.relative_to(root).as_posix()))
        files = [file for match in matches for file in (match.rglob("*") if match.is_dir() else (match,))]
        if not files:
            raise DataError(f"{field}: nothing matches {path}; correct the pattern.")
        return _inside(root, [file for file in files if file.is_file()], field)
    if os.path.exists(path):  # noqa: PTH110 - likewise
        raise DataError(f"{field}: {path} is neither file nor folder but a pipe or device; write the rows to a file.")
    return [_known(path, field)]


def _known(path: Path, field: str) -> Path:
    if format_of(path.name) is None:
        raise SpecError(
            f"{field}: the ending {path.suffix!r} of {str(path)!r} names no known format; "
            f"save the rows as one of {', '.join(KNOWN_ENDINGS)} (text also packed: .gz, .zst)."
        )
    return path


def _inside(root: Path, files: Collection[Path], field: str) -> list[Path]:
    chosen = choose_files([file.relative_to(root).as_posix() for file in files], str(root), field)
    real_root = root.resolve()
    for name in chosen:
        if not (root / name).resolve().is_relative_to(real_root):
            raise DataError(
                f"{field}: {root / name} is a link out of {root}, to {(root / name).resolve()}. Put the file itself "
                f"there, or name it by its own path."
            )
    return [root / name for name in chosen]


def _refuse_unreadable(path: Path, field: str) -> None:
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except FileNotFoundError as error:
        raise DataError(f"{field}: there is no file {path}; correct the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{field}: cannot open {path}: {error}; check the path and its permissions.") from error
    if is_empty:
        raise DataError(f"{field}: {path} is empty (0 bytes); fetch or write it again.")


def _guarded(path: Path, field: str) -> Iterator[Row]:
    try:
        yield from read_file(path, field)
    except OSError as error:
        raise DataError(f"{field}: reading {path} failed: {error}.") from error


def _at_least_one(rows: Iterator[Row], path: Path, field: str) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, start=1):  # noqa: B007 - counts beyond the loop
        yield row
    if number == 0:
        raise DataError(f"{field}: {path} holds no rows; a fine-tune needs rows for training, validation and test.")
