"""Whether RayJobs can be created and watched: KubeRay comes, goes and is upgraded while the operator runs."""

import asyncio
import logging
from collections.abc import Sequence

from finetune_api.job import KIND
from finetune_operator.cluster import Cluster, NotFoundError, RefusedError, UnavailableError
from finetune_operator.observed import ChildKind, KubeRayState
from finetune_operator.ray_job import newest_fields

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 30.0
EVERYWHERE = "default"
"""The namespace that no cluster is without."""


class KubeRayChangedError(Exception):
    """KubeRay has come, gone or become another one; every watch must be started anew."""


class KubeRay:
    """Looks whether the API server serves RayJobs, with all the fields of ours, and serves them to us."""

    def __init__(self, cluster: Cluster, namespaces: Sequence[str], seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Look in ``namespaces``, in all when there are none, every ``seconds``."""
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = namespaces or (None,)
        self._seconds = seconds

    async def state(self, known: KubeRayState = KubeRayState.MISSING) -> KubeRayState:
        """Return whether RayJobs can be listed wherever FineTuneJobs can, and whether their definition has all of ours.

        It is as ``known`` where FineTuneJobs can be listed nowhere.

        Raises:
            UnavailableError: the API server did not answer.
        """
        listed: list[str | None] = []
        for namespace in self._namespaces:
            try:
                await self._cluster.first(ChildKind.RAY_JOB, namespace)
            except NotFoundError:
                return KubeRayState.MISSING
            except RefusedError as error:
                if await self._is_lost(namespace):
                    continue
                # Its jobs would wait for ever for a list of RayJobs; without one everything else goes on.
                logger.warning("RayJobs cannot be listed namespace=%s error=%s", namespace, error)
                return KubeRayState.MISSING
            listed.append(namespace)
        if not listed:
            return known
        return KubeRayState.TOO_OLD if await self._unknown_fields(listed[0]) else KubeRayState.READY

    async def _is_lost(self, namespace: str | None) -> bool:
        """Return whether a namespace is closed to us altogether, with its Role or gone, and says nothing of KubeRay."""
        try:
            await self._cluster.first(KIND, namespace)
        except (RefusedError, NotFoundError):
            return True
        return False

    async def _unknown_fields(self, namespace: str | None) -> frozenset[str]:
        try:
            return await self._cluster.unknown_fields(newest_fields(namespace or EVERYWHERE))
        except (NotFoundError, RefusedError) as error:
            # Who may create none hears so at the first that is needed.
            logger.warning("cannot tell how old KubeRay is error=%s", error)
            return frozenset()

    async def watch(self, was: KubeRayState) -> None:
        """Return never.

        Raises:
            KubeRayChangedError: it is not as it was.
        """
        while True:
            await asyncio.sleep(self._seconds)
            try:
                state = await self.state(was)
            except UnavailableError as error:
                logger.warning("cannot look for KubeRay error=%s", error)
                continue
            if state is not was:
                raise KubeRayChangedError(f"KubeRay was {was.value} and is {state.value}")
