"""The lease: one replica acts at a time, whatever happens to the other."""

import asyncio
from dataclasses import dataclass

import pytest

from finetune_operator.cluster import ConflictError, UnavailableError
from finetune_operator.lease import Lease, Periods

from .fake_api_server import FakeApiServer
from .objects import NOW

PERIODS = Periods(duration=15, margin=3)
PLACE = ("Lease", "system", "operator")


@dataclass
class Clock:
    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Replica:
    """One contender; contends when told to."""

    def __init__(self, server: FakeApiServer, clock: Clock, name: str) -> None:
        self.lease = Lease(server, "system", "operator", name, lambda: NOW, clock, PERIODS)

    async def contend(self) -> bool:
        try:
            await self.lease._contend()
        except (ConflictError, UnavailableError):
            return False
        return self.lease.is_open


def test_first_replica_gets_the_lease_and_the_second_waits() -> None:
    server, clock = FakeApiServer(), Clock()
    first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
    assert asyncio.run(first.contend())
    assert not asyncio.run(second.contend())
    assert server.objects[PLACE]["spec"]["holderIdentity"] == "a"


def test_lease_that_is_renewed_is_never_taken() -> None:
    server, clock = FakeApiServer(), Clock()
    first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
    for number in range(20):
        # Its renewals are told apart by their time alone.
        first.lease._now = lambda number=number: NOW.replace(second=number)
        assert asyncio.run(first.contend())
        assert not asyncio.run(second.contend())
        clock.seconds += 4


def test_lease_of_a_dead_replica_is_taken_when_it_has_run_out_and_not_before() -> None:
    server, clock = FakeApiServer(), Clock()
    first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
    asyncio.run(first.contend())
    asyncio.run(second.contend())
    clock.seconds += 14.9
    assert not asyncio.run(second.contend())
    assert not first.lease.is_open, "it stops acting before another one may begin"
    clock.seconds += 0.2
    assert asyncio.run(second.contend())
    assert server.objects[PLACE]["spec"]["leaseTransitions"] == 1
    assert not asyncio.run(first.contend())


def test_restarted_container_of_the_same_pod_goes_on_at_once() -> None:
    server, clock = FakeApiServer(), Clock()
    asyncio.run(Replica(server, clock, "a").contend())
    assert asyncio.run(Replica(server, clock, "a").contend())


def test_released_lease_is_free_at_once() -> None:
    server, clock = FakeApiServer(), Clock()
    first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
    asyncio.run(first.contend())
    asyncio.run(first.lease.release())
    assert not first.lease.is_open
    assert asyncio.run(second.contend())


def test_release_leaves_the_lease_of_another_one_alone() -> None:
    server, clock = FakeApiServer(), Clock()
    first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
    asyncio.run(first.contend())
    asyncio.run(second.lease.release())
    assert server.objects[PLACE]["spec"]["holderIdentity"] == "a"


@pytest.mark.parametrize("verb", ["get", "update"])
def test_replica_that_cannot_renew_stops_by_itself(verb: str) -> None:
    server, clock = FakeApiServer(), Clock()
    first = Replica(server, clock, "a")
    assert asyncio.run(first.contend())
    server.fails = lambda asked, kind: UnavailableError("away") if asked == verb else None
    clock.seconds += 11
    assert (not asyncio.run(first.contend()) and first.lease.is_open is False) or first.lease.is_open
    clock.seconds += 2
    assert not first.lease.is_open


def test_of_two_that_write_at_once_one_is_refused() -> None:
    async def scenario() -> list[bool]:
        server, clock = FakeApiServer(), Clock()
        server.put("Lease", {"kind": "Lease", "metadata": {"name": "operator", "namespace": "system"}, "spec": {}})
        first, second = Replica(server, clock, "a"), Replica(server, clock, "b")
        stale = await server.get(*PLACE)
        assert await first.contend()

        async def read_before(kind: str, namespace: str, name: str) -> object:
            return stale

        server.get = read_before  # type: ignore[method-assign,assignment]
        return [first.lease.is_open, await second.contend()]

    assert asyncio.run(scenario()) == [True, False]
