"""Figures over many rows, each as sums that can be drawn again: what a row adds, and what the sums amount to. Pure.

A figure keeps ``[rows, parts]``. Its value is ``combine`` of the column sums, so a bootstrap over rows, or over groups
of rows, is exact also where the figure is no mean of row scores: perplexity, BLEU, chrF, macro F1, calibration.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

Floats = NDArray[np.float64]

CALIBRATION_BINS = 15
"""Equally wide bins of confidence, as in arXiv:1706.04599."""

_CHRF_ORDER = 6
_CHRF_BETA = 2
_BLEU = BLEU(effective_order=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one model over the rows of one task."""

    name: str
    rows: Floats
    """``[rows, parts]``."""
    combine: Callable[[Floats], Floats]
    """``[…, parts]`` sums to ``[…]`` values."""
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        """The figure over all rows."""
        return float(self.combine(self.rows.sum(axis=0)))

    @property
    def of_each_row(self) -> Floats:
        """``[rows]``, the figure over each row alone."""
        return self.combine(self.rows)


def mean_figure(name: str, scores: ArrayLike) -> Figure:
    """Return the mean of one score a row: accuracy, exact match, ROUGE."""
    column = np.asarray(scores, dtype=np.float64)
    return Figure(name, np.stack([column, np.ones_like(column)], axis=1), ratio)


def mean_of(
    score: Callable[[str, str], float], name: str, predictions: Sequence[str], references: Sequence[str]
) -> Figure:
    """Return the mean of what ``score`` gives each prediction for its reference."""
    return mean_figure(name, [float(score(*pair)) for pair in zip(predictions, references, strict=True)])


def perplexity_figure(logprobs: Sequence[Floats]) -> Figure:
    """Return exp of the mean negative log-probability of a token: every token weighs the same."""
    rows = np.array([(-row.sum(), len(row)) for row in logprobs], dtype=np.float64)
    return Figure("perplexity", rows, _exp_ratio, higher_is_better=False)


def token_probability_figure(logprobs: Sequence[Floats]) -> Figure:
    """Return the geometric mean of the probabilities of all tokens, 1 / perplexity: from 0 to 1, as accuracy is."""
    rows = np.array([(row.sum(), len(row)) for row in logprobs], dtype=np.float64)
    return Figure("token_probability", rows, _exp_ratio)


def bits_per_byte_figure(logprobs: Sequence[Floats], texts: Sequence[str]) -> Figure:
    """Return the bits that a byte of UTF-8 costs: comparable between tokenizers, which perplexity is not."""
    pairs = zip(logprobs, texts, strict=True)
    rows = np.array([(-row.sum() / np.log(2), len(text.encode())) for row, text in pairs], dtype=np.float64)
    return Figure("bits_per_byte", rows, ratio, higher_is_better=False)


def macro_f1_figure(
    predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str], name: str = "macro_f1"
) -> Figure:
    """Return the mean over all labels of their F1; a label that nobody expects or predicts has 0.

    What is predicted and is no label misses the expected one and is held against no other.
    """
    number = {label: index for index, label in enumerate(labels)}
    # Of each label: how often it was right, and how often it was said or wanted.
    rows = np.zeros((len(expected), 2, len(labels)))
    for row, (guess, truth) in enumerate(zip(predicted, expected, strict=True)):
        rows[row, 0, number[truth]] = guess == truth
        rows[row, 1, number[truth]] += 1
        if guess in number:
            rows[row, 1, number[guess]] += 1

    def combine(sums: Floats) -> Floats:
        hits, mentions = np.moveaxis(sums.reshape(*sums.shape[:-1], 2, len(labels)), -2, 0)
        f1: Floats = divide(2 * hits, mentions).mean(axis=-1)
        return f1

    return Figure(name, rows.reshape(len(expected), -1), combine)


