"""Whether everything is listed: kopf's own answer, which the queue of jobs waits for and kopf's handlers do not."""

import asyncio

import pytest
from kopf._cogs.aiokits import aiotoggles
from kopf._core.reactor import orchestration

from finetune_operator.listing import Listing, give_kopf
from finetune_operator.queue import Key, Queue, Result


def run(steps: str) -> list[bool]:
    """Return whether all is listed behind each step: a letter makes the toggle of that name, or drops it again."""

    async def scenario() -> list[bool]:
        listing, complete = Listing(), []
        made: dict[str, aiotoggles.Toggle] = {}
        for name in steps:
            if name in made:
                await listing.drop_toggle(made.pop(name))
            else:
                made[name] = await listing.make_toggle(name=name)
            complete.append(listing.complete.is_set())
        return complete

    return asyncio.run(scenario())


def test_all_is_listed_when_the_last_kind_and_its_objects_are() -> None:
    # Kopf's own toggle k, the kinds a and b, an object 1 of a.
    assert run("kabk1ab1") == [False] * 7 + [True]


def test_nothing_is_listed_before_kopf_knows_of_any_kind() -> None:
    assert run("kkkabkab") == [False] * 7 + [True]


def test_what_is_watched_later_holds_up_nothing() -> None:
    assert run("kakakckc") == [False] * 3 + [True] * 5


def test_kopf_holds_no_object_back() -> None:
    async def scenario() -> bool:
        listing = Listing()
        await listing.make_toggle()
        async with asyncio.timeout(5):
            await listing.wait_for(True)
        return listing.is_on()

    assert asyncio.run(scenario()) is False


def test_no_job_is_looked_at_before_all_is_listed() -> None:
    async def scenario() -> list[Key]:
        looked: list[Key] = []

        async def look(key: Key) -> Result:
            looked.append(key)
            queue.stop()
            return Result()

        listing = Listing()
        queue = Queue(look, workers=2, opened=listing.complete)
        working = asyncio.create_task(queue.run())
        queue.add(("team", "early"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert looked == [] and len(queue) == 1
        listing.complete.set()
        await working
        return looked

    assert asyncio.run(scenario()) == [("team", "early")]


def test_an_operator_that_is_to_end_does_not_wait_for_the_list() -> None:
    async def look(key: Key) -> Result:
        raise AssertionError(f"{key} is looked at")

    async def scenario() -> None:
        queue = Queue(look, workers=2, opened=asyncio.Event())
        queue.add(("team", "early"))
        working = asyncio.create_task(queue.run())
        await asyncio.sleep(0)
        queue.stop()
        async with asyncio.timeout(5):
            await working

    asyncio.run(scenario())


def test_kopf_takes_it_for_what_is_listed_and_none_for_what_pauses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiotoggles, "ToggleSet", aiotoggles.ToggleSet)
    listing = Listing()
    give_kopf(listing)
    assert orchestration.aiotoggles.ToggleSet(all) is listing
    assert not isinstance(orchestration.aiotoggles.ToggleSet(any), Listing)
