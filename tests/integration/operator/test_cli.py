"""`finetune submit`, `status`, `cancel` and `resume` against a real API server; the test plays the operator."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.report import ExitCode
from finetune_cli.__main__ import run_command
from finetune_cli.connection import connect
from finetune_cli.job_api import Target
from finetune_cli.refusal import ClusterError

from ...cluster.folder import BIN
from .api_server import ApiServer
from .definition import CRD_PATH, define, takes
from .operator_process import await_until
from .workload import MERGE

EXAMPLE = Path(__file__).parents[3] / "examples" / "06-kubernetes" / "finetunejob.yaml"
NAME = "reviews-lora"
TIMES = {"lastTransitionTime": "2026-01-02T03:04:05Z"}


@pytest.fixture(autouse=True)
def kubeconfig(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))


@pytest.fixture
def finetune(namespace: str) -> Callable[..., ExitCode]:
    """Run one command in a namespace of its own."""
    return lambda command, *rest: run_command([command, *rest, "-n", namespace])


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Write example 06 with changes: ``old="new"`` texts."""

    def write(*changes: tuple[str, str]) -> Path:
        text = EXAMPLE.read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "job.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def jobs_of(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def path_of(namespace: str) -> str:
    return f"{jobs_of(namespace)}/{NAME}"


def get(api_server: ApiServer, namespace: str) -> dict[str, Any]:
    job: dict[str, Any] = api_server.request("GET", path_of(namespace))
    return job


