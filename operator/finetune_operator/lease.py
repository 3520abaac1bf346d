"""A Lease that lets one replica act at a time: during a rollout there are two.

It gates the work queue alone. Watches run in every replica, so that the next one takes over within moments.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator.cluster import Cluster, ClusterError

logger = logging.getLogger(__name__)

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Periods:
    """In seconds."""

    duration: float = 15.0
    """How long a lease counts that is not renewed. A killed replica blocks the next one for so long."""
    margin: float = 3.0
    """How much earlier its holder stops acting: a request that was sent may still arrive."""
    renewal: float = 4.0
    """Between two renewals."""
    poll: float = 1.0
    """Between two looks at somebody else's lease."""


class Lease:
    """Held or not; see `run`."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        now: Callable[[], datetime],
        clock: Callable[[], float],
        periods: Periods | None = None,
    ) -> None:
        """Contend as ``identity``: the pod's name, so that a restarted container goes on at once.

        Args:
            cluster: where the lease is.
            namespace: the operator's own.
            name: of the lease; the same for all replicas.
            identity: of this replica.
            now: tells the time, for people who read the lease.
            clock: counts seconds; two replicas' clocks are never compared.
            periods: how often, how long.
        """
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._now = now
        self._clock = clock
        self._periods = periods or Periods()
        self._held_until = float("-inf")
        self._seen: tuple[str, str] = ("", "")
        """Holder and time of renewal when last looked at."""
        self._seen_since = float("-inf")

    @property
    def is_open(self) -> bool:
        """Whether this replica may act. Ends by itself when renewals fail."""
        return self._clock() < self._held_until

    async def run(self, on_gain: Callable[[], None]) -> None:
        """Contend for ever; call ``on_gain`` whenever the lease becomes ours."""
        was_told = False
        while True:
            was_open = self.is_open
            try:
                is_ours = await self._contend()
                was_told = False
            except ClusterError as error:
                # Once in a row: an API server that is away for an hour is no news every second.
                logger.log(logging.DEBUG if was_told else logging.WARNING, "lease not renewed error=%s", error)
                is_ours, was_told = False, True
            if self.is_open and not was_open:
                logger.info("leading identity=%s", self._identity)
                on_gain()
            elif was_open and not self.is_open:
                logger.warning("not leading any more identity=%s", self._identity)
            await asyncio.sleep(self._periods.renewal if is_ours else self._periods.poll)

    async def release(self) -> None:
        """Let the next replica act at once, if the lease is ours."""
        self._held_until = float("-inf")
        try:
            lease = await self._cluster.get("Lease", self._namespace, self._name)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                await self._cluster.update({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except ClusterError as error:
            logger.warning("lease not released error=%s", error)

    async def _contend(self) -> bool:
        """Renew or take the lease if that may be done; return whether it is ours.

        Raises:
            ClusterError: it cannot be read or written, or somebody else was faster.
        """
        # Before the request is sent: when it was answered, nobody knows how long ago it was carried out.
        started = self._clock()
        lease = await self._cluster.get("Lease", self._namespace, self._name)
        if lease is None:
            await self._cluster.create(self._manifest({}))
        elif self._may_take(lease["spec"], started):
            await self._cluster.update({**lease, "spec": self._manifest(lease["spec"])["spec"]})
        else:
            return False
        self._held_until = started + self._periods.duration - self._periods.margin
        return True

    def _may_take(self, spec: Raw, now: float) -> bool:
        holder = spec.get("holderIdentity") or ""
        seen = (holder, spec.get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_since = seen, now
        duration = float(spec.get("leaseDurationSeconds") or self._periods.duration)
        return holder in ("", self._identity) or now >= self._seen_since + duration

    def _manifest(self, before: Raw) -> dict[str, Any]:
        now = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        is_ours = before.get("holderIdentity") == self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._periods.duration)),
                "acquireTime": before.get("acquireTime", now) if is_ours else now,
                "renewTime": now,
                "leaseTransitions": (before.get("leaseTransitions") or 0) + (not is_ours and bool(before)),
            },
        }
