"""A Weights & Biases server in this process: what wandb 0.31's own client asks of one for a run, and nothing else."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from .http_server import serve


@dataclass
class KeptRun:
    """A run as the server keeps it."""

    entity: str
    project: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    """One of each attempt that told its end."""

    def drawn(self, figure: str) -> list[tuple[int, float]]:
        """What a chart would draw: every step with its value, in the order in which they came."""
        return [(row["train/global_step"], row[figure]) for row in self.history if figure in row]


@dataclass
class FakeWandb:
    """What the server knows and was told. Change the fields while it runs."""

    key: str
    url: str = ""
    runs: dict[str, KeptRun] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Bodies of all requests."""
    foreign: list[str] = field(default_factory=list)
    """Whatever it was asked or sent beside a run's settings, history and summary."""
    refused_stream: int | None = None
    """HTTP status for whatever is told of a run that is there."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Nothing is answered while it is clear."""


@contextmanager
def serve_wandb(key: str) -> Iterator[FakeWandb]:
    """Serve on a free local port until the block ends."""
    fake = FakeWandb(key)
    fake.gate.set()
    with serve(_handler(fake)) as fake.url:
        try:
            yield fake
        finally:
            fake.gate.set()


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """What was asked is kept in the fake instead."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode(errors="replace")
            fake.asked.append(body)
            fake.gate.wait(60)
            if self.headers["Authorization"] != "Basic " + base64.b64encode(f"api:{fake.key}".encode()).decode():
                self.send(401, {"errors": [{"message": "invalid API key"}]})
            elif self.path == "/graphql":
                asked = json.loads(body)
                self.answer(asked["operationName"], asked.get("variables", {}))
            elif self.path.startswith("/files/") and self.path.endswith("/file_stream"):
                self.take(self.path.split("/")[-2], json.loads(body))
            else:
                self.refuse(f"POST {self.path}")

        def do_GET(self) -> None:
            self.refuse(f"GET {self.path}")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.refuse(f"PUT {self.path}")

        def refuse(self, what: str) -> None:
            fake.foreign.append(what)
            self.send(404, {"errors": [{"message": "not found"}]})

        def answer(self, operation: str, given: dict[str, Any]) -> None:
            if operation == "RunResumeStatus":
                run = fake.runs.get(given["name"])
                self.send(200, {"data": {"model": {"id": "p", "bucket": run and _bucket(given["name"], run)}}})
            elif operation == "UpsertBucket":
                self.send(200, {"data": {"upsertBucket": self.upsert(given)}})
            elif operation == "CreateRunFiles":
                fake.foreign += given["files"]
                self.send(200, {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}})
            else:
                self.refuse(operation)

        def upsert(self, given: dict[str, Any]) -> dict[str, Any]:
            is_new = given["name"] not in fake.runs
            run = fake.runs.setdefault(
                given["name"], KeptRun(given["entity"] or "anna", given["project"], given["displayName"])
            )
            told = ("commit", "host", "program", "repo", "notes", "description", "tags")
            fake.foreign += [f"{name}: {given[name]}" for name in told if given[name]]
            config = json.loads(given["config"])
            run.config = {name: entry["value"] for name, entry in config.items()}
            return {"bucket": _bucket(given["name"], run), "inserted": is_new}

        def take(self, name: str, told: dict[str, Any]) -> None:
            if fake.refused_stream is not None:
                self.send(fake.refused_stream, {"error": "not here"})
                return
            run = fake.runs[name]
            for file, part in told.get("files", {}).items():
                if file == "wandb-history.jsonl":
                    run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
                elif file == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
                else:
                    fake.foreign.append(file)
            if told.get("complete"):
                run.exit_codes.append(told["exitcode"])
            self.send(200, {"limits": {}})

        def send(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _bucket(key: str, run: KeptRun) -> dict[str, Any]:
    return {
        "id": f"bucket-{key}",
        "name": key,
        "displayName": run.name,
        "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
        "config": json.dumps({name: {"value": value} for name, value in run.config.items()}),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "tags": [],
        "notes": None,
        "wandbConfig": json.dumps({"t": {}}),
    }
