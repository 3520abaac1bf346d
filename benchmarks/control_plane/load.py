"""Create many objects at once and see when each gets its child."""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
from tests.integration.operator.api_server import ADMIN_TOKEN, ApiServer

AT_THE_SAME_TIME = 16
LONGEST_LINE = 2**22
METADATA = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"


class Client:
    """An administrator with many connections."""

    def __init__(self, server: ApiServer) -> None:
        self._url = server.url
        context = ssl.create_default_context(cafile=str(server.ca_file))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=AT_THE_SAME_TIME + 4),
            headers={"Authorization": f"Bearer {ADMIN_TOKEN}"},
            timeout=aiohttp.ClientTimeout(),
            read_bufsize=LONGEST_LINE,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def create_all(self, path: str, manifests: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Create all, some at the same time; return when each was asked for, by its name.

        Args:
            path: of the list, with a place for the namespace.
            manifests: each with namespace and name.
        """
        waiting, times = list(reversed(manifests)), dict[str, float]()

        async def work() -> None:
            while waiting:
                manifest = waiting.pop()
                metadata = manifest["metadata"]
                times[metadata["name"]] = time.monotonic()
                url = f"{self._url}{path.format(metadata['namespace'])}"
                async with self._session.post(url, json=manifest) as answer:
                    if answer.status >= 300:
                        raise SystemExit(f"{metadata['name']} is refused: {await answer.text()}")

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_THE_SAME_TIME):
                group.create_task(work())
        return times

    async def first_seen(
        self, path: str, owner: Callable[[dict[str, Any]], str | None], times: dict[str, float]
    ) -> None:
        """Watch ``path`` for ever; enter into ``times`` when the first object of each owner was seen."""
        query = {"watch": "true", "resourceVersion": "0"}
        async with self._session.get(f"{self._url}{path}", params=query, headers={"Accept": METADATA}) as stream:
            async for line in stream.content:
                if name := owner(json.loads(line)["object"]["metadata"]):
                    times.setdefault(name, time.monotonic())


def patience(jobs: int) -> float:
    """Return for how many seconds ``jobs`` are waited for at most, on a machine that is busy with other things."""
    return 600 + 5.0 * jobs


async def latencies(
    client: Client,
    manifests: Sequence[dict[str, Any]],
    path: str,
    children: str,
    owner: Callable[[dict[str, Any]], str | None],
) -> list[float]:
    """Create ``manifests`` and return how long each waited for its first child, shortest first.

    Args:
        client: creates and watches.
        manifests: to be created at once.
        path: where, with a place for the namespace.
        children: what to watch.
        owner: tells from a child's metadata whose it is.
    """
    seen: dict[str, float] = {}
    watch = asyncio.create_task(client.first_seen(children, owner, seen))
    try:
        asked = await client.create_all(path, manifests)
        async with asyncio.timeout(patience(len(manifests))):
            while len(seen) < len(manifests) and not watch.done():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise SystemExit(f"only {len(seen)} of {len(manifests)} have a child") from None
    finally:
        watch.cancel()
    return sorted(seen[name] - asked[name] for name in asked)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the sorted ``values`` do not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))]
