"""Whether RayJobs can be had: asked at the start, and now and then for as long as the operator runs."""

import asyncio

import pytest

from finetune_operator.cluster import ClusterError, NotFoundError, RefusedError, UnavailableError
from finetune_operator.kuberay import KubeRay, KubeRayChangedError
from finetune_operator.observed import KubeRayState

from .fake_api_server import FakeApiServer

READY, TOO_OLD, MISSING = KubeRayState.READY, KubeRayState.TOO_OLD, KubeRayState.MISSING


def kuberay(
    *answers: ClusterError | None, namespaces: tuple[str, ...] = (), unknown: str = "", verb: str = "first"
) -> KubeRay:
    """Return one whose API server gives these answers to ``verb``, the last of them for ever."""
    server, left = FakeApiServer(), list(answers)
    server.unknown = frozenset(unknown.split())
    server.fails = lambda asked, kind: None if asked != verb else left.pop(0) if len(left) > 1 else left[0]
    return KubeRay(server, namespaces, seconds=0.001)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(None, READY), (NotFoundError("no such kind"), MISSING), (RefusedError("no rights"), MISSING)],
)
def test_it_is_there_when_ray_jobs_can_be_listed(answer: ClusterError | None, expected: KubeRayState):
    assert asyncio.run(kuberay(answer).state()) is expected


def test_it_must_be_there_in_every_namespace_whose_jobs_can_be_listed():
    jobs_alone = (None, RefusedError("no RayJobs here"), None)
    assert asyncio.run(kuberay(*jobs_alone, namespaces=("a", "b")).state()) is MISSING


@pytest.mark.parametrize("namespaces", [("a", "lost"), ("lost", "a")])
def test_a_namespace_that_is_lost_takes_it_from_no_other(namespaces: tuple[str, ...]):
    server = FakeApiServer()
    server.closed = {"lost"}
    assert asyncio.run(KubeRay(server, namespaces).state()) is READY


def test_a_moment_without_any_rights_starts_nothing_anew():
    refused = RefusedError("no rights")
    with pytest.raises(KubeRayChangedError, match="is Missing"):
        asyncio.run(kuberay(refused, refused, None, NotFoundError("")).watch(READY))
    with pytest.raises(KubeRayChangedError, match="is Ready"):
        asyncio.run(kuberay(refused, refused, None).watch(MISSING))


def test_it_is_too_old_when_its_definition_lacks_a_field_of_ours():
    assert asyncio.run(kuberay(None, unknown="spec.rayClusterSpec.authOptions").state()) is TOO_OLD


def test_who_may_create_no_ray_job_hears_so_when_one_is_needed():
    assert asyncio.run(kuberay(RefusedError("no rights"), verb="try").state()) is READY


@pytest.mark.parametrize("verb", ["first", "try"])
def test_an_api_server_that_does_not_answer_says_nothing_about_it(verb: str):
    with pytest.raises(UnavailableError):
        asyncio.run(kuberay(UnavailableError("away"), verb=verb).state())


def test_all_watches_start_anew_when_it_is_installed():
    with pytest.raises(KubeRayChangedError, match="was Missing and is Ready"):
        asyncio.run(kuberay(NotFoundError(""), UnavailableError("away"), None).watch(MISSING))


def test_all_watches_start_anew_when_it_is_removed():
    with pytest.raises(KubeRayChangedError, match="was Ready and is Missing"):
        asyncio.run(kuberay(None, NotFoundError("")).watch(READY))


def test_all_watches_start_anew_when_it_is_upgraded():
    with pytest.raises(KubeRayChangedError, match="was TooOld and is Ready"):
        asyncio.run(kuberay(None).watch(TOO_OLD))
