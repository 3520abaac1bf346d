"""A RayJob goes although KubeRay does not let it."""

import asyncio

import pytest

from finetune_operator.cache import Cache, Indices
from finetune_operator.cluster import UnavailableError
from finetune_operator.observed import ChildKind
from finetune_operator.stalled_deletion import FINALIZER, PATIENCE, StalledDeletions
from finetune_operator.view import child_view

from .fake_api_server import FakeApiServer
from .objects import NAME, NAMESPACE, after
from .raw_objects import raw_child

SECONDS = PATIENCE.total_seconds()


class Gate:
    is_open = True


class World:
    """One RayJob that is being deleted."""

    def __init__(self, *finalizers: str) -> None:
        raw = raw_child()
        raw = {**raw, "apiVersion": "ray.io/v1", "kind": "RayJob"}
        raw["metadata"] |= {"finalizers": [*finalizers], "deletionTimestamp": "2026-01-02T03:04:05Z"}
        self.server, self.cache, self.gate, self.seconds = FakeApiServer(), Cache(), Gate(), 0.0
        self.name = raw["metadata"]["name"]
        view = child_view(self.server.put("RayJob", raw))
        assert view is not None and view.kind is ChildKind.RAY_JOB
        # Its FineTuneJob is gone: only the index of children knows of it.
        self.cache.indices = Indices(children={(NAMESPACE, NAME): [view]})
        self.stalled = StalledDeletions(self.server, self.cache, self.gate, lambda: after(self.seconds))

    def look(self, seconds: float) -> list[str]:
        """Look then; return the finalizers that are left."""
        self.seconds = seconds
        asyncio.run(self.stalled.look())
        left: list[str] = self.server.objects["RayJob", NAMESPACE, self.name]["metadata"]["finalizers"]
        return left


def test_kuberay_is_given_its_time() -> None:
    world = World(FINALIZER)
    assert world.look(0) == [FINALIZER]
    assert world.look(SECONDS - 1) == [FINALIZER]


def test_then_its_finalizer_is_taken_off_and_others_stay() -> None:
    world = World(FINALIZER, "example.org/archive")
    world.look(0)
    assert world.look(SECONDS) == ["example.org/archive"]


def test_a_ghost_is_not_asked_for() -> None:
    world = World(FINALIZER)
    world.look(0)
    world.cache.mark_ghost("child")
    assert world.look(SECONDS) == [FINALIZER]
    assert world.server.calls == []


def test_a_replica_without_the_lease_only_counts_the_time() -> None:
    world = World(FINALIZER)
    world.gate.is_open = False
    world.look(0)
    assert world.look(SECONDS) == [FINALIZER]
    world.gate.is_open = True
    assert world.look(SECONDS + 1) == []


def test_another_rayjob_of_that_name_is_left_alone() -> None:
    world = World(FINALIZER)
    world.look(0)
    world.server.objects["RayJob", NAMESPACE, world.name]["metadata"]["uid"] = "another"
    assert world.look(SECONDS) == [FINALIZER]


def test_an_api_server_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World(FINALIZER)
    world.look(0)
    world.server.fails = lambda verb, kind: UnavailableError("away") if verb == "patch" else None
    assert world.look(SECONDS) == [FINALIZER]
    assert "cannot finish a deletion" in caplog.text
    world.server.fails = lambda verb, kind: None
    assert world.look(SECONDS + 10) == []
