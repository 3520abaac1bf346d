"""The sweep finds what broken watches have missed."""

import asyncio
from typing import Any

import pytest

from finetune_operator.cache import Cache, Indices, namespace_key
from finetune_operator.cluster import UnavailableError
from finetune_operator.metric import Metrics
from finetune_operator.sweep import BrokenWatchError, Sweep
from finetune_operator.view import packed_job

from .fake_api_server import FakeApiServer
from .objects import NAME, NAMESPACE, after
from .raw_objects import raw_job

KEY = (NAMESPACE, NAME)


class World:
    def __init__(self) -> None:
        self.server, self.cache, self.woken = FakeApiServer(), Cache(), list[tuple[str, str]]()
        self.sweep = Sweep(
            self.server, self.cache, Metrics(), (), {"FineTuneJob": "", "Job": "labels", "Pod": "labels"}
        )

    def look(self, seconds: float = 300) -> None:
        asyncio.run(self.sweep.look(after(seconds), self.woken.append))

    def watch(self, raw: dict[str, Any]) -> None:
        packed = packed_job(raw)
        self.cache.indices = Indices({packed.key: [packed], namespace_key(NAMESPACE): [packed]})


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


def test_list_that_fails_makes_nothing_a_ghost() -> None:
    world = World()
    world.watch(raw_job())
    world.server.fails = lambda verb, kind: UnavailableError("away")
    world.look()
    assert world.cache.packed(KEY) is not None
