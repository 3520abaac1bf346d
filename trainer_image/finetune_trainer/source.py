"""Read rows from a file: JSON lines, CSV or Parquet. A broken file is named, with the place and a remedy; no guesses.

CSV values are strings, always; an empty cell is an empty string. JSON and Parquet keep their types.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.spec import SecretRef
from finetune_trainer.errors import DataError, SpecError

Row = dict[str, object]

_SHOWN_CHARACTERS = 80
_BYTE_ORDER_MARK = "\ufeff"


Fetch = Callable[[str, str, SecretRef | None], Path]
"""Returns the local file of a source, given its URI, the setting that names it and its own Secret."""


def fetch_local(uri: str, field: str, secret_ref: SecretRef | None = None) -> Path:
    """Return the file behind a plain path or ``file:///path``; `finetune_trainer.storage` knows the other schemes.

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


def read_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a file in order; ``field`` is the path of the setting that named it, for messages.

    Raises:
        SpecError: its ending says no format that is read here.
        DataError: the file is missing, unreadable, empty, truncated or broken.
    """
    _refuse_folder(path, field)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SpecError(
            f"{field}: the ending {path.suffix!r} of {str(path)!r} names no known format; "
            f"save the rows as one of {', '.join(_READERS)}."
        )
    _refuse_unreadable(path, field)
    return _at_least_one(reader(path, field), path, field)


def _refuse_folder(path: Path, field: str) -> None:
    # Before the ending, which a folder seldom has. What cannot be looked at is told by opening it.
    if "\0" not in str(path) and os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where this says no
        raise DataError(f"{field}: {path} is a folder; name one file ({', '.join(_READERS)}).")


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


def _at_least_one(rows: Iterator[Row], path: Path, field: str) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):  # noqa: B007 - counts beyond the loop
            yield row
    except OSError as error:
        raise DataError(f"{field}: reading {path} failed after {number} rows: {error}.") from error
    if number == 0:
        raise DataError(f"{field}: {path} holds no rows; a fine-tune needs rows for training, validation and test.")


def _lines(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end): decoded line by line so that an error knows its line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{field}: {path} line {number} is not UTF-8 (byte {raw[error.start]:#04x} at column "
                    f"{error.start + 1}); convert it, e.g. iconv -f LATIN1 -t UTF-8 (or -f UTF-16)."
                ) from error
            if "\0" in line:
                raise DataError(
                    f"{field}: {path} line {number} holds a null character: a binary or UTF-16 file; "
                    f"convert it, e.g. iconv -f UTF-16 -t UTF-8."
                )
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _read_json_lines(path: Path, field: str) -> Iterator[Row]:
    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON; write null, or drop the row")

    for number, line in _lines(path, field):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=refuse_constant)
            if "\\u" in line:
                _refuse_lone_surrogates(row)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            hint = "" if line.endswith("\n") else " It is the last line and has no line end: is the file truncated?"
            raise DataError(f"{field}: {path} line {number} is not JSON: {error}: {_shown(line)}.{hint}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{field}: {path} line {number} is a JSON {_JSON_NAMES[type(row)]}, not an object: {_shown(line)}. "
                f'Write one object per line: {{"column": "value"}}.'
            )
        yield row


_JSON_NAMES: dict[type, str] = {
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _refuse_lone_surrogates(row: object) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escaped half character (\\ud800 to \\udfff without its partner)") from error


def _read_csv(path: Path, field: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path, field)), strict=True)
    try:
        header = next(reader)
        _check_header(header, path, field)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{field}: {path} line {reader.line_num} has {len(cells)} cells where the header has "
                    f"{len(header)} ({_shown(','.join(header))}): {_shown(','.join(cells))}. "
                    f"Put cells that hold commas or line ends in double quotes."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{field}: {path} line {reader.line_num} is not CSV: {error}. A quote that is never closed reads to the "
            f"end of the file; cells beyond {csv.field_size_limit():,} characters need jsonl or parquet."
        ) from error


def _check_header(header: list[str], path: Path, field: str) -> None:
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{field}: {path} separates its columns by {separator!r}; CSV here means commas.")
    if not all(name.strip() for name in header):
        raise DataError(f"{field}: {path} line 1 must name every column; it reads {_shown(','.join(header))}.")
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{field}: {path} line 1 names columns twice: {repeated}; rename them.")


def _read_parquet(path: Path, field: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            if repeated := sorted({n for n in file.schema_arrow.names if file.schema_arrow.names.count(n) > 1}):
                raise DataError(f"{field}: {path} names columns twice: {repeated}; rename them.")
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{field}: {path} is not a whole Parquet file: {_shown(str(error))}; fetch or write it again."
        ) from error
    except OSError as error:  # what Arrow raises for truncated pages
        raise DataError(f"{field}: {path} is truncated or broken: {_shown(str(error))}; fetch it again.") from error


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
