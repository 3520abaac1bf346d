"""Tell people what happens to a job, by Kubernetes events. Said again, one is counted up; lost, it stops nothing.

Events wait in a line of their own, and one after the other is written: of a thousand jobs that come at once, none waits
for what is told about another.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
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


class EventRecorder:
    """Writes events; remembers the newest ones to count them up. Belongs to one event loop."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._waiting: deque[dict[str, Any]] = deque()
        self._something_new = asyncio.Event()
        self._stopping = False

    def __len__(self) -> int:
        """Return how many events wait."""
        return len(self._waiting)

    def tell(self, emit: Emit, job: PackedJob, now: datetime) -> None:
        """Write ``emit`` about ``job`` when its turn comes."""
        event = _event(emit, job, now)
        if len(self._waiting) >= MOST_WAITING:
            self._lose(event, "too many others wait")
            return
        self._waiting.append(event)
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

    async def _write(self, event: dict[str, Any]) -> None:
        name = event["metadata"]["name"]
        count = self._counts.pop(name, 0) + 1
        try:
            if count > 1:
                await self._count_up(event, count)
            else:
                await self._cluster.create(event)
        except AlreadyExistsError:
            # From before this operator was started: how often it was said is not known any more.
            logger.debug("event is there already name=%s", name)
        except ClusterError as error:
            self._lose(event, str(error))
            return
        self._counts[name] = count
        while len(self._counts) > MOST_REMEMBERED:
            self._counts.popitem(last=False)

    async def _count_up(self, event: dict[str, Any], count: int) -> None:
        change = {"count": count, "lastTimestamp": event["lastTimestamp"]}
        try:
            await self._cluster.patch("Event", event["metadata"]["namespace"], event["metadata"]["name"], change)
        except NotFoundError:
            # The API server keeps events for an hour.
            await self._cluster.create({**event, "count": count})

    def _lose(self, event: dict[str, Any], why: str) -> None:
        self._metrics.events_lost.inc()
        job = event["involvedObject"]
        logger.warning(
            "event not written reason=%s error=%s job=%s/%s", event["reason"], why, job["namespace"], job["name"]
        )


def _name(emit: Emit, job: PackedJob) -> str:
    said = "\0".join((job.uid, emit.type, emit.reason, emit.message))
    return f"{job.name}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _event(emit: Emit, job: PackedJob, now: datetime) -> dict[str, Any]:
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": _name(emit, job), "namespace": job.namespace},
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
