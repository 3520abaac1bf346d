"""Bring one job forward: observe, plan, execute. What a job needs is decided by the planner alone."""

import contextlib
import time
from collections.abc import Callable
from datetime import datetime

from finetune_api.job import KIND
from finetune_operator.action import Action, Create, Plan, RecordStatus
from finetune_operator.cache import Cache, JobKey
from finetune_operator.cluster import Cluster, ClusterError, ConflictError
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.executor import Executor, Gate
from finetune_operator.fence import Standing, standing
from finetune_operator.inbox import Inbox
from finetune_operator.ledger import open_attempt
from finetune_operator.memo import Memo
from finetune_operator.metric import Metrics
from finetune_operator.observed import DeliveredResult, JobView, KubeRayState, Observed
from finetune_operator.observer import Observer
from finetune_operator.queue import Result, RetryError
from finetune_operator.settings import Settings
from finetune_operator.view import PackedJob, job_view, packed_job

Planner = Callable[[JobView, Observed, Settings, datetime], Plan]

SHORTEST_PAUSE_SECONDS = 0.5
"""A plan that does nothing and wants to be made again at once would keep a processor busy."""


class Reconciler:
    """Looks at one job after the other, at several at the same time, never twice at one."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        settings: Settings,
        inbox: Inbox,
        gate: Gate,
        metrics: Metrics,
        events: EventRecorder,
        plan: Planner,
        progress_ca: Callable[[], str],
        now: Callable[[], datetime],
        kuberay: KubeRayState,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._settings = settings
        self._inbox = inbox
        self._gate = gate
        self._metrics = metrics
        self._plan = plan
        self._now = now
        self._observer = Observer(cluster, cache, settings, inbox, progress_ca, kuberay)
        self._executor = Executor(cluster, cache, gate, metrics, events, now)
        self._memos: dict[JobKey, Memo] = {}

    async def __call__(self, key: JobKey) -> Result:
        """Do for the job of that name what is to be done now.

        Raises:
            RetryError: the API server or another writer came between.
        """
        if not self._gate.is_open:
            # Whoever gets the lease looks at all jobs.
            return Result()
        started, outcome = time.perf_counter(), "failed"
        try:
            result = await self._look(key)
            outcome = "settled" if result.settled else "acted"
        except ClusterError as error:
            raise RetryError(str(error)) from error
        finally:
            self._metrics.reconcile_seconds.labels(outcome).observe(time.perf_counter() - started)
        return result

    def is_new(self, key: JobKey) -> bool:
        """Return whether the job of that name has not been looked at yet: perhaps it is to begin."""
        return key not in self._memos

    def forget(self, key: JobKey) -> None:
        """Drop what is remembered of a job that is gone."""
        self._cache.forget_job(key)
        if memo := self._memos.pop(key, None):
            self._inbox.forget(memo.uid)

    async def _look(self, key: JobKey) -> Result:
        packed = self._cache.packed(key)
        if packed is None:
            self.forget(key)
            return Result()
        job, memo, now = job_view(packed), self._memo(packed), self._now()
        if packed.is_terminal:
            # Thousands that have ended are looked at for years, and nothing is made of this any more.
            memo.pinned = None
        self._acknowledge(job)
        sight = await self._observer.observe(packed, job, memo, now)
        plan = self._plan(job, sight.observed, self._settings, now)
        if plan.actions and await self._carry_out(plan, job, packed, memo):
            return Result(settled=False)
        return Result(after_seconds=_pause(plan, sight.look_again_after, now))

    async def _carry_out(self, plan: Plan, job: JobView, packed: PackedJob, memo: Memo) -> bool:
        """Do what is planned; return whether something is other than it was."""
        with self._cache.beginning(packed) if _begins(plan) else contextlib.nullcontext():
            live = packed if _is_guarded(plan, job) else await self._live(packed)
            try:
                has_changed = live is None or await self._executor.execute(plan.actions, live, memo)
            except ConflictError:
                # The next plan is made from what the API server has, whether or not the watch has told of it by then.
                await self._live(packed)
                return True
        memo.pinned = plan.pinned or memo.pinned
        return has_changed

    def _memo(self, packed: PackedJob) -> Memo:
        memo = self._memos.get(packed.key)
        if memo is None or memo.uid != packed.uid:
            memo = self._memos[packed.key] = Memo(packed.uid)
        return memo

    def _acknowledge(self, job: JobView) -> None:
        """Answer trainers whose result is in the status now, or never will be."""
        settled = [one for one in self._inbox.take(job.uid) if not _is_current(job, one)]
        self._inbox.acknowledge(job.uid, settled)

    async def _live(self, packed: PackedJob) -> PackedJob | None:
        """Return the job as the API server has it now; None when that is not what the plan was made for.

        The cache knows then: a watch may lag, and a broken one may have missed that the job is gone.
        """
        live = await self._cluster.get(KIND, packed.namespace, packed.name)
        if live is None or live["metadata"]["uid"] != packed.uid:
            self._cache.mark_ghost(packed.uid)
            self._metrics.ghosts.labels(KIND).inc()
            return None
        newest = packed_job(live)
        self._cache.wrote_job(newest)
        return newest if newest.essence == packed.essence else None


def _is_guarded(plan: Plan, job: JobView) -> bool:
    """Return whether the API server itself refuses the plan if it was made for what ``job`` is no longer.

    The record names the version that it is for, and all that may come before it is a pin: without its job, the cluster
    collects it. A record that changes neither of these two may turn out to be none.
    """
    first = next((action for action in plan.actions if not _is_pin(action)), None)
    if not isinstance(first, RecordStatus):
        return False
    return (first.status.conditions, first.status.attempts) != (job.status.conditions, job.status.attempts)


def _is_pin(action: Action) -> bool:
    return isinstance(action, Create) and action.manifest["kind"] == "ConfigMap"


def _begins(plan: Plan) -> bool:
    return any(isinstance(action, RecordStatus) and open_attempt(action.status) for action in plan.actions)


def _is_current(job: JobView, delivered: DeliveredResult) -> bool:
    return standing(job.status, delivered.stage, delivered.attempt) is Standing.CURRENT


def _pause(plan: Plan, look_again_after: float | None, now: datetime) -> float | None:
    planned = None if plan.wake_at is None else max(SHORTEST_PAUSE_SECONDS, (plan.wake_at - now).total_seconds())
    return min((seconds for seconds in (planned, look_again_after) if seconds is not None), default=None)
