"""Lay out what the models reach on one task, with intervals: numbers in, coordinates out. Knows no HTML."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.report import MetricComparison, Span
from finetune_trainer.axis import Tick, label_of, round_values
from finetune_trainer.verdict import format_value, leading_comparisons

WIDTH = 560
LEFT, RIGHT, TOP, ROW, BOTTOM = 142, 86, 10, 34, 34


@dataclass(frozen=True, slots=True)
class Bar:
    """One model."""

    name: str
    is_tuned: bool
    value: str
    down: float
    across: float
    low: float
    """Across, as ``high``: the ends of the interval; both at the value where there is none."""
    high: float


@dataclass(frozen=True, slots=True)
class TaskChart:
    """Everything the drawing needs, in the units of its view box."""

    task: str
    metric: str
    bars: tuple[Bar, ...]
    values: tuple[Tick, ...]
    height: int
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP

    @property
    def bottom(self) -> int:
        """Down to the axis."""
        return self.height - BOTTOM


def lay_out_tasks(metrics: Sequence[MetricComparison]) -> tuple[TaskChart, ...]:
    """Return a chart for each task's most telling figure, of those whose base was measured."""
    return tuple(_lay_out(one, one.base) for one in leading_comparisons(metrics) if one.base is not None)


def _lay_out(comparison: MetricComparison, base: float) -> TaskChart:
    models: list[tuple[str, float, Span | None]] = [("base", base, comparison.base_interval)]
    if comparison.few_shot is not None:
        models.append(("with examples", comparison.few_shot.value, comparison.few_shot.interval))
    models.append(("tuned", comparison.tuned, comparison.tuned_interval))
    spans = [span or Span(low=value, high=value) for _, value, span in models]
    # From 0: bars of which the start is left out make small differences look large.
    values = round_values(0.0, max(span.high for span in spans), whole=False)

    def place(value: float) -> float:
        return round(LEFT + (value - values[0]) / (values[-1] - values[0]) * (WIDTH - LEFT - RIGHT), 1)

    return TaskChart(
        task=comparison.task,
        metric=comparison.metric,
        bars=tuple(
            Bar(
                name=name,
                is_tuned=name == "tuned",
                value=format_value(comparison, value),
                down=TOP + ROW * (number + 0.5),
                across=place(value),
                low=place(span.low),
                high=place(span.high),
            )
            for number, ((name, value, _), span) in enumerate(zip(models, spans, strict=True))
        ),
        values=tuple(Tick(place(value), label_of(value, values[1] - values[0])) for value in values),
        height=TOP + ROW * len(models) + BOTTOM,
    )
