"""The HTTP client under the hub's library, which itself reads into memory and waits without a bound.

An answer that is read whole may be so large and no larger, all pages of a listing together; what is silent or trickles
is ended; nothing is unpacked. What is written to a file is bounded where its size is known, in `finetune_trainer.hub`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub.utils._http import hf_request_event_hook

LARGEST_LISTING_BYTES = 64 << 20
"""The hub wants fewer than 100,000 files in a repository; each takes some 330 bytes of a listing, and its name again.
https://huggingface.co/docs/hub/en/repositories-recommendations"""
_PAGE_BYTES = 16 << 10
"""What a page counts beside its bytes: it may be empty, and there is another one."""
SILENCE_SECONDS = 60.0
"""The library itself waits for a listing for ever."""
PACE_SECONDS = 60.0
_PACE_BYTES = 64 << 10
"""At least so much comes in that time; a page of gigabytes over a slow line brings a hundred times as much."""
_READ_WHOLE = "finetune.read_whole"


class AnswerError(httpx2.HTTPError):
    """What is sent is no answer that is taken here; asking again at once changes nothing."""


@dataclass
class _Budget:
    """Bytes that may still be read into memory."""

    left: int

    def take(self, count: int, where: str) -> None:
        self.left -= count
        if self.left < 0:
            raise AnswerError(
                f"{where} has more than {LARGEST_LISTING_BYTES >> 20} MiB to say, and 100,000 files take less; "
                "join the files of a data set that has more"
            )


_listing: ContextVar[_Budget | None] = ContextVar("_listing", default=None)


@contextmanager
def one_listing() -> Iterator[None]:
    """Count what this thread reads in the block as one listing, whatever number of pages it comes in."""
    token = _listing.set(_Budget(LARGEST_LISTING_BYTES))
    try:
        yield
    finally:
        _listing.reset(token)


class HubClient(httpx2.Client):
    """The library's own client with bounds on what comes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            event_hooks={"request": [hf_request_event_hook], "response": [_bound]},
            follow_redirects=True,
            # What comes packed is small on the way and without end in memory.
            headers={"Accept-Encoding": "identity"},
            **options,
        )

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """Send ``request``, and wait no longer than `SILENCE_SECONDS` for the next byte."""
        asked = request.extensions.get("timeout", {})
        waits = {kind: asked.get(kind) or SILENCE_SECONDS for kind in ("connect", "read", "write", "pool")}
        request.extensions |= {"timeout": waits, _READ_WHOLE: not stream}
        return super().send(request, stream=stream, **options)


def _bound(response: httpx2.Response) -> None:
    """Bound what comes of ``response``; called before its body is read, of those that lead elsewhere as well."""
    if response.request.method == "HEAD":
        return
    where = f"{response.url.scheme}://{response.url.netloc.decode('ascii')}{response.url.path}"
    if (packing := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise AnswerError(f"{where} is sent packed ({packing}), which was not asked for")
    pieces = _paced(response.stream, where)
    if response.request.extensions[_READ_WHOLE] or not response.is_success:
        budget = _listing.get() or _Budget(LARGEST_LISTING_BYTES)
        budget.take(_PAGE_BYTES, where)
        pieces = _counted(pieces, budget, where)
    response.stream = _Stream(response.stream, pieces)


def _paced(stream: Any, where: str) -> Iterator[bytes]:
    """Yield the pieces of ``stream`` while they come at some pace; only the wait for them counts."""
    pieces = iter(stream)
    waited, came = 0.0, 0
    while True:
        before = time.monotonic()
        piece = next(pieces, None)
        if piece is None:
            return
        waited, came = waited + time.monotonic() - before, came + len(piece)
        if waited > PACE_SECONDS:
            if came < _PACE_BYTES:
                raise AnswerError(f"{where} trickles: {came:,} bytes in {waited:.0f} s")
            waited, came = 0.0, 0
        yield piece


def _counted(pieces: Iterator[bytes], budget: _Budget, where: str) -> Iterator[bytes]:
    for piece in pieces:
        budget.take(len(piece), where)
        yield piece


@dataclass
class _Stream(httpx2.SyncByteStream):
    """A body that is bounded on its way."""

    body: Any
    pieces: Iterator[bytes]

    def __iter__(self) -> Iterator[bytes]:
        return self.pieces

    def close(self) -> None:
        self.body.close()
