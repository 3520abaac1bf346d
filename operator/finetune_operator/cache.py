"""The watched objects as last seen, ahead of the watches by what the operator itself wrote a moment ago.

kopf's indices hold what the watches told. Two things they cannot know: the answers to our own writes, which come before
the watch tells of them, and that an object is gone whose deletion happened while a watch was broken (a ghost).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from finetune_api.job import KIND
from finetune_operator.observed import ChildKind, ChildView, JobView, PodPhase, PodView
from finetune_operator.view import PackedJob, job_view

JobKey = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

OVERLAY_SECONDS = 60.0
"""How long an answer counts that no watch confirms: somebody may have deleted the object before the watch saw it."""

_View = TypeVar("_View", ChildView, PodView)
_Object = TypeVar("_Object", PackedJob, ChildView, PodView)


# Kinds of keys in one index: by owner, by UID, by namespace, by what is waited for.
def uid_key(uid: str) -> str:
    """Return the index key of one object."""
    return f"uid/{uid}"


def namespace_key(namespace: str) -> str:
    """Return the index key of everything in a namespace."""
    return f"namespace/{namespace}"


def waiting_key(namespace: str, name: str) -> str:
    """Return the index key of the jobs that wait for the job called ``name``."""
    return f"waiting/{namespace}/{name}"


def keys_of(job: PackedJob) -> tuple["IndexKey", ...]:
    """Return under which index keys a FineTuneJob is found."""
    waiting = () if job.waits_for is None else (waiting_key(job.namespace, job.waits_for),)
    return (job.key, namespace_key(job.namespace), *waiting)


IndexKey = JobKey | str
JobIndex = Mapping[IndexKey, Iterable[PackedJob]]
ChildIndex = Mapping[IndexKey, Iterable[ChildView]]
PodIndex = Mapping[IndexKey, Iterable[PodView]]
"""As kopf's indices: values under keys; kopf alone writes them."""


@dataclass(frozen=True, slots=True)
class Indices:
    """What the watches told."""

    jobs: JobIndex = dataclasses.field(default_factory=dict)
    """By owner key (its own), by namespace, and by the job that it waits for."""
    children: ChildIndex = dataclasses.field(default_factory=dict)
    """By owner key, UID and namespace."""
    pods: PodIndex = dataclasses.field(default_factory=dict)
    """As children."""


@dataclass(slots=True)
class _Written:
    key: JobKey
    view: ChildView
    until: float


