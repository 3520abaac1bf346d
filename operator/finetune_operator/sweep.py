"""Compare the cache with the cluster now and then: what a broken watch missed is found within minutes.

After a watch has to start anew, kopf lists what is left and never hears of what was deleted meanwhile.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from finetune_operator.cache import Cache
from finetune_operator.cluster import Cluster, ClusterError, Identity, RefusedError
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
        self._missed: dict[tuple[str, str | None], set[str]] = {}
        """By kind and namespace."""

    async def look(self, now: datetime, wake: Callable[[tuple[str, str]], None]) -> None:
        """Mark ghosts and ``wake`` every job that has not ended.

        Raises:
            BrokenWatchError: an object was missed twice in a row.
        """
        for namespace in self._namespaces:
            try:
                await self._compare(namespace, now)
            except RefusedError as error:
                logger.warning("cannot list namespace=%s error=%s", namespace, error)
                if namespace is None or not await self._bury(namespace):
                    continue
            except ClusterError as error:
                logger.warning("cannot list namespace=%s error=%s", namespace, error)
                return
            self._wake_jobs(namespace, wake)

    async def _compare(self, namespace: str | None, now: datetime) -> None:
        latest = now - SETTLED_AFTER
        for kind, selector in self._selectors.items():
            known = self._cache.uids(kind, namespace)
            living = await self._cluster.identities(kind, namespace, selector)
            self._mark_ghosts(kind, known - {one.uid for one in living})
            told = self._cache.uids(kind, namespace)
            missed = {one.uid for one in living if one.uid not in told and _time(one) < latest}
            if again := missed & self._missed.get((kind, namespace), set()):
                raise BrokenWatchError(f"no watch tells of {len(again)} objects, {kind} {min(again)} among them")
            self._missed[kind, namespace] = missed

    async def _bury(self, namespace: str) -> bool:
        """Make ghosts of all of a namespace if it is gone, and return whether it is.

        Its watches end before its objects do.
        """
        known = {kind: self._cache.uids(kind, namespace) for kind in self._selectors}
        try:
            if await self._cluster.has_namespace(namespace):
                return False
        except ClusterError as error:
            logger.warning("cannot look for namespace=%s error=%s", namespace, error)
            return False
        for kind, uids in known.items():
            self._mark_ghosts(kind, uids)
        return True

    def _wake_jobs(self, namespace: str | None, wake: Callable[[tuple[str, str]], None]) -> None:
        for key in self._cache.job_keys():
            job = self._cache.packed(key)
            if namespace in (None, key[0]) and (job is None or not job.is_terminal):
                wake(key)

    def _mark_ghosts(self, kind: str, ghosts: set[str]) -> None:
        for uid in ghosts:
            logger.warning("ghost kind=%s uid=%s", kind, uid)
            self._cache.mark_ghost(uid)
            self._metrics.ghosts.labels(kind).inc()


def _time(identity: Identity) -> datetime:
    return datetime.fromisoformat(identity.created)
