"""The endpoint with its real listener and certificate; the API server behind it is `trainers`."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from finetune_api.report import CONTRACT_VERSION, ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import Attempt, MetricValue, Phase, StageStatus
from finetune_operator import naming
from finetune_operator.certificate import CertificateHolder
from finetune_operator.inbox import Inbox
from finetune_operator.observed import JobView, PodPhase, PodView
from finetune_operator.progress_server import Limits, ProgressServer, host_of
from finetune_operator.settings import ProgressSettings

from ...unit.operator.trainers import NOW, Jobs, MemorySecret, Tokens, make_job

TRAIN = (Stage.TRAIN, 1)
PROGRESS = {"trainerStatus": {"progressPercentage": 42, "estimatedRemainingSeconds": 750}}
RESULT = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.OK)


@dataclass
class Endpoint:
    """A running server, and one job whose first training attempt has a pod."""

    server: ProgressServer
    jobs: Jobs
    tokens: Tokens
    inbox: Inbox
    woken: list[tuple[str, str]]
    session: aiohttp.ClientSession
    job: JobView
    pod: PodView
    token: str

    def url(self, stage: Stage = Stage.TRAIN, attempt: int = 1, job: str = "reviews") -> str:
        return f"https://127.0.0.1:{self.server.port}{naming.progress_path('team', job, stage, attempt)}"

    def issue(self, job: JobView, pod: PodView | None, stage: Stage = Stage.TRAIN, attempt: int = 1) -> str:
        audience = naming.audience(job.namespace, job.name, job.uid, stage, attempt)
        return self.tokens.issue(audience, pod.uid if pod else None)

    async def post(self, body: Any = None, *, token: str | None = None, url: str | None = None, **extra: Any) -> int:
        """Post ``body`` as the job's pod, unless something else is given, and return the answer's code."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        headers |= {"Content-Type": "application/json"} | extra.pop("headers", {})
        content = body if isinstance(body, bytes) else json.dumps(PROGRESS if body is None else body).encode()
        async with self.session.post(url or self.url(), data=content, headers=headers, **extra) as response:
            answer = await response.json()
            assert response.status == 200 or answer["code"] == response.status
            return response.status

    async def post_result(self, result: StageResult = RESULT, **options: Any) -> int:
        return await self.post(result.model_dump_json(by_alias=True).encode(), url=self.url() + "/result", **options)

    def set_status(self, **changes: Any) -> None:
        job = self.jobs.by_name[self.job.key]
        self.jobs.put(replace(job, status=job.status.model_copy(update=changes)))

    async def until_written(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            await self.jobs.written.wait()
        self.jobs.written.clear()
        return dict(self.jobs.status())


@asynccontextmanager
async def running(
    limits: Limits | None = None,
    seconds_between_writes: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Endpoint]:
    jobs, tokens, woken = Jobs(), Tokens(), list[tuple[str, str]]()
    job = make_job()
    jobs.put(job)
    pod = jobs.start(job, *TRAIN)
    inbox = Inbox(wake=woken.append)
    holder = CertificateHolder(MemorySecret(), ["127.0.0.1"], now=lambda: datetime.now(UTC))
    server = ProgressServer(
        ProgressSettings(url="https://127.0.0.1", port=0, seconds_between_writes=seconds_between_writes),
        tokens,
        jobs,
        jobs,
        inbox,
        holder,
        address="127.0.0.1",
        limits=limits or Limits(requests_per_second=1000, burst=1000, pod_requests_per_second=1000, pod_burst=1000),
        clock=clock,
        now=lambda: NOW,
    )
    await server.start()
    trust = ssl.create_default_context(cadata=holder.ca_bundle)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
            endpoint = Endpoint(server, jobs, tokens, inbox, woken, session, job, pod, "")
            endpoint.token = endpoint.issue(job, pod)
            yield endpoint
    finally:
        await server.stop()


Scenario = Callable[[Endpoint], Awaitable[None]]


def run(scenario: Scenario, limits: Limits | None = None, **options: Any) -> None:
    async def main() -> None:
        async with running(limits, **options) as endpoint:
            await scenario(endpoint)

    asyncio.run(main())


# --- progress


def test_progress_reaches_the_status() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post() == 200
        status = await endpoint.until_written()
        assert status["progress"]["percent"] == 42
        assert status["progress"]["lastUpdateTime"] == "2026-01-02T03:04:05Z"
        assert status["summary"] == {"progress": "42 %", "eta": "12m"}

    run(scenario)


def test_a_write_names_the_version_of_the_job_that_it_is_about() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.post()
        await endpoint.until_written()
        assert endpoint.jobs.patches[0][1]["metadata"] == {"uid": endpoint.job.uid, "resourceVersion": "7"}

    run(scenario)


def test_a_refused_write_is_tried_again() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.jobs.refusals = 2
        await endpoint.post()
        assert (await endpoint.until_written())["progress"]["percent"] == 42

    run(scenario, seconds_between_writes=0.01)


def test_between_two_writes_the_newest_wins() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.post()
        await endpoint.until_written()
        for percent in (50, 60, 70):
            await endpoint.post({"trainerStatus": {"progressPercentage": percent}})
        await asyncio.sleep(0.2)
        assert len(endpoint.jobs.patches) == 1
        seconds[0] = 0.5
        assert (await endpoint.until_written())["progress"]["percent"] == 70
        assert len(endpoint.jobs.patches) == 2

    seconds = [0.0]
    run(scenario, seconds_between_writes=0.5, clock=lambda: seconds[0])


# --- who may


async def no_token(endpoint: Endpoint) -> int:
    return await endpoint.post(token="")


async def forged_token(endpoint: Endpoint) -> int:
    return await endpoint.post(token="forged")


async def token_of_another_job(endpoint: Endpoint) -> int:
    other = make_job("other")
    endpoint.jobs.put(other)
    pod = endpoint.jobs.start(other, *TRAIN)
    return await endpoint.post(token=endpoint.issue(other, pod))


async def token_of_the_job_that_had_the_name_before(endpoint: Endpoint) -> int:
    before = replace(endpoint.job, uid="uid-before")
    return await endpoint.post(token=endpoint.issue(before, endpoint.pod))


async def token_of_an_old_attempt(endpoint: Endpoint) -> int:
    endpoint.jobs.start(endpoint.job, Stage.TRAIN, 2)
    return await endpoint.post(url=endpoint.url(attempt=2))


async def token_of_another_stage(endpoint: Endpoint) -> int:
    endpoint.jobs.start(endpoint.job, Stage.EVALUATE, 1)
    return await endpoint.post(url=endpoint.url(stage=Stage.EVALUATE))


async def expired_token(endpoint: Endpoint) -> int:
    endpoint.tokens.expire(endpoint.token)
    return await endpoint.post()


async def unknown_job(endpoint: Endpoint) -> int:
    return await endpoint.post(url=endpoint.url(job="nobody"))


async def token_of_no_pod(endpoint: Endpoint) -> int:
    return await endpoint.post(token=endpoint.issue(endpoint.job, None))


async def pod_that_nobody_knows(endpoint: Endpoint) -> int:
    return await endpoint.post(token=endpoint.issue(endpoint.job, replace(endpoint.pod, uid="uid-of-nobody")))


async def pod_of_another_job_with_a_token_for_this_one(endpoint: Endpoint) -> int:
    other = make_job("other")
    endpoint.jobs.put(other)
    pod = endpoint.jobs.start(other, *TRAIN)
    return await endpoint.post(token=endpoint.issue(endpoint.job, pod))


async def pod_that_claims_by_its_labels_to_belong_to_the_job(endpoint: Endpoint) -> int:
    impostor = replace(endpoint.pod, uid="uid-of-impostor", child_uid="")
    endpoint.jobs.pods[impostor.uid] = impostor
    return await endpoint.post(token=endpoint.issue(endpoint.job, impostor))


async def pod_of_a_job_that_claims_by_its_labels_to_be_the_attempt(endpoint: Endpoint) -> int:
    child = endpoint.jobs.children_by_uid[endpoint.pod.child_uid]
    endpoint.jobs.children_by_uid[child.uid] = replace(child, owner_uid="uid-of-somebody")
    return await endpoint.post()


async def pod_that_has_ended(endpoint: Endpoint) -> int:
    endpoint.jobs.pods[endpoint.pod.uid] = replace(endpoint.pod, phase=PodPhase.SUCCEEDED)
    return await endpoint.post()


async def api_server_is_away(endpoint: Endpoint) -> int:
    endpoint.tokens.is_away = True
    return await endpoint.post()


REFUSED_CALLERS = {
    no_token: 401,
    forged_token: 401,
    token_of_another_job: 401,
    token_of_the_job_that_had_the_name_before: 401,
    token_of_an_old_attempt: 401,
    token_of_another_stage: 401,
    expired_token: 401,
    unknown_job: 401,
    token_of_no_pod: 403,
    pod_that_nobody_knows: 403,
    pod_of_another_job_with_a_token_for_this_one: 403,
    pod_that_claims_by_its_labels_to_belong_to_the_job: 403,
    pod_of_a_job_that_claims_by_its_labels_to_be_the_attempt: 403,
    pod_that_has_ended: 403,
    api_server_is_away: 503,
}


@pytest.mark.parametrize(("call", "code"), REFUSED_CALLERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_caller_is_refused(call: Callable[[Endpoint], Awaitable[int]], code: int) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await call(endpoint) == code
        await asyncio.sleep(0)
        assert endpoint.jobs.patches == []

    run(scenario)


def test_a_good_token_is_reviewed_once_a_minute() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for _ in range(5):
            assert await endpoint.post() == 200
        assert endpoint.tokens.reviews == 1

    run(scenario)


def test_a_token_that_was_good_a_minute_ago_is_reviewed_again() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post() == 200
        endpoint.tokens.expire(endpoint.token)
        seconds[0] = 59.0
        assert await endpoint.post() == 200
        seconds[0] = 61.0
        assert await endpoint.post() == 401

    seconds = [0.0]
    run(scenario, clock=lambda: seconds[0])


def test_a_remembered_token_is_of_no_use_once_its_pod_is_gone() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post() == 200
        del endpoint.jobs.pods[endpoint.pod.uid]
        assert await endpoint.post() == 403

    run(scenario)


# --- hostile requests

REFUSED_BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "a body of a megabyte": ({"body": b" " * 2**20}, 413),
    "a body just too large": ({"body": b" " * (64 * 1024 + 1)}, 413),
    "no JSON": ({"body": b"hello"}, 422),
    "JSON nested deeper than a parser may go": ({"body": b'{"trainerStatus":' + b"[" * 60000}, 422),
    "a list": ({"body": [1]}, 422),
    "more than all of it": ({"body": {"trainerStatus": {"progressPercentage": 101}}}, 422),
    "not a number": ({"body": b'{"trainerStatus": {"progressPercentage": NaN}}'}, 422),
    "a number of four thousand digits": ({"body": b'{"trainerStatus": {"step": ' + b"9" * 4000 + b"}}"}, 422),
    "negative time": ({"body": {"trainerStatus": {"estimatedRemainingSeconds": -1}}}, 422),
    "a thousand metrics": ({"body": {"trainerStatus": {"metrics": [{"name": "x", "value": "1"}] * 1000}}}, 422),
    "half of a character": ({"body": b'{"trainerStatus": {"message": "\\ud800"}}'}, 422),
    "a form": ({"headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 415),
    "no type": ({"headers": {"Content-Type": "text/plain"}}, 415),
    "a compressed body": ({"headers": {"Content-Encoding": "gzip"}}, 415),
}


@pytest.mark.parametrize(("given", "code"), REFUSED_BODIES.values(), ids=REFUSED_BODIES.keys())
def test_a_body_is_refused(given: dict[str, Any], code: int) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post(**given) == code
        assert await endpoint.post() == 200, "the endpoint goes on"

    run(scenario)


def test_a_large_body_of_unknown_size_is_refused() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1024

    async def scenario(endpoint: Endpoint) -> None:
        headers = {"Authorization": f"Bearer {endpoint.token}", "Content-Type": "application/json"}
        async with endpoint.session.post(endpoint.url(), data=endless(), headers=headers) as response:
            assert response.status == 413

    run(scenario)


async def raw(endpoint: Endpoint, sent: bytes) -> bytes:
    """Send ``sent`` and nothing more, and return all that is answered until the connection ends."""
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.server.port, ssl=trust)
    writer.write(sent)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


LIMITS = Limits(body_seconds=2)  # for the handshake as well


def test_a_slow_body_is_not_waited_for() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        head = (
            f"POST {naming.progress_path('team', 'reviews', *TRAIN)} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {endpoint.token}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        )
        assert (await raw(endpoint, head.encode())).startswith(b"HTTP/1.1 408")

    run(scenario, LIMITS)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /", b"POST / HTTP/1.1\r\nHost: x\r\nX-"], ids=["nothing", "a line", "headers"]
)
def test_a_connection_that_says_nothing_whole_is_closed(sent: bytes) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert b"200" not in await raw(endpoint, sent)

    run(scenario, LIMITS)


def test_one_address_cannot_hold_all_connections() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        trust = ssl.create_default_context()
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        held = [await asyncio.open_connection("127.0.0.1", endpoint.server.port, ssl=trust) for _ in range(3)]
        async with asyncio.timeout(20):
            # It may be dropped before the end could be said.
            with contextlib.suppress(ConnectionError):
                assert await held[2][0].read() == b""
        assert not held[0][0].at_eof()
        for _, writer in held:
            writer.close()

    run(scenario, Limits(connections_per_host=2))


def test_a_flood_of_one_pod_is_refused_and_ends() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        codes = [await endpoint.post() for _ in range(6)]
        assert codes == [200, 200, 200, 429, 429, 429]
        seconds[0] = 1.0
        assert await endpoint.post() == 200
        assert await endpoint.post() == 429

    seconds = [0.0]
    limits = Limits(requests_per_second=1000, burst=1000, pod_requests_per_second=1, pod_burst=3)
    run(scenario, limits, clock=lambda: seconds[0])


def test_a_flood_of_forged_tokens_costs_few_reviews() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        codes = [await endpoint.post(token=f"forged-{number}") for number in range(30)]
        assert codes == [401] * 10 + [429] * 20
        assert endpoint.tokens.reviews == 10

    run(scenario, Limits(requests_per_second=1, burst=10), clock=lambda: 0.0)


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", naming.progress_path("team", "reviews", Stage.TRAIN, 1), 405),
        ("POST", "/", 404),
        ("POST", naming.progress_path("team", "reviews", Stage.TRAIN, 1) + "/more", 404),
        ("POST", naming.progress_path("team", "reviews", Stage.TRAIN, 0), 404),
        ("POST", naming.progress_path("team", "reviews", Stage.PUBLISH, 1), 404),
        ("POST", naming.progress_path("team", "../other", Stage.TRAIN, 1), 404),
    ],
)
def test_there_are_no_other_addresses(method: str, path: str, code: int) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        url = f"https://127.0.0.1:{endpoint.server.port}{path}"
        headers = {"Authorization": f"Bearer {endpoint.token}"}
        async with endpoint.session.request(method, url, json=PROGRESS, headers=headers) as response:
            assert response.status == code

    run(scenario)


