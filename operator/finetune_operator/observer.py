"""Collect what is known about one job: from the cache, and from the API server what no watch tells. Changes nothing."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from finetune_api.job import FineTuneJob
from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster, RefusedError, UnavailableError
from finetune_operator.inbox import Inbox
from finetune_operator.manifest import JOB_FILE, content_hash
from finetune_operator.memo import Memo
from finetune_operator.naming import trust_config_map_name
from finetune_operator.observed import ChildView, JobView, KubeRayState, Observed, PodPhase, PodView
from finetune_operator.settings import Settings
from finetune_operator.view import PackedJob, controller, queue_told, trouble_told

logger = logging.getLogger(__name__)

SILENT_FOR = timedelta(seconds=3)
"""A pod that has not started by then is asked for its events: they alone tell of a failed mount. Kueue is asked about a
Job that it holds back."""
LOOK_AGAIN_SECONDS = (4.0, 60.0)
"""Shortest and longest pause between two such questions: a user hears within 15 s what is missing, and a thousand jobs
that a quota holds back for hours do not ask all the time. Every answer costs the API server a look at all events, or
at all that is queued, of a namespace."""
SHARE_OF_AGE = 0.25
"""The pause between those two limits, as a share of how long the youngest one has been waiting."""

_View = TypeVar("_View", ChildView, PodView)


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a job."""

    observed: Observed
    look_again_after: float | None = None
    """Seconds; set where something does not start for a reason that no watch will tell: it must be asked for again."""


