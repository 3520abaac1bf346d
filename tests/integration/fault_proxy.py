"""A network that fails: a proxy in front of a real S3 server, which a test tells what goes wrong with which request.

One request a connection. Host and signed headers pass unchanged, so the server checks signatures and checksums itself.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

STOP_SECONDS = 10


@dataclass(frozen=True)
class Request:
    """One request as it arrives, its body not read yet."""

    number: int
    """Counted from 1."""
    method: str
    key: str
    """Bucket and key, without a slash before them."""
    query: dict[str, str]
    bytes: int
    """Of the body."""

    @property
    def part(self) -> int:
        """Number of the part that is uploaded; 0 when none is."""
        return int(self.query.get("partNumber", 0))

    @property
    def completes_upload(self) -> bool:
        return self.method == "POST" and "uploadId" in self.query

    def puts(self, name: str) -> bool:
        """Whether a whole object of this name is written."""
        return self.method == "PUT" and not self.part and self.key.endswith(f"/{name}")


@dataclass(frozen=True)
class Cut:
    """The connection is reset behind so much of the body, which is what the server gets."""

    share: float = 0.0


@dataclass(frozen=True)
class LoseAnswer:
    """The server does what it is asked, and nobody hears of it."""


@dataclass(frozen=True)
class FlipUpload:
    """One bit of the body is another one when it arrives at the server."""


@dataclass(frozen=True)
class FlipDownload:
    """One bit of the answer's body is another one when it arrives at the client."""


@dataclass(frozen=True)
class CutAnswer:
    """The connection ends in the middle of the answer's body."""


@dataclass(frozen=True)
class Overflow:
    """Behind the answer's body come more bytes, without end."""


@dataclass(frozen=True)
class NextPage:
    """The answer is a page of a listing, behind which there is another one; the server is not asked."""

    objects: int = 0
    """On the page."""


@dataclass(frozen=True)
class Refuse:
    """The answer is this error; the server is not asked."""

    status: int
    code: str = ""
    """Without one the body is empty, as from a load balancer."""


@dataclass(frozen=True)
class Delay:
    """The server gets the request so much later."""

    seconds: float


Fault = Cut | LoseAnswer | FlipUpload | FlipDownload | CutAnswer | Overflow | NextPage | Refuse | Delay


@dataclass
class FaultProxy:
    """What goes wrong, and what was asked. Change ``fault`` while it runs."""

    port: int = 0
    fault: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    hits: int = 0
    """Requests that something went wrong with."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def clear(self) -> None:
        """Let everything pass from now on, and forget what was asked."""
        self.fault = lambda request: None
        self.requests.clear()
        self.hits = 0

    def once(self, matches: Callable[[Request], bool], fault: Fault) -> None:
        """Let the next request that matches go wrong, and no other."""

        def one(request: Request) -> Fault | None:
            return fault if self.hits == 0 and matches(request) else None

        self.fault = one

    def always(self, matches: Callable[[Request], bool], fault: Fault | None) -> None:
        """Let every request that matches go wrong."""
        self.fault = lambda request: fault if matches(request) else None


@contextmanager
def serve_faults(server_port: int) -> Iterator[FaultProxy]:
    """Run a proxy to the server on ``server_port`` of this machine until the block ends."""
    proxy = FaultProxy()
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(lambda *ends: _serve(proxy, server_port, *ends), "127.0.0.1", 0)

    listening = loop.run_until_complete(start())
    proxy.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(listening), loop).result(2 * STOP_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(listening: asyncio.Server) -> None:
    listening.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=STOP_SECONDS)


async def _serve(
    proxy: FaultProxy, server_port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        # The client has opened a connection that it does not need.
        writer.transport.abort()
        return
    try:
        await _answer(proxy, server_port, head, reader, writer)
    except (asyncio.IncompleteReadError, ConnectionError):
        # Either end has gone: a client that is stopped, a server that refuses before it has read everything.
        writer.transport.abort()


async def _answer(
    proxy: FaultProxy, server_port: int, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    request = _parse(len(proxy.requests) + 1, lines[0], int(headers.get("content-length", 0)))
    proxy.requests.append(request)
    fault = proxy.fault(request)
    proxy.hits += fault is not None
    match fault:
        case Cut(share=0.0):
            writer.transport.abort()
            return
        case Refuse(status, code):
            writer.write(_refusal(status, code, request))
            await writer.drain()
            writer.close()
            return
        case NextPage(objects):
            writer.write(_next_page(objects, request.number))
            await writer.drain()
            writer.close()
            return
        case Delay(seconds):
            await asyncio.sleep(seconds)
    kept = [line for line in lines[:-2] if not line.lower().startswith("connection:")]
    asked = "\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1")
    from_server, to_server = await asyncio.open_connection("127.0.0.1", server_port)
    try:
        to_server.write(asked)
        answer = b""
        if "100-continue" in headers.get("expect", ""):
            answer = await from_server.readuntil(b"\r\n\r\n")
        if answer.startswith(b"HTTP/1.1 100") or not answer:
            writer.write(answer)
            body = await reader.readexactly(request.bytes)
            answer = await _pass_on(body, fault, from_server, to_server)
        else:
            # The server does not want the body.
            answer += await from_server.read()
    finally:
        to_server.close()
    match fault:
        case Cut() | LoseAnswer():
            writer.transport.abort()
            return
        case FlipDownload():
            start, _, content = answer.partition(b"\r\n\r\n")
            answer = start + b"\r\n\r\n" + _flipped(content)
        case CutAnswer():
            answer = answer[: -(len(answer.partition(b"\r\n\r\n")[2]) // 2)]
        case Overflow():
            writer.write(_without_length(answer))
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
    writer.write(answer)
    await writer.drain()
    writer.close()


async def _pass_on(
    body: bytes, fault: Fault | None, from_server: asyncio.StreamReader, to_server: asyncio.StreamWriter
) -> bytes:
    """Send the body as the network leaves it; return what the server answers, nothing when it did not get all."""
    match fault:
        case Cut(share):
            to_server.write(body[: int(len(body) * share)])
            await to_server.drain()
            return b""
        case FlipUpload():
            body = _flipped(body)
    to_server.write(body)
    await to_server.drain()
    return await from_server.read()


def _parse(number: int, line: str, size: int) -> Request:
    method, target, _ = line.split(" ")
    address = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
    return Request(number, method, unquote(address.path).lstrip("/"), query, size)


def _refusal(status: int, code: str, request: Request) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>" if code else ""
    head = f"HTTP/1.1 {status} Refused\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + ("" if request.method == "HEAD" else body)).encode()


def _without_length(answer: bytes) -> bytes:
    """Return an answer that ends where the connection does."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(b"content-length:")) + gap + body


def _next_page(objects: int, number: int) -> bytes:
    entries = "".join(
        f"<Contents><Key>rows-{number}-{one}.jsonl</Key><ETag>{one}</ETag><Size>1</Size></Contents>"
        for one in range(objects)
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{number}</NextContinuationToken>"
    body = f"<ListBucketResult>{more}{entries}</ListBucketResult>"
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def _flipped(content: bytes) -> bytes:
    assert content, "there is a byte to flip"
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
