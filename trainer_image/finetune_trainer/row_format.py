"""Read the rows of one file: JSON lines, JSON, CSV, text, Parquet or Arrow, the first four also compressed.

Rows come one after the other; what is held at once is bounded by the longest row, whatever the file unpacks to. CSV
values are strings, always; an empty cell is an empty string. The other formats keep their types.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import pyarrow as pa

from finetune_trainer.errors import DataError
from finetune_trainer.excerpt import excerpt
from finetune_trainer.row_limit import (
    ALWAYS_UNPACKED_BYTES,
    LONGEST_ROW_BYTES,
    MOST_UNPACKED,
    Row,
    refuse_columns,
)
from finetune_trainer.table_file import read_arrow, read_parquet

_BYTE_ORDER_MARK = "\ufeff"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_JSON_PIECE_BYTES = 1 << 18
_JSON_WHITE_SPACE = re.compile(r"[ \t\n\r]*+")
_DEEPEST = 100
"""Lists and objects within each other; a few hundred are more than Python can keep."""


def format_of(name: str) -> str | None:
    """Return the ending of ``name`` that says its format, with that of its compression; nothing when none is known."""
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    plain = f".{parts[-1]}" if len(parts) > 1 else ""
    if plain in _COMPRESSIONS and len(parts) > 2:
        inner = f".{parts[-2]}"
        return f"{inner}{plain}" if inner in _TEXT_READERS else None
    return plain if plain in _TEXT_READERS or plain in _BINARY_READERS else None


def read_file(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a file that has a known format; ``field`` is the setting that named it, for messages.

    Raises:
        DataError: the file is truncated or broken, or a row is too large.
    """
    ending = format_of(path.name)
    assert ending is not None, path
    _, plain, compression = ending.rpartition(".")[0], "." + ending.split(".")[1], "." + ending.split(".")[-1]
    if plain in _BINARY_READERS:
        yield from _BINARY_READERS[plain](path, field)
        return
    with path.open("rb") as file:
        if compression not in _COMPRESSIONS:
            yield from _TEXT_READERS[plain](file, path, field)
            return
        with pa.input_stream(file, compression=_COMPRESSIONS[compression]) as packed:
            unpacked = io.BufferedReader(cast(Any, _Unpacked(packed, path, field)), 1 << 17)
            yield from _TEXT_READERS[plain](unpacked, path, field)


class _Unpacked(io.RawIOBase):
    """A compressed file as it reads unpacked, up to a size that honest files do not reach."""

    def __init__(self, packed: pa.NativeFile, path: Path, field: str) -> None:
        self._packed = packed
        self._place = f"{field}: {path}"
        self._left = max(ALWAYS_UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._packed.read(len(buffer))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._place} cannot be unpacked: {excerpt(str(error))}. It is truncated, damaged or of another "
                f"format than its ending says; fetch it again."
            ) from error
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._place} unpacks to more than {MOST_UNPACKED} times its size, as files do that are made to "
                f"fill a disk. If it is what you want, unpack it yourself and name the result."
            )
        buffer[: len(content)] = content
        return len(content)


