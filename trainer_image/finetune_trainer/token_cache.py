"""Tokens kept under a hash of everything that they follow from, so that the same rows are tokenised once.

An entry is whole or absent, and is verified before it is used. Those not used for longest go when all together are too
large; any may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from finetune_api import __version__
from finetune_api.spec import LossOn, TaskSpec
from finetune_trainer.durable import disk_errors, is_partial, partial_name
from finetune_trainer.errors import DataError
from finetune_trainer.example import Encoded, Example, pack_example, unpack_encoded
from finetune_trainer.manifest import verify_manifest, write_manifest
from finetune_trainer.record_file import RecordFile
from finetune_trainer.records import StoredRows
from finetune_trainer.renderer import Renderer

MOST_BYTES = 4 << 30
"""Of all entries together; what a job of more tokens keeps stays until the next one comes."""

_FORM = 1
"""Raised when the same rows give other tokens, or they are written otherwise."""
_DEPENDS_ON = ("transformers", "tokenizers", "jinja2")
_TOKENS = "tokens"
_ENDS = "ends"
_END_BYTES = 8


def token_key(
    examples: Iterable[Example], specs: Mapping[str, TaskSpec], renderer: Renderer, model: str, loss_on: LossOn
) -> str:
    """Return the hash of everything that decides the tokens of ``examples``.

    Args:
        examples: with their rows, which are rendered again when one must be shortened.
        specs: of their tasks, by name.
        renderer: makes the tokens.
        model: the revision of the base model, whose files hold the tokenizer and the chat template.
        loss_on: decides what of them is learnt.
    """
    other = {"source", "validation_source", "test_source", "secret_ref", "max_examples", "weight"}
    settings = {
        "form": _FORM,
        "byteOrder": sys.byteorder,
        "versions": [__version__, *map(version, _DEPENDS_ON)],
        "model": model,
        "format": renderer.format,
        "system": renderer.system,
        "maxLength": renderer.max_length,
        "lossOn": loss_on.value,
        "tasks": [spec.model_dump(mode="json", exclude=other) for _, spec in sorted(specs.items())],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        record = pack_example(example)
        digest.update(len(record).to_bytes(8, "big") + record)
    return digest.hexdigest()


class TokenCache:
    """A folder with a folder for every key."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most_bytes = most_bytes

    def tokens(self, key: str, make: Callable[[], StoredRows[Encoded]], scratch: Path) -> StoredRows[Encoded]:
        """Return what is kept under ``key``, else what ``make`` returns, which is kept then.

        What is returned lies on the disk of ``scratch``: the entry may go while it is in use.

        Raises:
            StorageError: the disk is full or broken.
        """
        entry = self._folder / key
        try:
            verify_manifest(entry)
        except DataError:
            # Absent or damaged; either way it is made anew.
            made = make()
            self._keep(entry, made)
            return made
        with disk_errors("read", entry):
            os.utime(entry)
            return StoredRows(_read(entry, scratch), unpack_encoded)

    def _keep(self, entry: Path, rows: StoredRows[Encoded]) -> None:
        partial = self._folder / partial_name(entry.name)
        with disk_errors("write", partial):
            partial.mkdir(parents=True)
            try:
                _write(partial, rows)
                write_manifest(partial)
                shutil.rmtree(entry, ignore_errors=True)
                partial.rename(entry)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        self._make_room(entry)

    def _make_room(self, newest: Path) -> None:
        with disk_errors("clear", self._folder):
            ages: list[tuple[float, Path]] = []
            for entry in self._folder.iterdir():
                # Another process may be clearing as well, or writing.
                with suppress(FileNotFoundError):
                    if entry != newest and not is_partial(entry.name):
                        ages.append((entry.stat().st_mtime, entry))
            kept = _size_bytes(newest)
            for _, entry in sorted(ages, reverse=True):
                kept += _size_bytes(entry)
                if kept > self._most_bytes:
                    shutil.rmtree(entry, ignore_errors=True)


def _size_bytes(entry: Path) -> int:
    total = 0
    for name in (_TOKENS, _ENDS):
        with suppress(FileNotFoundError):
            total += (entry / name).stat().st_size
    return total


def _write(folder: Path, rows: StoredRows[Encoded]) -> None:
    with (folder / _TOKENS).open("wb") as tokens, (folder / _ENDS).open("wb") as ends:
        for record in rows.packed():
            tokens.write(record)
            ends.write(tokens.tell().to_bytes(_END_BYTES, sys.byteorder))


def _read(folder: Path, scratch: Path) -> RecordFile:
    records = RecordFile(scratch)
    start = 0
    with (folder / _TOKENS).open("rb") as tokens, (folder / _ENDS).open("rb") as ends:
        while packed := ends.read(_END_BYTES):
            end = int.from_bytes(packed, sys.byteorder)
            records.append(tokens.read(end - start))
            start = end
    return records
