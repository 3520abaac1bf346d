"""Do what a plan says, one action after the other, up to the first that fails. Decides nothing about a job."""

import json
import logging
from collections.abc import Callable, MutableMapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, assert_never

from finetune_api.job import KIND
from finetune_api.status import FineTuneJobStatus
from finetune_operator import attempt as attempts
from finetune_operator.action import Action, Create, Delete, Emit, EventType, Manifest, RecordStatus, Ref, Replace
from finetune_operator.cache import Cache
from finetune_operator.cluster import AlreadyExistsError, Cluster, NotFoundError, RefusedError
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.manifest import content_hash
from finetune_operator.memo import Memo, Taken
from finetune_operator.metric import Metrics
from finetune_operator.observed import ChildKind
from finetune_operator.queue import RetryError
from finetune_operator.status_patch import status_patch
from finetune_operator.view import PackedJob, child_view, controller, job_view, packed_job, stored_status

logger = logging.getLogger(__name__)

_CHILDREN = frozenset(kind.value for kind in ChildKind)
COLLECTED_AFTER = timedelta(seconds=30)
"""How long the cluster may take to collect what is left behind, before a user hears that it holds a name."""


class Gate(Protocol):
    """Whether this replica may act."""

    @property
    def is_open(self) -> bool:
        """True while no other replica acts."""


