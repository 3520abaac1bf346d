"""Find the questions of tests that training rows give away. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from finetune_api.report import Overlap
from finetune_trainer.example import Example

OVERLAP_WORDS = 13
"""Words in a row that two texts share by copying, not by chance (arXiv:2005.14165, appendix C)."""
SHORTEST_QUESTION = 8
"""Words of a question below which it says too little to be looked for."""
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
        hits = [piece for words in one if (piece := next((piece for piece in words if piece in seen), None))]
        given_away = [_joined(words) for words in one if tuple(words) in whole]
        first = given_away or [" ".join(piece) for piece in hits]
        yield Overlap(
            source=source,
            questions=len(one),
            overlapping=len(hits),
            given_away=len(given_away),
            first=first[0] if first else "",
        )


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
        words = _words(" ".join([*(turn for _, turn in example.earlier), example.prompt, example.completion]))
        found = wanted.intersection(chain.from_iterable(_windows(words, length) for length in lengths))
        seen |= found
        whole.update(question for piece in found for question in keyed.get(piece, ()) if found.issuperset(question))
    return seen, whole


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
