"""Whether everything that is watched has been listed; until then no job is looked at.

kopf holds back every object until all are in its indices, each with a task and a copy of the object. Of some thousand
jobs with their children that took more memory than the operator may have. All that our handlers do is wake jobs, so
here objects go on at once, and what waits is the queue of jobs.
"""

import asyncio
from collections.abc import Callable, Iterable

from kopf._cogs.aiokits import aiotoggles

_ToggleSet = aiotoggles.ToggleSet


class Listing(aiotoggles.ToggleSet):
    """What kopf has still to list and to index: a toggle for each, the last of which is dropped when all is done."""

    def __init__(self) -> None:
        super().__init__(all)
        self.complete = asyncio.Event()
        """Set when everything has been in the indices for the first time. What is watched later holds up nothing."""
        self._has_begun = False

    async def make_toggle(self, __val: bool = False, *, name: str | None = None) -> aiotoggles.Toggle:
        """Add a toggle."""
        toggle = await super().make_toggle(__val, name=name)
        # kopf's first one only spans the moment in which it makes those of the kinds of objects.
        self._has_begun |= len(self) > 1
        return toggle

    async def drop_toggle(self, toggle: aiotoggles.Toggle) -> None:
        """Take a toggle out; nothing happens when it is not there."""
        await super().drop_toggle(toggle)
        if self._has_begun and not len(self):
            self.complete.set()

    async def wait_for(self, __state: bool) -> None:
        """Return at once: kopf's handlers are held back by nothing."""


def give_kopf(listing: Listing) -> None:
    """Let kopf's next session use ``listing``: it offers no other way to hand it one."""

    def made(fn: Callable[[Iterable[bool]], bool]) -> aiotoggles.ToggleSet:
        # The other set, any, is of what pauses it.
        return listing if fn is all else _ToggleSet(fn)

    aiotoggles.ToggleSet = made  # type: ignore[assignment, misc]
