"""Tell the operator how far a stage is and how it ended, over HTTPS. Never stops or slows what it reports about.

Address, token and certificate authority come from the variables that KubeflowCallback of Transformers reads.
"""

import contextlib
import http.client
import json
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from finetune_api.progress_message import MOST_BYTES, message_of
from finetune_api.report import Progress
from finetune_api.stage_result import StageResult, bounded

logger = logging.getLogger(__name__)

URL = "KUBEFLOW_TRAINER_SERVER_URL"
CA_CERT = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"
CALLBACK_OFF = "DISABLE_KUBEFLOW_INTEGRATION"

FINAL = {400, 404, 405, 409, 413, 415, 422}
"""Answers that the same request will get again."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between one thing and the next."""

    between_posts: float = 3.0
    request: float = 10.0
    """For one request, its connection included."""
    first_pause: float = 1.0
    """After a failure; doubles with every further one."""
    longest_pause: float = 15.0
    closing: float = 5.0
    """For the last progress to be told."""


class ProgressClient:
    """A sink for progress, and the way to deliver a stage's result."""

    def __init__(
        self,
        url: str,
        token_file: Path,
        ca_file: Path | None,
        pace: Pace | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """Report to ``url``. Both files are read again and again: the kubelet renews them."""
        self._url = urlsplit(url)
        self._token_file = token_file
        self._ca_file = ca_file
        self._pace = pace or Pace()
        self._now = now
        self._lock = threading.Lock()
        self._newest: bytes | None = None
        """Not posted yet; under the lock."""
        self._something_new = threading.Event()
        self._closing = threading.Event()
        self._is_away = False
        self._thread = threading.Thread(target=self._post_progress, name="progress", daemon=True)
        self._thread.start()

    def report(self, progress: Progress) -> None:
        """Take note of one moment; a thread posts the newest."""
        body = message_of(progress, self._now()).model_dump_json(by_alias=True, exclude_none=True).encode()
        with self._lock:
            self._newest = body
            self._something_new.set()

    def deliver(self, result: StageResult, patience_seconds: float = 600.0) -> bool:
        """Post ``result`` until the operator has recorded it; whether it has.

        Blocks until then, until ``patience_seconds`` are over, or until `close` is called by another thread.
        """
        body = bounded(result, MOST_BYTES)
        deadline = time.monotonic() + patience_seconds
        pause = self._pace.first_pause
        with contextlib.closing(self._open_line()) as line:
            while not self._closing.is_set():
                answer = self._post(line, "/result", body)
                if answer.code == 200:
                    with self._lock:
                        # The stage is over: the operator hears no more of how far it is.
                        self._newest = None
                    return True
                if answer.code in FINAL:
                    logger.error("the operator refuses the result code=%d message=%s", answer.code, answer.message)
                    return False
                wait = pause if answer.retry_after is None else answer.retry_after
                if time.monotonic() + wait >= deadline:
                    logger.error("the operator has not recorded the result seconds=%.0f", patience_seconds)
                    return False
                self._closing.wait(wait)
                pause = min(2 * pause, self._pace.longest_pause)
        return False

    def close(self) -> None:
        """Post the newest progress once more and stop."""
        self._closing.set()
        self._something_new.set()
        self._thread.join(self._pace.closing)

    def _open_line(self) -> "_Line":
        return _Line(self._url, self._token_file, self._ca_file, self._pace.request)

    def _post_progress(self) -> None:
        pause = self._pace.between_posts
        with contextlib.closing(self._open_line()) as line:
            while not self._closing.is_set():
                self._something_new.wait()
                answer = self._post_newest(line)
                pause = self._pace.between_posts if answer.code == 200 else min(2 * pause, self._pace.longest_pause)
                self._closing.wait(max(pause, answer.retry_after or 0.0))
            self._post_newest(line)

    def _post_newest(self, line: "_Line") -> "_Answer":
        with self._lock:
            body, self._newest = self._newest, None
            self._something_new.clear()
        if body is None:
            return _NOTHING
        answer = self._post(line, "", body)
        if answer.code != 200 and answer.code not in FINAL:
            with self._lock:
                # Unless there is a newer one by now, it is told when somebody listens again.
                self._newest = self._newest or body
                self._something_new.set()
        return answer

    def _post(self, line: "_Line", below: str, body: bytes) -> "_Answer":
        try:
            answer = line.post(below, body)
        # Also a token or an authority that is not there yet, or not whole.
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer = _Answer(0, f"{type(error).__name__}: {error}")
        if answer.code != 200 and not self._is_away:
            logger.warning("the operator does not listen code=%d message=%s", answer.code, answer.message)
        elif answer.code == 200 and self._is_away:
            logger.info("the operator listens again")
        self._is_away = answer.code != 200
        return answer


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back; code 0 when nothing did."""

    code: int
    message: str
    retry_after: float | None = None


_NOTHING = _Answer(200, "")
"""There was nothing to post."""


class _Line:
    """A connection that is kept from one request to the next: a new one costs the operator ten times the work."""

    def __init__(self, url: SplitResult, token_file: Path, ca_file: Path | None, seconds: float):
        self._url = url
        self._token_file = token_file
        self._ca_file = ca_file
        self._seconds = seconds
        self._connection: http.client.HTTPSConnection | None = None

    def post(self, below: str, body: bytes) -> _Answer:
        """Return what is answered to ``body``; raises OSError, HTTPException and ValueError."""
        if self._connection is not None:
            try:
                return self._exchange(self._connection, below, body)
            except (OSError, http.client.HTTPException):
                # The operator closes a connection that was silent for a while, or has been restarted.
                self.close()
        self._connection = self._connect()
        try:
            return self._exchange(self._connection, below, body)
        except (OSError, http.client.HTTPException):
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> http.client.HTTPSConnection:
        text = None if self._ca_file is None else self._ca_file.read_text(encoding="ascii")
        trust = ssl.create_default_context(cadata=text)
        # No proxy: the endpoint is in the cluster.
        return http.client.HTTPSConnection(
            self._url.hostname or "", self._url.port or 443, timeout=self._seconds, context=trust
        )

    def _exchange(self, connection: http.client.HTTPSConnection, below: str, body: bytes) -> _Answer:
        token = self._token_file.read_text(encoding="ascii").strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", self._url.path + below, body, headers)
        response = connection.getresponse()
        answer = _Answer(response.status, _message(response.read()), _seconds(response.getheader("Retry-After")))
        if response.will_close:
            # Or it would be opened again with the authority of then.
            self.close()
        return answer


def open_client(environ: MutableMapping[str, str] = os.environ) -> ProgressClient | None:
    """Return a client for the operator that ``environ`` names; None when it names none.

    Switches KubeflowCallback off for this process and its children: it would report the same, and it stops training for
    seconds at a time while nobody listens.
    """
    url = environ.get(URL)
    if not url:
        return None
    environ[CALLBACK_OFF] = "TRUE"
    if not _is_usable(urlsplit(url)):
        logger.warning("%s is %r, which is no https address: progress is not reported", URL, url)
        return None
    authority = environ.get(CA_CERT)
    return ProgressClient(url, Path(environ.get(TOKEN, "")), Path(authority) if authority else None)


def _is_usable(url: SplitResult) -> bool:
    # A token is not sent in the clear.
    return url.scheme == "https" and bool(url.hostname)


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content).get("message", ""))[:300]
    except (ValueError, AttributeError):
        return ""


def _seconds(text: str | None) -> float | None:
    return min(float(text), 60.0) if text is not None and text.isascii() and text.isdigit() else None
