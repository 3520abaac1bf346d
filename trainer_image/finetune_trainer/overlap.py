"""Find the questions of tests that training rows give away. Pure."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from finetune_api.report import Overlap
from finetune_trainer.example import Example

OVERLAP_WORDS = 13
"""Words in a row that two texts share by copying, not by chance (arXiv:2005.14165, appendix C)."""
SHORTEST_QUESTION = 8
"""Words of a question below which it says too little to be looked for."""


def find_overlaps(examples: Iterable[Example], questions: Mapping[str, Sequence[str]]) -> Iterator[Overlap]:
    """Yield for every source of questions how many of them share `OVERLAP_WORDS` words in a row with a training row.

    Of a chat all turns are searched. A question with fewer words counts when a row holds all of it, and it has at least
    `SHORTEST_QUESTION`.

    Args:
        examples: the training rows.
        questions: by source.
    """
    pieces = {source: [_pieces(text) for text in texts] for source, texts in questions.items()}
    wanted = {piece for one in pieces.values() for words in one for piece in words}
    lengths = {len(piece) for piece in wanted}
    seen: set[tuple[str, ...]] = set()
    for example in examples if wanted else ():
        words = _words(" ".join([*(turn for _, turn in example.earlier), example.prompt, example.completion]))
        for length in lengths:
            seen.update(piece for piece in _windows(words, length) if piece in wanted)
    for source, one in pieces.items():
        hits = [piece for words in one if (piece := next((piece for piece in words if piece in seen), None))]
        yield Overlap(source=source, questions=len(one), overlapping=len(hits), first=" ".join(hits[0]) if hits else "")


def _pieces(text: str) -> list[tuple[str, ...]]:
    words = _words(text)
    if len(words) < SHORTEST_QUESTION:
        return []
    return list(_windows(words, min(OVERLAP_WORDS, len(words))))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _windows(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
