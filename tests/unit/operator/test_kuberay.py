"""Whether RayJobs are there: asked at the start, and now and then for as long as the operator runs."""

import asyncio

import pytest

from finetune_operator.cluster import ClusterError, NotFoundError, RefusedError, UnavailableError
from finetune_operator.kuberay import KubeRay, KubeRayChangedError

from .fake_api_server import FakeApiServer


def kuberay(*answers: ClusterError | None, namespaces: tuple[str, ...] = ()) -> KubeRay:
    """Return one whose API server gives these answers, the last of them for ever."""
    server, left = FakeApiServer(), list(answers)
    server.fails = lambda verb, kind: left.pop(0) if len(left) > 1 else left[0]
    return KubeRay(server, namespaces, seconds=0.001)


@pytest.mark.parametrize(
    ("answer", "expected"), [(None, True), (NotFoundError("no such kind"), False), (RefusedError("no rights"), False)]
)
def test_it_is_there_when_ray_jobs_can_be_listed(answer: ClusterError | None, expected: bool):
    assert asyncio.run(kuberay(answer).is_there()) is expected


def test_it_must_be_there_in_every_namespace_whose_jobs_can_be_listed():
    jobs_alone = (None, RefusedError("no RayJobs here"), None)
    assert not asyncio.run(kuberay(*jobs_alone, namespaces=("a", "b")).is_there())


@pytest.mark.parametrize("namespaces", [("a", "lost"), ("lost", "a")])
def test_a_namespace_that_is_lost_takes_it_from_no_other(namespaces: tuple[str, ...]):
    server = FakeApiServer()
    server.closed = {"lost"}
    assert asyncio.run(KubeRay(server, namespaces).is_there())


def test_a_moment_without_any_rights_starts_nothing_anew():
    refused = RefusedError("no rights")
    with pytest.raises(KubeRayChangedError, match="removed"):
        asyncio.run(kuberay(refused, refused, None, NotFoundError("")).watch(was_there=True))
    with pytest.raises(KubeRayChangedError, match="installed"):
        asyncio.run(kuberay(refused, refused, None).watch(was_there=False))


def test_an_api_server_that_does_not_answer_says_nothing_about_it():
    with pytest.raises(UnavailableError):
        asyncio.run(kuberay(UnavailableError("away")).is_there())


def test_all_watches_start_anew_when_it_is_installed():
    with pytest.raises(KubeRayChangedError, match="installed"):
        asyncio.run(kuberay(NotFoundError(""), UnavailableError("away"), None).watch(was_there=False))


def test_all_watches_start_anew_when_it_is_removed():
    with pytest.raises(KubeRayChangedError, match="removed"):
        asyncio.run(kuberay(None, NotFoundError("")).watch(was_there=True))