def line_of(text: str) -> int:
    """Return the first line of example 06 that holds ``text``."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def set_status(api_server: ApiServer, namespace: str, **status: Any) -> None:
    """Do what the operator would."""
    api_server.request("PATCH", f"{path_of(namespace)}/status", {"status": status}, MERGE)


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message, **TIMES}


def ended_stage(stage: str, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "attempt": 1, "exitCode": 0, **more}


# --- submit


def test_a_submitted_job_is_in_the_cluster_as_it_was_written(finetune, namespace, api_server, capsys):
    assert finetune("submit", str(EXAMPLE)) == ExitCode.OK
    assert capsys.readouterr().out.splitlines() == [
        f"FineTuneJob {NAME} in namespace {namespace} is submitted.",
        f"To watch it: finetune status {NAME} -n {namespace} -w",
    ]
    written = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert get(api_server, namespace)["spec"] == written["spec"]


def test_the_same_job_may_be_submitted_twice(finetune, capsys):
    finetune("submit", str(EXAMPLE))
    capsys.readouterr()
    assert finetune("submit", str(EXAMPLE)) == ExitCode.OK
    assert "is there already, with the same spec" in capsys.readouterr().out


def test_another_job_of_the_same_name_is_refused_with_the_difference(finetune, changed, namespace, capsys):
    finetune("submit", str(EXAMPLE))
    assert finetune("submit", str(changed(("rank: 8", "rank: 4"), ("maxSteps: 60", "epochs: 1")))) == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert "differs in spec.method.lora.rank, spec.training.epochs, spec.training.maxSteps" in error
    assert f"finetune cancel {NAME} -n {namespace}" in error


def test_a_difference_that_may_change_is_told_with_the_command_that_changes_it(finetune, changed, namespace, capsys):
    finetune("submit", str(EXAMPLE))
    file = changed(("  output:\n", "  runPolicy: {suspend: true}\n  output:\n"))
    assert finetune("submit", str(file)) == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert f"differs in spec.runPolicy.suspend, which may change: kubectl apply -n {namespace} -f {file}" in error


def test_a_folder_of_this_machine_is_refused_by_line_before_anything_is_sent(finetune, changed, namespace, capsys):
    file = changed(("s3://finetune-demo/models/base", "file:///models/base"))
    assert finetune("submit", str(file)) == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert error.startswith(
        f'error: {file}:{line_of("source: s3")}: spec.model.source ("file:///models/base"): is a folder of one machine'
    )


def test_a_namespace_that_is_not_there_is_named(capsys):
    assert run_command(["submit", str(EXAMPLE), "-n", "nowhere"]) == ExitCode.BAD_SPEC
    assert "there is no namespace nowhere. Create it: kubectl create namespace nowhere" in capsys.readouterr().err


def test_two_different_namespaces_are_a_contradiction(finetune, changed, capsys):
    file = changed((f"  name: {NAME}", f"  name: {NAME}\n  namespace: elsewhere"))
    assert finetune("submit", str(file)) == ExitCode.BAD_SPEC
    assert "metadata.namespace is 'elsewhere' and --namespace says" in capsys.readouterr().err


def test_the_object_can_be_had_as_json(finetune, namespace, capsys):
    finetune("submit", str(EXAMPLE), "-o", "json")
    job = json.loads(capsys.readouterr().out)
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == (NAME, namespace)
    assert "managedFields" not in job["metadata"]


@pytest.fixture
def older_definition(api_server: ApiServer, namespace: str) -> Iterator[None]:
    """A cluster whose definition allows less than this version knows."""
    now = api_server.request("GET", CRD_PATH)["spec"]
    older = json.loads(json.dumps(now))
    spec = older["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    spec["data"]["properties"]["maxLength"]["maximum"] = 100
    spec["method"]["properties"]["lora"]["properties"]["rank"]["maximum"] = 4
    spec["model"]["properties"]["source"]["enum"] = ["hf://only/this"]
    define(api_server, older)
    yield
    define(api_server, now)
    job = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")) | {"metadata": {"name": "another"}}
    await_until(lambda: takes(api_server, "POST", jobs_of(namespace), job), "today's definition rules")


def test_what_only_the_cluster_refuses_is_told_by_field_and_line(finetune, older_definition, capsys):
    def is_refused() -> bool:
        capsys.readouterr()
        return finetune("submit", str(EXAMPLE)) == ExitCode.BAD_SPEC

    await_true(is_refused, between=lambda: finetune("cancel", NAME))  # the changed schema is served a moment later
    correct = "Correct it; docs/spec.md describes every field."
    assert capsys.readouterr().err.splitlines()[-3:] == [
        f'error: {EXAMPLE}:{line_of("source: s3")}: spec.model.source ("s3://finetune-demo/models/base"): is none of '
        f'the choices "hf://only/this". {correct}',
        f"error: {EXAMPLE}:{line_of('maxLength')}: spec.data.maxLength (256): should be less than or equal to 100. "
        f"{correct}",
        f"error: {EXAMPLE}:{line_of('rank: 8')}: spec.method.lora.rank (8): should be less than or equal to 4. "
        f"{correct}",
    ]


@pytest.fixture
def policy(api_server: ApiServer, namespace: str) -> Iterator[None]:
    """An administrator's rule for one namespace."""
    root = "/apis/admissionregistration.k8s.io/v1"
    rule = {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "resourceRules": [
                {
                    "apiGroups": ["finetune.dev"],
                    "apiVersions": ["*"],
                    "operations": ["CREATE"],
                    "resources": ["finetunejobs"],
                }
            ],
        },
        "validations": [
            {
                "expression": "object.spec.output.uri.startsWith('s3://team/')",
                "message": "spec.output.uri must begin with s3://team/",
            }
        ],
    }
    binding = {"policyName": namespace, "validationActions": ["Deny"]}
    for plural, spec in (("validatingadmissionpolicies", rule), ("validatingadmissionpolicybindings", binding)):
        api_server.request("POST", f"{root}/{plural}", {"metadata": {"name": namespace}, "spec": spec})
    yield
    for plural in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
        api_server.request("DELETE", f"{root}/{plural}/{namespace}")


def test_an_administrators_rule_is_told_by_field_and_line(finetune, policy, capsys):
    def is_refused() -> bool:
        capsys.readouterr()
        return finetune("submit", str(EXAMPLE)) == ExitCode.BAD_SPEC

    await_true(is_refused, between=lambda: finetune("cancel", NAME))  # policies are obeyed a moment later
    assert capsys.readouterr().err.startswith(
        f'error: {EXAMPLE}:{line_of("uri: s3")}: spec.output.uri ("s3://finetune-demo/output"): must begin with s3://team/.'
    )


