"""Turn what trainers post into what the status says. Pure. Nothing that is posted is believed to be well meant."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from finetune_api.plain_text import one_line, printable, printable_values
from finetune_api.progress_message import LONGEST_MESSAGE, MOST, ProgressMessage
from finetune_api.report import CONTRACT_VERSION, ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import MetricValue, ProgressStatus, figure

LONGEST_REASON = 256
MOST_METRICS = 32


@dataclass(frozen=True, slots=True)
class Moment:
    """How far a job was when its trainer said so."""

    progress: ProgressStatus
    metrics: Mapping[str, str]
    """Measured values as text, by name."""
    told: datetime | None = None
    """By the trainer's clock."""


def moment_of(message: ProgressMessage, stage: Stage, now: datetime) -> Moment:
    """Return what ``message``, received at ``now`` from the pod of ``stage``, says."""
    said = message.trainer_status
    values = {one_line(metric.name): _number(metric.value) for metric in said.metrics}
    step, steps, epoch = (values.pop(name, None) for name in ("current_step", "total_steps", "current_epoch"))
    known = {name: figure(value) for name, value in values.items() if name and value is not None}
    progress = ProgressStatus(
        stage=Stage.PUBLISH if said.stage is Stage.PUBLISH and stage is Stage.EVALUATE else stage,
        message=one_line(said.message[:LONGEST_MESSAGE]),
        percent=_whole(said.progress_percentage),
        step=_whole(step) if said.step is None else said.step,
        total_steps=_whole(steps) if said.total_steps is None else said.total_steps,
        epoch=_figure(epoch if said.epoch is None else said.epoch),
        eta_seconds=_whole(said.estimated_remaining_seconds),
        tokens_per_second=known.get("tokens_per_second"),
        last_update_time=now,
    )
    return Moment(progress, dict(list(known.items())[:MOST_METRICS]), said.last_updated_time)


def final_moment(result: StageResult, now: datetime) -> Moment:
    """Return the last moment of a stage that ended with ``result``."""
    percent = 100 if result.exit_code is ExitCode.OK else None
    return Moment(
        ProgressStatus(stage=result.stage, percent=percent, eta_seconds=0 if percent else None, last_update_time=now),
        {metric.name: metric.value for metric in result.latest_metrics},
    )


def followed(earlier: Moment, later: Moment) -> Moment:
    """Return ``later`` with what ``earlier``, of the same attempt, said and it does not say again."""
    metrics = {**earlier.metrics, **later.metrics}
    newest = dict(list(metrics.items())[-MOST_METRICS:])
    if earlier.progress.stage is not later.progress.stage:
        return replace(later, metrics=newest)
    unsaid = [name for name, value in later.progress if value is None]
    kept = {name: getattr(earlier.progress, name) for name in unsaid}
    return replace(later, progress=later.progress.model_copy(update=kept), metrics=newest)


def is_outdated(earlier: Moment, later: Moment) -> bool:
    """Whether ``later`` was received later and said earlier."""
    return earlier.told is not None and later.told is not None and later.told < earlier.told


def status_patch(moment: Moment) -> dict[str, Any]:
    """Return the part of the status that progress owns, as a merge patch: None removes."""
    progress = moment.progress
    patch: dict[str, Any] = {
        "progress": progress.model_dump(mode="json", by_alias=True),
        "summary": {
            "progress": None if progress.percent is None else f"{progress.percent} %",
            "eta": None if progress.eta_seconds is None else short_duration(progress.eta_seconds),
        },
    }
    if moment.metrics:
        metrics = (MetricValue(name=name, value=value) for name, value in moment.metrics.items())
        patch["latestMetrics"] = [metric.model_dump(mode="json", by_alias=True) for metric in metrics]
    return patch


def short_duration(seconds: int) -> str:
    """Return ``seconds`` for a narrow column: ``45s``, ``12m``, ``3h05m``, ``2d4h``."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m" if minutes else f"{seconds}s"


def read_result(body: bytes, stage: Stage) -> StageResult:
    """Return the result of ``stage`` in ``body``. One of another contract version keeps nothing but that version.

    Raises:
        ValueError: it is none; pydantic's ValidationError is a ValueError too.
    """
    content = printable_values(from_json(body))
    version = content.get("contractVersion", CONTRACT_VERSION) if isinstance(content, dict) else CONTRACT_VERSION
    if isinstance(version, int) and version != CONTRACT_VERSION:
        return StageResult(contract_version=version, stage=stage, exit_code=ExitCode.INTERNAL)
    result = StageResult.model_validate(content, by_alias=True, by_name=False)
    if result.stage is not stage:
        raise ValueError(f"a result of stage {result.stage.value} at the address of stage {stage.value}")
    return result


def short_reason(error: ValueError) -> str:
    """Return what is wrong with a body, in a line that holds little of it."""
    return one_line(printable(str(error))[:LONGEST_REASON])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) and 0 <= value <= MOST else None


def _figure(value: float | None) -> str | None:
    return None if value is None else figure(value)