class Observer:
    """Sees one job after the other."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        settings: Settings,
        inbox: Inbox,
        progress_ca: Callable[[], str],
        kuberay: KubeRayState,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._settings = settings
        self._inbox = inbox
        self._progress_ca = progress_ca
        self._kuberay = kuberay

    async def observe(self, packed: PackedJob, job: JobView, memo: Memo, now: datetime) -> Sight:
        """Look at a job; what is read from the API server is remembered in ``memo``."""
        children, pods = self._cache.children_of(packed), self._cache.pods_of(packed)
        if packed.is_terminal:
            return Sight(Observed(children=children, pods=pods))
        silent = [pod for pod in pods if _is_silent(pod)]
        idle = [child for child in children if _is_idle(child, pods)]
        since = [*(pod.created for pod in silent), *(child.created for child in idle)]
        look_again_after = _pause([now - created for created in since])
        silent = [pod for pod in silent if now - pod.created >= SILENT_FOR]
        idle = [child for child in idle if now - child.created >= SILENT_FOR]
        if silent:
            # Perhaps it waits for a ConfigMap of ours that somebody has deleted.
            memo.pinned, memo.trust_is_known = None, False
        observed = Observed(
            starts=self._starts(job),
            children=await self._with_reasons(job.namespace, children, idle),
            pods=await self._with_reasons(job.namespace, pods, silent),
            results=self._inbox.take(job.uid),
            resolved=await self._resolved(job, memo),
            trust_hash=await self._trust_hash(job, memo),
            kuberay=self._kuberay,
            progress_ca=self._progress_ca(),
            taken_names=await self._taken_names(job, memo, now),
            refused=dict(memo.refused),
        )
        # Last, and nothing is awaited until the plan is made: two jobs never count the same free place.
        running, waiting = self._ahead(packed)
        observed = dataclasses.replace(observed, running_in_namespace=running, waiting_before=waiting)
        return Sight(observed, look_again_after)

    def _starts(self, job: JobView) -> tuple[JobView, ...]:
        found: dict[str, JobView] = {}
        name = job.start_job
        while name is not None and name not in found and (start := self._cache.job(job.namespace, name)):
            found[name] = start
            name = start.start_job
        return tuple(found.values())

    def _ahead(self, packed: PackedJob) -> tuple[int, int]:
        """Return how many other jobs of the namespace run, and how many older ones want to."""
        if self._settings.policy.max_running_jobs is None:
            return 0, 0
        busy = self._cache.uids_with_work(packed.namespace) - {packed.uid}
        age = (packed.created, packed.name)
        waiting = (
            job
            for job in self._cache.jobs_in(packed.namespace)
            if job.wants_to_run and job.uid not in busy and (job.created, job.name) < age
        )
        return len(busy), sum(1 for _ in waiting)

    async def _with_reasons(self, namespace: str, views: Sequence[_View], silent: Sequence[_View]) -> tuple[_View, ...]:
        """Return ``views``; those that are ``silent`` with what their queue or their events tell."""
        told = {view.uid: await self._reason(namespace, view) for view in silent}
        return tuple(
            dataclasses.replace(view, waiting_reason=told[view.uid][0], waiting_message=told[view.uid][1])
            if view.uid in told
            else view
            for view in views
        )

    async def _reason(self, namespace: str, view: ChildView | PodView) -> tuple[str, str]:
        if isinstance(view, ChildView) and view.suspended:
            return await self._queue(namespace, view.uid)
        return await self._trouble(namespace, view.uid)

    async def _queue(self, namespace: str, uid: str) -> tuple[str, str]:
        try:
            return queue_told(await self._cluster.workloads(namespace, uid), uid)
        # Kueue converts its objects itself: where it is down, the API server fails at them and at nothing else.
        except (RefusedError, UnavailableError) as error:
            logger.warning("cannot read workloads namespace=%s error=%s", namespace, error)
            return "", ""

    async def _trouble(self, namespace: str, uid: str) -> tuple[str, str]:
        try:
            return trouble_told(await self._cluster.events(namespace, uid))
        except RefusedError as error:
            logger.warning("cannot read events namespace=%s error=%s", namespace, error)
            return "", ""

    async def _resolved(self, job: JobView, memo: Memo) -> FineTuneJob | None:
        name = job.status.resolved.config_map if job.status.resolved else None
        if name is None:
            return None
        if memo.pinned is None:
            stored = await self._cluster.get("ConfigMap", job.namespace, name)
            if stored is not None and controller(stored["metadata"]).get("uid") == job.uid:
                memo.pinned = stored["data"][JOB_FILE]
        return None if memo.pinned is None else _parsed(memo.pinned)

    async def _trust_hash(self, job: JobView, memo: Memo) -> str | None:
        if not memo.trust_is_known and job.status.attempts:
            stored = await self._cluster.get("ConfigMap", job.namespace, trust_config_map_name(job.name))
            is_ours = stored is not None and controller(stored["metadata"]).get("uid") == job.uid
            memo.trust_hash = content_hash(stored.get("data") or {}) if stored and is_ours else None
            memo.trust_is_known = True
        return memo.trust_hash

    async def _taken_names(self, job: JobView, memo: Memo, now: datetime) -> frozenset[str]:
        for name, taken in list(memo.taken.items()):
            holder = await self._cluster.get(taken.kind, job.namespace, name)
            if holder is None or controller(holder["metadata"]).get("uid") == job.uid:
                del memo.taken[name]
        return frozenset(name for name, taken in memo.taken.items() if now >= taken.told_from)


# A job is looked at several times within moments, and then not for long.
@functools.lru_cache(maxsize=64)
def _parsed(pinned: str) -> FineTuneJob:
    return FineTuneJob.model_validate_json(pinned, by_alias=True, by_name=False)


def _pause(ages: Sequence[timedelta]) -> float | None:
    if not ages:
        return None
    shortest, longest = LOOK_AGAIN_SECONDS
    return min(longest, max(shortest, SHARE_OF_AGE * min(ages).total_seconds()))


def _is_silent(pod: PodView) -> bool:
    """Return whether the pod does not run and its status does not say why."""
    return pod.phase is PodPhase.PENDING and pod.gone_by is None and not pod.waiting_reason


def _is_idle(child: ChildView, pods: Sequence[PodView]) -> bool:
    """Return whether a queue holds the child back, or it should have a pod and has none."""
    if child.deleting or child.is_over:
        return False
    return child.suspended or not any(child.owns(pod) for pod in pods)
