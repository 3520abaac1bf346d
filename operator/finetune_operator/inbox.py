"""Results that trainers have posted and that no status holds yet.

In memory: who posted posts again until it is recorded. Knows no cluster: the progress server delivers, the reconciler
takes and acknowledges.
"""

import asyncio
from collections.abc import Callable, Iterable

from finetune_api.report import Stage
from finetune_operator.observed import DeliveredResult, JobView

_Slot = tuple[Stage, int]
"""Stage and attempt: a later delivery of the same takes the place of the earlier."""


class Inbox:
    """One result for each attempt, by the job's UID. Belongs to one event loop."""

    def __init__(self, wake: Callable[[tuple[str, str]], None]):
        """Call ``wake`` with a job's namespace and name whenever there is something new for it."""
        self._wake = wake
        self._kept: dict[str, dict[_Slot, DeliveredResult]] = {}
        self._waiting: dict[tuple[str, Stage, int], asyncio.Event] = {}

    async def deliver(self, job: JobView, delivered: DeliveredResult, seconds: float) -> bool:
        """Keep ``delivered`` and return whether it was recorded within ``seconds``; it is kept either way."""
        slot = (delivered.stage, delivered.attempt)
        kept = self._kept.setdefault(job.uid, {})
        if kept.get(slot) != delivered:
            kept[slot] = delivered
        # One event for all who deliver the same at the same time.
        recorded = self._waiting.setdefault((job.uid, *slot), asyncio.Event())
        self._wake(job.key)
        try:
            async with asyncio.timeout(seconds):
                await recorded.wait()
        except TimeoutError:
            return False
        return True

    def take(self, uid: str) -> tuple[DeliveredResult, ...]:
        """Return what was delivered for the job and is not acknowledged yet."""
        return tuple(self._kept.get(uid, {}).values())

    def acknowledge(self, uid: str, results: Iterable[DeliveredResult]) -> None:
        """Forget ``results``, which the status holds now or never will, and answer who delivered them."""
        kept = self._kept.get(uid, {})
        for result in results:
            slot = (result.stage, result.attempt)
            # A newer delivery of the same attempt is not what was recorded.
            if kept.get(slot) == result:
                del kept[slot]
                if event := self._waiting.pop((uid, *slot), None):
                    event.set()
        if not kept:
            self._kept.pop(uid, None)

    def forget(self, uid: str) -> None:
        """Forget everything about a job that is gone; who waits is left to give up."""
        self._kept.pop(uid, None)
        for waiting in [waiting for waiting in self._waiting if waiting[0] == uid]:
            del self._waiting[waiting]
