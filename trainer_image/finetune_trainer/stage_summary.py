"""Say how a stage ended in the words of the status. Pure."""

from collections.abc import Iterable

from finetune_api.report import (
    ArtifactKind,
    DataReport,
    EvaluationReport,
    ExitCode,
    MetricComparison,
    Overlap,
    Rehearsal,
    Report,
    Stage,
    TaskData,
    TrainingReport,
)
from finetune_api.stage_result import StageResult
from finetune_api.status import (
    LONGEST_MESSAGE,
    LONGEST_WARNING,
    MOST_WARNINGS,
    DataStatus,
    EvaluationStatus,
    LabelStatus,
    MetricValue,
    OverlapStatus,
    PersonalDataStatus,
    PlanStatus,
    PublishedArtifact,
    RehearsalStatus,
    RowsStatus,
    Summary,
    TaskDataStatus,
    TaskResult,
    figure,
)
from finetune_trainer.verdict import format_value, judge, leading_comparisons

_MOST_TASKS = 64
_MOST_GATES = 32
_MOST_FORGOTTEN = 16
_MOST_BENCHMARKS = 16
_MOST_OVERLAPS = 16
_MOST_DESCRIBED = 16
_MOST_LABELS = 8
_LABEL = 64
_TEXT = 256


def failure(stage: Stage, exit_code: ExitCode, message: str) -> StageResult:
    """Return the result of a stage that ended with an error."""
    return StageResult(stage=stage, exit_code=exit_code, message=_clipped(message, LONGEST_MESSAGE))


def check_result(report: DataReport, plan: PlanStatus | None, model_revision: str | None = None) -> StageResult:
    """Return what the check stage found."""
    rows, warnings = report.rows, (*(plan.warnings if plan else ()), *report.warnings)
    return StageResult(
        stage=Stage.CHECK,
        exit_code=ExitCode.OK,
        model_revision=model_revision,
        plan=(plan or PlanStatus()).model_copy(
            update={"warnings": tuple(_clipped(text, LONGEST_WARNING) for text in warnings[:MOST_WARNINGS])}
        ),
        data=DataStatus(
            rows=RowsStatus(train=rows.train, validation=rows.validation, test=rows.test),
            tokens=report.tokens,
            longest_tokens=report.longest_tokens,
            max_length=report.max_length,
            truncated_percent=figure(report.truncated_percent),
            duplicates=report.duplicates,
            exact_duplicates=report.exact_duplicates,
            leakage=report.leakage,
            overlaps=_overlaps(report.overlaps),
            personal_data=PersonalDataStatus.model_validate(report.personal_data.model_dump()),
            tasks=tuple(_task_data(task) for task in report.tasks[:_MOST_DESCRIBED]),
            layout=_clipped(report.layout, _TEXT),
            rehearsal=report.rehearsal and _rehearsal(report.rehearsal),
            hash=report.hash,
        ),
    )


def _overlaps(overlaps: Iterable[Overlap]) -> tuple[OverlapStatus, ...]:
    found = [overlap for overlap in overlaps if overlap.overlapping]
    found.sort(key=lambda overlap: (-overlap.given_away, -overlap.overlapping))
    return tuple(
        OverlapStatus(
            source=_clipped(overlap.source, _TEXT),
            questions=overlap.questions,
            overlapping=overlap.overlapping,
            given_away=overlap.given_away,
        )
        for overlap in found[:_MOST_OVERLAPS]
    )


def _task_data(task: TaskData) -> TaskDataStatus:
    commonest = sorted(task.labels.items(), key=lambda item: -item[1])[:_MOST_LABELS]
    return TaskDataStatus(
        name=task.task,
        rows=task.rows.train,
        language=next(iter(task.languages), ""),
        labels=tuple(LabelStatus(label=_clipped(label, _LABEL), rows=count) for label, count in commonest),
    )


def _rehearsal(rehearsal: Rehearsal) -> RehearsalStatus:
    return RehearsalStatus(seconds=round(rehearsal.seconds), why_not=_clipped(rehearsal.why_not, _TEXT))


