"""Whether kopf has listed everything: its own answer, told to those who wait for it only when it has changed.

kopf holds back every object until all are in its indices, and wakes all that are held back whenever one more is found
or indexed. With thousands of objects that takes more of the processor than everything else at a start.
"""

from kopf._cogs.aiokits import aiotoggles


class QuietToggleSet(aiotoggles.ToggleSet):
    """A set of toggles that wakes whoever waits for its state when that has changed, and not before."""

    async def make_toggle(self, __val: bool = False, *, name: str | None = None) -> aiotoggles.Toggle:
        """Add a toggle."""
        toggle = aiotoggles.Toggle(__val, name=name, condition=self._condition)
        async with self._condition:
            before = self.is_on()
            self._toggles.add(toggle)
            self._tell_of_change(before)
        return toggle

    async def drop_toggle(self, toggle: aiotoggles.Toggle) -> None:
        """Take a toggle out; nothing happens when it is not there."""
        async with self._condition:
            before = self.is_on()
            self._toggles.discard(toggle)
            self._tell_of_change(before)

    def _tell_of_change(self, before: bool) -> None:
        if self.is_on() != before:
            self._condition.notify_all()


def quiet_toggles() -> None:
    """Let kopf make its sets of toggles of this class: it offers no other way to hand it one."""
    aiotoggles.ToggleSet = QuietToggleSet  # type: ignore[misc]