def _lines(file: BinaryIO, path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end): decoded line by line so that an error knows its line."""
    number = 0
    while raw := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if len(raw) > LONGEST_ROW_BYTES:
            raise DataError(
                f"{field}: {path} line {number} has more than {LONGEST_ROW_BYTES:,} bytes, which no model reads; "
                f"cut it, or write one row a line."
            )
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


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON; write null, or drop the row")


def _read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    for number, line in _lines(file, path, field):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
            if "\\u" in line or "[" in line or line.rfind("{") > 0:
                _refuse_unusable(row, line)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            hint = "" if line.endswith("\n") else " It is the last line and has no line end: is the file truncated?"
            raise DataError(
                f"{field}: {path} line {number} is not JSON: {error}: {excerpt(line.strip())}.{hint}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{field}: {path} line {number} is a JSON {_JSON_NAMES[type(row)]}, not an object: "
                f'{excerpt(line.strip())}. Write one object per line: {{"column": "value"}}.'
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


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    """Read one array of objects, of which one is held at a time."""
    for number, row in enumerate(_JsonArray(file, f"{field}: {path}")):
        if not isinstance(row, dict):
            raise DataError(
                f"{field}: {path} entry {number} (counted from 0) is a JSON {_JSON_NAMES[type(row)]}, not an object: "
                f"{excerpt(row)}."
            )
        yield row


class _JsonArray:
    """The entries of a file that is one JSON array."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._file = file
        self._place = place
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        self._text, self._at, self._lines = "", 0, 1
        self._has_ended = False

    def __iter__(self) -> Iterator[object]:
        self._open()
        number = 0
        while self._next_character() != "]" or number:
            yield self._entry(number)
            number += 1
            mark = self._next_character()
            if mark == "]":
                break
            if mark != ",":
                raise self._no_json("',' or ']' expected", self._at)
            self._at += 1
        self._at += 1
        if self._next_character():
            raise self._no_json("more behind the array's end", self._at)

    def _open(self) -> None:
        first = self._next_character()
        if first != "[":
            if first not in _JSON_BEGINNINGS:
                raise self._no_json("'[' expected", self._at)
            raise DataError(
                f"{self._place} holds a JSON {_JSON_BEGINNINGS[first]}, not an array of objects. Write "
                f"[{{...}}, {{...}}], or one object a line and call it .jsonl."
            )
        self._at += 1

    def _entry(self, number: int) -> object:
        while True:
            try:
                entry, end = self._decoder.raw_decode(self._text, self._at)
                # A number that ends with the text may go on.
                if end < len(self._text) or self._has_ended:
                    _refuse_unusable(entry, self._text, self._at, end)
                    self._at = end
                    return entry
            except json.JSONDecodeError as error:
                if self._has_ended:
                    raise self._no_json(f"{error.msg} (entry {number}, counted from 0)", error.pos) from error
                end = len(self._text)
            except (ValueError, RecursionError) as error:
                raise self._no_json(f"{error} (entry {number}, counted from 0)", self._at) from error
            if end - self._at > LONGEST_ROW_BYTES:
                raise self._no_json(
                    f"entry {number} (counted from 0) has more than {LONGEST_ROW_BYTES:,} characters, or is broken",
                    self._at,
                )
            self._read_on()

    def _next_character(self) -> str:
        """Return what stands behind the next white space, nothing at the end."""
        while True:
            self._at = _JSON_WHITE_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._has_ended:
                return ""
            self._read_on()

    def _read_on(self) -> None:
        """Drop what was decoded, and read as much again as is left: a long entry is not tried with every piece."""
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        left = LONGEST_ROW_BYTES + 1 - len(self._text)
        content = self._file.read(min(max(_JSON_PIECE_BYTES, len(self._text)), max(_JSON_PIECE_BYTES, left)))
        self._has_ended = not content
        try:
            self._text += self._to_text.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._place} is not JSON: {excerpt(str(error))}; write it again, as UTF-8.") from error

    def _no_json(self, why: str, at: int) -> DataError:
        line = self._lines + self._text.count("\n", 0, at)
        return DataError(f"{self._place} is not JSON: line {line}: {why}; write it again, as UTF-8.")


_JSON_BEGINNINGS = {
    "{": "object",
    '"': "string",
    "t": "boolean",
    "f": "boolean",
    "n": "null",
    **dict.fromkeys("-0123456789", "number"),
}


def _read_text(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    """Read lines of text, each a row with the column text; blank ones are none."""
    for _, line in _lines(file, path, field):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _refuse_unusable(row: object, text: str, start: int = 0, end: int | None = None) -> None:
    """Raise ValueError for what no program behind this one can keep; ``row`` was read from that part of ``text``."""
    if text.find("\\u", start, end) >= 0:
        _refuse_lone_surrogates(row)
    if text.count("[", start, end) + text.count("{", start, end) > _DEEPEST:
        _refuse_deep(row)


def _refuse_deep(row: object) -> None:
    level = [row]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"more than {_DEEPEST} lists and objects within each other")


def _refuse_lone_surrogates(row: object) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escaped half character (\\ud800 to \\udfff without its partner)") from error


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    lines = _CsvLines(file, path, field)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, path, field)
        for cells in reader:
            lines.row_characters = 0
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{field}: {path} line {reader.line_num} has {len(cells)} cells where the header has "
                    f"{len(header)} ({excerpt(','.join(header))}): {excerpt(','.join(cells))}. "
                    f"Put cells that hold commas or line ends in double quotes."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{field}: {path} line {reader.line_num} is not CSV: {error}. A quote that is never closed reads to the "
            f"end of the file; cells beyond {csv.field_size_limit():,} characters need jsonl or parquet."
        ) from error


class _CsvLines:
    """Lines, of which one row may take many; whoever reads rows resets ``row_characters`` behind each."""

    def __init__(self, file: BinaryIO, path: Path, field: str) -> None:
        self._lines = _lines(file, path, field)
        self._place = f"{field}: {path}"
        self.row_characters = 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.row_characters += len(line)
        if self.row_characters > LONGEST_ROW_BYTES:
            raise DataError(
                f"{self._place} line {number} is still of a row that has more than {LONGEST_ROW_BYTES:,} characters. "
                f"Look for a quote that is never closed, or cut the row."
            )
        return line


def _check_header(header: list[str], path: Path, field: str) -> None:
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{field}: {path} separates its columns by {separator!r}; CSV here means commas.")
    if not all(name.strip() for name in header):
        raise DataError(f"{field}: {path} line 1 must name every column; it reads {excerpt(','.join(header))}.")
    refuse_columns(header, f"{field}: {path} line 1")


_TEXT_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
}
_BINARY_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".parquet": read_parquet, ".arrow": read_arrow}

KNOWN_ENDINGS = (*_TEXT_READERS, *_BINARY_READERS)
"""Of files that are read; the text formats also with .gz or .zst behind it."""