# --- fences


def test_an_attempt_that_a_newer_one_follows_is_told_so() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.jobs.start(endpoint.job, Stage.TRAIN, 2)
        assert await endpoint.post() == 409
        assert await endpoint.post_result() == 409

    run(scenario)


def test_nothing_is_written_after_a_job_has_ended() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.post()
        await endpoint.until_written()
        await endpoint.post()
        endpoint.set_status(phase=Phase.FAILED)
        assert await endpoint.post() == 409
        seconds[0] = 0.5
        await asyncio.sleep(0.8)
        assert len(endpoint.jobs.patches) == 1

    seconds = [0.0]
    run(scenario, seconds_between_writes=0.5, clock=lambda: seconds[0])


def test_a_job_that_is_made_anew_gets_no_progress_of_its_namesake() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.jobs.refusals = 1
        await endpoint.post()
        while endpoint.jobs.refusals:
            await asyncio.sleep(0.01)
        endpoint.jobs.put(replace(endpoint.job, uid="uid-of-the-next"))
        await asyncio.sleep(0.3)
        assert endpoint.jobs.patches == []

    run(scenario, seconds_between_writes=0.1)


# --- results


async def record(endpoint: Endpoint) -> None:
    """What the reconciler does: write results into the status, then acknowledge them."""
    while not (results := endpoint.inbox.take(endpoint.job.uid)):
        await asyncio.sleep(0.01)
    stages = tuple(StageStatus(stage=one.stage, attempt=one.attempt) for one in results)
    endpoint.set_status(stages=stages)
    endpoint.inbox.acknowledge(endpoint.job.uid, results)


