"""What a cluster knows of a job, as lines of plain text. Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from finetune_api.plain_text import one_line
from finetune_api.report import ArtifactKind, EvaluationReport, MetricComparison, Progress
from finetune_api.status import (
    Attempt,
    Condition,
    ConditionStatus,
    ConditionType,
    DataStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    PlanStatus,
    ProgressStatus,
    Reason,
    RehearsalStatus,
    TaskDataStatus,
    TaskResult,
)
from finetune_cli.cluster_job import ClusterJob
from finetune_cli.wording import aligned, comparison_table, duration, numbers, subject
from finetune_operator.condition import find

_BAR = 20
_ABSENT = "-"


def status_lines(job: ClusterJob, now: datetime) -> list[str]:
    """Return everything that is known of ``job``, the most wanted first."""
    status = job.status
    sections = (
        _head(job),
        _progress(status),
        _section("Conditions", _conditions(status.conditions)),
        _section("Attempts", _attempts(status.attempts, now)),
        _section("Plan", _plan(status.plan)),
        _section("Data", _data(status.data)),
        result_lines(status),
    )
    return _spaced(sections)


def result_lines(status: FineTuneJobStatus) -> list[str]:
    """Return what came out: base against tuned, gates, what was published where."""
    return _spaced((_section("Evaluation", _evaluation(status.evaluation)), _section("Artifacts", _artifacts(status))))


def job_table(jobs: Sequence[ClusterJob], now: datetime) -> list[str]:
    """Return one line a job, as ``kubectl get`` shows them."""
    rows: list[tuple[str, ...]] = [("NAME", "PHASE", "METHOD", "PROGRESS", "METRIC", "DELTA", "PUBLISHED", "AGE")]
    for job in sorted(jobs, key=lambda one: one.name.name):
        summary = job.status.summary
        texts = (summary.progress, summary.metric, summary.delta) if summary else ("", "", "")
        rows.append(
            (
                job.name.name,
                str(job.status.phase or ""),
                one_line(str((job.spec.get("method") or {}).get("type", ""))),
                *(one_line(text) for text in texts),
                _publication(job.status),
                _age(job.created, now),
            )
        )
    return aligned(rows, texts=len(rows[0]))


def _publication(status: FineTuneJobStatus) -> str:
    published = find(status, ConditionType.PUBLISHED)
    return published.reason.value if published else ""


def as_progress(progress: ProgressStatus, metrics: dict[str, str]) -> Progress:
    """Return what the status says of progress as a trainer says it, so that both are shown alike."""
    return Progress(
        stage=progress.stage,
        message=progress.message,
        percent=progress.percent,
        step=progress.step,
        total_steps=progress.total_steps,
        loss=_number(metrics.get("loss")),
        validation_loss=_number(metrics.get("validation_loss")),
        eta_seconds=progress.eta_seconds,
    )


def latest_metrics(status: FineTuneJobStatus) -> dict[str, str]:
    """Return what the trainer reported last, by name."""
    return {metric.name: metric.value for metric in status.latest_metrics}


def news(before: FineTuneJobStatus | None, now: FineTuneJobStatus) -> list[str]:
    """Return a line for every condition that changed."""
    known = {} if before is None else {condition.type: condition for condition in before.conditions}
    return [_news_line(condition) for condition in _in_order(now.conditions) if _differs(known, condition)]


# --- sections


def _spaced(sections: Iterable[list[str]]) -> list[str]:
    """Return the lines of ``sections`` with an empty one between any two that say something."""
    return [line for section in sections if section for line in ("", *section)][1:]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _head(job: ClusterJob) -> list[str]:
    status = job.status
    rows = [("Job", str(job.name)), ("Phase", _phase(job))]
    if status.summary and status.summary.message:
        rows.append(("", one_line(status.summary.message)))
    rows.append(("Model", one_line(str((job.spec.get("model") or {}).get("source", _ABSENT)))))
    rows.append(("Method", one_line(str((job.spec.get("method") or {}).get("type", _ABSENT)))))
    if status.resolved and status.resolved.output_path:
        rows.append(("Output", one_line(status.resolved.output_path)))
    return aligned(rows)


def _phase(job: ClusterJob) -> str:
    if job.is_deleting:
        return "being deleted"
    if job.status.phase is None:
        return "not looked at yet. If it stays so, no operator runs: helm list --all-namespaces"
    return job.status.phase.value


def _progress(status: FineTuneJobStatus) -> list[str]:
    if status.progress is None or (status.phase and status.phase.is_terminal):
        return []
    progress = as_progress(status.progress, latest_metrics(status))
    words = ", ".join(part for part in (subject(progress), *numbers(progress)) if part)
    if progress.percent is None:
        return [f"{progress.stage.value}  {words}"]
    filled = round(_BAR * progress.percent / 100)
    return [f"{progress.stage.value}  [{'#' * filled}{'-' * (_BAR - filled)}]  {progress.percent:.0f} %  {words}"]


def _conditions(conditions: Sequence[Condition]) -> list[str]:
    rows = [
        (condition.type.value, condition.status.value, condition.reason.value, one_line(condition.message))
        for condition in _in_order(conditions)
    ]
    return aligned(rows, texts=4) if rows else []


def _in_order(conditions: Sequence[Condition]) -> list[Condition]:
    return sorted(conditions, key=lambda condition: list(ConditionType).index(condition.type))


def _attempts(attempts: Sequence[Attempt], now: datetime) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "reason", "node", "change", "number", "exit", "from step", "ran")]
    rows += [_attempt(attempt, now) for attempt in attempts]
    return aligned(rows, texts=4) if attempts else []


def _attempt(attempt: Attempt, now: datetime) -> tuple[str, ...]:
    end = attempt.end_time or now
    ran = _ABSENT if attempt.start_time is None else duration((end - attempt.start_time).total_seconds())
    return (
        attempt.stage.value,
        (attempt.reason or (Reason.RUNNING if attempt.start_time else Reason.WAITING)).value,
        one_line(attempt.node or _ABSENT),
        one_line(attempt.change or _ABSENT),
        str(attempt.number),
        _count(attempt.exit_code),
        _count(attempt.resumed_from_step),
        ran,
    )


def _plan(plan: PlanStatus | None) -> list[str]:
    if plan is None:
        return []
    return [f"{_plan_numbers(plan)}".rstrip(), *(f"warning: {one_line(warning)}" for warning in plan.warnings)]


def _plan_numbers(plan: PlanStatus) -> str:
    known = []
    if plan.trainable_parameters is not None and plan.parameters is not None:
        share = f" ({plan.trainable_percent} %)" if plan.trainable_percent else ""
        known.append(f"{plan.trainable_parameters:,} of {plan.parameters:,} parameters{share}")
    if plan.gpus is not None:
        needed = f" ({plan.gpus_needed} needed)" if plan.gpus_needed not in (None, plan.gpus) else ""
        known.append("no GPU" if plan.gpus == 0 else f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}{needed}")
    if plan.memory_bytes_per_gpu:
        room = f" of {_size(plan.gpu_memory_bytes)}" if plan.gpus and plan.gpu_memory_bytes else ""
        known.append(f"{_size(plan.memory_bytes_per_gpu)}{room} each")
    return ", ".join(known)


def _data(data: DataStatus | None) -> list[str]:
    if data is None:
        return []
    rows = data.rows
    known = [f"{rows.train:,} training, {rows.validation:,} validation, {rows.test:,} test rows"]
    known += [f"{data.tokens:,} tokens"] if data.tokens is not None else []
    known += [f"{data.truncated_percent} % shortened"] if data.truncated_percent not in (None, "0") else []
    exact = f" ({data.exact_duplicates:,} exact)" if data.exact_duplicates else ""
    known += [f"{data.duplicates:,} duplicates{exact}"] if data.duplicates else []
    known += [f"{data.leakage:,} test rows also in training"] if data.leakage else []
    lines = [", ".join(known), *map(_task_data, data.tasks)]
    lines += [
        f"{overlap.overlapping:,} of {overlap.questions:,} questions of {one_line(overlap.source)} share words in a "
        f"row with training rows, {overlap.given_away:,} as a whole"
        for overlap in data.overlaps
    ]
    if (personal := data.personal_data) is not None and (personal.emails or personal.phones or personal.keys):
        lines.append(
            f"personal data: {personal.emails:,} e-mail, {personal.phones:,} telephone, {personal.keys:,} secret keys"
        )
    if data.layout:
        lines.append(f"rows are {one_line(data.layout)}")
    if data.rehearsal is not None:
        lines.append(_rehearsal(data.rehearsal))
    return lines


def _rehearsal(rehearsal: RehearsalStatus) -> str:
    if rehearsal.why_not:
        return f"not rehearsed to the end: {one_line(rehearsal.why_not)}"
    return f"rehearsed in small in {duration(rehearsal.seconds)}"


def _task_data(task: TaskDataStatus) -> str:
    known = [f"{task.rows:,} training rows"]
    known += [f"language {one_line(task.language)}"] if task.language else []
    known += [f"{one_line(label.label)} {label.rows:,}" for label in task.labels]
    return f"task {one_line(task.name)}: {', '.join(known)}"


def _evaluation(evaluation: EvaluationStatus | None) -> list[str]:
    if evaluation is None:
        return []
    results = (*evaluation.tasks, *evaluation.forgetting, *evaluation.benchmarks)
    compared = EvaluationReport(metrics=tuple(_comparison(result) for result in results))
    table = aligned(comparison_table(compared)) if results else []
    gates = [
        f"gate {one_line(gate.metric)}: {'passed' if gate.passed else 'NOT passed'}"
        f"{f', {one_line(gate.why)}' if gate.why else ''}"
        for gate in evaluation.gates
    ]
    return [*table, *gates]


def _comparison(result: TaskResult) -> MetricComparison:
    """Return ``result`` as the report has it; the number of rows is in the report alone."""
    return MetricComparison(
        task=result.name,
        metric=result.metric,
        base=_number(result.base),
        tuned=float(result.tuned),
        delta=_number(result.delta),
        low=_number(result.low),
        high=_number(result.high),
        rows=0,
    )


def _artifacts(status: FineTuneJobStatus) -> list[str]:
    rows = [
        (_artifact(artifact.kind), one_line(artifact.uri), _size(artifact.bytes), f"sha256 {artifact.sha256[:12]}")
        for artifact in status.artifacts
    ]
    return aligned(rows) if rows else []


def _artifact(kind: ArtifactKind) -> str:
    return "merged model" if kind is ArtifactKind.MERGED else kind.value


# --- words


def _differs(known: dict[ConditionType, Condition], condition: Condition) -> bool:
    before = known.get(condition.type)
    # What does not hold and never did is no news: Trained=False while the rows are checked.
    if before is None:
        return condition.status is ConditionStatus.TRUE or bool(condition.message)
    return (before.status, before.reason, before.message) != (condition.status, condition.reason, condition.message)


def _news_line(condition: Condition) -> str:
    # "Checked: StageSucceeded" reads well; of what does not hold yet the reason alone would say the contrary.
    name = condition.type.value if condition.status is ConditionStatus.TRUE else f"not {condition.type.value}"
    message = f": {one_line(condition.message)}" if condition.message else ""
    return f"{name} ({condition.reason.value}){message}"


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _count(number: int | None) -> str:
    return _ABSENT if number is None else str(number)


def _size(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _age(created: str, now: datetime) -> str:
    seconds = max(0, int((now - datetime.fromisoformat(created)).total_seconds()))
    return next(f"{seconds // size}{unit}" for size, unit in _UNITS if seconds >= size or size == 1)


_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