class Executor:
    """Writes to the cluster, and into the cache what the API server answers."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        gate: Gate,
        metrics: Metrics,
        events: EventRecorder,
        now: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._gate = gate
        self._metrics = metrics
        self._now = now
        self._events = events

    async def execute(self, actions: Sequence[Action], job: PackedJob, memo: Memo) -> bool:
        """Do ``actions`` for ``job``; return whether something is other than it was.

        Raises:
            ClusterError: the API server refused or did not answer.
            RetryError: something else came between.
        """
        log = _JobLogger(logger, {"job": f"{job.namespace}/{job.name}"})
        news: list[Emit] = []
        try:
            return await self._execute(actions, job, memo, log, news)
        finally:
            # At last: what has happened is told even if the rest has failed.
            for emit in news:
                self._emit(emit, job, log)

    async def _execute(
        self, actions: Sequence[Action], job: PackedJob, memo: Memo, log: "_JobLogger", news: list[Emit]
    ) -> bool:
        has_changed = False
        for action in actions:
            if not self._gate.is_open:
                raise RetryError("the lease is lost; another replica goes on")
            match action:
                case Create() | Replace():
                    has_changed = True
                    if not await self._write(action, job, memo, log):
                        break
                case Delete(ref, why):
                    has_changed |= await self._delete(ref, why, job, log)
                case RecordStatus():
                    recorded = await self._record(action, job, log)
                    has_changed |= recorded is not job
                    job = recorded
                case Emit():
                    news.append(action)
                case _:
                    assert_never(action)
            self._metrics.actions.labels(type(action).__name__).inc()
        return has_changed

    # --- children and ConfigMaps

    async def _write(self, action: Create | Replace, job: PackedJob, memo: Memo, log: "_JobLogger") -> bool:
        """Write an object; return whether it is there. A refusal that was not known yet is news to be planned with."""
        kind, name = action.manifest["kind"], action.manifest["metadata"]["name"]
        try:
            match action:
                case Create():
                    await self._create(action, job, memo, log)
                case Replace():
                    await self._replace(action, job, memo, log)
                case _:
                    assert_never(action)
        except RefusedError as error:
            if memo.refused.get(name) == str(error):
                raise
            memo.refused[name] = str(error)
            log.warning("refused kind=%s name=%s error=%s", kind, name, _quoted(str(error)))
            return False
        memo.refused.pop(name, None)
        memo.taken.pop(name, None)
        return True

    async def _create(self, create: Create, job: PackedJob, memo: Memo, log: "_JobLogger") -> None:
        kind, name = create.manifest["kind"], create.manifest["metadata"]["name"]
        try:
            stored = await self._cluster.create(create.manifest)
            log.info("created kind=%s name=%s why=%s", kind, name, _quoted(create.why))
        except AlreadyExistsError:
            stored = await self._ours(create.manifest, job, memo)
        except NotFoundError as error:
            raise RetryError(f"namespace {job.namespace} is gone: {error}") from error
        if kind in _CHILDREN and (child := child_view(stored)):
            self._cache.wrote_child(job.key, child)

    async def _ours(self, manifest: Manifest, job: PackedJob, memo: Memo) -> Manifest:
        """Return the object that holds the name, if it is this job's: a crash came between its creation and now."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        stored = await self._cluster.get(kind, job.namespace, name)
        if stored is None:
            raise RetryError(f"{kind} {name} has just gone")
        if controller(stored["metadata"]).get("uid") != job.uid:
            wait = COLLECTED_AFTER if _is_left_behind(stored["metadata"]) else timedelta()
            memo.taken.setdefault(name, Taken(kind, self._now() + wait))
            raise RetryError(f"{kind} {name} belongs to somebody else")
        return stored

    async def _replace(self, replace: Replace, job: PackedJob, memo: Memo, log: "_JobLogger") -> None:
        kind, name = replace.manifest["kind"], replace.manifest["metadata"]["name"]
        try:
            await self._cluster.create(replace.manifest)
        except AlreadyExistsError:
            stored = await self._ours(replace.manifest, job, memo)
            version = {"resourceVersion": stored["metadata"]["resourceVersion"]}
            metadata = {**replace.manifest["metadata"], **version}
            try:
                await self._cluster.update({**replace.manifest, "metadata": metadata})
            except NotFoundError as error:
                raise RetryError(f"{kind} {name} has just gone") from error
        except NotFoundError as error:
            raise RetryError(f"namespace {job.namespace} is gone: {error}") from error
        memo.trust_hash, memo.trust_is_known = content_hash(replace.manifest["data"]), True
        log.info("wrote kind=%s name=%s why=%s", kind, name, _quoted(replace.why))

    async def _delete(self, ref: Ref, why: str, job: PackedJob, log: "_JobLogger") -> bool:
        """Delete an object; return whether there was one."""
        uid = ref.uid or await self._uid_of_ours(ref, job)
        if not uid:
            return False
        await self._cluster.delete(ref.kind, ref.namespace, ref.name, uid)
        log.info("deleted kind=%s name=%s why=%s", ref.kind, ref.name, _quoted(why))
        if child := self._cache.child(uid):
            self._cache.deleted_child(job.key, child)
        return True

    async def _uid_of_ours(self, ref: Ref, job: PackedJob) -> str:
        """Return the UID of the object of that name, when it is this job's."""
        stored = await self._cluster.get(ref.kind, ref.namespace, ref.name)
        if stored is None or controller(stored["metadata"]).get("uid") != job.uid:
            return ""
        uid: str = stored["metadata"]["uid"]
        return uid

    # --- the job itself

    async def _record(self, record: RecordStatus, job: PackedJob, log: "_JobLogger") -> PackedJob:
        """Write the status; return the job as it is then, ``job`` itself when there was nothing to write."""
        # Progress may have been written meanwhile: that is no conflict, but the version is another one.
        newest = self._cache.packed(job.key)
        if newest is None or newest.uid != job.uid or newest.essence != job.essence:
            raise RetryError("the job has changed meanwhile")
        old = job_view(newest).status
        patch = status_patch(stored_status(newest), old, record.status)
        if not patch:
            return job
        metadata = {"uid": newest.uid, "resourceVersion": str(newest.resource_version)}
        content = {"metadata": metadata, "status": patch}
        try:
            stored = await self._cluster.patch(KIND, job.namespace, job.name, content, "/status")
        except NotFoundError as error:
            self._cache.mark_ghost(job.uid)
            raise RetryError(f"the job is gone: {error}") from error
        written = packed_job(stored)
        self._cache.wrote_job(written)
        log.info("recorded phase=%s why=%s", record.status.phase, _quoted(record.why))
        self._measure(old, record.status, written)
        return written

    def _measure(self, old: FineTuneJobStatus, new: FineTuneJobStatus, job: PackedJob) -> None:
        ended = {(one.stage, one.number) for one in old.attempts if not attempts.is_open(one)}
        for one in new.attempts:
            if one.end_time and one.start_time and not attempts.is_open(one) and (one.stage, one.number) not in ended:
                seconds = (one.end_time - one.start_time).total_seconds()
                self._metrics.stage_seconds.labels(one.stage, one.reason or "").observe(seconds)
        if new.phase is not None and new.phase.is_terminal and old.phase is not new.phase:
            self._metrics.job_seconds.labels(new.phase).observe((self._now() - job.created).total_seconds())

    def _emit(self, emit: Emit, job: PackedJob, log: "_JobLogger") -> None:
        level = logging.INFO if emit.type is EventType.NORMAL else logging.WARNING
        log.log(level, "event reason=%s message=%s", emit.reason, _quoted(emit.message))
        self._events.tell(emit, job, self._now())


class _JobLogger(logging.LoggerAdapter[logging.Logger]):
    """Ends every line with the job's identity."""

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return f"{msg} job={(self.extra or {})['job']}", kwargs


def _is_left_behind(metadata: Manifest) -> bool:
    """Return whether an object holds its name for a while only: it is being deleted, or a job of that name was."""
    return "deletionTimestamp" in metadata or controller(metadata).get("kind") == KIND


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
