"""A hub in this process: the part of the Hugging Face HTTP API that a download needs, over real files."""

import hashlib
import itertools
import json
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .http_server import serve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the server answers, and what it was asked. Change the fields while it runs."""

    repository: str
    folder: Path
    kind: str = "model"
    """Or dataset."""
    url: str = ""
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    needed_token: str | None = None
    gated: bool = False
    failures: list[int] = field(default_factory=list)
    """HTTP statuses for the next requests, one each, before it works again."""
    cut_downloads: int = 0
    """How many of the next weight downloads end after half of the bytes."""
    endless: str = ""
    """Name of a file that is sent without end, in pieces that nothing announces the number of."""
    encoding: str = ""
    """Of that file: gzip, or none."""
    trickle: str = ""
    """Name of a file of which a byte comes now and then."""
    pages_without_end: bool = False
    """Whether behind every page of the listing there is another one, with no file on it."""
    page_without_end: bool = False
    """Whether the listing is one page that does not end."""
    status_without_end: int = 200
    """Its HTTP status: an error's, or of one that leads elsewhere."""
    silent: threading.Event | None = None
    """Until it is set, no listing is answered."""
    xet: bool = False
    """Whether weights are offered from Xet storage as well."""
    listed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes by name that the listing tells in the place of the true ones."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    tokens: set[str | None] = field(default_factory=set)

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def serve_hub(repository: str, folder: Path, kind: str = "model") -> Iterator[FakeHub]:
    """Serve ``folder`` as ``repository`` on a free local port until the block ends."""
    hub = FakeHub(repository, folder, kind)
    with serve(_handler(hub)) as hub.url:
        yield hub


def pieces_without_end(encoding: str, *, is_slow: bool) -> Iterator[bytes]:
    """Yield zeros, in large pieces or byte by byte."""
    packed = zlib.compressobj(wbits=31)
    while True:
        if is_slow:
            time.sleep(0.05)
        piece = bytes(1 if is_slow else 1 << 20)
        yield packed.compress(piece) + packed.flush(zlib.Z_SYNC_FLUSH) if encoding else piece


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Requests are kept in ``hub.requests`` instead."""

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            files = f"/{hub.repository}" if hub.kind == "model" else f"/{hub.kind}s/{hub.repository}"
            hub.requests.append((self.command, path))
            hub.tokens.add(token)
            if hub.failures:
                self.send(hub.failures.pop(0), b"", with_body)
            elif hub.needed_token and token is not None and token != hub.needed_token:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif hub.needed_token and token is None and not hub.gated:
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif path.startswith(f"/api/{hub.kind}s/{hub.repository}/"):
                self.answer_api(path.removeprefix(f"/api/{hub.kind}s/{hub.repository}/"), with_body)
            elif path.startswith(f"{files}/resolve/"):
                revision, _, name = path.removeprefix(f"{files}/resolve/").partition("/")
                self.answer_file(revision, name, token, with_body)
            else:
                self.refuse(404, "RepoNotFound", "Repository not found")

        def answer_api(self, rest: str, with_body: bool) -> None:
            kind, _, revision = rest.partition("/")
            names = sorted(p.relative_to(hub.folder).as_posix() for p in hub.folder.rglob("*") if p.is_file())
            if revision not in (*hub.branches, hub.commit):
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            elif kind == "revision":
                siblings = [{"rfilename": name} for name in names]
                self.send_json({"id": hub.repository, "sha": hub.commit, "siblings": siblings}, with_body)
            elif kind == "tree" and hub.silent is not None:
                hub.silent.wait()
                self.close_connection = True
            elif kind == "tree" and hub.page_without_end:
                self.send_pieces({"Location": self.path}, itertools.repeat(b" " * (1 << 20)), hub.status_without_end)
            elif kind == "tree" and hub.pages_without_end:
                self.send_json([], with_body, self.next_page)
            elif kind == "tree":
                self.send_json([self.entry(name) for name in names], with_body)
            else:
                self.refuse(404, "EntryNotFound", "Entry not found")

        @property
        def next_page(self) -> dict[str, str]:
            return {"Link": f'<{hub.url}{self.path.partition("?")[0]}?cursor={len(hub.requests)}>; rel="next"'}

        def entry(self, name: str) -> dict[str, object]:
            content = (hub.folder / name).read_bytes()
            entry: dict[str, object] = {
                "type": "file",
                "path": name,
                "size": hub.listed_sizes.get(name, len(content)),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            return entry

        def answer_file(self, revision: str, name: str, token: str | None, with_body: bool) -> None:
            path = hub.folder / name
            if hub.gated and token != hub.needed_token:
                self.refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
            elif revision not in (*hub.branches, hub.commit) or not path.is_file():
                self.refuse(404, "EntryNotFound", "Entry not found")
            else:
                content = path.read_bytes()
                headers = {
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Repo-Commit": hub.commit,
                    "Accept-Ranges": "bytes",
                }
                if hub.xet and name.endswith(".safetensors"):
                    headers |= {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.url}/xet-token"}
                if name in (hub.endless, hub.trickle) and with_body:
                    packing = {"Content-Encoding": hub.encoding} if hub.encoding else {}
                    self.send_pieces(headers | packing, pieces_without_end(hub.encoding, is_slow=name == hub.trickle))
                    return
                start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
                status = 206 if start else 200
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send(status, content[int(start or 0) :], with_body, headers, cut=name.endswith(".safetensors"))

        def send_pieces(self, headers: dict[str, str], pieces: Iterable[bytes], status: int = 200) -> None:
            self.send_response(status)
            for name, value in (headers | {"Transfer-Encoding": "chunked"}).items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            with suppress(ConnectionError):
                for piece in pieces:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")

        def refuse(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.send(status, json.dumps({"error": message}).encode(), self.command == "GET", headers)

        def send_json(self, content: object, with_body: bool, headers: dict[str, str] | None = None) -> None:
            kind = {"Content-Type": "application/json"}
            self.send(200, json.dumps(content).encode(), with_body, kind | (headers or {}))

        def send(
            self,
            status: int,
            body: bytes,
            with_body: bool,
            headers: dict[str, str] | None = None,
            *,
            cut: bool = False,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not with_body:
                return
            if cut and hub.cut_downloads:
                hub.cut_downloads -= 1
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    return Handler
