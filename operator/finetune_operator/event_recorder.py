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
MOST_WAITING = 20_000
"""Behind them others are lost: some 10 MB."""


class EventRecorder:
    """Writes events; remembers the newest ones to count them up. Belongs to one event loop."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._waiting: deque[_Untold] = deque()
        self._something_new = asyncio.Event()
        self._stopping = False

    def __len__(self) -> int:
        """Return how many events wait."""
        return len(self._waiting)

    def tell(self, emit: Emit, job: PackedJob, now: datetime) -> None:
        """Write ``emit`` about ``job`` when its turn comes."""
        untold = _Untold(emit, job.namespace, job.name, job.uid, job.resource_version, now)
        if len(self._waiting) >= MOST_WAITING:
            self._lose(untold, "too many others wait")
            return
        self._waiting.append(untold)
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

    async def _write(self, untold: "_Untold") -> None:
        event = untold.event()
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
            self._lose(untold, str(error))
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

    def _lose(self, untold: "_Untold", why: str) -> None:
        self._metrics.events_lost.inc()
        logger.warning(
            "event not written reason=%s error=%s job=%s/%s", untold.emit.reason, why, untold.namespace, untold.job
        )


@dataclass(frozen=True, slots=True)
class _Untold:
    """What is to be told, in a fifth of the memory that it takes as an object of the API server."""

    emit: Emit
    namespace: str
    job: str
    uid: str
    resource_version: int
    time: datetime

    @property
    def name(self) -> str:
        said = "\0".join((self.uid, self.emit.type, self.emit.reason, self.emit.message))
        return f"{self.job}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def event(self) -> dict[str, Any]:
        time = self.time.strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": self.namespace,
                "name": self.job,
                "uid": self.uid,
                "resourceVersion": str(self.resource_version),
            },
            "type": self.emit.type.value,
            "reason": self.emit.reason.value,
            "message": self.emit.message.encode()[:LONGEST_MESSAGE].decode(errors="ignore"),
            "count": 1,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "source": {"component": OPERATOR},
        }
