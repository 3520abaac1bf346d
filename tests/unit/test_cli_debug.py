"""`finetune debug`: everything is in the file, nothing secret is, and what cannot be read stops nothing."""

import copy
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_api.secret_text import MASK, masked
from finetune_cli.cluster_job import JobName, cluster_job
from finetune_cli.debug import LOG_LINES, debug, debug_lines
from finetune_cli.refusal import ForbiddenError, NotFoundError
from finetune_operator import naming

from .cluster_api import NAME, NAMESPACE, FakeJobApi, make_object, make_pod, pod_name

NOW = datetime(2026, 1, 2, 3, 5, tzinfo=UTC)
JOB = JobName(NAMESPACE, NAME)
ENV = [
    {"name": "WANDB_API_KEY", "value": "0123456789"},
    {"name": "FROM", "valueFrom": {"secretKeyRef": {"name": "s"}}},
]


def make_api() -> FakeJobApi:
    api = FakeJobApi(make_object({"phase": "Training"}, compute={"pod": {"env": ENV}}))
    applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps({"env": ENV}), "team": "a"}
    api.job["metadata"]["annotations"] = applied
    running = make_pod(Stage.TRAIN)
    running["spec"] = {"nodeName": "node-7", "containers": [{"env": [{"name": "X", "value": "never shown"}]}]}
    running["status"]["conditions"] = [
        {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "containers\nwith status"},
        {"type": "Initialized", "status": "True"},
    ]
    ended = make_pod(Stage.CHECK, 1, "terminated", "Error")
    ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = 65
    api.pod_objects = [running, ended, make_pod(Stage.EVALUATE, 1, "waiting", "ImagePullBackOff")]
    api.logs = {
        pod_name(Stage.TRAIN): [f"2026-01-02T03:04:05Z step {number}" for number in range(LOG_LINES + 50)],
        pod_name(Stage.CHECK): ["2026-01-02T03:04:05Z aws_secret_access_key=abcdefghijklmnop"],
    }
    api.event_objects = [
        event("Pod", pod_name(Stage.TRAIN), "Scheduled", 1),
        event("FineTuneJob", NAME, "StageStarted", 0),
        event("Job", f"{NAME}-check-a1", "Completed", 2),
        event("Pod", "somebody-elses", "Killing", 3),
    ]
    return api


def event(kind: str, name: str, reason: str, second: int) -> dict[str, Any]:
    return {
        "involvedObject": {"kind": kind, "name": name},
        "type": "Normal",
        "reason": reason,
        "message": f"{reason} happened",
        "lastTimestamp": f"2026-01-02T03:04:0{second}Z",
        "count": 2,
    }


def text_of(api: FakeJobApi) -> str:
    return "\n".join(debug_lines(api, cluster_job(copy.deepcopy(api.job)), NOW))


def test_everything_is_in_the_file():
    text = text_of(make_api())
    titles = [line.removeprefix("--- ") for line in text.splitlines() if line.startswith("--- ")]
    log = f"last {LOG_LINES} lines"
    assert titles == [
        "Status",
        "Object",
        "Pods",
        "Events",
        f"Log of {pod_name(Stage.TRAIN)}, {naming.CONTAINER}, {log}",
        f"Log of {pod_name(Stage.CHECK)}, {naming.CONTAINER}, {log}",
    ]
    for part in (
        "source: hf://acme/tiny",
        f"{pod_name(Stage.TRAIN)}: Running on node-7, created 2026-01-02T03:04:05Z",
        "Ready is False: ContainersNotReady containers with status",
        "terminated, exit code 65, 0 restarts Error",
        "waiting, 0 restarts ImagePullBackOff",
        f"step {LOG_LINES + 49}",
    ):
        assert part in text
    assert "step 49\n" not in text


def test_events_are_those_of_the_job_in_their_order():
    lines = text_of(make_api()).splitlines()
    reasons = [line.split()[3] for line in lines if line.endswith(" happened")]
    assert reasons == ["StageStarted", "Scheduled", "Completed"]


def test_no_value_of_an_environment_variable_and_no_secret_is_in_the_file():
    text = text_of(make_api())
    for secret in ("0123456789", "never shown", "abcdefghijklmnop"):
        assert secret not in text
    assert f"name: WANDB_API_KEY\n        value: '{MASK}'" in text
    assert f"aws_secret_access_key={MASK}" in text
    assert "secretKeyRef" in text
    assert "team: a" in text


def test_what_may_not_be_read_is_said_in_its_place():
    class Guarded(FakeJobApi):
        def events(self, namespace: str) -> list[dict[str, Any]]:
            raise ForbiddenError("you may not list events in namespace team")

    text = text_of(Guarded(make_object({"phase": "Pending"})))
    assert "--- Events\n\nnot readable: you may not list events in namespace team" in text
    assert "--- Pods\n\nThere are none." in text


def test_the_file_has_the_jobs_name_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        debug(make_api(), JOB, None)
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}-debug.txt"]
    assert capsys.readouterr().out.startswith(f"{NAME}-debug.txt: status, object, events, pods and logs of FineTuneJob")
    debug(make_api(), JOB, tmp_path / "own.txt")
    assert (tmp_path / "own.txt").read_text().startswith("FineTuneJob ")


def test_a_job_that_is_not_there_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError):
        debug(make_api(), JobName(NAMESPACE, "gone"), None)
    assert not list(tmp_path.iterdir())


SECRETS = {
    "an access key": ("id AKIAIOSFODNN7EXAMPLE here", f"id {MASK} here"),
    "a token": ("with hf_abcdefghijklmnopqrstuvwxyz.", f"with {MASK}."),
    "a private key": (
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----\nrest",
        f"{MASK}\nrest",
    ),
    "a named value": ("password: hunter22 and more", f"password: {MASK} and more"),
    "json": ('{"AWS_SECRET_ACCESS_KEY": "abcd/efgh+ij", "x": 1}', f'{{"AWS_SECRET_ACCESS_KEY": "{MASK}", "x": 1}}'),
    "a header": ("Authorization: Bearer abc.def.ghi", f"Authorization: Bearer {MASK}"),
    "a URL": ("to https://me:pass@example.org/x", f"to https://me:{MASK}@example.org/x"),
    "no secret": ("training: 2 tokens = 5, secretRef name s3", "training: 2 tokens = 5, secretRef name s3"),
}


@pytest.mark.parametrize("text, shown", SECRETS.values(), ids=SECRETS.keys())
def test_what_looks_like_a_secret_is_masked(text: str, shown: str):
    assert masked(text) == shown


@pytest.mark.parametrize("piece", ["a", "token", "token=", "-----BEGIN PRIVATE KEY-----", "a://", "secret-", "a:"])
def test_a_long_text_is_masked_in_no_time(piece: str):
    started = time.process_time()
    masked(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 5
