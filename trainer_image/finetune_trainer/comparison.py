"""Put one figure of the base beside the same figure of the tuned model, with how sure the difference is. Pure."""

import math
from collections.abc import Hashable, Sequence

from finetune_api.report import FewShotComparison, MetricComparison, Span
from finetune_trainer.figure import Figure
from finetune_trainer.gate import Measurement
from finetune_trainer.statistics import (
    FEW_ROWS,
    Difference,
    Interval,
    adjusted_p_values,
    paired_difference,
    rows_needed,
)


def measure(base: Figure, tuned: Figure, seed: int, groups: Sequence[Hashable] | None = None) -> Measurement:
    """Return both figures and the bootstrap of their difference; rows of one of ``groups`` are drawn together."""
    return Measurement(
        base=base.value,
        tuned=tuned.value,
        difference=paired_difference(base.rows, tuned.rows, base.combine, seed, groups),
        rows=len(base.rows),
        higher_is_better=base.higher_is_better,
        groups=None if groups is None else len({*groups}),
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
        p_value=_p_value(found),
        rows=found.rows,
        groups=found.groups,
        base_interval=_span(found.difference.base),
        tuned_interval=_span(found.difference.tuned),
        rows_needed=_rows_needed(found),
        higher_is_better=found.higher_is_better,
        note=note,
    )


def adjust_for_many(comparisons: Sequence[MetricComparison]) -> tuple[MetricComparison, ...]:
    """Return the comparisons with their p-values corrected for how many there are."""
    known = [index for index, one in enumerate(comparisons) if one.p_value is not None]
    adjusted = dict(zip(known, adjusted_p_values([comparisons[index].p_value or 0.0 for index in known]), strict=True))
    return tuple(
        one.model_copy(update={"adjusted_p_value": adjusted.get(index)}) for index, one in enumerate(comparisons)
    )


def _rows_needed(found: Measurement) -> int | None:
    """Return how many rows would let a 95 % interval exclude zero, were the measured difference the true one."""
    sign = 1 if found.difference.measured > 0 else -1
    away_from_zero = Difference(sign * found.difference.measured, sign * found.difference.drawn)
    needed = rows_needed(away_from_zero, found.rows, margin=0.0, confidence=0.975)
    return None if needed is None else max(needed, FEW_ROWS)


def few_shot_comparison(found: Measurement) -> FewShotComparison:
    """Return ``found``, whose base was shown examples, as the report has it."""
    interval = found.difference.interval()
    return FewShotComparison(
        value=found.base,
        interval=_span(found.difference.base),
        delta=found.difference.measured,
        low=interval.low,
        high=interval.high,
        p_value=_p_value(found),
    )


def _p_value(found: Measurement) -> float | None:
    p_value = found.difference.p_value
    return None if math.isnan(p_value) else p_value


def _span(interval: Interval | None) -> Span | None:
    return None if interval is None else Span(low=interval.low, high=interval.high)
