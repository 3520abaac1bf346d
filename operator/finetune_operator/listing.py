"""Which namespaces have been listed; before that no job of theirs is looked at.

kopf holds back every object until all are in its indices, each with a task and a copy of the object, and lists faster
than it indexes. Of some thousand jobs with their children that took more memory than the operator may have. All that
our handlers do is wake jobs, so here objects go on at once, what waits is the queue of jobs, and a list is read no
faster than its objects are indexed. A namespace that cannot be listed holds up no other.
"""

from collections.abc import Callable, Iterable

from kopf._cogs.aiokits import aiotoggles

MOST_AT_ONCE = 500
"""Objects that are read and not in an index yet."""

_EVERYWHERE = "None"
"""What kopf calls the one place that it watches where it watches all namespaces."""

_ToggleSet = aiotoggles.ToggleSet
_Toggle = aiotoggles.Toggle


class Listing(aiotoggles.ToggleSet):
    """What kopf has still to list and to index: a toggle for each, dropped when it is done.

    By its name a toggle is of a kind of objects in a place, ``jobs.v1.batch@team-a``; of one object, ``(jobs.v1.batch,
    'uid')``; or it spans the moment in which kopf makes those of kinds.
    """

    def __init__(self, on_listed: Callable[[], None]) -> None:
        """Call ``on_listed`` whenever a namespace, or all, has been listed."""
        super().__init__(all)
        self._on_listed = on_listed
        self._kinds: dict[str, dict[str, _Toggle]] = {}
        """Those that are not listed, by place and name."""
        self._objects: set[_Toggle] = set()
        """Those that are not indexed."""
        self._read: dict[str, set[_Toggle]] = {}
        """By a place whose kinds are all listed, those of the objects that were not indexed by then."""
        self._listed: set[str] = set()

    def has(self, namespace: str) -> bool:
        """Return whether all that is watched of ``namespace`` has been in the indices."""
        return namespace in self._listed or _EVERYWHERE in self._listed

    async def make_toggle(self, initial: bool = False, /, *, name: str | None = None) -> _Toggle:
        """Add a toggle; one of an object when there are not too many."""
        name = name or ""
        is_of_object = name.startswith("(")
        if is_of_object:
            async with self._condition:
                await self._condition.wait_for(lambda: len(self._objects) < MOST_AT_ONCE)
        toggle = await super().make_toggle(initial, name=name)
        _, is_of_kind, place = name.rpartition("@")
        if is_of_object:
            self._objects.add(toggle)
        elif is_of_kind:
            # One of that name may be left: of a namespace that went while it was listed, and has come again.
            self._kinds.setdefault(place, {})[name] = toggle
            self._listed.discard(place)
            self._read.pop(place, None)
        return toggle

    async def drop_toggle(self, toggle: _Toggle) -> None:
        """Take a toggle out; nothing happens when it is not there."""
        if toggle not in self:
            return
        # Before those are told who wait for it.
        self._objects.discard(toggle)
        await super().drop_toggle(toggle)
        for waiting in self._read.values():
            waiting.discard(toggle)
        for place, kinds in list(self._kinds.items()):
            if kinds.get(toggle.name or "") is toggle:
                del kinds[toggle.name or ""]
            if not kinds:
                del self._kinds[place]
                self._read[place] = set(self._objects)
        for place in [place for place, waiting in self._read.items() if not waiting]:
            del self._read[place]
            self._listed.add(place)
            self._on_listed()

    def is_on(self) -> bool:
        """Return that there is something to list: kopf would make no more toggles, and lists again now and then."""
        return False

    async def wait_for(self, __state: bool) -> None:
        """Return at once: no object is held back."""


def give_kopf(listing: Listing) -> None:
    """Let kopf's next session in this process use ``listing``: it offers no other way to hand it one."""

    def made(fn: Callable[[Iterable[bool]], bool]) -> aiotoggles.ToggleSet:
        # The other set, any, is of what pauses it.
        return listing if fn is all else _ToggleSet(fn)

    aiotoggles.ToggleSet = made  # type: ignore[assignment, misc]