class Cache:
    """Answers what exists. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin empty; ``clock`` counts seconds."""
        self.indices = Indices()
        self._clock = clock
        self._jobs: dict[JobKey, PackedJob] = {}
        self._answered: dict[JobKey, tuple[str, int]] = {}
        """UID and version of each job in the newest answer of the API server."""
        self._children: dict[str, _Written] = {}
        self._children_of: dict[JobKey, set[str]] = {}
        """UIDs of the former."""
        self._departed: dict[JobKey, ChildView] = {}
        """Of each job the child that went last: its pods may still have a word to say."""
        self._killed: dict[JobKey, PodView] = {}
        """Of each job the pod that was last ended at a limit of its own, for memory or storage, as one that is over:
        KubeRay deletes a worker's before anybody has told of the loss."""
        self._ghosts: set[str] = set()
        self._strangers: dict[tuple[str, str], set[str]] = {}
        """By kind and namespace."""
        self._beginning: set[JobKey] = set()

    # --- what exists

    def packed(self, key: JobKey) -> PackedJob | None:
        """Return the FineTuneJob as last seen or written."""
        seen = [job for job in self.indices.jobs.get(key, ()) if job.uid not in self._ghosts]
        written = self._jobs.get(key)
        if not seen:
            return None
        newest = max(seen, key=lambda job: job.resource_version)
        if written is not None and written.uid == newest.uid and written.resource_version > newest.resource_version:
            return written
        self._jobs.pop(key, None)
        return newest

    def told(self, key: JobKey, resource_version: str) -> PackedJob | None:
        """Return that version of a FineTuneJob if it is what the watch told last."""
        seen = self.indices.jobs.get(key, ())
        return next((job for job in seen if str(job.resource_version) == resource_version), None)

    def told_child(self, uid: str) -> ChildView | None:
        """Return the Job or RayJob with that UID as the watch told of it last."""
        return next(iter(self.indices.children.get(uid_key(uid), ())), None)

    def told_pod(self, uid: str) -> PodView | None:
        """Return the pod with that UID as the watch told of it last."""
        return next(iter(self.indices.pods.get(uid_key(uid), ())), None)

    def answered(self, key: JobKey, resource_version: str) -> PackedJob | None:
        """Return that version of a FineTuneJob if the API server has answered with it, before the watch told of it."""
        written = self._jobs.get(key)
        return written if written is not None and str(written.resource_version) == resource_version else None

    def is_answered(self, job: PackedJob) -> bool:
        """Return whether an answer of the API server told of that version, or of a later one, before the watch did."""
        uid, version = self._answered.get(job.key, ("", 0))
        return uid == job.uid and version >= job.resource_version

    def job(self, namespace: str, name: str) -> JobView | None:
        """Return the FineTuneJob for those who read it."""
        packed = self.packed((namespace, name))
        return job_view(packed) if packed else None

    def child(self, uid: str) -> ChildView | None:
        """Return the Job or RayJob with that UID."""
        if written := self._children.get(uid):
            return written.view
        return next(iter(self._living(self.indices.children, uid_key(uid))), None)

    def pod(self, uid: str) -> PodView | None:
        """Return the pod with that UID."""
        return next(iter(self._living(self.indices.pods, uid_key(uid))), None)

    def children_of(self, job: PackedJob) -> tuple[ChildView, ...]:
        """Return the children that the job controls."""
        views = {child.uid: child for child in self._living(self.indices.children, job.key)}
        for uid in list(self._children_of.get(job.key, ())):
            written = self._children[uid]
            if written.until < self._clock():
                self._drop_written(uid)
            elif written.view.deleting and uid in views:
                views[uid] = dataclasses.replace(views[uid], deleting=True)
            elif not written.view.deleting:
                views.setdefault(uid, written.view)
        return tuple(child for child in views.values() if child.owner_uid == job.uid)

    def pods_of(self, job: PackedJob) -> tuple[PodView, ...]:
        """Return the pods of the job's children; of children that are gone, those that may still run.

        The one that was ended last at a limit of its own is among them, deleted or not, if it tells how its child ends.
        """
        children, pods = self.children_of(job), self._living(self.indices.pods, job.key)
        killed = self._killed.get(job.key)
        if killed and all(pod.uid != killed.uid for pod in pods) and any(_ends_with(one, killed) for one in children):
            pods.append(killed)
        return tuple(
            pod
            for pod in pods
            if pod.job_uid == job.uid and (not pod.is_over or any(child.owns(pod) for child in children))
        )

    def children(self, job: JobView) -> tuple[ChildView, ...]:
        """Return the children of a job for those who read it, the one that went last among them."""
        packed = self.packed(job.key)
        if packed is None or packed.uid != job.uid:
            return ()
        departed = self._departed.get(job.key)
        gone = (departed,) if departed is not None and departed.owner_uid == job.uid else ()
        return (*self.children_of(packed), *gone)

    def deleting(self, kind: ChildKind) -> Iterator[tuple[str, ChildView]]:
        """Yield the children that are being deleted, also of jobs that are gone, each behind its namespace."""
        for key in self.indices.children:
            if isinstance(key, tuple):
                living = self._living(self.indices.children, key)
                yield from ((key[0], view) for view in living if view.deleting and view.kind is kind)

    def job_keys(self) -> tuple[JobKey, ...]:
        """Return all FineTuneJobs."""
        return tuple(key for key in self.indices.jobs if isinstance(key, tuple))

    def jobs(self) -> Iterator[PackedJob]:
        """Yield all FineTuneJobs."""
        return (job for key in self.job_keys() if (job := self.packed(key)) is not None)

    def jobs_in(self, namespace: str) -> tuple[PackedJob, ...]:
        """Return the FineTuneJobs of a namespace."""
        keys = dict.fromkeys(job.key for job in self.indices.jobs.get(namespace_key(namespace), ()))
        return tuple(job for key in keys if (job := self.packed(key)) is not None)

    def waiting_for(self, key: JobKey) -> tuple[JobKey, ...]:
        """Return the FineTuneJobs that wait for another one to publish."""
        return tuple(dict.fromkeys(job.key for job in self.indices.jobs.get(waiting_key(*key), ())))

    def uids_with_work(self, namespace: str) -> set[str]:
        """Return the UIDs of the FineTuneJobs that have an open attempt, a pod, or a child that may start one."""
        key = namespace_key(namespace)
        written = [one.view for one in self._children.values() if one.key[0] == namespace and not one.view.deleting]
        children = {child.uid: child for child in (*written, *self._living(self.indices.children, key))}
        running = {child.owner_uid for child in children.values() if not (child.is_over or child.suspended)}
        begun = {job.uid for job in self.jobs_in(namespace) if job.has_begun or job.key in self._beginning}
        return running | begun | {pod.job_uid for pod in self._living(self.indices.pods, key) if not pod.is_over}

    @contextlib.contextmanager
    def beginning(self, job: PackedJob) -> Iterator[None]:
        """Count ``job`` as one with work while its first step is written: others decide meanwhile."""
        self._beginning.add(job.key)
        try:
            yield
        finally:
            self._beginning.discard(job.key)

    # --- what was written or found out

    def wrote_job(self, packed: PackedJob) -> None:
        """Take note of what the API server answered to a write or a read; whoever asked looks at the job once more."""
        self._jobs[packed.key] = packed
        self._answered[packed.key] = (packed.uid, packed.resource_version)

    def wrote_child(self, key: JobKey, child: ChildView) -> None:
        """Take note of a child that was created."""
        self._keep_written(key, child)

    def deleted_child(self, key: JobKey, child: ChildView) -> None:
        """Take note of a child whose deletion was accepted."""
        self._keep_written(key, dataclasses.replace(child, deleting=True))

    def saw_child(self, key: JobKey, child: ChildView, *, is_gone: bool) -> bool:
        """Take note that a watch told of a child; return whether that is more than was written."""
        written = self._children.get(child.uid)
        if written is not None and (is_gone or not written.view.deleting):
            self._drop_written(child.uid)
        if is_gone:
            self._departed[key] = child
        return is_gone or written is None or written.view != child

    def saw_pod(self, key: JobKey, pod: PodView) -> None:
        """Take note that a watch told of a pod, perhaps for the last time."""
        # Anybody may label a pod, also for a job that does not exist and is never forgotten.
        if (pod.out_of_memory or pod.over_limit) and self.packed(key) is not None:
            # The kubelet tells of the container before it tells of the pod, and may never come to the latter.
            self._killed[key] = dataclasses.replace(pod, phase=PodPhase.FAILED)

    def forget_job(self, key: JobKey) -> None:
        """Drop what was written about a job that is gone."""
        self._jobs.pop(key, None)
        self._answered.pop(key, None)
        self._departed.pop(key, None)
        self._killed.pop(key, None)
        for uid in list(self._children_of.get(key, ())):
            self._drop_written(uid)

    def _keep_written(self, key: JobKey, child: ChildView) -> None:
        self._children[child.uid] = _Written(key, child, self._clock() + OVERLAY_SECONDS)
        self._children_of.setdefault(key, set()).add(child.uid)

    def _drop_written(self, uid: str) -> None:
        key = self._children.pop(uid).key
        self._children_of[key].discard(uid)
        if not self._children_of[key]:
            del self._children_of[key]

    # --- ghosts and strangers

    def note_stranger(self, kind: str, namespace: str, uid: str) -> None:
        """Take note of an object that is watched for its labels and is none of ours."""
        self._strangers.setdefault((kind, namespace), set()).add(uid)

    def mark_ghost(self, uid: str) -> None:
        """Leave the object with that UID out from now on. A UID never comes back."""
        self._ghosts.add(uid)
        self.forget_stranger(uid)

    def forget_stranger(self, uid: str) -> None:
        """Drop what was noted of an object that is gone."""
        for uids in self._strangers.values():
            uids.discard(uid)

    def uids(self, kind: str, namespace: str | None) -> set[str]:
        """Return the UIDs that the watches told of, ghosts left out; of all namespaces where that is None."""
        strangers = (
            uids for (one, place), uids in self._strangers.items() if one == kind and namespace in (None, place)
        )
        return (set(self._told_uids(kind, namespace)) - self._ghosts).union(*strangers)

    def _told_uids(self, kind: str, namespace: str | None) -> Iterator[str]:
        if kind == KIND:
            return (job.uid for job in _owned(self.indices.jobs, namespace))
        if kind == "Pod":
            return (pod.uid for pod in _owned(self.indices.pods, namespace))
        return (child.uid for child in _owned(self.indices.children, namespace) if child.kind == kind)

    def _living(self, index: Mapping[IndexKey, Iterable[_View]], key: IndexKey) -> list[_View]:
        return [view for view in index.get(key, ()) if view.uid not in self._ghosts]


def _ends_with(child: ChildView, pod: PodView) -> bool:
    """Return whether the end of ``pod`` may be that of ``child``: a Job that goes on has another pod by now."""
    return child.owns(pod) and (child.kind is ChildKind.RAY_JOB or child.is_over)


def _owned(index: Mapping[IndexKey, Iterable[_Object]], namespace: str | None) -> Iterable[_Object]:
    """Return each object of a namespace once, or of an index: by its owner."""
    if namespace is not None:
        return index.get(namespace_key(namespace), ())
    return (view for key, views in index.items() if isinstance(key, tuple) for view in views)
