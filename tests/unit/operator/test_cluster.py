"""What goes over the wire for a question to the API server, answered by a web server of the test."""

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator.cluster import KubernetesCluster, Raw, RefusedError

from .raw_objects import raw_workload

WORKLOAD = raw_workload()
FORBIDDEN = {"kind": "Status", "message": "workloads.kueue.x-k8s.io is forbidden", "code": 403}


def ask_for_workloads(answer: web.Response) -> tuple[list[Raw], web.BaseRequest]:
    """Return what the cluster makes of ``answer``, and what it had asked."""
    asked: list[web.BaseRequest] = []

    async def serve(request: web.BaseRequest) -> web.Response:
        asked.append(request)
        return answer

    async def scenario() -> list[Raw]:
        application = web.Application()
        application.router.add_get("/{path:.*}", serve)
        async with TestServer(application) as server:
            configuration = Configuration(host=str(server.make_url("")).rstrip("/"))
            async with KubernetesCluster(ApiClient(configuration)) as cluster:
                return await cluster.workloads("team", "child-uid")

    return asyncio.run(scenario()), asked[0]


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
