"""Whether RayJobs can be watched: KubeRay may be installed, and removed, while the operator runs."""

import asyncio
import logging
from collections.abc import Sequence

from finetune_api.job import KIND
from finetune_operator.cluster import Cluster, NotFoundError, RefusedError, UnavailableError
from finetune_operator.observed import ChildKind

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 30.0


class KubeRayChangedError(Exception):
    """KubeRay has come or gone; every watch must be started anew."""


class KubeRay:
    """Looks whether the API server serves RayJobs, and serves them to us."""

    def __init__(self, cluster: Cluster, namespaces: Sequence[str], seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Look in ``namespaces``, in all when there are none, every ``seconds``."""
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = namespaces or (None,)
        self._seconds = seconds

    async def is_there(self, known: bool = False) -> bool:
        """Return whether RayJobs can be listed wherever FineTuneJobs can; ``known`` where those can nowhere.

        Raises:
            UnavailableError: the API server did not answer.
        """
        there = known
        for namespace in self._namespaces:
            try:
                await self._cluster.first(ChildKind.RAY_JOB, namespace)
            except NotFoundError:
                return False
            except RefusedError as error:
                if await self._is_lost(namespace):
                    continue
                # Its jobs would wait for ever for a list of RayJobs; without one everything else goes on.
                logger.warning("RayJobs cannot be listed namespace=%s error=%s", namespace, error)
                return False
            there = True
        return there

    async def _is_lost(self, namespace: str | None) -> bool:
        """Return whether a namespace is closed to us altogether, with its Role or gone, and says nothing of KubeRay."""
        try:
            await self._cluster.first(KIND, namespace)
        except (RefusedError, NotFoundError):
            return True
        return False

    async def watch(self, was_there: bool) -> None:
        """Return never.

        Raises:
            KubeRayChangedError: it is there and was not, or the other way round.
        """
        while True:
            await asyncio.sleep(self._seconds)
            try:
                is_there = await self.is_there(was_there)
            except UnavailableError as error:
                logger.warning("cannot look for KubeRay error=%s", error)
                continue
            if is_there != was_there:
                raise KubeRayChangedError("KubeRay has been installed" if is_there else "KubeRay has been removed")
