"""Whether the definition of FineTuneJob is still the one that watches were begun with: it may be replaced at any time.

kopf asks what the API server serves when a definition changes, and that may be a moment before it is served. It would
not ask again, and every job would be overlooked.
"""

import asyncio
import logging

from finetune_operator.cluster import Cluster, ClusterError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 15.0
"""Far longer than the API server needs to serve what is defined."""


class DefinitionReplacedError(Exception):
    """Watches were begun with another definition, or with none; all must be started anew."""


class Definition:
    """Looks which definition there is."""

    def __init__(self, cluster: Cluster, seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Look every ``seconds``."""
        self._cluster = cluster
        self._seconds = seconds

    async def watch(self) -> None:
        """Return never.

        Raises:
            DefinitionReplacedError: another one than at first has been there for two looks.
        """
        first = seen = await self._uid(None)
        while True:
            await asyncio.sleep(self._seconds)
            before, seen = seen, await self._uid(seen)
            if seen is not None and seen == before != first:
                raise DefinitionReplacedError("the definition of FineTuneJob has been replaced")

    async def _uid(self, known: str | None) -> str | None:
        """Return the UID of the definition, ``known`` where that cannot be told, nothing where there is none."""
        try:
            return await self._cluster.definition()
        except ClusterError as error:
            logger.warning("cannot look for the definition error=%s", error)
            return known