def train_result(report: TrainingReport) -> StageResult:
    """Return how training went."""
    last = next((point for point in reversed(report.curve) if point.validation_loss is not None), None)
    values = {
        "steps": report.steps,
        "loss": report.final_loss,
        "validation_loss": None if last is None else last.validation_loss,
        "tokens_per_second": report.tokens_per_second,
        "peak_memory_bytes": report.peak_memory_bytes,
    }
    return StageResult(
        stage=Stage.TRAIN,
        exit_code=ExitCode.OK,
        message=_clipped("; ".join(report.warnings), LONGEST_MESSAGE),
        resumed_from_step=report.resumed_from_step,
        latest_metrics=tuple(
            MetricValue(name=name, value=figure(value)) for name, value in values.items() if value is not None
        ),
    )


def evaluate_result(report: Report, report_uri: str, report_sha256: str, report_bytes: int) -> StageResult:
    """Return what was measured and published.

    Args:
        report: of the whole run.
        report_uri: where the published report lies.
        report_sha256: of its manifest.
        report_bytes: of all its files.
    """
    evaluation = report.evaluation
    metrics = () if evaluation is None else evaluation.metrics
    published = [PublishedArtifact.model_validate(artifact.model_dump()) for artifact in report.artifacts]
    published.append(
        PublishedArtifact(kind=ArtifactKind.REPORT, uri=report_uri, sha256=report_sha256, bytes=report_bytes)
    )
    return StageResult(
        stage=Stage.EVALUATE,
        exit_code=ExitCode.OK,
        model_revision=report.base_revision,
        evaluation=EvaluationStatus(
            tasks=tuple(_task_result(metric) for metric in metrics[:_MOST_TASKS]),
            # The first are kept where there is no room for all: those that decided.
            gates=()
            if evaluation is None
            else tuple(sorted(evaluation.gates, key=lambda gate: gate.passed))[:_MOST_GATES],
            forgetting=tuple(_task_result(metric) for metric in _forgotten(evaluation)[:_MOST_FORGOTTEN]),
            benchmarks=tuple(_task_result(metric) for metric in _benchmarked(evaluation)[:_MOST_BENCHMARKS]),
        ),
        artifacts=tuple(published),
        summary=None if evaluation is None else _summary(metrics, judge(evaluation).sentence),
        report_sha256=report_sha256,
        published=report.published,
        why_not_published=_clipped(report.why_not_published, _TEXT),
    )


def _forgotten(evaluation: EvaluationReport | None) -> tuple[MetricComparison, ...]:
    return () if evaluation is None or evaluation.forgetting is None else evaluation.forgetting.tasks


def _benchmarked(evaluation: EvaluationReport | None) -> list[MetricComparison]:
    """Return the figures of all benchmarks, the first ones of each before any of the others."""
    found = () if evaluation is None else evaluation.benchmarks
    ranked = [(rank, metric) for benchmark in found for rank, metric in enumerate(benchmark.metrics)]
    return [metric for _, metric in sorted(ranked, key=lambda pair: pair[0])]


def _task_result(metric: MetricComparison) -> TaskResult:
    return TaskResult(
        name=metric.task,
        metric=metric.metric,
        base=_figure(metric.base),
        few_shot=None if metric.few_shot is None else figure(metric.few_shot.value),
        tuned=figure(metric.tuned),
        delta=_figure(metric.delta),
        low=_figure(metric.low),
        high=_figure(metric.high),
    )


def _summary(metrics: tuple[MetricComparison, ...], sentence: str) -> Summary:
    leading = next(iter(leading_comparisons(metrics)), None)
    if leading is None:
        return Summary(message=_clipped(sentence, _TEXT))
    return Summary(
        metric=_clipped(f"{leading.task} {leading.metric} {format_value(leading, leading.tuned)}", _TEXT),
        delta="" if leading.delta is None else f"{leading.delta:+.3f}",
        message=_clipped(sentence, _TEXT),
    )


def _figure(value: float | None) -> str | None:
    return None if value is None else figure(value)


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
