"""Numbers and messages as people read them: one wording for terminals and pipes. Pure."""

from collections.abc import Sequence

from finetune_api.plain_text import one_line
from finetune_api.report import EvaluationReport, MetricComparison, Progress
from finetune_trainer.verdict import format_value

COLUMNS = ("task", "metric", "base", "tuned", "delta", "95 % interval")
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


def comparison_rows(evaluation: EvaluationReport) -> list[tuple[str, ...]]:
    """Return one row of text per metric, for `COLUMNS`."""
    return [
        (
            one_line(metric.task),
            metric.metric,
            _value(metric, metric.base),
            _value(metric, metric.tuned),
            _difference(metric, metric.delta),
            _interval(metric),
        )
        for metric in evaluation.metrics
    ]


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


def _value(metric: MetricComparison, value: float | None) -> str:
    return _ABSENT if value is None else format_value(metric, value)


def _difference(metric: MetricComparison, value: float | None) -> str:
    return _ABSENT if value is None else f"{'-' if value < 0 else '+'}{format_value(metric, abs(value))}"


def _interval(metric: MetricComparison) -> str:
    if metric.low is None or metric.high is None:
        return _ABSENT
    return f"{_difference(metric, metric.low)} to {_difference(metric, metric.high)}"
