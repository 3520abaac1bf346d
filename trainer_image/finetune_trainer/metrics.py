"""Measure one prediction, or the probabilities of many, against what was expected. Pure; aggregates nothing else.

Peers' own implementations are used where there is one, so that numbers can be compared with published ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Score:
    """How much of a prediction is right and how much of the reference it covers; each from 0 to 1."""

    precision: float
    recall: float
    f1: float


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether both are the same text once white space around them is gone; case and punctuation count."""
    return prediction.strip() == reference.strip()


def rouge(prediction: str, reference: str) -> dict[str, Score]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L, without stemming, as rouge_score computes them.

    A word counts at most as often as the reference has it (clipping), so repeating the right word does not pay.
    ROUGE-L follows the paper (aclanthology.org/W04-1013): the longest common SUBsequence, which may have gaps.
    Case is folded and only ``a-z0-9`` are words: text in another script scores 0, see `rouge_reads`.
    """
    scores = _rouge_scorer().score(reference, prediction)
    return {name: Score(scores[name].precision, scores[name].recall, scores[name].fmeasure) for name in ROUGE_NAMES}


def rouge_reads(text: str) -> bool:
    """Return whether every letter of ``text`` is one that ROUGE's words are made of."""
    return all(letter.isascii() for letter in text if letter.isalpha())


def perplexity(logprobs: Sequence[NDArray[np.float64]]) -> float:
    """Return exp of the mean negative log-probability over all tokens of all rows: every token weighs the same.

    Infinite when a token was impossible or the mean is too large for a float.

    Raises:
        ValueError: there is no token.
    """
    tokens = sum(len(row) for row in logprobs)
    if tokens == 0:
        raise ValueError("perplexity needs at least one token")
    mean = -sum(float(row.sum()) for row in logprobs) / tokens
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@cache
def _rouge_scorer() -> "RougeScorer":
    # Imported here: brings the whole of nltk, which every stage would wait for.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_NAMES), use_stemmer=False)
