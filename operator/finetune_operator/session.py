"""One life of the operator's moving parts, from the first watch to the last answer; see `run`.

kopf ends at what it cannot go on from (a definition that vanishes under a watch, say), and takes every task of the
event loop with it. So everything is made anew then, in the same process: the cluster alone holds what must be kept.
"""

import asyncio
import logging
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import kopf

from finetune_api.job import KIND
from finetune_operator import handlers
from finetune_operator.cache import Cache
from finetune_operator.certificate import CertificateHolder
from finetune_operator.cluster import Cluster, Connection
from finetune_operator.definition import Definition
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.inbox import Inbox
from finetune_operator.kuberay import KubeRay
from finetune_operator.lease import Lease
from finetune_operator.listing import Listing, give_kopf
from finetune_operator.metric import Metrics
from finetune_operator.observed import ChildKind, KubeRayState
from finetune_operator.planner import plan
from finetune_operator.progress_backend import ClusterPatcher, ClusterReviewer, ClusterSecret
from finetune_operator.progress_server import ProgressServer, host_of
from finetune_operator.queue import Queue
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.stalled_deletion import StalledDeletions
from finetune_operator.sweep import Sweep

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SWEEPS = 300.0
STOP_SECONDS = 20.0
"""For what has been begun, after the signal to stop; the kubelet grants 30 s in all."""
EVENTS_SECONDS = 5.0
"""Then, for what is still to be told of it."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What does not change from one session to the next."""

    settings: Settings
    connection: Connection
    identity: str
    metrics: Metrics
    ready: asyncio.Event
    """Set while every watch runs."""
    stop: asyncio.Event
    """Set when the process is to end."""


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


async def run(operator: Operator) -> None:
    """Reconcile until `Operator.stop` is set.

    Raises:
        Exception: whatever ended one of the parts.
    """
    async with operator.connection.connect() as cluster:
        kuberay = KubeRay(cluster, operator.settings.watch_namespaces)
        await _Session(operator, cluster, kuberay, await kuberay.state()).run()


class _Session:
    def __init__(self, operator: Operator, cluster: Cluster, kuberay: KubeRay, state: KubeRayState) -> None:
        settings = operator.settings
        self._operator = operator
        self._kuberay, self._kuberay_state = kuberay, state
        self._definition = Definition(cluster)
        # What an older one runs already is looked after.
        self._kinds = (ChildKind.JOB,) if state is KubeRayState.MISSING else tuple(ChildKind)
        self._cache = Cache()
        self._inbox = Inbox(lambda key: self._queue.add(key))
        self._lease = Lease(cluster, settings.namespace, settings.lease, operator.identity, now, time.monotonic)
        self._certificate = CertificateHolder(
            ClusterSecret(cluster, settings.namespace, settings.progress.secret),
            [host_of(settings.progress.url)],
            now,
            on_change=self._wake_all,
        )
        self._server = ProgressServer(
            settings.progress,
            ClusterReviewer(cluster),
            self._cache,
            ClusterPatcher(cluster),
            self._inbox,
            self._certificate,
        )
        self._events = EventRecorder(cluster, operator.metrics)
        self._reconciler = Reconciler(
            cluster,
            self._cache,
            settings,
            self._inbox,
            self._lease,
            operator.metrics,
            self._events,
            plan,
            lambda: self._certificate.ca_bundle,
            now,
            state,
        )
        self._listing = Listing(lambda: self._queue.release())
        self._queue = Queue(
            self._reconciler,
            settings.workers,
            operator.metrics.retries.inc,
            self._reconciler.is_new,
            lambda key: self._listing.has(key[0]),
        )
        selectors = {KIND: "", **dict.fromkeys(("Pod", *(kind.value for kind in self._kinds)), handlers.CHILD_LABELS)}
        self._stalled = StalledDeletions(cluster, self._cache, self._lease, now)
        self._sweep = Sweep(cluster, self._cache, operator.metrics, settings.watch_namespaces, selectors)

    async def run(self) -> None:
        operator = self._operator
        operator.metrics.sessions.inc()
        gauges = operator.metrics.watch(
            lambda: ((job.namespace, job.phase) for job in self._cache.jobs()),
            lambda: len(self._queue),
            lambda: len(self._events),
            lambda: self._lease.is_open,
        )
        try:
            await self._server.start()
            await self._run_parts()
        finally:
            operator.ready.clear()
            operator.metrics.forget(gauges)
            await self._server.stop()
            await self._lease.release()

    async def _run_parts(self) -> None:
        """Run all parts; the end of one is the end of all."""
        stop_kopf = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            workers = group.create_task(self._queue.run(), name="workers")
            events = group.create_task(self._events.run(), name="events")
            others = [
                group.create_task(self._lease.run(self._wake_all), name="lease"),
                group.create_task(self._server.watch(), name="progress endpoint"),
                group.create_task(self._sweep_for_ever(), name="sweep"),
                group.create_task(self._stalled.watch(), name="stalled deletions"),
                group.create_task(self._kuberay.watch(self._kuberay_state), name="KubeRay"),
                group.create_task(self._definition.watch(), name="definition"),
            ]
            # kopf cancels at its end what was begun after it: so it is begun last.
            await asyncio.sleep(0)
            watches = group.create_task(self._watch(stop_kopf), name="kopf")
            group.create_task(self._stop_in_order(workers, events, others, watches, stop_kopf), name="end")

    async def _stop_in_order(
        self,
        workers: asyncio.Task[None],
        events: asyncio.Task[None],
        others: list[asyncio.Task[None]],
        watches: asyncio.Task[None],
        stop_kopf: asyncio.Event,
    ) -> None:
        await self._operator.stop.wait()
        logger.info("stopping")
        self._operator.ready.clear()
        self._queue.stop()
        await asyncio.wait([workers], timeout=STOP_SECONDS)
        self._events.stop()
        await asyncio.wait([events], timeout=EVENTS_SECONDS)
        for task in (workers, events, *others):
            task.cancel()
        await self._server.stop()
        await self._lease.release()
        stop_kopf.set()
        await asyncio.wait([watches])

    async def _watch(self, stop: asyncio.Event) -> None:
        settings = self._operator.settings
        before = asyncio.all_tasks()
        give_kopf(self._listing)
        tasks = await kopf.spawn_tasks(
            registry=handlers.registry(
                self._cache,
                self._queue.add,
                self._operator.connection.login,
                settings.policy.max_running_jobs is not None,
                self._kinds,
            ),
            settings=handlers.kopf_settings(),
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
            ready_flag=self._operator.ready,
            stop_flag=stop,
        )
        # kopf has taken them; its way to stop would leave begun work behind.
        stop_on_signals(self._operator.stop)
        await kopf.run_tasks(tasks, ignored=before)
        if not stop.is_set():
            raise RuntimeError("kopf has ended without having been asked to")

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SWEEPS)
            await self._sweep.look(now(), self._queue.add)

    def _wake_all(self) -> None:
        for key in self._cache.job_keys():
            self._queue.add(key)


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set ``stop`` when the process is asked to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
