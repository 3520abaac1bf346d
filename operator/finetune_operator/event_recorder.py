"""Tell people what happens to a job, by Kubernetes events. Said again, one is counted up; lost, it stops nothing."""

import hashlib
import logging
from collections import OrderedDict
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


class EventRecorder:
    """Writes events; remembers the newest ones to count them up."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def record(self, emit: Emit, job: PackedJob, now: datetime) -> None:
        """Write ``emit`` about ``job``."""
        name, time = _name(emit, job), now.strftime("%Y-%m-%dT%H:%M:%SZ")
        count = self._counts.pop(name, 0) + 1
        try:
            if count > 1:
                await self._count_up(name, emit, job, time, count)
            else:
                await self._cluster.create(_event(name, emit, job, time))
        except AlreadyExistsError:
            # From before this operator was started: how often it was said is not known any more.
            logger.debug("event is there already name=%s", name)
        except ClusterError as error:
            self._metrics.events_lost.inc()
            logger.warning("event not written reason=%s error=%s job=%s/%s", emit.reason, error, *job.key)
            return
        self._counts[name] = count
        while len(self._counts) > MOST_REMEMBERED:
            self._counts.popitem(last=False)

    async def _count_up(self, name: str, emit: Emit, job: PackedJob, time: str, count: int) -> None:
        try:
            await self._cluster.patch("Event", job.namespace, name, {"count": count, "lastTimestamp": time})
        except NotFoundError:
            # The API server keeps events for an hour.
            await self._cluster.create(_event(name, emit, job, time, count))


def _name(emit: Emit, job: PackedJob) -> str:
    said = "\0".join((job.uid, emit.type, emit.reason, emit.message))
    return f"{job.name}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _event(name: str, emit: Emit, job: PackedJob, time: str, count: int = 1) -> dict[str, Any]:
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
        "count": count,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "source": {"component": OPERATOR},
    }
