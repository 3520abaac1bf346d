"""Compare the cache with the cluster now and then: what a broken watch missed is found within minutes.

After a watch has to start anew, kopf lists what is left and never hears of what was deleted meanwhile.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster, ClusterError, Identity
from finetune_operator.metric import Metrics

logger = logging.getLogger(__name__)

SETTLED_AFTER = timedelta(seconds=60)
"""An object that is older and that no watch has told of was missed."""


class BrokenWatchError(Exception):
    """A watch does not tell of objects that exist; all watches must be started again."""


class Sweep:
    """Finds ghosts, and objects that no watch tells of."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        metrics: Metrics,
        namespaces: Sequence[str],
        selectors: Mapping[str, str],
    ) -> None:
        """Look at ``namespaces``, all when there are none; at the kinds of ``selectors``, by their labels."""
        self._cluster = cluster
        self._cache = cache
        self._metrics = metrics
        self._namespaces: Sequence[str | None] = namespaces or (None,)
        self._selectors = selectors
        self._missed: set[str] = set()

    async def look(self, now: datetime, wake: Callable[[tuple[str, str]], None]) -> None:
        """Mark ghosts and ``wake`` every job that has not ended.

        Raises:
            BrokenWatchError: an object was missed twice in a row.
        """
        missed: set[str] = set()
        for kind, selector in self._selectors.items():
            known = self._cache.uids()[kind]
            try:
                living = await self._list(kind, selector)
            except ClusterError as error:
                logger.warning("cannot list kind=%s error=%s", kind, error)
                return
            self._mark_ghosts(kind, known - {one.uid for one in living})
            told = self._cache.uids()[kind]
            latest = now - SETTLED_AFTER
            missed |= {one.uid for one in living if one.uid not in told and _time(one) < latest}
        if again := missed & self._missed:
            raise BrokenWatchError(f"no watch tells of {len(again)} objects, {min(again)} among them")
        self._missed = missed
        for key in self._cache.job_keys():
            job = self._cache.packed(key)
            if job is None or not job.is_terminal:
                wake(key)

    async def _list(self, kind: str, selector: str) -> list[Identity]:
        return [one for place in self._namespaces for one in await self._cluster.identities(kind, place, selector)]

    def _mark_ghosts(self, kind: str, ghosts: set[str]) -> None:
        for uid in ghosts:
            logger.warning("ghost kind=%s uid=%s", kind, uid)
            self._cache.mark_ghost(uid)
            self._metrics.ghosts.labels(kind).inc()


def _time(identity: Identity) -> datetime:
    return datetime.fromisoformat(identity.created)
