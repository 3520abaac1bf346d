"""In a pod before the S3 server: passes requests on, misbehaves when told to, writes down what the server has done.

``PUT /-/behaviour/cuts`` tells how to behave, ``GET /-/journal`` returns what happened; no bucket is called ``-``. Runs
alone, as one file: the image has no tests.
"""

import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from enum import StrEnum
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTROL = "/-/"
SLOW_SECONDS = 1.0
ANSWER_SECONDS = 60
WRITES = ("PUT", "POST", "DELETE")
BETWEEN_HOPS = ("connection", "expect", "keep-alive", "transfer-encoding", "content-length")
"""Headers that are said between two neighbours, and none that a client signs."""
BUSY = b"<Error><Code>SlowDown</Code><Message>by request of a test</Message></Error>"


class Behaviour(StrEnum):
    """What the proxy does with requests."""

    WELL = "well"
    REFUSES = "refuses"
    """Three of five requests are answered with 503."""
    SLOW = "slow"
    CUTS = "cuts"
    """The connection is reset before, inside or behind what the server gets, in turn; two in a row are well."""


class CutError(Exception):
    """The connection is to be torn down."""


class Proxy(ThreadingHTTPServer):
    """One server behind, any number of clients in front."""

    daemon_threads = True

    def __init__(self, upstream: str, port: int) -> None:
        super().__init__(("", port), Handler)
        self.upstream = upstream
        self.behaviour = Behaviour.WELL
        self.lock = threading.Lock()
        self.disturbed = 0
        self.harm: Counter[str] = Counter()
        self.writes: list[tuple[float, str, str, int]] = []
        """When, what and how it ended, in the order in which the server said so."""

    def turn(self) -> int:
        """Count from 0 to 4, again and again."""
        with self.lock:
            self.disturbed += 1
            return (self.disturbed - 1) % 5

    def count(self, harm: str) -> None:
        """Note that a request was harmed."""
        with self.lock:
            self.harm[harm] += 1

    def control(self, path: str) -> bytes:
        """Do what ``path`` asks for and return the journal."""
        what, _, value = path.removeprefix(CONTROL).partition("/")
        if what == "behaviour":
            self.behaviour = Behaviour(value)
        with self.lock:
            return json.dumps({"writes": self.writes, "harm": self.harm}).encode()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on_or_harm(self) -> None:
        """Answer one request as well or as badly as was asked for."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.path.startswith(CONTROL):
                self._answer(HTTPStatus.OK, (), self.server.control(self.path))
            else:
                self._disturb(body)
        except (CutError, OSError):
            # By request, or the client or the server has gone.
            self.close_connection = True
            reset(self.connection)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on_or_harm  # noqa: N815 # the base class calls them so

    def log_message(self, *_: object) -> None:
        """Say nothing: the journal has it."""

    def _disturb(self, body: bytes) -> None:
        match self.server.behaviour:
            case Behaviour.WELL:
                self._answer(*self._ask(body))
            case Behaviour.SLOW:
                self.server.count("slowed")
                time.sleep(SLOW_SECONDS)  # the fault itself
                self._answer(*self._ask(body))
            case Behaviour.REFUSES:
                if self.server.turn() > 2:
                    self._answer(*self._ask(body))
                else:
                    self.server.count("refused")
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, (), BUSY)
            case Behaviour.CUTS:
                self._cut(body)

    def _cut(self, body: bytes) -> None:
        match self.server.turn():
            case 0:
                self.server.count("cut before")
                raise CutError
            case 1:
                self.server.count("cut inside")
                connection = self._connect(len(body))
                connection.send(body[: len(body) // 2])
                connection.close()
                raise CutError
            case 2:
                self.server.count("cut behind")
                self._ask(body)
                raise CutError
            case _:
                self._answer(*self._ask(body))

    def _connect(self, length: int) -> HTTPConnection:
        """Return a connection on which the request's head was sent."""
        connection = HTTPConnection(self.server.upstream, timeout=ANSWER_SECONDS)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in _kept(self.headers.items()):
            connection.putheader(name, value)
        if length or "Content-Length" in self.headers:
            connection.putheader("Content-Length", str(length))
        connection.endheaders()
        return connection

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return the server's answer: status, headers, body."""
        connection = self._connect(len(body))
        # A server may answer before it has read all, and hang up.
        with suppress(ConnectionError):
            connection.send(body)
        answer = connection.getresponse()
        headers, content = _kept(answer.getheaders()), answer.read()
        if self.command == "HEAD":
            headers += [(name, value) for name, value in answer.getheaders() if name.lower() == "content-length"]
        connection.close()
        if self.command in WRITES:
            with self.server.lock:
                self.server.writes.append((time.time(), self.command, self.path, answer.status))
        return answer.status, headers, content

    def _answer(self, status: int, headers: list[tuple[str, str]] | tuple[()], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _kept(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in BETWEEN_HOPS]


def reset(connection: socket.socket) -> None:
    """Let the other end learn of a reset, and get no end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


if __name__ == "__main__":
    Proxy(os.environ["UPSTREAM"], int(os.environ["PORT"])).serve_forever()
