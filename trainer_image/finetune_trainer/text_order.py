"""Texts in alphabetical order, equal ones once, by merging sorted pieces: memory holds a piece, not all texts. Pure."""

import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_trainer.records import Records, StoredRows

_PIECE_BYTES = 16 << 20
_NUMBER_BYTES = 8

_Numbered = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class TextOrder:
    """Every distinct text, and where each given one is among them."""

    distinct: StoredRows[str]
    """In the order of their code points."""
    lengths: npt.NDArray[np.int64]
    """Characters of each."""
    ranks: npt.NDArray[np.int64]
    """For every text that was given, in that order, its number in ``distinct``."""


def order_texts(texts: Iterable[str], kind: Records) -> TextOrder:
    """Sort ``texts``; pieces, and what comes out, are records of that ``kind``."""
    distinct = kind.empty()
    lengths = array("q")
    places, ranks = array("q"), array("q")
    previous: bytes | None = None
    for text, number in _merged(texts, kind):
        if text != previous:
            distinct.append(text)
            lengths.append(len(_decoded(text)))
            previous = text
        places.append(number)
        ranks.append(len(distinct) - 1)
    by_number = np.empty(len(places), dtype=np.int64)
    by_number[np.array(places, dtype=np.int64)] = np.array(ranks, dtype=np.int64)
    return TextOrder(StoredRows(distinct, _decoded), np.array(lengths, dtype=np.int64), by_number)


def _merged(texts: Iterable[str], kind: Records) -> Iterator[_Numbered]:
    """Yield the texts as bytes, whose order is that of their code points, each with its number, sorted."""
    pieces: list[Iterator[_Numbered]] = []
    piece: list[_Numbered] = []
    size = 0
    for number, text in enumerate(texts):
        encoded = text.encode("utf-8", "surrogatepass")
        piece.append((encoded, number))
        size += len(encoded)
        if size >= _PIECE_BYTES:
            pieces.append(_kept(piece, kind.empty()))
            piece, size = [], 0
    piece.sort()
    return heapq.merge(*pieces, piece)


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
