"""The HTTPS endpoint that trainers report to: progress, with the contract of KubeflowCallback, and their results.

Whoever can reach a pod's network can reach this; so who calls is found out before anything of the body is read, and
what a caller may cost is bounded: connections, requests, bytes, seconds. It never reads or writes the cluster itself.
"""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from pydantic import ValidationError

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_api.progress_message import MOST_BYTES, ProgressMessage
from finetune_api.report import Stage
from finetune_operator.authentication import (
    Address,
    Authenticator,
    Caller,
    Jobs,
    NotAllowedError,
    NotAuthenticatedError,
    ReviewUnavailableError,
    TokenReviewer,
)
from finetune_operator.certificate import CertificateHolder
from finetune_operator.fence import Standing, standing
from finetune_operator.inbox import Inbox
from finetune_operator.observed import DeliveredResult
from finetune_operator.progress import final_moment, moment_of, read_result, short_reason
from finetune_operator.progress_writer import ProgressWriter, StatusPatcher
from finetune_operator.rate_limit import RateLimit
from finetune_operator.settings import ProgressSettings

logger = logging.getLogger(__name__)

_PATH = re.compile(
    rf"/apis/{re.escape(GROUP)}/{VERSION}/namespaces/(?P<namespace>[a-z0-9-]{{1,63}})/{PLURAL}/(?P<job>[a-z0-9-]{{1,63}})"
    r"/(?P<stage>check|train|evaluate)/(?P<attempt>[1-9][0-9]{0,6})(?P<result>/result)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What callers may cost."""

    body_bytes: int = MOST_BYTES
    body_seconds: float = 10.0
    """For a whole body, and for a connection to send its first request."""
    result_seconds: float = 5.0
    """How long a result's request waits to be recorded; then its sender is asked to come again."""
    connections: int = 2048
    connections_per_host: int = 128
    """A pod needs two; all pods of a node may share an address."""
    requests_per_second: float = 20.0
    """Of one address, before it is known who calls: each may cost a question to the API server."""
    burst: int = 100
    pod_requests_per_second: float = 1.0
    """Of one pod."""
    pod_burst: int = 10


def host_of(url: str) -> str:
    """Return the host that a certificate for ``url`` must name."""
    host = urlsplit(url).hostname
    if not host:
        raise ValueError(f"{url!r} names no host; set progress.url to https://<service>.<namespace>.svc:<port>")
    return host


class _RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class ProgressServer:
    """Answers trainers. Belongs to one event loop; every replica of the operator runs one."""

    def __init__(
        self,
        settings: ProgressSettings,
        reviewer: TokenReviewer,
        jobs: Jobs,
        patcher: StatusPatcher,
        inbox: Inbox,
        certificate: CertificateHolder,
        *,
        address: str = "",
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """Serve on ``address``, empty for all, and ``settings.port``.

        Args:
            settings: of the endpoint.
            reviewer: tells whose token it is.
            jobs: what is watched.
            patcher: writes progress.
            inbox: takes results.
            certificate: for `host_of` the settings' URL.
            address: to listen on.
            limits: what callers may cost.
            clock: counts seconds.
            now: tells the time.
        """
        self._settings = settings
        self._inbox = inbox
        self._certificate = certificate
        self._address = address
        self._limits = limits or Limits()
        self._clock = clock
        self._now = now
        self._authenticator = Authenticator(reviewer, jobs, clock)
        self._writer = ProgressWriter(jobs, patcher, settings.seconds_between_writes, clock)
        self._per_address = RateLimit(self._limits.requests_per_second, self._limits.burst)
        self._per_pod = RateLimit(self._limits.pod_requests_per_second, self._limits.pod_burst)
        self._server: _BoundedServer | None = None
        self._listener: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._listener is not None, "not started"
        return int(self._listener.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Get the certificate, listen and write progress from now on.

        Raises:
            SecretUnavailableError: there is no certificate and none could be kept.
            OSError: the port is taken.
        """
        await self._certificate.refresh()
        self._server = _BoundedServer(self._handle, self._limits)
        self._listener = await asyncio.get_running_loop().create_server(
            self._server,
            self._address or None,
            self._settings.port,
            ssl=self._certificate.ssl_context,
            ssl_handshake_timeout=self._limits.body_seconds,
            ssl_shutdown_timeout=self._limits.body_seconds,
        )
        self._tasks = [
            asyncio.create_task(self._writer.run(), name="progress writer"),
            asyncio.create_task(self._certificate.keep_fresh(), name="certificate"),
        ]
        logger.info("progress endpoint listens port=%d", self.port)

    async def watch(self) -> None:
        """Run until a background task fails, which is a defect, and raise what it raised."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Listen no more and drop what is not written yet; trainers post again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self._server is not None:
            await self._server.shutdown(timeout=1.0)
        if self._listener is not None:
            await self._listener.wait_closed()

    # --- requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            await self._answer(request)
        except _RefusedError as refusal:
            return _refused(refusal)
        return web.json_response({})

    async def _answer(self, request: web.BaseRequest) -> None:
        self._spend(self._per_address, request.remote)
        address, is_result = _address(request)
        _check_headers(request, self._limits.body_bytes)
        caller = await self._caller(request, address)
        self._spend(self._per_pod, caller.pod.uid)
        body = await self._body(request)
        stand = standing(caller.job.status, address.stage, address.attempt)
        if stand is Standing.SUPERSEDED or (stand is Standing.RECORDED and not is_result):
            raise _RefusedError(409, f"attempt {address.attempt} of {address.stage.value} is over")
        if stand is Standing.RECORDED:
            return
        if is_result:
            await self._take_result(caller, address, body)
        else:
            self._take_progress(caller, address, body)

    def _spend(self, limit: RateLimit, caller: str | None) -> None:
        if seconds := limit.seconds_to_wait(caller, self._clock()):
            raise _RefusedError(429, "too many requests", retry_after=seconds)

    async def _caller(self, request: web.BaseRequest, address: Address) -> Caller:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _RefusedError(401, "send the pod's projected token as bearer token")
        try:
            return await self._authenticator.caller(token.strip(), address)
        except NotAuthenticatedError as error:
            raise _RefusedError(401, str(error)) from error
        except NotAllowedError as error:
            logger.warning("caller refused namespace=%s job=%s error=%s", address.namespace, address.job, error)
            raise _RefusedError(403, str(error)) from error
        except ReviewUnavailableError as error:
            raise _RefusedError(503, "the token cannot be reviewed at the moment", retry_after=1.0) from error

    async def _body(self, request: web.BaseRequest) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while chunk := await request.content.readany():
                    body += chunk
                    if len(body) > self._limits.body_bytes:
                        raise _too_large(self._limits.body_bytes)
        except TimeoutError as error:
            raise _RefusedError(408, f"the body took longer than {self._limits.body_seconds:g} s") from error
        return bytes(body)

    def _take_progress(self, caller: Caller, address: Address, body: bytes) -> None:
        try:
            message = ProgressMessage.model_validate_json(body, by_alias=True, by_name=False)
        except ValidationError as error:
            raise _RefusedError(422, short_reason(error)) from error
        moment = moment_of(message, address.stage, self._now())
        self._writer.offer(caller.job, address.stage, address.attempt, caller.pod.uid, moment)

    async def _take_result(self, caller: Caller, address: Address, body: bytes) -> None:
        try:
            result = read_result(body, address.stage)
        except ValueError as error:
            raise _RefusedError(422, short_reason(error)) from error
        # Before the result is known: afterwards the stage has ended, and progress is not written any more.
        self._writer.offer(
            caller.job, address.stage, address.attempt, caller.pod.uid, final_moment(result, self._now())
        )
        await self._writer.write_now(caller.job.uid)
        delivered = DeliveredResult(address.stage, address.attempt, result)
        if not await self._inbox.deliver(caller.job, delivered, self._limits.result_seconds):
            raise _RefusedError(503, "the result is not recorded yet; post it again", retry_after=1.0)


def _address(request: web.BaseRequest) -> tuple[Address, bool]:
    match = _PATH.fullmatch(request.rel_url.raw_path)
    if match is None:
        raise _RefusedError(404, "no such address")
    if request.method != "POST":
        raise _RefusedError(405, "only POST is answered")
    stage, attempt = Stage(match["stage"]), int(match["attempt"])
    return Address(match["namespace"], match["job"], stage, attempt), match["result"] is not None


def _check_headers(request: web.BaseRequest, most_bytes: int) -> None:
    if request.content_type != "application/json" or request.headers.get("Content-Encoding"):
        raise _RefusedError(415, "send application/json, not compressed")
    if (request.content_length or 0) > most_bytes:
        raise _too_large(most_bytes)


def _too_large(most_bytes: int) -> _RefusedError:
    return _RefusedError(413, f"the body is larger than {most_bytes} bytes")


def _refused(refusal: _RefusedError) -> web.Response:
    """Return the answer in the form of the API server's own."""
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(refusal), "code": refusal.code}
    response = web.Response(status=refusal.code, text=json.dumps(status), content_type="application/json")
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(refusal.retry_after)))
    if refusal.code == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    # What is left of the body is not waited for.
    response.force_close()
    return response


class _BoundedServer(web.Server):
    """Drops connections beyond a number in all and from one address."""

    def __init__(self, handler: Callable[[web.BaseRequest], object], limits: Limits):
        super().__init__(
            handler,  # type: ignore[arg-type]
            access_log=None,
            keepalive_timeout=limits.body_seconds,
            lingering_time=1.0,
            auto_decompress=False,
        )
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._hosts: dict[RequestHandler, str] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        host = _host(transport)
        super().connection_made(handler, transport)
        self._hosts[handler] = host
        self._open[host] += 1
        if len(self._hosts) > self._limits.connections or self._open[host] > self._limits.connections_per_host:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        if (host := self._hosts.pop(handler, None)) is not None:
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]
        super().connection_lost(handler, exc)


def _host(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""
