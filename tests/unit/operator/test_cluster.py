"""What goes over the wire for a question to the API server, answered by a web server of the test."""

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator.cluster import KubernetesCluster, Raw, RefusedError

from .raw_objects import raw_workload

T = TypeVar("T")

WORKLOAD = raw_workload()
FORBIDDEN = {"kind": "Status", "message": "workloads.kueue.x-k8s.io is forbidden", "code": 403}


def ask(
    question: Callable[[KubernetesCluster], Awaitable[T]], serve: Callable[[web.Request], Awaitable[web.Response]]
) -> T:
    """Return what the cluster makes of the answers of ``serve``."""

    async def scenario() -> T:
        application = web.Application()
        application.router.add_get("/{path:.*}", serve)
        async with TestServer(application) as server:
            configuration = Configuration(host=str(server.make_url("")).rstrip("/"))
            async with KubernetesCluster(ApiClient(configuration)) as cluster:
                return await question(cluster)

    return asyncio.run(scenario())


def ask_for_workloads(answer: web.Response) -> tuple[list[Raw], web.BaseRequest]:
    """Return what the cluster makes of ``answer``, and what it had asked."""
    asked: list[web.BaseRequest] = []

    async def serve(request: web.BaseRequest) -> web.Response:
        asked.append(request)
        return answer

    return ask(lambda cluster: cluster.workloads("team", "child-uid"), serve), asked[0]


def listed(*items: Any) -> web.Response:
    return web.json_response({"items": items, "metadata": {}})


def test_kueue_is_asked_by_the_label_that_it_gives_to_workloads() -> None:
    found, request = ask_for_workloads(listed(WORKLOAD))
    assert found == [WORKLOAD]
    assert request.path == "/apis/kueue.x-k8s.io/v1beta2/namespaces/team/workloads"
    assert request.query["labelSelector"] == "kueue.x-k8s.io/job-uid=child-uid"


def test_without_kueue_nothing_is_queued() -> None:
    found, _ = ask_for_workloads(web.Response(status=404, text="404 page not found"))
    assert found == []


def test_missing_right_is_told_in_the_words_of_the_api_server() -> None:
    with pytest.raises(RefusedError, match=r"^workloads\.kueue\.x-k8s\.io is forbidden$"):
        ask_for_workloads(web.json_response(FORBIDDEN, status=403))


@pytest.mark.parametrize("items", [[], [{"metadata": {"name": "team"}}]])
def test_namespace_is_looked_for_by_its_name(items: list[Any]) -> None:
    asked: list[web.BaseRequest] = []

    async def serve(request: web.BaseRequest) -> web.Response:
        asked.append(request)
        return listed(*items)

    assert ask(lambda cluster: cluster.has_namespace("team"), serve) is bool(items)
    assert asked[0].path == "/api/v1/namespaces"
    assert asked[0].query["fieldSelector"] == "metadata.name=team"


def test_of_thousands_of_objects_one_page_at_a_time_is_in_memory() -> None:
    pages, per_page = 20, 500
    peaks = []

    async def serve(request: web.Request) -> web.Response:
        page = int(request.query.get("continue") or 0)
        peaks.append(tracemalloc.get_traced_memory()[0])
        places = range(page * per_page, (page + 1) * per_page)
        items = [{"metadata": metadata_of(number)} for number in places]
        return web.json_response({"items": items, "metadata": {"continue": str(page + 1) if page + 1 < pages else ""}})

    tracemalloc.start()
    try:
        found = ask(lambda cluster: cluster.identities("Pod", None), serve)
    finally:
        tracemalloc.stop()
    assert [one.uid for one in found] == [f"uid-{number}" for number in range(pages * per_page)]
    # An identity takes some 400 bytes, what was told of its object ten times that.
    assert peaks[-1] - peaks[2] < pages * per_page * 1000


def metadata_of(number: int) -> dict[str, Any]:
    """Return what the API server tells of a pod when it is asked for metadata alone."""
    managed = [{"manager": f"m-{part}", "fieldsV1": {f"f:{name}": {} for name in range(10)}} for part in range(4)]
    return {
        "namespace": "team",
        "name": f"pod-{number}",
        "uid": f"uid-{number}",
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "managedFields": managed,
    }
