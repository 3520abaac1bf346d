"""What kopf calls: indices keep trimmed objects, events wake the job they belong to. Nothing is decided here.

No handler of a kind that writes to objects (create, update, delete, daemon, timer) is registered: so kopf puts neither
finalizers nor annotations on them, and a FineTuneJob can be deleted while no operator runs.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

import kopf

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_operator.cache import Cache, Indices, JobKey, keys_of, namespace_key, uid_key
from finetune_operator.cluster import Login
from finetune_operator.naming import CHILD_SELECTOR, JOB_UID_LABEL
from finetune_operator.observed import ChildKind, ChildView, PodView
from finetune_operator.view import PackedJob, Raw, child_view, job_key, owner_key, packed_job, pod_view

JOBS = (GROUP, VERSION, PLURAL)
CHILDREN = {ChildKind.JOB: ("batch", "v1", "jobs"), ChildKind.RAY_JOB: ("ray.io", "v1", "rayjobs")}
PODS = ("", "v1", "pods")
DEFINITIONS = ("apiextensions.k8s.io", "v1", "customresourcedefinitions")

CHILD_LABELS = ",".join([*(f"{name}={value}" for name, value in CHILD_SELECTOR.items()), JOB_UID_LABEL])
"""Selects what is watched of Jobs and pods, on the server."""

INACTIVITY_SECONDS = 70.0
"""The API server sends a bookmark every minute; a watch that is silent for longer is dead."""


def kopf_settings() -> kopf.OperatorSettings:
    """Return how kopf is to behave."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    # kopf removes its finalizer wherever it finds it; the default name is every kopf operator's.
    settings.persistence.finalizer = f"{GROUP}/none"
    settings.persistence.diffbase_storage = NoDifferences()
    settings.persistence.progress_storage = NoProgress()
    # It would kill this process ten minutes after the first of its sessions has ended.
    settings.process.ultimate_exiting_timeout = None
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 10.0
    settings.networking.error_backoffs = EndlessBackoffs()
    # A whole number: the API server refuses "300.0".
    settings.watching.server_timeout = 300
    settings.watching.inactivity_timeout = INACTIVITY_SECONDS
    settings.watching.chunk_size = 100
    # Each object that is told of has a task until then.
    settings.queueing.idle_timeout = 0.2
    settings.execution.max_workers = 1
    for resource in (*CHILDREN.values(), PODS):
        settings.watching.label_selectors[resource] = CHILD_LABELS
    # The definitions of a whole cluster are many megabytes, and only one is of interest.
    settings.watching.field_selectors[DEFINITIONS] = f"metadata.name={PLURAL}.{GROUP}"
    return settings


