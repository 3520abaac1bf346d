"""Decide whether an attempt may still speak for its job. Pure."""

from enum import StrEnum

from finetune_api.report import Stage
from finetune_api.status import FineTuneJobStatus

_ORDER = tuple(Stage)


class Standing(StrEnum):
    """What the status says of an attempt."""

    CURRENT = "current"
    """It is the newest and has not ended."""
    RECORDED = "recorded"
    """What its trainer said at the end, or how it ended without a word, is in the status."""
    SUPERSEDED = "superseded"
    """A newer attempt or a later stage has begun, or the job is over."""


def standing(status: FineTuneJobStatus, stage: Stage, attempt: int) -> Standing:
    """Return how the attempt stands. One that the status does not know yet is current: it was recorded a moment ago."""
    if any(ended.stage is stage and ended.attempt == attempt for ended in status.stages):
        return Standing.RECORDED
    if any(
        known.stage is stage and known.number == attempt and known.end_time is not None for known in status.attempts
    ):
        return Standing.RECORDED
    if status.phase is not None and status.phase.is_terminal:
        return Standing.SUPERSEDED
    newest = max(((_ORDER.index(known.stage), known.number) for known in status.attempts), default=(0, 0))
    return Standing.SUPERSEDED if (_ORDER.index(stage), attempt) < newest else Standing.CURRENT
