"""The client against a listener that answers as it is told."""

import json
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.report import ExitCode, Progress, Stage
from finetune_api.stage_result import StageResult
from finetune_operator.certificate import Lifetimes, renewed, to_data
from finetune_trainer.progress_client import Pace, ProgressClient, open_client

PACE = Pace(between_posts=0.05, request=30.0, first_pause=0.01, longest_pause=0.05, closing=30.0)
RARELY = replace(PACE, between_posts=60.0)
RESULT = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.OK)
DAY = timedelta(days=1)


@dataclass
class Listener:
    """Keeps what is posted, and answers with the codes that a test gives; with 200 when they are used up."""

    server: ThreadingHTTPServer
    folder: Path
    posts: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Path, token and body."""
    codes: list[int] = field(default_factory=list)
    answered: int = 0
    """Posts whose answer has been sent."""
    may_answer: threading.Event = field(default_factory=threading.Event)
    """Set, unless the test clears it."""
    connections: list[socket.socket] = field(default_factory=list)

    def client(self, pace: Pace = PACE, **options: Any) -> ProgressClient:
        url = f"https://127.0.0.1:{self.server.server_port}/job"
        return ProgressClient(url, self.folder / "token", self.folder / "ca.crt", pace, **options)

    def use_certificate(self, *, is_trusted: bool = True) -> None:
        """Serve a certificate of a new authority, which the client's file names or not."""
        data = to_data(renewed(None, ["127.0.0.1"], Lifetimes(), datetime.now(UTC)))
        if is_trusted:
            (self.folder / "ca.crt").write_bytes(data["ca.crt"])
        chain = self.folder / "chain.pem"
        chain.write_bytes(data["tls.key"] + data["tls.crt"])
        self.context.load_cert_chain(chain)

    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def hang_up(self) -> None:
        """Close every connection, between two posts."""
        until(lambda: self.answered == len(self.posts))
        for connection in self.connections:
            connection.shutdown(socket.SHUT_RDWR)

    def percents(self) -> list[float]:
        return [body["trainerStatus"]["progressPercentage"] for _, _, body in list(self.posts)]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.005)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            listener.connections.append(self.connection)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            listener.may_answer.wait()
            listener.posts.append((self.path, self.headers["Authorization"], body))
            self.send_response(listener.codes.pop(0) if listener.codes else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            listener.answered += 1

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that does not trust the certificate hangs up."""

    server = Server(("127.0.0.1", 0), Handler)
    listener = Listener(server, tmp_path)
    listener.may_answer.set()
    (tmp_path / "token").write_text("first\n")
    listener.use_certificate()
    server.socket = listener.context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield listener
    finally:
        listener.may_answer.set()
        # Or its threads would wait for another request.
        for connection in listener.connections:
            connection.close()
        server.shutdown()
        server.server_close()
        thread.join()


def progress(percent: float, **values: Any) -> Progress:
    return Progress(stage=Stage.TRAIN, percent=percent, **values)


def test_progress_is_posted_as_kubeflow_callback_would(listener: Listener) -> None:
    client = listener.client(now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    client.report(progress(40, message="training", step=4, total_steps=10, loss=0.5, eta_seconds=60.4))
    client.close()
    assert listener.posts == [
        (
            "/job",
            "Bearer first",
            {
                "trainerStatus": {
                    "progressPercentage": 40.0,
                    "estimatedRemainingSeconds": 60.4,
                    "metrics": [{"name": "loss", "value": "0.5"}],
                    "lastUpdatedTime": "2026-01-01T00:00:00Z",
                    "stage": "train",
                    "message": "training",
                    "step": 4,
                    "totalSteps": 10,
                }
            },
        )
    ]


def test_a_loss_that_is_no_number_is_told(listener: Listener) -> None:
    client = listener.client()
    client.report(progress(math.nan, loss=math.nan, epoch=math.inf))
    client.close()
    said = listener.posts[0][2]["trainerStatus"]
    assert said["metrics"] == [{"name": "loss", "value": "nan"}]
    assert not {"progressPercentage", "epoch"} & said.keys()


def test_any_text_can_be_told(listener: Listener) -> None:
    client = listener.client()
    client.report(progress(1, message="reading \udcff\x00" + "x" * 100_000))
    client.close()
    assert listener.posts[0][2]["trainerStatus"]["message"].startswith("reading xx")


def test_the_newest_progress_is_posted_and_the_last_is_never_lost(listener: Listener) -> None:
    client = listener.client(RARELY)
    for percent in range(101):
        client.report(progress(percent))
    client.close()
    assert listener.percents()[-1] == 100
    assert len(listener.posts) <= 2


def test_reporting_takes_no_time_while_the_operator_hangs(listener: Listener) -> None:
    listener.may_answer.clear()
    client = listener.client()
    began = time.monotonic()
    for percent in range(10):
        client.report(progress(percent))
    assert time.monotonic() - began < PACE.request, "one of them waited for an answer"
    assert listener.posts == []
    listener.may_answer.set()
    client.close()


def test_progress_that_nobody_took_is_told_later(listener: Listener) -> None:
    listener.codes = [503, 429, 401]
    client = listener.client()
    client.report(progress(7))
    until(lambda: len(listener.posts) == 4)
    assert listener.percents() == [7, 7, 7, 7]
    client.close()
    assert len(listener.posts) == 4


def test_progress_that_is_refused_is_not_told_again(listener: Listener) -> None:
    listener.codes = [409]
    client = listener.client()
    client.report(progress(7))
    until(lambda: len(listener.posts) == 1)
    client.close()
    assert len(listener.posts) == 1


def test_an_operator_that_is_away_is_named_once(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    listener.codes = [503] * 5
    caplog.set_level(logging.INFO, "finetune_trainer")
    client = listener.client()
    client.report(progress(1))
    until(lambda: len(listener.posts) == 6)
    client.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_new_token_is_used_at_once(listener: Listener) -> None:
    client = listener.client()
    client.report(progress(1))
    until(lambda: len(listener.posts) == 1)
    (listener.folder / "token").write_text("second")
    client.report(progress(2))
    client.close()
    assert [token for _, token, _ in listener.posts] == ["Bearer first", "Bearer second"]


def test_a_connection_is_kept(listener: Listener) -> None:
    client = listener.client()
    client.report(progress(1))
    until(lambda: len(listener.posts) == 1)
    client.report(progress(2))
    client.close()
    assert listener.percents() == [1, 2]
    assert len(listener.connections) == 1


def test_a_connection_that_was_closed_meanwhile_is_made_anew(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    client = listener.client()
    client.report(progress(1))
    until(lambda: len(listener.posts) == 1)
    listener.hang_up()
    client.report(progress(2))
    client.close()
    assert listener.percents() == [1, 2]
    assert not caplog.records


def test_a_new_authority_is_trusted_at_once(listener: Listener) -> None:
    client = listener.client()
    client.report(progress(1))
    until(lambda: len(listener.posts) == 1)
    listener.use_certificate()
    listener.hang_up()
    client.report(progress(2))
    client.close()
    assert listener.percents() == [1, 2]


def test_an_endpoint_of_another_authority_gets_no_token(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    listener.use_certificate(is_trusted=False)
    client = listener.client()
    client.report(progress(1))
    until(lambda: bool(caplog.records))
    client.close()
    assert listener.posts == []
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def test_a_missing_token_stops_nothing(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    (listener.folder / "token").unlink()
    client = listener.client()
    client.report(progress(1))
    until(lambda: bool(caplog.records))
    (listener.folder / "token").write_text("late")
    until(lambda: len(listener.posts) == 1)
    client.close()


# --- results


def test_a_result_is_delivered_until_it_is_recorded(listener: Listener) -> None:
    listener.codes = [503, 401, 429, 200]
    client = listener.client()
    assert client.deliver(RESULT)
    assert [path for path, _, _ in listener.posts] == ["/job/result"] * 4
    assert StageResult.model_validate(listener.posts[0][2]) == RESULT
    client.close()


@pytest.mark.parametrize("code", [409, 413, 422])
def test_a_result_that_is_refused_is_not_delivered_again(listener: Listener, code: int) -> None:
    listener.codes = [code]
    client = listener.client()
    assert not client.deliver(RESULT)
    assert len(listener.posts) == 1
    client.close()


def test_what_is_over_is_not_told_how_far_it_is(listener: Listener) -> None:
    client = listener.client(RARELY)
    client.report(progress(1))
    until(lambda: len(listener.posts) == 1)
    client.report(progress(100))
    assert client.deliver(RESULT)
    client.close()
    assert [path for path, _, _ in listener.posts] == ["/job", "/job/result"]


def test_delivery_has_an_end(listener: Listener) -> None:
    listener.codes = [503] * 1000
    client = listener.client()
    began = time.monotonic()
    assert not client.deliver(RESULT, patience_seconds=0.3)
    assert time.monotonic() - began < 30
    client.close()


def test_a_result_outlasts_an_operator_that_is_down(tmp_path: Path, listener: Listener) -> None:
    client = ProgressClient("https://127.0.0.1:1/job", tmp_path / "token", tmp_path / "ca.crt", PACE)
    assert not client.deliver(RESULT, patience_seconds=0.2)
    client.close()


# --- the environment


def test_outside_of_a_cluster_there_is_no_client() -> None:
    environ: dict[str, str] = {}
    assert open_client(environ) is None
    assert environ == {}


def test_the_callback_of_transformers_is_switched_off(listener: Listener) -> None:
    environ = {
        "KUBEFLOW_TRAINER_SERVER_URL": f"https://127.0.0.1:{listener.server.server_port}/job",
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(listener.folder / "ca.crt"),
        "KUBEFLOW_TRAINER_SERVER_TOKEN": str(listener.folder / "token"),
    }
    client = open_client(environ)
    assert client is not None
    assert environ["DISABLE_KUBEFLOW_INTEGRATION"] == "TRUE"
    client.report(progress(3))
    client.close()
    assert listener.percents() == [3]


def test_a_token_is_not_sent_in_the_clear(caplog: pytest.LogCaptureFixture) -> None:
    assert open_client({"KUBEFLOW_TRAINER_SERVER_URL": "http://127.0.0.1:1/job"}) is None
    assert "no https address" in caplog.text
