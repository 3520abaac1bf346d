"""Decide between the labels of a closed set by how likely a model finds each; nothing is generated. Pure: numbers only.

A plain sum of log-probabilities can hardly ever choose a label of two tokens over one of a single token, and an
untuned model has favourites that the prompt's wording shifts. How likelihoods are compared is therefore chosen for the
base model, on the validation split; a tuned model has learnt where a label ends, its plain sum is what it believes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Normaliser(StrEnum):
    """How the log-likelihoods of labels are made comparable. On a tie the earlier one is chosen."""

    SUM = "sum"
    MEAN = "mean"
    CALIBRATED = "calibrated"


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What a model thinks of every label behind every prompt."""

    sums: Floats
    """``[rows, labels]``: log-probability of the whole completion, end token included, in nats."""
    tokens: NDArray[np.int64]
    """``[rows, labels]``: tokens of each completion."""


@dataclass(frozen=True, slots=True)
class PromptDecision:
    """The template and normaliser that serve a model best on the validation split."""

    template: int
    normaliser: Normaliser
    prior: Floats
    """``[labels]``: mean log-likelihood of each label under that template; what calibration takes away."""
    accuracy: float
    candidates: dict[str, float]
    """Accuracy of everything tried, keyed ``template 0, mean``, or ``raw template 0, mean`` for a chat job's prompts
    without the chat template."""
    format: str = ""
    """``raw`` when that is how a chat job's base does best."""


def with_label(completion: str, label: str) -> str:
    """Return ``completion`` saying ``label`` instead, with the white space around it kept.

    The boundary of prompt and label must be the one the model was trained on: a space in the wrong place costs more
    accuracy than many a training run wins.
    """
    text = completion.strip()
    start = completion.index(text)
    return completion[:start] + label + completion[start + len(text) :]


def collect_scores(logprobs: Sequence[Floats], labels: int) -> LabelScores:
    """Return the scores of rows whose completions lie one after the other, ``labels`` of them per row.

    Raises:
        ValueError: the completions do not make up whole rows.
    """
    if len(logprobs) % labels:
        raise ValueError(f"{len(logprobs)} scored completions are not whole rows of {labels} labels")
    sums = np.array([row.sum() for row in logprobs], dtype=np.float64).reshape(-1, labels)
    tokens = np.array([len(row) for row in logprobs], dtype=np.int64).reshape(-1, labels)
    return LabelScores(sums, tokens)


def label_prior(scores: LabelScores) -> Floats:
    """Return ``[labels]``: how likely the model finds each label whatever the prompt says."""
    return np.asarray(scores.sums.mean(axis=0), dtype=np.float64)


def predict(scores: LabelScores, normaliser: Normaliser, prior: Floats) -> NDArray[np.int64]:
    """Return ``[rows]``, the index of the label chosen in each row; the first of equally likely ones."""
    return np.asarray(np.argmax(_comparable(scores, normaliser, prior), axis=1), dtype=np.int64)


def confidences(scores: LabelScores, normaliser: Normaliser, prior: Floats) -> Floats:
    """Return ``[rows]``, the probability of the label chosen by `predict` among all labels, 1 / labels to 1."""
    comparable = _comparable(scores, normaliser, prior)
    odds = np.exp(comparable - comparable.max(axis=1, keepdims=True))
    # The likeliest label's odds are 1.
    return np.asarray(1 / odds.sum(axis=1), dtype=np.float64)


def _comparable(scores: LabelScores, normaliser: Normaliser, prior: Floats) -> Floats:
    match normaliser:
        case Normaliser.SUM:
            return scores.sums
        case Normaliser.MEAN:
            return scores.sums / scores.tokens
        case Normaliser.CALIBRATED:
            return scores.sums - prior
        case _:
            assert_never(normaliser)


def harness_accuracy(
    logprobs: Sequence[Floats], labels: Sequence[str], references: NDArray[np.int64], end_tokens: int
) -> tuple[float, float]:
    """Return (acc, acc_norm) as lm-evaluation-harness computes them for multiple choice.

    Args:
        logprobs: of every label's completion, label by label within row by row, as `collect_scores` takes them.
        labels: their texts; acc_norm divides by their characters.
        references: ``[rows]``, index of the right label.
        end_tokens: tokens at the end of every completion that are not the label's; the harness does not score them.
    """
    sums = np.array([row[: len(row) - end_tokens].sum() for row in logprobs]).reshape(-1, len(labels))
    characters = np.array([len(label) for label in labels], dtype=np.float64)
    acc, acc_norm = (float((scores.argmax(axis=1) == references).mean()) for scores in (sums, sums / characters))
    return acc, acc_norm


def choose_prompt(
    scores: Mapping[int, LabelScores], references: NDArray[np.int64], normalisers: Sequence[Normaliser]
) -> PromptDecision:
    """Return the template and normaliser with the highest accuracy; the first of equally good ones.

    Args:
        scores: for each template's index, the scores of the same validation rows in the same order.
        references: ``[rows]``, index of the right label.
        normalisers: those to choose from.

    Raises:
        ValueError: there is no row or nothing to choose from.
    """
    if not len(references) or not scores or not normalisers:
        raise ValueError("a prompt is chosen among at least one template and normaliser on at least one row")
    decisions = [
        PromptDecision(template, normaliser, prior, _accuracy(of_template, normaliser, prior, references), {})
        for template, of_template in scores.items()
        for prior in (label_prior(of_template),)
        for normaliser in normalisers
    ]
    best = max(decisions, key=lambda decision: decision.accuracy)  # max keeps the first of equals
    candidates = {f"template {tried.template}, {tried.normaliser}": tried.accuracy for tried in decisions}
    return PromptDecision(best.template, best.normaliser, best.prior, best.accuracy, candidates)


def _accuracy(scores: LabelScores, normaliser: Normaliser, prior: Floats, references: NDArray[np.int64]) -> float:
    return float((predict(scores, normaliser, prior) == references).mean())
