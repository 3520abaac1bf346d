"""The port for probes and Prometheus: /healthz, /readyz, /metrics. Plain HTTP, nothing secret."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from aiohttp import web

from finetune_operator.metric import Metrics


class HealthServer:
    """Answers as long as the event loop turns: that is what its liveness probe asks."""

    def __init__(self, metrics: Metrics, is_ready: Callable[[], bool], port: int) -> None:
        self._metrics = metrics
        self._is_ready = is_ready
        self._port = port
        application = web.Application()
        application.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._serve_metrics),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, port=self._port).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self._is_ready():
            return web.Response(text="ok")
        return web.Response(status=503, text="not watching yet")

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
