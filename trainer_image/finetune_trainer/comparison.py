"""Put one figure of the base beside the same figure of the tuned model, with how sure the difference is. Pure."""

from collections.abc import Sequence

from finetune_api.report import FewShotComparison, MetricComparison
from finetune_trainer.figure import Figure
from finetune_trainer.gate import Measurement
from finetune_trainer.statistics import paired_difference


def measure(base: Figure, tuned: Figure, seed: int, groups: Sequence[object] | None = None) -> Measurement:
    """Return both figures and the bootstrap of their difference; rows of one of ``groups`` are drawn together."""
    return Measurement(
        base=base.value,
        tuned=tuned.value,
        difference=paired_difference(base.rows, tuned.rows, base.combine, seed, groups),
        rows=len(base.rows),
        higher_is_better=base.higher_is_better,
    )


def describe(task: str, metric: str, found: Measurement, note: str = "") -> MetricComparison:
    """Return ``found`` as the report has it."""
    interval = found.difference.interval()
    return MetricComparison(
        task=task,
        metric=metric,
        base=found.base,
        tuned=found.tuned,
        delta=found.difference.measured,
        low=interval.low,
        high=interval.high,
        rows=found.rows,
        higher_is_better=found.higher_is_better,
        note=note,
    )


def few_shot_comparison(found: Measurement) -> FewShotComparison:
    """Return ``found``, whose base was shown examples, as the report has it."""
    interval = found.difference.interval()
    return FewShotComparison(value=found.base, delta=found.difference.measured, low=interval.low, high=interval.high)
