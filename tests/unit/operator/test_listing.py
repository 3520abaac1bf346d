"""Which namespaces are listed: by kopf's own toggles, which the queue of jobs waits for and kopf's handlers do not."""

import asyncio

import pytest
from kopf._cogs.aiokits import aiotoggles
from kopf._cogs.structs.references import Resource
from kopf._core.reactor import orchestration, queueing

from finetune_operator import listing as module
from finetune_operator.listing import Listing, give_kopf
from finetune_operator.queue import Key, Queue, Result

BLOCKER, JOBS_A, PODS_A, JOBS_B = "orchestration blocker", "jobs@a", "pods@a", "jobs@b"
FIRST, SECOND = "(jobs, 'uid-1')", "(pods, 'uid-2')"


def listed(*steps: str) -> list[str]:
    """Return which of the namespaces a and b are listed behind each step: a name makes a toggle, or drops it again."""

    async def scenario() -> list[str]:
        listing, made, states = Listing(lambda: None), dict[str, aiotoggles.Toggle](), []
        for name in steps:
            if name in made:
                await listing.drop_toggle(made.pop(name))
            else:
                made[name] = await listing.make_toggle(name=name)
            states.append("".join(place for place in "ab" if listing.has(place)))
        return states

    return asyncio.run(scenario())


def test_a_namespace_is_listed_when_its_kinds_and_their_objects_are() -> None:
    steps = (BLOCKER, JOBS_A, PODS_A, BLOCKER, FIRST, JOBS_A, PODS_A, FIRST)
    assert listed(*steps) == [""] * 7 + ["a"]


def test_objects_that_come_behind_the_list_hold_up_nothing() -> None:
    assert listed(JOBS_A, FIRST, JOBS_A, SECOND, FIRST) == [""] * 4 + ["a"]


def test_a_namespace_that_is_watched_later_is_listed_later_and_holds_up_no_other() -> None:
    assert listed(JOBS_A, JOBS_A, JOBS_B, FIRST, FIRST, JOBS_B) == ["", "a", "a", "a", "a", "ab"]


def test_a_namespace_that_went_while_it_was_listed_is_listed_when_it_has_come_again() -> None:
    async def scenario() -> bool:
        listing = Listing(lambda: None)
        await listing.make_toggle(name=JOBS_A)
        again = await listing.make_toggle(name=JOBS_A)
        await listing.drop_toggle(again)
        return listing.has("a")

    assert asyncio.run(scenario())


def test_where_all_namespaces_are_watched_all_are_listed_at_once() -> None:
    assert listed(BLOCKER, "jobs@None", BLOCKER, "jobs@None") == ["", "", "", "ab"]


def test_nothing_is_listed_before_kopf_knows_of_any_kind() -> None:
    assert listed(BLOCKER, BLOCKER) == ["", ""]


def test_kopf_holds_no_object_back() -> None:
    async def scenario() -> bool:
        listing = Listing(lambda: None)
        await listing.make_toggle(name=JOBS_A)
        async with asyncio.timeout(5):
            await listing.wait_for(True)
        return listing.is_on()

    assert asyncio.run(scenario()) is False


def test_no_more_is_read_than_is_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_AT_ONCE", 2)

    async def scenario() -> list[bool]:
        listing = Listing(lambda: None)
        toggles = [await listing.make_toggle(name=f"(pods, '{number}')") for number in range(2)]
        third = asyncio.create_task(listing.make_toggle(name="(pods, '3')"))
        # What is no object is not held up.
        await listing.make_toggle(name=JOBS_A)
        await asyncio.sleep(0)
        early = third.done()
        await listing.drop_toggle(toggles[0])
        async with asyncio.timeout(5):
            await third
        return [early, third.done()]

    assert asyncio.run(scenario()) == [False, True]


def test_no_job_is_looked_at_before_its_namespace_is_listed() -> None:
    async def scenario() -> list[Key]:
        looked: list[Key] = []

        async def look(key: Key) -> Result:
            looked.append(key)
            return Result()

        queue = Queue(look, workers=2, is_listed=lambda key: listing.has(key[0]))
        listing = Listing(queue.release)
        jobs = {place: await listing.make_toggle(name=f"jobs@{place}") for place in "ab"}
        working = asyncio.create_task(queue.run())
        for place in "ab":
            queue.add((place, "early"))
        await breathe()
        assert looked == [] and len(queue) == 2
        await listing.drop_toggle(jobs["b"])
        await breathe()
        assert looked == [("b", "early")] and len(queue) == 1
        await listing.drop_toggle(jobs["a"])
        await breathe()
        queue.stop()
        await working
        return looked

    assert asyncio.run(scenario()) == [("b", "early"), ("a", "early")]


async def breathe() -> None:
    """Let everybody who can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_operator_that_is_to_end_does_not_wait_for_a_list() -> None:
    async def look(key: Key) -> Result:
        raise AssertionError(f"{key} is looked at")

    async def scenario() -> None:
        queue = Queue(look, workers=2, is_listed=lambda key: False)
        queue.add(("a", "early"))
        working = asyncio.create_task(queue.run())
        await asyncio.sleep(0)
        queue.stop()
        async with asyncio.timeout(5):
            await working

    asyncio.run(scenario())


def test_kopf_takes_it_for_what_is_listed_and_not_for_what_pauses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiotoggles, "ToggleSet", aiotoggles.ToggleSet)
    listing = Listing(lambda: None)
    give_kopf(listing)
    assert orchestration.aiotoggles.ToggleSet(all) is listing
    assert not isinstance(orchestration.aiotoggles.ToggleSet(any), Listing)


def test_kopf_names_objects_as_is_expected_of_it() -> None:
    resource = Resource(group="", version="v1", plural="pods")
    assert f"{(resource, queueing.ObjectUid('uid'))!r}".startswith("(")
    assert not f"{resource}@team-a".startswith("(")
