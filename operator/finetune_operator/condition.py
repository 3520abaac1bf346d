"""Conditions, and what is derived from them: the phase, the line for ``kubectl get -o wide``, the events. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.report import Stage
from finetune_api.status import (
    LONGEST_MESSAGE,
    Condition,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    Reason,
)
from finetune_operator.action import Emit, EventType

LONGEST_HEADLINE = 256

STAGE_CONDITIONS = {
    Stage.CHECK: ConditionType.CHECKED,
    Stage.TRAIN: ConditionType.TRAINED,
    Stage.EVALUATE: ConditionType.EVALUATED,
}
"""The condition that tells how a stage stands."""

_STAGE_PHASES = {Stage.CHECK: Phase.CHECKING, Stage.TRAIN: Phase.TRAINING, Stage.EVALUATE: Phase.EVALUATING}


@dataclass(frozen=True, slots=True)
class Statement:
    """What is to be said by a condition."""

    type: ConditionType
    status: ConditionStatus
    reason: Reason
    message: str = ""


ADMITTED = Statement(ConditionType.ADMITTED, ConditionStatus.TRUE, Reason.ADMITTED, "may run")


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """Return the condition of that type."""
    return next((condition for condition in status.conditions if condition.type is kind), None)


def holds(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    """Return whether the condition is there and true."""
    condition = find(status, kind)
    return condition is not None and condition.status is ConditionStatus.TRUE


def ending(status: FineTuneJobStatus) -> Condition | None:
    """Return the condition by which the job has ended for good."""
    return next(
        (
            condition
            for condition in status.conditions
            if condition.type in (ConditionType.COMPLETE, ConditionType.FAILED)
            and condition.status is ConditionStatus.TRUE
        ),
        None,
    )


def stated(
    status: FineTuneJobStatus, statements: Sequence[Statement], now: datetime, generation: int
) -> FineTuneJobStatus:
    """Return ``status`` with every statement made; what was said before in the same words stays as it is."""
    conditions = {condition.type: condition for condition in status.conditions}
    for statement in statements:
        conditions[statement.type] = _condition(statement, conditions.get(statement.type), now, generation)
    after = tuple(conditions.values())
    return status if after == status.conditions else status.model_copy(update={"conditions": after})


def _condition(statement: Statement, before: Condition | None, now: datetime, generation: int) -> Condition:
    message = shortened(statement.message, LONGEST_MESSAGE)
    if before is not None and (before.status, before.reason, before.message) == (
        statement.status,
        statement.reason,
        message,
    ):
        return before
    unchanged = before is not None and before.status is statement.status
    return Condition(
        type=statement.type,
        status=statement.status,
        reason=statement.reason,
        message=message,
        last_transition_time=before.last_transition_time if before and unchanged else now,
        observed_generation=generation,
    )


def shortened(text: str, longest: int) -> str:
    """Return ``text`` with at most ``longest`` characters; an ellipsis tells that there was more."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def current_stage(status: FineTuneJobStatus) -> Stage:
    """Return the stage that runs, is to run next, or was the last."""
    ended = {stage.stage for stage in status.stages}
    if Stage.TRAIN in ended:
        return Stage.EVALUATE
    if Stage.CHECK in ended or _is_skipped(status, ConditionType.CHECKED):
        return Stage.EVALUATE if _is_skipped(status, ConditionType.TRAINED) else Stage.TRAIN
    return Stage.CHECK


def _is_skipped(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    condition = find(status, kind)
    return condition is not None and condition.reason is Reason.SKIPPED


def derive_phase(status: FineTuneJobStatus) -> Phase:
    """Return the conditions' summary in one word."""
    if holds(status, ConditionType.FAILED):
        return Phase.FAILED
    if holds(status, ConditionType.COMPLETE):
        return Phase.SUCCEEDED
    if holds(status, ConditionType.SUSPENDED):
        return Phase.SUSPENDED
    if not holds(status, ConditionType.ACCEPTED):
        return Phase.PENDING
    admitted = find(status, ConditionType.ADMITTED)
    if admitted is not None and admitted.status is ConditionStatus.FALSE:
        return Phase.QUEUED
    stage = current_stage(status)
    if stage is Stage.EVALUATE and status.progress is not None and status.progress.stage is Stage.PUBLISH:
        return Phase.PUBLISHING
    return _STAGE_PHASES[stage]


def headline(status: FineTuneJobStatus) -> str:
    """Return what matters most at the moment, in one line."""
    condition = _most_telling(status)
    if condition is None:
        return ""
    first_line = condition.message.partition("\n")[0] or condition.reason.value
    return shortened(first_line, LONGEST_HEADLINE)


def _most_telling(status: FineTuneJobStatus) -> Condition | None:
    if over := ending(status):
        return over
    suspended = find(status, ConditionType.SUSPENDED)
    if suspended is not None and suspended.reason is Reason.SUSPENDED_BY_USER:
        return suspended
    for kind in (ConditionType.ACCEPTED, ConditionType.ADMITTED):
        condition = find(status, kind)
        if condition is not None and condition.status is not ConditionStatus.TRUE:
            return condition
    return find(status, STAGE_CONDITIONS[current_stage(status)]) or find(status, ConditionType.ACCEPTED)


_GOOD_NEWS = {
    Reason.SPEC_VALID,
    Reason.ADMITTED,
    Reason.WAITING,
    Reason.WAITING_FOR_JOB,
    Reason.IN_QUEUE,
    Reason.RUNNING,
    Reason.SKIPPED,
    Reason.STAGE_SUCCEEDED,
    Reason.STAGE_STARTED,
    Reason.PREEMPTED,
    Reason.GATES_PASSED,
    Reason.NO_GATES,
    Reason.PUBLISHED,
    Reason.PUBLISH_NEVER,
    Reason.ALREADY_PUBLISHED,
    Reason.SUSPENDED_BY_USER,
    Reason.RESUMED,
}
"""Reasons that nobody has to look into."""


_EXPECTED = {Reason.SPEC_VALID, Reason.WAITING, Reason.ADMITTED, Reason.RUNNING, Reason.NO_GATES}
"""Reasons that are news only where something else was feared: a job that goes well has enough to tell."""


def news(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Emit, ...]:
    """Return an event for every condition whose status or reason is another one now, unless it was to be expected."""
    known = {condition.type: condition for condition in before.conditions}
    return tuple(
        event(condition.reason, f"{condition.type.value}: {condition.message or condition.reason.value}")
        for condition in after.conditions
        if _is_news(known.get(condition.type), condition)
    )


def _is_news(before: Condition | None, now: Condition) -> bool:
    if before is not None and (before.status, before.reason) == (now.status, now.reason):
        return False
    if now.reason is Reason.WAITING:
        return False
    return now.reason not in _EXPECTED or (before is not None and before.reason not in _EXPECTED)


def event(reason: Reason, message: str) -> Emit:
    """Return the event that tells ``reason``, as a warning where somebody may have to act."""
    kind = EventType.NORMAL if reason in _GOOD_NEWS else EventType.WARNING
    return Emit(kind, reason, shortened(message, LONGEST_MESSAGE))
