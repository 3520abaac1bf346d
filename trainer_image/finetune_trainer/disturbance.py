"""Disturb a text the way hasty people do: typos, and letters in another case. Pure; equal seeds disturb alike."""

import random
import re
from typing import assert_never

from finetune_api.spec import Perturbation

TYPO_SHARE = 0.1
"""Of the words with at least four letters that get one typo: about what people make who do not look back."""

_WORD = re.compile(r"[^\W\d_]{4,}")
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def disturb(text: str, how: Perturbation, seed: str) -> str:
    """Return ``text`` as someone else would have typed it; what ``seed`` says decides where."""
    draw = random.Random(f"{seed} {how}")
    match how:
        case Perturbation.TYPOS:
            return _WORD.sub(lambda found: _mistyped(found[0], draw) if draw.random() < TYPO_SHARE else found[0], text)
        case Perturbation.CASE:
            return text.lower() if draw.random() < 0.5 else text.upper()
        case _:
            assert_never(how)


def _mistyped(word: str, draw: random.Random) -> str:
    """Return ``word`` with one slip behind its first letter: two letters swapped, one left out, doubled or beside."""
    place = draw.randrange(1, len(word) - 1)
    before, letter, following, after = word[:place], word[place], word[place + 1], word[place + 2 :]
    slips = (
        following + letter,
        following,
        letter + letter + following,
        _beside(letter, draw) + following,
    )
    return before + draw.choice(slips) + after


def _beside(letter: str, draw: random.Random) -> str:
    """Return the letter of a neighbouring key; a letter that English keyboards lack stays."""
    row = next((row for row in _KEY_ROWS if letter.lower() in row), None)
    if row is None:
        return letter
    place = row.index(letter.lower())
    near = draw.choice([row[at] for at in (place - 1, place + 1) if 0 <= at < len(row)])
    return near.upper() if letter.isupper() else near