class NoDifferences(kopf.DiffBaseStorage):
    """Keeps no copy of an object; kopf would make one at every event, for handlers of changes that nobody registers."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        """Return nothing of ``body``."""
        return {}

    def fetch(self, *, body: Any) -> None:
        """Return that nothing is kept."""

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        """Keep nothing."""


class NoProgress(kopf.ProgressStorage):
    """Keeps no progress of handlers: those that have some are not registered."""

    def fetch(self, *, key: Any, body: Any) -> None:
        """Return that nothing is kept."""

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        """Keep nothing."""

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        """Leave everything as it is."""

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        """Leave everything as it is."""

    def clear(self, *, essence: Any) -> Any:
        """Return ``essence``, in which there is nothing of ours."""
        return essence


class EndlessBackoffs:
    """Seconds between tries of a request: a 403 or an absent API server must not end the operator, ever."""

    def __iter__(self) -> Iterator[float]:
        """Yield pauses that grow up to five seconds."""
        pause = 0.25
        while True:
            yield pause
            pause = min(5.0, pause * 2)


def registry(
    cache: Cache,
    wake: Callable[[JobKey], None],
    login: Callable[[], Awaitable[Login]],
    has_cap: bool,
    kinds: Collection[ChildKind],
) -> kopf.OperatorRegistry:
    """Return the handlers.

    Args:
        cache: gets kopf's indices.
        wake: called with a job's namespace and name when something of it has changed.
        login: tells where the API server is, whenever kopf was not let in.
        has_cap: jobs of a namespace wait for each other.
        kinds: the children that the API server knows of.
    """
    handlers = kopf.OperatorRegistry()
    events = Events(cache, wake, has_cap)

    @kopf.on.login(registry=handlers)
    async def credentials(**_: Any) -> kopf.ConnectionInfo:
        found = await login()
        return kopf.ConnectionInfo(
            server=found.server,
            ca_path=found.ca_file,
            insecure=not found.verify,
            scheme="Bearer" if found.token else None,
            token=found.token,
            certificate_path=found.certificate_file,
            private_key_path=found.key_file,
        )

    @kopf.on.startup(registry=handlers)
    async def adopt_indices(**indices: Any) -> None:
        cache.indices = Indices(indices["jobs"], indices["children"], indices["pods"])

    @kopf.index(*JOBS, id="jobs", registry=handlers)
    async def index_job(body: Any, **_: Any) -> dict[Any, PackedJob]:
        # Most versions are known from the answer to our own write: kept once, and not packed again.
        packed = cache.answered(job_key(body), body["metadata"]["resourceVersion"]) or packed_job(body)
        _strip(body)
        return dict.fromkeys(keys_of(packed), packed)

    for kind in kinds:
        _register_child(handlers, kind, cache, events)

    @kopf.index(*PODS, id="pods", registry=handlers)
    async def index_pod(body: Any, **_: Any) -> dict[Any, PodView]:
        return _indexed(cache, "Pod", body, pod_view(body))

    @kopf.on.event(*JOBS, registry=handlers)
    async def job_changed(body: Any, type: str | None, **_: Any) -> None:
        events.job_changed(body, is_gone=type == "DELETED")

    @kopf.on.event(*PODS, registry=handlers)
    async def pod_changed(body: Any, type: str | None, **_: Any) -> None:
        is_gone = type == "DELETED"
        events.part_changed(body, pod_view(body) if is_gone else cache.told_pod(_uid(body)), is_gone=is_gone)

    return handlers


def _register_child(handlers: kopf.OperatorRegistry, kind: ChildKind, cache: Cache, events: "Events") -> None:
    """Let the objects of ``kind`` into the one index of children."""

    @kopf.index(*CHILDREN[kind], id="children", registry=handlers)
    async def index_child(body: Any, **_: Any) -> dict[Any, ChildView]:
        return _indexed(cache, kind.value, body, child_view(body))

    @kopf.on.event(*CHILDREN[kind], id=f"{kind.value}_changed", registry=handlers)
    async def child_changed(body: Any, type: str | None, **_: Any) -> None:
        is_gone = type == "DELETED"
        events.part_changed(body, child_view(body) if is_gone else cache.told_child(_uid(body)), is_gone=is_gone)


def _indexed(cache: Cache, kind: str, body: Raw, view: Any) -> dict[Any, Any]:
    """Return under which keys an object of a job is found. An empty answer takes it out of the index."""
    owner, uid = owner_key(body), _uid(body)
    _strip(body)
    if view is None or owner is None:
        cache.note_stranger(kind, body["metadata"]["namespace"], uid)
        return {}
    return {owner: view, uid_key(uid): view, namespace_key(owner[0]): view}


def _strip(body: Raw) -> None:
    """Empty an object of what is in the index now: kopf keeps it until nothing has been told of it for a while."""
    body["metadata"].pop("managedFields", None)
    for part in ("spec", "status"):
        (body.get(part) or {}).clear()


def _uid(body: Raw) -> str:
    uid: str = body["metadata"]["uid"]
    return uid


class Events:
    """Tells changes that matter from those that do not: progress, heartbeats, what was seen before."""

    def __init__(self, cache: Cache, wake: Callable[[JobKey], None], has_cap: bool) -> None:
        self._cache = cache
        self._wake = wake
        self._has_cap = has_cap
        self._seen: dict[str, object] = {}
        """What was last seen of an object, by its UID, and of a job's phase."""

    def job_changed(self, body: Raw, *, is_gone: bool) -> None:
        """Wake the job if more than its progress has changed, and who waits for it if its phase has."""
        # Packed for the index a moment ago, unless it is gone.
        packed = self._cache.told(job_key(body), body["metadata"]["resourceVersion"]) or packed_job(body)
        if self._is_news(packed.uid, packed.essence, is_gone):
            # Behind every answer comes a look: one more for its echo would find nothing.
            if is_gone or not self._cache.is_answered(packed):
                self._wake(packed.key)
            if self._has_cap and (is_gone or packed.is_terminal):
                self._wake_waiting(packed.namespace)
        if self._is_news(f"phase of {packed.uid}", packed.phase, is_gone):
            for key in self._cache.waiting_for(packed.key):
                self._wake(key)

    def part_changed(self, body: Raw, view: ChildView | PodView | None, *, is_gone: bool) -> None:
        """Wake the job that a child or a pod belongs to."""
        owner, uid = owner_key(body), body["metadata"]["uid"]
        if is_gone:
            self._cache.forget_stranger(uid)
        if owner is None or view is None:
            return
        is_echo = isinstance(view, ChildView) and not self._cache.saw_child(owner, view, is_gone=is_gone)
        if isinstance(view, PodView):
            self._cache.saw_pod(owner, view)
        if self._is_news(uid, view, is_gone):
            if not is_echo:
                self._wake(owner)
            if self._has_cap and (is_gone or view.is_over):
                self._wake_waiting(owner[0])

    def _is_news(self, uid: str, seen: object, is_gone: bool) -> bool:
        if is_gone:
            self._seen.pop(uid, None)
            return True
        if self._seen.get(uid) == seen:
            return False
        self._seen[uid] = seen
        return True

    def _wake_waiting(self, namespace: str) -> None:
        for job in self._cache.jobs_in(namespace):
            if job.held_back:
                self._wake(job.key)


def quiet_kopf() -> None:
    """Let kopf speak of trouble alone: a line for every event would hide ours."""
    logging.getLogger("kopf").setLevel(logging.WARNING)
