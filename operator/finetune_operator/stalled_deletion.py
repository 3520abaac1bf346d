"""RayJobs whose deletion waits for KubeRay for too long, because KubeRay is down or was removed without its objects.

Its finalizer is there to stop the program first. Pods go with the RayJob anyway, by Kubernetes' own garbage collection;
but as long as the finalizer is not taken off they hold their GPUs, and a suspended or deleted job never ends.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster, ClusterError
from finetune_operator.executor import Gate
from finetune_operator.observed import ChildKind, ChildView

logger = logging.getLogger(__name__)

FINALIZER = "ray.io/rayjob-finalizer"
PATIENCE = timedelta(seconds=60)
"""KubeRay needs a few seconds, and half a minute to be replaced by another replica of itself."""
SECONDS_BETWEEN_LOOKS = 10.0


class StalledDeletions:
    """Takes KubeRay's finalizer off where KubeRay does not."""

    def __init__(self, cluster: Cluster, cache: Cache, gate: Gate, now: Callable[[], datetime]) -> None:
        """Act while ``gate`` is open."""
        self._cluster = cluster
        self._cache = cache
        self._gate = gate
        self._now = now
        self._since: dict[str, datetime] = {}
        """When each deletion was first seen, by UID."""

    async def watch(self, seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Look every ``seconds``; return never."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """Finish every deletion that has been going on for longer than `PATIENCE`."""
        now, deleting = self._now(), list(self._cache.deleting(ChildKind.RAY_JOB))
        self._since = {child.uid: self._since.get(child.uid, now) for _, child in deleting}
        for namespace, child in deleting:
            if self._gate.is_open and now - self._since[child.uid] >= PATIENCE:
                await self._finish(namespace, child)

    async def _finish(self, namespace: str, child: ChildView) -> None:
        try:
            stored = await self._cluster.get(child.kind, namespace, child.name)
            if stored is None or stored["metadata"]["uid"] != child.uid:
                return
            metadata = stored["metadata"]
            others = [name for name in metadata.get("finalizers", ()) if name != FINALIZER]
            if others == metadata.get("finalizers", []):
                return
            patch = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": others}}
            await self._cluster.patch(child.kind, namespace, child.name, patch)
        except ClusterError as error:
            logger.warning("cannot finish a deletion kind=%s name=%s error=%s", child.kind, child.name, error)
            return
        logger.warning(
            "finished a deletion that KubeRay has not within %s s namespace=%s name=%s",
            int(PATIENCE.total_seconds()),
            namespace,
            child.name,
        )
