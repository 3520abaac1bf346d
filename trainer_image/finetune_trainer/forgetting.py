"""Whether tuning cost more general ability than allowed: a non-inferiority test. Pure.

Not a comparison of point estimates: with 200 rows, a drop of 0.02 is seen in every fifth model that lost nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

from finetune_trainer.statistics import Difference


class Retention(StrEnum):
    """What can be said about a drop."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class ForgettingVerdict:
    """The judgement and the sentence that gives its reason."""

    retention: Retention
    sentence: str


def judge_retention(difference: Difference, max_drop: float, confidence: float, rows: int) -> ForgettingVerdict:
    """Return whether the accuracy of the tuned model is at most ``max_drop`` below its base's.

    Args:
        difference: tuned minus base, over the deciding half of the suite.
        max_drop: the budget.
        confidence: one-sided; of the bound that must stay inside the budget, or outside for a failure.
        rows: how many were measured, for the sentence.
    """
    low, high = difference.lower_bound(confidence), difference.upper_bound(confidence)
    facts = (
        f"accuracy on general tasks changed by {difference.measured:+.3f} ({confidence:.0%} sure that it is above "
        f"{low:+.3f}; {rows:,} rows), and a drop of {max_drop:g} is allowed."
    )
    if low >= -max_drop:
        return ForgettingVerdict(Retention.PASSED, f"The model kept its general ability: {facts}")
    if high < -max_drop:
        return ForgettingVerdict(Retention.FAILED, f"The model forgot too much: {facts}")
    return ForgettingVerdict(Retention.INCONCLUSIVE, f"Whether the model forgot too much cannot be told: {facts}")