def await_true(is_so: Callable[[], bool], between: Callable[[], object] = lambda: None, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        between()
        time.sleep(0.1)


# --- status


def test_a_misspelt_name_brings_the_right_one(finetune, capsys):
    finetune("submit", str(EXAMPLE))
    assert finetune("status", "reviews-lore") == ExitCode.BAD_SPEC
    assert f"Did you mean {NAME}?" in capsys.readouterr().err


def test_status_of_a_file_is_that_of_its_job(finetune, capsys):
    finetune("submit", str(EXAMPLE))
    capsys.readouterr()
    assert finetune("status", str(EXAMPLE)) == ExitCode.OK
    assert capsys.readouterr().out.startswith(f"Job     {NAME} in namespace ")


def test_without_a_name_all_jobs_are_listed(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    set_status(api_server, namespace, phase="Training", summary={"progress": "42 %"})
    capsys.readouterr()
    assert finetune("status") == ExitCode.OK
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "PHASE", "METHOD", "PROGRESS", "METRIC", "DELTA", "PUBLISHED", "AGE"]
    assert line.split()[:5] == [NAME, "Training", "lora", "42", "%"]


def test_kubectl_and_the_table_tell_alike_why_a_model_is_kept_back(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    why = "not published: sentiment accuracy fell from 0.910 to 0.720"
    kept_back = condition("Published", "False", "WorseThanBase", why)
    set_status(api_server, namespace, phase="Succeeded", conditions=[kept_back], summary={"message": why})
    capsys.readouterr()
    finetune("status")
    kubectl = [BIN / "kubectl", f"--kubeconfig={api_server.kubeconfig}", f"--namespace={namespace}", "get", "ftj"]
    narrow, wide = (
        subprocess.run([*kubectl, *options], capture_output=True, text=True, timeout=60, check=True).stdout
        for options in ([], ["--output=wide"])
    )
    header, line = narrow.splitlines()
    table = capsys.readouterr().out.splitlines()
    assert (table[0].split(), table[1].split()[:-1]) == (header.split(), line.split()[:-1]), "the age may differ"
    assert line.split()[-2] == "WorseThanBase"
    assert why in wide


def test_watching_ends_well_with_the_numbers(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    with playing(lambda: succeed(api_server, namespace)):
        assert finetune("status", NAME, "-w") == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "train      42 %  step 25/60, loss 0.412, 1:15 left" in lines
    assert "sentiment  accuracy  0.500  0.950  +0.450  +0.300 to +0.600" in text
    assert f"FineTuneJob {NAME} in namespace {namespace} has succeeded: published" in lines


def test_watching_survives_a_restart_of_the_api_server(finetune, namespace, api_server):
    finetune("submit", str(EXAMPLE))
    with watching(api_server, namespace) as watcher:
        api_server.stop_server()
        api_server.start_server()
        api_server.await_path(path_of(namespace))
        succeed(api_server, namespace)
        out, error = watcher.communicate(timeout=200)
    assert (watcher.returncode, error) == (ExitCode.OK, "")
    assert "has succeeded" in out


def test_a_failed_job_fails_its_watcher_in_the_same_way(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    failed = condition("Failed", "True", "BadData", "reviews.jsonl:3: no column text.")
    with playing(lambda: set_status(api_server, namespace, phase="Failed", conditions=[failed])):
        assert finetune("status", NAME, "-w") == ExitCode.BAD_DATA
    assert capsys.readouterr().err == (
        f"error: FineTuneJob {NAME} in namespace {namespace} failed (BadData): reviews.jsonl:3: no column text.\n"
    )


def test_programs_get_an_object_for_every_change(finetune, namespace, api_server):
    finetune("submit", str(EXAMPLE))
    with watching(api_server, namespace, "-o", "json") as watcher:
        succeed(api_server, namespace)
        out, _ = watcher.communicate(timeout=200)
    assert watcher.returncode == ExitCode.OK
    assert [json.loads(line)["status"]["phase"] for line in out.splitlines()] == ["Training", "Succeeded"]


def test_a_job_that_is_deleted_ends_its_watch(finetune, namespace, api_server):
    finetune("submit", str(EXAMPLE))
    with watching(api_server, namespace) as watcher:
        api_server.request("DELETE", path_of(namespace))
        _, error = watcher.communicate(timeout=200)
    assert watcher.returncode == ExitCode.BAD_SPEC
    assert error == f"error: FineTuneJob {NAME} in namespace {namespace} was deleted. What it had published stays.\n"


def test_ctrl_c_leaves_the_job_alone(finetune, namespace, api_server):
    finetune("submit", str(EXAMPLE))
    # Tests that a shell runs in the background have it ignored, and so has what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with watching(api_server, namespace) as watcher:
        watcher.send_signal(signal.SIGINT)
        _, error = watcher.communicate(timeout=200)
    assert (watcher.returncode, error) == (
        ExitCode.PREEMPTED,
        f"The job goes on in the cluster. To watch it again: finetune status {NAME} -n {namespace} -w\n",
    )
    assert get(api_server, namespace)["status"]["phase"] == "Checking"


@contextlib.contextmanager
def watching(api_server: ApiServer, namespace: str, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Watch a job with a process of its own, which has said how it found the job when the block is entered."""
    set_status(api_server, namespace, phase="Checking", conditions=[condition("Accepted", "True", "SpecValid")])
    command = [sys.executable, "-m", "finetune_cli", "status", NAME, "-n", namespace, "-w", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert "SpecValid" in watcher.stdout.readline()
        try:
            yield watcher
        finally:
            watcher.kill()


def test_a_version_that_the_server_forgot_ends_a_watch(api_server, namespace, finetune):
    finetune("submit", str(EXAMPLE))
    api_server.stop_server()
    api_server.start_server()
    api_server.await_path(path_of(namespace))
    ends: list[list[Any]] = []

    def has_ended() -> bool:
        try:
            ends.append(list(connect(Target()).watch(namespace, NAME, "1")))
        except ClusterError as error:
            # What watches are served from is ready later than what lists are.
            if "HTTP 429" in str(error):
                return False
            assert "too old resource version" in str(error)
            ends.append([])
        return True

    await_until(has_ended, "the end of the watch", 30)
    assert ends == [[]]


def test_a_later_operator_may_say_what_this_version_does_not_know(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    known = condition("Accepted", "True", "SpecValid")
    unknown = condition("Blessed", "True", "ByMoon")
    now = api_server.request("GET", CRD_PATH)["spec"]
    later = json.loads(json.dumps(now))
    status = later["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    conditions = status["properties"]["conditions"]["items"]["properties"]
    conditions["type"].pop("enum")
    conditions["reason"].pop("enum")
    said = {"status": {"phase": "Training", "conditions": [unknown, known]}}

    def is_taken() -> bool | None:
        return takes(api_server, "PATCH", f"{path_of(namespace)}/status", said, MERGE)

    define(api_server, later)
    try:
        await_until(is_taken, "the later definition rules")
        set_status(api_server, namespace, **said["status"])
        capsys.readouterr()
        assert finetune("status", NAME) == ExitCode.OK
    finally:
        set_status(api_server, namespace, conditions=[known])
        define(api_server, now)
    await_until(lambda: is_taken() is False, "today's definition rules")
    out = capsys.readouterr().out
    assert "Accepted  True  SpecValid" in out
    assert "Blessed" not in out


# --- cancel and resume


def test_cancel_deletes_after_saying_what_stays(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    succeed(api_server, namespace)
    capsys.readouterr()
    assert finetune("cancel", NAME) == ExitCode.OK
    assert capsys.readouterr().out.splitlines() == [
        "Published, and stays: adapter s3://finetune-demo/output/team/reviews-lora-1a2b3c4d/model",
        f"FineTuneJob {NAME} in namespace {namespace} is deleted.",
    ]
    assert finetune("status", NAME) == ExitCode.BAD_SPEC


def test_keep_suspends_and_resume_goes_on(finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    assert finetune("cancel", NAME, "--keep") == ExitCode.OK
    assert get(api_server, namespace)["spec"]["runPolicy"]["suspend"] is True
    assert f"finetune resume {NAME} -n {namespace}" in capsys.readouterr().out
    assert finetune("resume", NAME) == ExitCode.OK
    assert get(api_server, namespace)["spec"]["runPolicy"]["suspend"] is False


@pytest.mark.parametrize("command", [["cancel", NAME, "--keep"], ["resume", NAME]], ids=" ".join)
def test_a_job_that_has_ended_is_neither_stopped_nor_gone_on_with(command, finetune, namespace, api_server, capsys):
    finetune("submit", str(EXAMPLE))
    set_status(api_server, namespace, phase="Succeeded")
    assert finetune(*command) == ExitCode.BAD_SPEC
    assert "has ended (Succeeded)" in capsys.readouterr().err


# --- rights and roads


def test_a_user_without_rights_is_told_which_are_missing(api_server, namespace, finetune, monkeypatch, capsys):
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    api_server.request("POST", accounts, {"metadata": {"name": "guest"}})
    token = api_server.request("POST", f"{accounts}/guest/token", {"spec": {}})["status"]["token"]
    monkeypatch.setenv("KUBECONFIG", str(api_server.write_kubeconfig("guest", token)))
    assert finetune("submit", str(EXAMPLE)) == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert f"user 'system:serviceaccount:{namespace}:guest' may not create finetunejobs" in error
    assert f"kubectl auth can-i create finetunejobs.finetune.dev -n {namespace}" in error
    assert finetune("logs", NAME) == ExitCode.BAD_SPEC
    assert "may not get finetunejobs" in capsys.readouterr().err


def test_a_cluster_that_is_away_is_named_and_worth_another_try(api_server, finetune, capsys):
    api_server.stop_server()
    try:
        assert finetune("status", NAME) == ExitCode.STORAGE
    finally:
        api_server.start_server()
    error = capsys.readouterr().err
    assert f"the cluster of test does not answer at {api_server.url}: " in error
    assert "Connection refused" in error


def test_a_cluster_without_the_definition_is_told_how_to_get_it(api_server, tmp_path, capsys):
    from ...cluster.folder import BIN

    bare = ApiServer(BIN, tmp_path / "bare")
    try:
        bare.start()
        assert run_command(["status", NAME, "--kubeconfig", str(bare.kubeconfig)]) == ExitCode.BAD_SPEC
    finally:
        bare.stop()
    assert "Install the operator: helm install finetune-operator" in capsys.readouterr().err


# --- the operator's part


class playing:  # noqa: N801 - reads as a word
    """Do something in a thread while the block runs; its errors are the test's."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(act,))

    def _run(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            self._error = error
            os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        if self._error is not None:
            raise self._error


def succeed(api_server: ApiServer, namespace: str) -> None:
    """Take a job from acceptance to its end."""
    conditions = [condition("Accepted", "True", "SpecValid")]
    set_status(api_server, namespace, phase="Checking", conditions=conditions)
    stages = [ended_stage("check")]
    progress = {
        "stage": "train",
        "message": "training",
        "percent": 42,
        "step": 25,
        "totalSteps": 60,
        "etaSeconds": 75,
        "lastUpdateTime": "2026-01-02T03:04:05Z",
    }
    set_status(
        api_server,
        namespace,
        phase="Training",
        stages=stages,
        progress=progress,
        latestMetrics=[{"name": "loss", "value": "0.412"}],
    )
    result = {
        "name": "sentiment",
        "metric": "accuracy",
        "base": "0.5",
        "tuned": "0.95",
        "delta": "0.45",
        "low": "0.3",
        "high": "0.6",
    }
    set_status(
        api_server,
        namespace,
        phase="Succeeded",
        stages=[*stages, ended_stage("train"), ended_stage("evaluate", published=True)],
        conditions=[
            *conditions,
            condition("Published", "True", "Published"),
            condition("Complete", "True", "Published", "published"),
        ],
        evaluation={"tasks": [result]},
        artifacts=[
            {
                "kind": "adapter",
                "uri": "s3://finetune-demo/output/team/reviews-lora-1a2b3c4d/model",
                "sha256": "0" * 64,
                "bytes": 1234567,
            }
        ],
    )
