"""Numbers and messages as people read them: one wording for terminals and pipes. Pure."""

from collections.abc import Sequence

from finetune_api.plain_text import one_line
from finetune_api.report import EvaluationReport, MetricComparison, Progress
from finetune_trainer.verdict import format_value

_ABSENT = "-"


def duration(seconds: float) -> str:
    """Return ``m:ss``, from an hour on ``h:mm:ss``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def subject(progress: Progress) -> str:
    """Return what is being done; nothing where the stage and its step say it."""
    return "" if progress.step is not None and progress.message == "training" else one_line(progress.message)


def numbers(progress: Progress) -> list[str]:
    """Return what ``progress`` knows, the most wanted first."""
    known = []
    if progress.step is not None:
        known.append(f"step {progress.step}/{progress.total_steps or '?'}")
    if progress.loss is not None:
        known.append(f"loss {progress.loss:.3f}")
    if progress.eta_seconds is not None:
        known.append(f"{duration(progress.eta_seconds)} left")
    if progress.rows_per_second is not None:
        known.append(f"{progress.rows_per_second:.1f} rows/s")
    if progress.validation_loss is not None:
        known.append(f"validation loss {progress.validation_loss:.3f}")
    return known


def comparison_table(evaluation: EvaluationReport) -> list[tuple[str, ...]]:
    """Return the names of the columns and one row of text per metric; what no metric knows has no column."""
    columns = [
        ("task", [one_line(metric.task) for metric in evaluation.metrics]),
        ("metric", [metric.metric for metric in evaluation.metrics]),
        ("base", [_value(metric, metric.base) for metric in evaluation.metrics]),
        ("tuned", [_value(metric, metric.tuned) for metric in evaluation.metrics]),
        ("delta", [_difference(metric, metric.delta) for metric in evaluation.metrics]),
        ("95 % interval", [_interval(metric) for metric in evaluation.metrics]),
    ]
    if any(metric.adjusted_p_value is not None for metric in evaluation.metrics):
        columns.append(("p", [p_value(metric.adjusted_p_value) for metric in evaluation.metrics]))
    if any(metric.rows_needed is not None for metric in evaluation.metrics):
        columns.append(("rows needed", [_count(metric.rows_needed) for metric in evaluation.metrics]))
    return list(zip(*([name, *cells] for name, cells in columns), strict=True))


def aligned(rows: Sequence[tuple[str, ...]], texts: int = 2) -> list[str]:
    """Return ``rows`` as lines of equal columns; the first ``texts`` are text, the others numbers, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def p_value(value: float | None) -> str:
    """Return a p-value with the digits that matter."""
    return _ABSENT if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _count(number: int | None) -> str:
    return _ABSENT if number is None else f"{number:,}"


def _value(metric: MetricComparison, value: float | None) -> str:
    return _ABSENT if value is None else format_value(metric, value)


def _difference(metric: MetricComparison, value: float | None) -> str:
    return _ABSENT if value is None else f"{'-' if value < 0 else '+'}{format_value(metric, abs(value))}"


def _interval(metric: MetricComparison) -> str:
    if metric.low is None or metric.high is None:
        return _ABSENT
    return f"{_difference(metric, metric.low)} to {_difference(metric, metric.high)}"
