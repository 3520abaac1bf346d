"""Tries at a stage: which one is next, when it may start, with what change, how long the job has run. Pure."""

from datetime import datetime, timedelta

from finetune_api.job import FineTuneJob
from finetune_api.report import Stage
from finetune_api.status import Attempt, FineTuneJobStatus, Reason
from finetune_operator import naming
from finetune_operator.remedy import ADJUSTMENTS, find_remedy, needs_remedy
from finetune_operator.settings import Settings

MOST_KEPT = 10
FREE = (Reason.PREEMPTED, Reason.SUSPENDED_BY_USER, Reason.UNKNOWN)
"""Ends that do not count against runPolicy.retries.

What a later release made of an end that only it knows lies beside it: ``failures``, and ``stages`` where nothing was to
be tried again. For what it had not come to, another attempt costs time and a fault may cost the job.
"""


def is_open(attempt: Attempt) -> bool:
    """Return whether the attempt goes on, or it is not known yet how it ended."""
    return attempt.end_time is None or attempt.reason is None


def is_reported(attempt: Attempt) -> bool:
    """Return whether its trainer has said that all went well, and its RayJob has not ended yet."""
    return attempt.end_time is not None and attempt.reason is None


def newest(status: FineTuneJobStatus, stage: Stage) -> Attempt | None:
    """Return the newest attempt of ``stage``."""
    return next((attempt for attempt in reversed(status.attempts) if attempt.stage is stage), None)


def following(status: FineTuneJobStatus, stage: Stage, job: FineTuneJob, now: datetime) -> Attempt:
    """Return the attempt after the newest one of ``stage``."""
    before = newest(status, stage)
    number = before.number + 1 if before else 1
    remedy = find_remedy(before, job, status.plan) if before and needs_remedy(before) else None
    first = Attempt(
        stage=stage,
        number=number,
        failures=before.failures if before else 0,
        child=naming.child_name(job.metadata.name, stage, number),
        record_time=now,
        image_id=next((one.image_id for one in reversed(status.attempts) if one.image_id), None),
        change="; ".join(remedy.changes) if remedy else "",
        earlier_seconds=_seconds_before(status),
    )
    adjusted = {name: getattr(before, name) for name in ADJUSTMENTS} if before else {}
    return first.model_copy(update=adjusted | (remedy.fields if remedy else {}))


def _seconds_before(status: FineTuneJobStatus) -> int:
    if not status.attempts:
        return 0
    last = status.attempts[-1]
    ran = last.end_time - last.start_time if last.end_time and last.start_time else timedelta()
    return last.earlier_seconds + max(0, round(ran.total_seconds()))


def may_start_at(before: Attempt, settings: Settings) -> datetime:
    """Return when the attempt after ``before``, which has ended, may start; pauses double with every fault."""
    assert before.end_time is not None, f"{before.child} has not ended"
    if before.reason is Reason.SUSPENDED_BY_USER:
        return before.end_time
    doublings = 0 if before.reason in FREE else max(0, before.failures - 1)
    # 2 ** 20 retries at most: the pause is bounded long before.
    pause = min(settings.backoff_seconds * 2.0 ** min(doublings, 30), settings.longest_backoff_seconds)
    return before.end_time + timedelta(seconds=pause)


def deadline(attempt: Attempt, active_deadline_seconds: int) -> datetime | None:
    """Return when the whole job has run for too long; None while the attempt does not run."""
    if attempt.start_time is None or is_reported(attempt):
        return None
    return attempt.start_time + timedelta(seconds=active_deadline_seconds - attempt.earlier_seconds)


def replaced(status: FineTuneJobStatus, attempt: Attempt) -> FineTuneJobStatus:
    """Return ``status`` with ``attempt`` in the place of the one it was, or as the newest."""
    others = tuple(one for one in status.attempts if (one.stage, one.number) != (attempt.stage, attempt.number))
    return status.model_copy(update={"attempts": (*others, attempt)[-MOST_KEPT:]})
