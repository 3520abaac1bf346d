"""Whether RayJobs can be watched: KubeRay may be installed, and removed, while the operator runs."""

import asyncio
import logging
from collections.abc import Sequence

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

    async def is_there(self) -> bool:
        """Return whether RayJobs can be listed.

        Raises:
            UnavailableError: the API server did not answer.
        """
        try:
            for namespace in self._namespaces:
                await self._cluster.first(ChildKind.RAY_JOB, namespace)
        except NotFoundError:
            return False
        except RefusedError as error:
            # kopf would end at this; without RayJobs everything else goes on.
            logger.warning("RayJobs cannot be listed error=%s", error)
            return False
        return True

    async def watch(self, was_there: bool) -> None:
        """Return never.

        Raises:
            KubeRayChangedError: it is there and was not, or the other way round.
        """
        while True:
            await asyncio.sleep(self._seconds)
            try:
                is_there = await self.is_there()
            except UnavailableError as error:
                logger.warning("cannot look for KubeRay error=%s", error)
                continue
            if is_there != was_there:
                raise KubeRayChangedError("KubeRay has been installed" if is_there else "KubeRay has been removed")
