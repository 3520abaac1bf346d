"""Tell people what happens to a job, by Kubernetes events. Said again, one is counted up; lost, it stops nothing.

Events wait in a line of their own, and one after the other is written: of a thousand jobs that come at once, none waits
for what is told about another.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.job import API_VERSION, KIND
from finetune_operator.action import Emit
from finetune_operator.cluster import AlreadyExistsError, Cluster, ClusterError, NotFoundError
from finetune_operator.metric import Metrics
from finetune_operator.naming import OPERATOR
from finetune_operator.view import PackedJob

logger = logging.getLogger(__name__)

MOST_REMEMBERED = 1024
LONGEST_MESSAGE = 1024
"""Bytes that the API server takes."""


MOST_WAITING = 10_000
"""Behind them others are lost: some 10 MB."""


@dataclass(frozen=True, slots=True)
class _Told:
    name: str
    job: tuple[str, str]
    event: dict[str, Any]


class EventRecorder:
    """Writes events; remembers the newest ones to count them up. Belongs to one event loop."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._waiting: deque[_Told] = deque()
        self._something_new = asyncio.Event()
        self._stopping = False

    def tell(self, emit: Emit, job: PackedJob, now: datetime) -> None:
        """Write ``emit`` about ``job`` when its turn comes."""
        if len(self._waiting) >= MOST_WAITING:
            self._lose(emit.reason, "too many others wait", job.key)
            return
        name = _name(emit, job)
        self._waiting.append(_Told(name, job.key, _event(name, emit, job, now)))
        self._something_new.set()

    async def run(self) -> None:
        """Write until `stop` is called and nothing waits."""
        while self._waiting or not self._stopping:
            await self._something_new.wait()
            self._something_new.clear()
            await self.write_all()

    async def write_all(self) -> None:
        """Write what waits."""
        while self._waiting:
            await self._write(self._waiting.popleft())

    def stop(self) -> None:
        """Let `run` end."""
        self._stopping = True
        self._something_new.set()

    async def _write(self, told: _Told) -> None:
        count = self._counts.pop(told.name, 0) + 1
        try:
            if count > 1:
                await self._count_up(told, count)
            else:
                await self._cluster.create(told.event)
        except AlreadyExistsError:
            # From before this operator was started: how often it was said is not known any more.
            logger.debug("event is there already name=%s", told.name)
        except ClusterError as error:
            self._lose(told.event["reason"], str(error), told.job)
            return
        self._counts[told.name] = count
        while len(self._counts) > MOST_REMEMBERED:
            self._counts.popitem(last=False)

    async def _count_up(self, told: _Told, count: int) -> None:
        change = {"count": count, "lastTimestamp": told.event["lastTimestamp"]}
        try:
            await self._cluster.patch("Event", told.job[0], told.name, change)
        except NotFoundError:
            # The API server keeps events for an hour.
            await self._cluster.create({**told.event, "count": count})

    def _lose(self, reason: str, why: str, job: tuple[str, str]) -> None:
        self._metrics.events_lost.inc()
        logger.warning("event not written reason=%s error=%s job=%s/%s", reason, why, *job)


def _name(emit: Emit, job: PackedJob) -> str:
    said = "\0".join((job.uid, emit.type, emit.reason, emit.message))
    return f"{job.name}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _event(name: str, emit: Emit, job: PackedJob, now: datetime) -> dict[str, Any]:
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
            "resourceVersion": str(job.resource_version),
        },
        "type": emit.type.value,
        "reason": emit.reason.value,
        "message": emit.message.encode()[:LONGEST_MESSAGE].decode(errors="ignore"),
        "count": 1,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "source": {"component": OPERATOR},
    }
