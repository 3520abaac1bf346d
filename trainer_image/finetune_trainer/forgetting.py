"""Whether tuning cost more general ability than allowed: a non-inferiority test. Pure.

Not a comparison of point estimates: with 200 rows, a drop of 0.02 is seen in every fifth model that lost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_api.report import ForgettingReport, GateResult, MetricComparison, Retention, RetentionResult
from finetune_api.spec import ForgettingSpec
from finetune_trainer.comparison import adjust_for_many, describe, measure
from finetune_trainer.figure import bits_per_byte_figure, mean_figure
from finetune_trainer.gate import Measurement
from finetune_trainer.general_suite import GeneralRow, GeneralSuite, text_parts
from finetune_trainer.statistics import FEW_GROUPS, FEW_ROWS, Difference, widened_confidence

GATE = "forgetting"
"""Name of the gate, beside ``<task>.<figure>``."""

PROSE = "general prose"

_LONGEST_REASON = 512


@dataclass(frozen=True, slots=True)
class SourceChange:
    """What became of accuracy on the rows of one source."""

    verdict: Retention
    why: str
    """The numbers behind it, in a sentence."""
    rows: int
    change: float
    """Tuned minus base."""
    low: float
    """What the change is above, with the budget's confidence."""


@dataclass(frozen=True, slots=True)
class GeneralAnswers:
    """What one model makes of a suite."""

    right: NDArray[np.bool_]
    """``[rows]``: whether it finds the right choice the likeliest."""
    text_logprobs: list[NDArray[np.float64]]
    """Of the tokens of each of the suite's texts, but for the first word."""


def compare_abilities(
    suite: GeneralSuite, base: GeneralAnswers, tuned: GeneralAnswers, budget: ForgettingSpec, seed: int
) -> ForgettingReport:
    """Return what each general task lost, and the verdict on each source of rows and on all together."""
    found = {
        source: measure_source(source, suite.rows, base, tuned, budget, seed)
        for source in dict.fromkeys(row.source for row in suite.rows)
    }
    results = tuple(
        RetentionResult(source=source, verdict=one.verdict, why=one.why, rows=one.rows, change=one.change)
        for source, one in found.items()
    )
    return ForgettingReport(
        verdict=_worst([result.verdict for result in results]),
        results=results,
        tasks=adjust_for_many(
            (*_compare_tasks(suite.rows, base, tuned, seed), _compare_prose(suite, base, tuned, seed))
        ),
    )


def measure_source(
    source: str,
    rows: Sequence[GeneralRow],
    base: GeneralAnswers,
    tuned: GeneralAnswers,
    budget: ForgettingSpec,
    seed: int,
) -> SourceChange:
    """Return what accuracy lost on the rows of one source, and whether that is within the budget."""
    chosen = [index for index, row in enumerate(rows) if row.source == source]
    found = _measure_rows(rows, chosen, base, tuned, seed)
    difference, groups = found.difference, found.groups or found.rows
    verdict, why = judge_retention(difference, budget.max_drop, budget.confidence, len(chosen), groups)
    # One group alone bounds nothing: accuracy can lose all that there is.
    low = difference.lower_bound(widened_confidence(budget.confidence, groups)) if groups > 1 else -1.0
    return SourceChange(verdict, why, len(chosen), difference.measured, low)


def judge_retention(
    difference: Difference, max_drop: float, confidence: float, rows: int, groups: int
) -> tuple[Retention, str]:
    """Return whether the accuracy of the tuned model is at most ``max_drop`` below its base's, and why, in a sentence.

    Args:
        difference: tuned minus base.
        max_drop: the budget.
        confidence: one-sided; of the bound that must stay inside the budget, or outside for a failure.
        rows: how many were measured.
        groups: of rows that are alike, as many as were drawn again.
    """
    if rows < FEW_ROWS or groups < FEW_GROUPS:
        few = (
            f"{rows:,} rows in {groups:,} groups decide nothing; at least {FEW_ROWS} rows in {FEW_GROUPS} groups are "
            "needed."
        )
        return Retention.INCONCLUSIVE, f"Whether the model forgot too much cannot be told: {few}"
    widened = widened_confidence(confidence, groups)
    low, high = difference.lower_bound(widened), difference.upper_bound(widened)
    facts = (
        f"accuracy on general tasks changed by {difference.measured:+.3f} ({confidence:.0%} sure that it is above "
        f"{low:+.3f}; {rows:,} rows in {groups:,} groups), and a drop of {max_drop:g} is allowed."
    )
    if low >= -max_drop:
        return Retention.PASSED, f"The model kept its general ability: {facts}"
    if high < -max_drop:
        return Retention.FAILED, f"The model forgot too much: {facts}"
    return Retention.INCONCLUSIVE, f"Whether the model forgot too much cannot be told: {facts}"


def forgetting_gate(found: ForgettingReport) -> GateResult:
    """Return the verdict as a gate: what is not shown to be kept does not pass, as with every other gate."""
    decisive = [result for result in found.results if result.verdict is found.verdict]
    why = " ".join(f"{result.source}: {result.why}" for result in decisive).removesuffix(".")
    return GateResult(metric=GATE, passed=found.verdict is Retention.PASSED, why=why[:_LONGEST_REASON])


def _worst(verdicts: Sequence[Retention]) -> Retention:
    return next(one for one in (Retention.FAILED, Retention.INCONCLUSIVE, Retention.PASSED) if one in verdicts)


def _compare_tasks(
    rows: Sequence[GeneralRow], base: GeneralAnswers, tuned: GeneralAnswers, seed: int
) -> list[MetricComparison]:
    comparisons = []
    for task in dict.fromkeys(row.task for row in rows):
        chosen = [index for index, row in enumerate(rows) if row.task == task]
        comparisons.append(describe(task, "accuracy", _measure_rows(rows, chosen, base, tuned, seed)))
    return comparisons


def _compare_prose(suite: GeneralSuite, base: GeneralAnswers, tuned: GeneralAnswers, seed: int) -> MetricComparison:
    texts = [text_parts(text)[1] for text in suite.texts]
    before, after = (bits_per_byte_figure(answers.text_logprobs, texts) for answers in (base, tuned))
    return describe(PROSE, "bits_per_byte", measure(before, after, seed))


def _measure_rows(
    rows: Sequence[GeneralRow], chosen: Sequence[int], base: GeneralAnswers, tuned: GeneralAnswers, seed: int
) -> Measurement:
    before, after = (mean_figure("accuracy", answers.right[chosen]) for answers in (base, tuned))
    # Rows that are alike rise and fall together.
    return measure(before, after, seed, [(rows[index].task, rows[index].group) for index in chosen])
