"""Texts in alphabetical order, equal ones once, by merging sorted pieces: memory holds a piece, not all texts. Pure."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_trainer.records import Records, StoredRows

_PIECE_BYTES = 16 << 20
_OBJECT_BYTES = 128  # of a text in a piece, besides what it says: bytes, number and pair as Python's objects
_NUMBER_BYTES = 8

_Numbered = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class TextOrder:
    """Every distinct text, and where each given one is among them."""

    distinct: StoredRows[str]
    """In the order of their code points."""
    ranks: npt.NDArray[np.int64]
    """For every text that was given, in that order, its number in ``distinct``."""


def order_texts(texts: Iterable[str], kind: Records) -> TextOrder:
    """Sort ``texts``; pieces, and what comes out, are records of that ``kind``."""
    pieces, count = _sorted_pieces(texts, kind)
    distinct, ranks = kind.empty(), kind.numbers(count, np.int64)
    previous: bytes | None = None
    for text, number in heapq.merge(*pieces):
        if text != previous:
            distinct.append(text)
            previous = text
        ranks[number] = len(distinct) - 1
    return TextOrder(StoredRows(distinct, _decoded), ranks)


def _sorted_pieces(texts: Iterable[str], kind: Records) -> tuple[list[Iterable[_Numbered]], int]:
    """Return the texts as bytes, whose order is that of their code points, each with its number, and their count."""
    pieces: list[Iterable[_Numbered]] = []
    piece: list[_Numbered] = []
    size = number = 0
    for number, text in enumerate(texts, start=1):
        encoded = text.encode("utf-8", "surrogatepass")
        piece.append((encoded, number - 1))
        size += len(encoded) + _OBJECT_BYTES
        if size >= _PIECE_BYTES:
            pieces.append(_kept(piece, kind.empty()))
            piece, size = [], 0
    return [*pieces, sorted(piece)], number


def _kept(piece: list[_Numbered], records: Records) -> Iterator[_Numbered]:
    """Put a sorted piece into ``records``; what is returned reads it from there."""
    piece.sort()
    for text, number in piece:
        records.append(number.to_bytes(_NUMBER_BYTES, "big") + text)
    return (
        (record[_NUMBER_BYTES:], int.from_bytes(record[:_NUMBER_BYTES], "big"))
        for record in records.records(0, len(records))
    )


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")