def test_a_result_is_acknowledged_once_it_is_recorded() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        posting = asyncio.create_task(endpoint.post_result())
        while not endpoint.woken:
            await asyncio.sleep(0.01)
        assert not posting.done()
        assert endpoint.woken == [("team", "reviews")]
        assert endpoint.inbox.take(endpoint.job.uid)[0].result == RESULT
        await record(endpoint)
        assert await posting == 200
        assert endpoint.inbox.take(endpoint.job.uid) == ()
        assert await endpoint.post_result() == 200, "a repeated delivery"
        assert endpoint.inbox.take(endpoint.job.uid) == ()

    run(scenario)


def test_a_result_that_nobody_records_is_kept_and_asked_for_again() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post_result() == 503
        assert await endpoint.post_result() == 503
        assert len(endpoint.inbox.take(endpoint.job.uid)) == 1
        recording = asyncio.create_task(record(endpoint))
        assert await endpoint.post_result() == 200
        await recording

    run(scenario, Limits(result_seconds=0.2, pod_burst=100))


def test_the_last_figures_come_with_the_result() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.post()
        await endpoint.until_written()
        result = RESULT.model_copy(update={"latest_metrics": (MetricValue(name="loss", value="0.25"),)})
        recording = asyncio.create_task(record(endpoint))
        assert await endpoint.post_result(result) == 200
        await recording
        status = endpoint.jobs.status()
        assert status["latestMetrics"] == [{"name": "loss", "value": "0.25"}]
        assert status["summary"] == {"progress": "100 %", "eta": "0s"}

    run(scenario, seconds_between_writes=60)