def confusion_matrix(predicted: Sequence[str], expected: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """Return ``[expected, predicted]`` counts in the order of ``labels``."""
    number = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for guess, truth in zip(predicted, expected, strict=True):
        matrix[number[truth], number[guess]] += 1
    return matrix


def calibration_figure(confidences: ArrayLike, right: ArrayLike, bins: int = CALIBRATION_BINS) -> Figure:
    """Return the expected calibration error: how far confidence is from accuracy, bins weighted by their rows.

    Args:
        confidences: ``[rows]``, probability of the predicted label, 0 to 1.
        right: ``[rows]``, whether it was the expected one.
        bins: equally wide ones.
    """
    sure, correct = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    rows = np.zeros((len(sure), bins, 3))
    place = np.minimum((sure * bins).astype(int), bins - 1)
    rows[np.arange(len(sure)), place] = np.stack([np.ones_like(sure), sure, correct], axis=1)

    def combine(sums: Floats) -> Floats:
        counts, surely, truly = np.moveaxis(sums.reshape(*sums.shape[:-1], bins, 3), -1, 0)
        error: Floats = np.abs(surely - truly).sum(axis=-1) / counts.sum(axis=-1)
        return error

    return Figure("ece", rows.reshape(len(sure), -1), combine, higher_is_better=False)


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of words shared by both, articles, case and punctuation aside, as SQuAD scores (arXiv:1606.05250).

    1 when both are empty, 0 when one is.
    """
    said, wanted = _answer_words(prediction), _answer_words(reference)
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def bleu_figure(predictions: Sequence[str], references: Sequence[str]) -> Figure:
    """Return corpus BLEU from 0 to 1: sacrebleu's tokenizer, exponential smoothing (aclanthology.org/W18-6319)."""
    scores = [_BLEU.sentence_score(text, [wanted]) for text, wanted in zip(predictions, references, strict=True)]
    rows = np.array([(*one.counts, *one.totals, one.sys_len, one.ref_len) for one in scores], dtype=np.float64)

    def combine(sums: Floats) -> Floats:
        return np.apply_along_axis(_corpus_bleu, -1, sums)

    return Figure("bleu", rows, combine)


def chrf_figure(predictions: Sequence[str], references: Sequence[str]) -> Figure:
    """Return chrF2 from 0 to 1: character n-grams up to 6, white space left out (aclanthology.org/W15-3049)."""
    pairs = zip(predictions, references, strict=True)
    return Figure("chrf", np.array([_character_matches(*pair) for pair in pairs], dtype=np.float64), _corpus_chrf)


def signatures() -> dict[str, str]:
    """Return how BLEU and chrF were computed, in sacrebleu's own notation, for the report."""
    corpus = BLEU()
    corpus.corpus_score(["a"], [["a"]])
    characters = CHRF()
    characters.corpus_score(["a"], [["a"]])
    return {"bleu": str(corpus.get_signature()), "chrf": str(characters.get_signature())}


# --- what the sums amount to


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Return the quotient, 0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def ratio(sums: Floats) -> Floats:
    """Return what ``[…, 2]`` sums amount to: the first over the second."""
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient


def _exp_ratio(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def _corpus_bleu(sums: Floats) -> float:
    counts, totals = ([int(one) for one in part] for part in (sums[:4], sums[4:8]))
    score = BLEU.compute_bleu(counts, totals, sys_len=int(sums[8]), ref_len=int(sums[9]), smooth_method="exp")
    return float(score.score) / 100


def _corpus_chrf(sums: Floats) -> Floats:
    said, wanted, shared = np.moveaxis(sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3), -1, 0)
    # An order counts once both sides are long enough for it.
    effective = (said > 0) & (wanted > 0)
    precision, recall = divide(shared, said), divide(shared, wanted)
    orders = np.maximum(effective.sum(axis=-1), 1)
    mean_precision = np.where(effective, precision, 0).sum(axis=-1) / orders
    mean_recall = np.where(effective, recall, 0).sum(axis=-1) / orders
    weight = _CHRF_BETA**2
    return divide((1 + weight) * mean_precision * mean_recall, weight * mean_precision + mean_recall)


def _character_matches(prediction: str, reference: str) -> list[int]:
    """Return for every order: n-grams of the prediction, of the reference, and shared ones."""
    said, wanted = ("".join(text.split()) for text in (prediction, reference))
    parts: list[int] = []
    for order in range(1, _CHRF_ORDER + 1):
        grams, targets = (_grams(text, order) for text in (said, wanted))
        # As in sacrebleu: what no reference n-gram could have matched is not held against the prediction.
        parts += [grams.total() if targets else 0, targets.total(), (grams & targets).total()]
    return parts


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def _answer_words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
