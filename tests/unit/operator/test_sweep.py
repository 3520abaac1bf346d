"""The sweep finds what broken watches have missed."""

import asyncio
from typing import Any

import pytest

from finetune_operator.cache import Cache, Indices, namespace_key
from finetune_operator.cluster import RefusedError, UnavailableError
from finetune_operator.metric import Metrics
from finetune_operator.sweep import BrokenWatchError, Sweep
from finetune_operator.view import packed_job

from .fake_api_server import FakeApiServer
from .objects import NAME, NAMESPACE, after
from .raw_objects import raw_job

KEY = (NAMESPACE, NAME)


class World:
    def __init__(self, *namespaces: str) -> None:
        self.server, self.cache, self.woken = FakeApiServer(), Cache(), list[tuple[str, str]]()
        selectors = {"FineTuneJob": "", "Job": "labels", "Pod": "labels"}
        self.sweep = Sweep(self.server, self.cache, Metrics(), namespaces, selectors)

    def look(self, seconds: float = 300) -> None:
        asyncio.run(self.sweep.look(after(seconds), self.woken.append))

    def watch(self, *raws: dict[str, Any]) -> None:
        packed = [packed_job(raw) for raw in raws]
        self.cache.indices = Indices(
            {job.key: [job] for job in packed} | {namespace_key(job.namespace): [job] for job in packed}
        )


def test_job_that_is_there_is_woken() -> None:
    world = World()
    world.watch(world.server.put("FineTuneJob", raw_job()))
    world.look()
    assert world.woken == [KEY]
    assert world.cache.packed(KEY) is not None


def test_ended_job_sleeps_on() -> None:
    world = World()
    world.watch(world.server.put("FineTuneJob", raw_job(status={"phase": "Failed"})))
    world.look()
    assert world.woken == []


def test_job_that_is_gone_is_a_ghost_and_woken_to_be_forgotten() -> None:
    world = World()
    world.watch(raw_job())
    world.look()
    assert world.cache.packed(KEY) is None
    assert world.woken == [KEY]


def test_job_that_no_watch_tells_of_twice_says_that_the_watch_is_broken() -> None:
    world = World()
    world.server.put("FineTuneJob", raw_job())
    world.look()
    with pytest.raises(BrokenWatchError):
        world.look()


def test_young_job_may_not_have_been_told_yet() -> None:
    world = World()
    world.server.put("FineTuneJob", raw_job())
    world.look(seconds=5)
    world.look(seconds=50)


@pytest.mark.parametrize("namespaces", [(NAMESPACE, "lost"), ("lost", NAMESPACE)])
def test_namespace_that_is_lost_hides_no_ghost_of_another_and_makes_none_of_its_own(
    namespaces: tuple[str, ...],
) -> None:
    world = World(*namespaces)
    world.watch(raw_job(), raw_job(namespace="lost", uid="kept"))
    world.server.closed = {"lost"}
    world.look()
    assert world.cache.packed(KEY) is None
    assert world.cache.packed(("lost", NAME)) is not None
    assert world.woken == [KEY]


def test_namespace_that_is_lost_hides_no_broken_watch_of_another() -> None:
    world = World("lost", NAMESPACE)
    world.server.closed = {"lost"}
    world.server.put("FineTuneJob", raw_job())
    world.look()
    with pytest.raises(BrokenWatchError):
        world.look()


def test_all_of_a_namespace_that_is_gone_are_ghosts_and_woken_to_be_forgotten() -> None:
    world = World("lost", NAMESPACE)
    world.watch(world.server.put("FineTuneJob", raw_job()), raw_job(namespace="lost", uid="gone"))
    world.server.gone = {"lost"}
    world.look()
    assert [job.key for job in world.cache.jobs()] == [KEY]
    assert world.woken == [("lost", NAME), KEY]


def test_namespace_that_may_not_be_looked_for_is_not_gone() -> None:
    world = World("lost")
    world.watch(raw_job(namespace="lost"))
    world.server.gone = {"lost"}
    world.server.fails = lambda verb, kind: RefusedError("forbidden") if kind == "Namespace" else None
    world.look()
    assert world.cache.packed(("lost", NAME)) is not None


def test_list_that_fails_makes_nothing_a_ghost() -> None:
    world = World()
    world.watch(raw_job())
    world.server.fails = lambda verb, kind: UnavailableError("away")
    world.look()
    assert world.cache.packed(KEY) is not None
