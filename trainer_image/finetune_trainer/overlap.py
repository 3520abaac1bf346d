"""Find the questions of tests that training rows give away, and rows of a test on the same passages. Pure."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from finetune_api.report import Overlap
from finetune_trainer.example import Example

OVERLAP_WORDS = 13
"""Words in a row that two texts share by copying, not by chance (arXiv:2005.14165, appendix C)."""
SHORTEST_QUESTION = 8
"""Words of a question below which it says too little to be looked for."""
FORM_SHARE = 0.1
"""Share of the training rows from which words that they have in common are their form, not a passage."""
SEARCHED_ROWS = 1000
"""Of a source, evenly spaced: their words are held in memory."""
_SEARCHED_PIECES = 64
_SHOWN_CHARACTERS = 200

Piece = tuple[str, ...]
Pieces = list[Piece]
"""Every run of words of a text, in its order."""


def find_overlaps(examples: Iterable[Example], questions: Mapping[str, Sequence[str]]) -> Iterator[Overlap]:
    """Yield for every source of questions how many of them share `OVERLAP_WORDS` words in a row with a training row.

    Of a chat all turns are searched. A question with fewer words counts when a row holds all of it, and it has at least
    `SHORTEST_QUESTION`. A question is given away when every such piece of it stands in one and the same row.

    Args:
        examples: the training rows.
        questions: by source.
    """
    pieces = {source: [_pieces(text) for text in texts] for source, texts in questions.items()}
    seen, whole = _search(examples, [words for one in pieces.values() for words in one if words])
    for source, one in pieces.items():
        given_away = [_joined(words) for words in one if tuple(words) in whole]
        found = _overlap(source, one, seen)
        yield found.model_copy(update={"given_away": len(given_away), "first": (given_away or [found.first])[0]})


def find_shared_passages(trained: Iterable[str], rows: Mapping[str, Sequence[str]]) -> Iterator[Overlap]:
    """Yield for every source of test rows how many share a passage with a training row: as in `find_overlaps`.

    Of a long text pieces are looked for that lie evenly in it. Nothing is given away for certain: the question may be
    another one.

    Args:
        trained: what training rows ask; no template and no answer is in it.
        rows: what others ask, by source.
    """
    pieces = {source: [_spread(_pieces(text)) for text in texts] for source, texts in rows.items()}
    wanted = frozenset(piece for one in pieces.values() for words in one for piece in words)
    lengths = {len(piece) for piece in wanted}
    holders: Counter[Piece] = Counter()
    count = 0
    for text in trained if wanted else ():
        count += 1
        holders.update(_found(text, wanted, lengths))
    seen = {piece for piece, rows_with_it in holders.items() if rows_with_it <= max(1, FORM_SHARE * count)}
    yield from (_overlap(source, one, seen) for source, one in pieces.items())


def _spread(pieces: Pieces) -> Pieces:
    return pieces[:: -(-len(pieces) // _SEARCHED_PIECES) or 1]


def _overlap(source: str, questions: Sequence[Pieces], seen: Collection[Piece]) -> Overlap:
    hits = [piece for pieces in questions if (piece := next((piece for piece in pieces if piece in seen), None))]
    first = " ".join(hits[0]) if hits else ""
    return Overlap(source=source, questions=len(questions), overlapping=len(hits), first=first)


def _search(examples: Iterable[Example], questions: Sequence[Pieces]) -> tuple[set[Piece], set[tuple[Piece, ...]]]:
    """Return the pieces that stand in some row, and the questions of which all pieces stand in one."""
    holders = Counter(piece for pieces in questions for piece in set(pieces))
    wanted = frozenset(holders)
    lengths = {len(piece) for piece in wanted}
    # A question is looked for by the piece that fewest others have: many may begin with the same words.
    keyed: dict[Piece, set[tuple[Piece, ...]]] = {}
    for pieces in questions:
        keyed.setdefault(min(pieces, key=holders.__getitem__), set()).add(tuple(pieces))
    seen: set[Piece] = set()
    whole: set[tuple[Piece, ...]] = set()
    for example in examples if wanted else ():
        text = " ".join([*(turn for _, turn in example.earlier), example.prompt, example.completion])
        found = _found(text, wanted, lengths)
        seen |= found
        whole.update(question for piece in found for question in keyed.get(piece, ()) if found.issuperset(question))
    return seen, whole


def _found(text: str, wanted: frozenset[Piece], lengths: Iterable[int]) -> frozenset[Piece]:
    words = _words(text)
    return wanted.intersection(chain.from_iterable(_windows(words, length) for length in lengths))


def _pieces(text: str) -> Pieces:
    words = _words(text)
    if len(words) < SHORTEST_QUESTION:
        return []
    return list(_windows(words, min(OVERLAP_WORDS, len(words))))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _windows(words: Sequence[str], length: int) -> Iterator[Piece]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _joined(pieces: Pieces) -> str:
    return " ".join([*pieces[0], *(piece[-1] for piece in pieces[1:])])[:_SHOWN_CHARACTERS]
