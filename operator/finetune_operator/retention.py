"""What is to be deleted: children that outlive their attempt, and everything when an ended job's time is over. Pure."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from finetune_api.report import Stage
from finetune_api.status import Attempt, FineTuneJobStatus, Reason
from finetune_operator import naming
from finetune_operator.action import Action, Delete, Plan, RecordStatus, Ref
from finetune_operator.attempt import MOST_KEPT
from finetune_operator.observed import ChildView, JobView, Observed

LINGER = timedelta(seconds=60)
"""How long a pod may go on after its trainer has said how it ended."""

STOPPED_BY_US = (Reason.SUSPENDED_BY_USER, Reason.DEADLINE_EXCEEDED, Reason.START_DEADLINE_EXCEEDED)
_STAGES = tuple(Stage)


def deletion(child: ChildView, job: JobView, why: str) -> Delete:
    """Return the action that deletes exactly ``child``."""
    return Delete(Ref(child.kind.value, job.namespace, child.name, child.uid), why)


def after_the_end(job: JobView, observed: Observed, expires: datetime, now: datetime) -> Plan:
    """Return what is left to do for a job that has ended.

    Args:
        job: the ended job.
        observed: its children.
        expires: when its children go; the job itself stays.
        now: the time.
    """
    if now < expires:
        return Plan(tuple(stragglers(job, observed, job.status, now)), wake_at=_next_look(job, observed, expires, now))
    children = [deletion(child, job, "runPolicy.childTtlSeconds is over") for child in _left(observed)]
    return Plan((*children, *_unpinned(job)))


def _left(observed: Observed) -> Iterator[ChildView]:
    return (child for child in observed.children if not child.deleting)


def _unpinned(job: JobView) -> Iterator[Action]:
    """Yield what removes the ConfigMaps; that the status names none any more tells that it is done."""
    pinned = job.status.resolved
    if pinned is None or pinned.config_map is None:
        return
    for name in (pinned.config_map, naming.trust_config_map_name(job.name)):
        yield Delete(Ref("ConfigMap", job.namespace, name, ""), "runPolicy.childTtlSeconds is over")
    cleared = pinned.model_copy(update={"config_map": None})
    yield RecordStatus(job.status.model_copy(update={"resolved": cleared}), "its children are removed")


def stragglers(job: JobView, observed: Observed, status: FineTuneJobStatus, now: datetime) -> Iterator[Delete]:
    """Yield the deletion of children that run although their attempt has ended by ``status``."""
    for child in _left(observed):
        if not child.is_over and now >= _may_run_until(child, status, now):
            yield deletion(child, job, "its attempt has ended")


def _next_look(job: JobView, observed: Observed, expires: datetime, now: datetime) -> datetime:
    running = [child for child in _left(observed) if not child.is_over]
    ends = [_may_run_until(child, job.status, now) for child in running]
    return min((time for time in (*ends, expires) if time > now), default=expires)


def _may_run_until(child: ChildView, status: FineTuneJobStatus, now: datetime) -> datetime:
    """Return until when ``child``, whose attempt has ended, may run: a moment longer when it ended by itself."""
    attempt = attempt_of(child, status)
    if attempt is None or attempt.end_time is None or attempt.reason in STOPPED_BY_US:
        return now
    return attempt.end_time + LINGER


def attempt_of(child: ChildView, status: FineTuneJobStatus) -> Attempt | None:
    """Return the attempt that ``child`` runs, if the status still has it."""
    return next((one for one in status.attempts if one.child == child.name), None)


def forgotten(job: JobView, observed: Observed, status: FineTuneJobStatus) -> Iterator[Delete]:
    """Yield the deletion of children whose attempts are too old to be kept in ``status``."""
    if len(status.attempts) < MOST_KEPT:
        return
    oldest = _order(status.attempts[0].stage, status.attempts[0].number)
    for child in _left(observed):
        if child.is_over and _order(child.stage, child.attempt) < oldest:
            yield deletion(child, job, f"only the newest {MOST_KEPT} attempts are kept")


def _order(stage: Stage, number: int) -> tuple[int, int]:
    return _STAGES.index(stage), number