def test_a_result_of_another_contract_keeps_its_version() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        body = {"contractVersion": CONTRACT_VERSION + 1, "stage": "new", "exitCode": 99, "more": {"x": 1}}
        recording = asyncio.create_task(endpoint.post(body, url=endpoint.url() + "/result"))
        while not (results := endpoint.inbox.take(endpoint.job.uid)):
            await asyncio.sleep(0.01)
        assert results[0].result.contract_version == CONTRACT_VERSION + 1
        endpoint.inbox.acknowledge(endpoint.job.uid, results)
        assert await recording == 200

    run(scenario)


def test_control_characters_of_a_result_do_not_reach_the_status() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        result = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.BAD_DATA, message="row 3:\n\x1b[2Jgone\u202e")
        posting = asyncio.create_task(endpoint.post_result(result))
        while not (results := endpoint.inbox.take(endpoint.job.uid)):
            await asyncio.sleep(0.01)
        assert results[0].result.message == "row 3:\n [2Jgone "
        endpoint.inbox.acknowledge(endpoint.job.uid, results)
        await posting

    run(scenario)


@pytest.mark.parametrize(
    "body",
    [
        {"stage": "check", "exitCode": 0},
        {"stage": "train", "exitCode": 1},
        {"stage": "train", "exitCode": 0, "unknown": 1},
        {"stage": "train", "exitCode": 0, "message": "x" * 2000},
        [],
        None,
    ],
    ids=["another stage's", "an exit code that there is not", "an unknown field", "too long", "a list", "null"],
)
def test_a_result_is_refused(body: Any) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await endpoint.post(json.dumps(body).encode(), url=endpoint.url() + "/result") == 422
        assert endpoint.inbox.take(endpoint.job.uid) == ()

    run(scenario)


def test_the_url_names_the_certificate() -> None:
    assert host_of("https://finetune-operator.finetune-system.svc:10443") == "finetune-operator.finetune-system.svc"
    with pytest.raises(ValueError, match=r"set progress\.url"):
        host_of("finetune-operator")


def test_an_attempt_that_has_ended_needs_no_result_any_more() -> None:
    async def scenario(endpoint: Endpoint) -> None:
        ended = Attempt(stage=Stage.TRAIN, number=1, child="reviews-train-a1", end_time=NOW)
        endpoint.set_status(attempts=(ended,))
        assert await endpoint.post_result() == 200
        assert endpoint.inbox.take(endpoint.job.uid) == ()

    run(scenario)
