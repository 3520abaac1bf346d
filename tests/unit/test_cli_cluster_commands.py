"""The cluster commands around the cluster: which job and server are meant, what refusals mean, what is rendered."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import InvalidJobError
from finetune_api.manifest_text import read_manifest
from finetune_api.report import ExitCode
from finetune_cli.__main__ import _parser, run_command
from finetune_cli.cancel import cancel
from finetune_cli.cluster_job import JobName, find_name
from finetune_cli.connection import connect
from finetune_cli.job_api import Target
from finetune_cli.refusal import (
    AlreadyExistsError,
    ClusterError,
    ForbiddenError,
    InvalidObjectError,
    NotFoundError,
    Request,
    explain_refusal,
    field_errors,
)
from finetune_cli.render import UNKNOWN_UID, default_settings
from finetune_operator.settings import Settings
from finetune_trainer.errors import SpecError

from .builders import make_manifest
from .cluster_api import NAME, NAMESPACE, FakeJobApi, make_object

ROOT = Path(__file__).resolve().parents[2]
IN_A_CLUSTER = {"spec.data.tasks[0].source": "pvc://rows/reviews.jsonl", "spec.output.uri": "pvc://models/tuned"}


def write_manifest(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(make_manifest(IN_A_CLUSTER | (changes or {}))))
    return file


# --- which job


NAMES = {
    "a name": ("reviews", None, JobName("current", "reviews")),
    "a name in a namespace": ("reviews", "team", JobName("team", "reviews")),
    "a file": ("job.yaml", None, JobName("current", "reviews")),
    "a file with a namespace on the command line": ("job.yaml", "team", JobName("team", "reviews")),
}


@pytest.mark.parametrize("given, namespace, expected", NAMES.values(), ids=NAMES.keys())
def test_a_job_is_named_by_its_name_or_its_file(given, namespace, expected, tmp_path):
    write_manifest(tmp_path)
    found = find_name(str(tmp_path / given) if "." in given else given, namespace, "current")
    assert found == expected


def test_the_namespace_of_a_manifest_counts_before_that_of_the_context(tmp_path):
    file = write_manifest(tmp_path, {"metadata.namespace": "own"})
    assert find_name(str(file), None, "current") == JobName("own", "reviews")
    with pytest.raises(SpecError, match=r"metadata\.namespace is 'own' and --namespace says 'team'"):
        find_name(str(file), "team", "current")


@pytest.mark.parametrize("given", ["", "a" * 41])
def test_what_can_be_no_name_is_refused(given):
    with pytest.raises(SpecError, match="is no name of a job"):
        find_name(given, None, "current")


def test_a_file_that_is_not_there_is_told_as_such():
    with pytest.raises(SpecError, match=r"cannot read nowhere\.yaml"):
        find_name("nowhere.yaml", None, "current")


# --- which cluster


def write_kubeconfig(file: Path, context: str, namespace: str | None = None, current: bool = True) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": context, "cluster": {"server": f"http://{context}.example:1"}}],
        "users": [{"name": context, "user": {"token": "x"}}],
        "contexts": [
            {
                "name": context,
                "context": {"cluster": context, "user": context} | ({"namespace": namespace} if namespace else {}),
            }
        ],
    } | ({"current-context": context} if current else {})
    file.write_text(yaml.safe_dump(content))
    return file


def test_the_current_context_says_the_namespace(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "one", "one", "team")))
    assert connect(Target()).default_namespace == "team"
    assert connect(Target(namespace="other")).default_namespace == "other"


def test_several_kubeconfigs_are_one(tmp_path, monkeypatch):
    one, two = write_kubeconfig(tmp_path / "one", "one"), write_kubeconfig(tmp_path / "two", "two", "b", current=False)
    monkeypatch.setenv("KUBECONFIG", f"{one}:{two}:{tmp_path / 'absent'}")
    assert connect(Target()).default_namespace == "default"
    assert connect(Target(context="two")).default_namespace == "b"


def test_the_option_counts_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "one", "one", "team")))
    file = write_kubeconfig(tmp_path / "two", "two", "b")
    assert connect(Target(kubeconfig=file)).default_namespace == "b"


def test_a_context_that_is_not_there_is_named(tmp_path):
    file = write_kubeconfig(tmp_path / "one", "one")
    with pytest.raises(SpecError, match=r"Expected object with name other in .* `kubectl config get-contexts`"):
        connect(Target(context="other", kubeconfig=file))


@pytest.mark.parametrize("content", ["", "[", "a: b", "contexts: 3"])
def test_a_broken_kubeconfig_is_no_crash(content, tmp_path):
    file = tmp_path / "kubeconfig"
    file.write_text(content)
    with pytest.raises(SpecError, match=f"the kubeconfig {file} is not usable"):
        connect(Target(kubeconfig=file))


def test_without_any_kubeconfig_the_way_to_one_is_told(tmp_path):
    with pytest.raises(SpecError, match=r"there is no kubeconfig at .* Set KUBECONFIG or --kubeconfig"):
        connect(Target(kubeconfig=tmp_path / "absent"))


# --- logging in


def write_login(folder: Path, script: str) -> Path:
    """Write a kubeconfig whose user logs in with a program."""
    program = folder / "login"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    file = write_kubeconfig(folder / "kubeconfig", "eks")
    content = yaml.safe_load(file.read_text())
    login = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program), "interactiveMode": "Never"}
    content["users"][0]["user"] = {"exec": login}
    file.write_text(yaml.safe_dump(content))
    return file


def credential(**status: str) -> str:
    said = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    return f"echo '{json.dumps(said)}'"


EXPIRED = "echo 'SSO session has expired' >&2; exit 255"
AGAIN = r"Log in again .* or install the program"
FAILED_LOGINS = {
    "a session that has expired": (EXPIRED, rf"eks.* failed: .*returned 255\. SSO session has expired\. {AGAIN}"),
    "a program that says something else": ("echo Hello", rf"eks.* failed: .*decode process output.* {AGAIN}"),
    "nothing to log in with": (credential(), rf"eks.* failed: .*missing token.* {AGAIN}"),
}


@pytest.mark.parametrize("script, says", FAILED_LOGINS.values(), ids=FAILED_LOGINS.keys())
def test_a_login_that_fails_is_told_as_such(script, says, tmp_path, capfd):
    with pytest.raises(SpecError, match=says):
        connect(Target(kubeconfig=write_login(tmp_path, script)))
    assert capfd.readouterr().err == ""


def test_a_login_whose_program_is_missing_is_told_as_such(tmp_path):
    file = write_login(tmp_path, "")
    (tmp_path / "login").unlink()
    with pytest.raises(SpecError, match=rf"eks.* failed: .*No such file .*{tmp_path / 'login'}.* {AGAIN}"):
        connect(Target(kubeconfig=file))


def test_on_a_terminal_the_login_says_itself_why_it_fails(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with (
        Path("/dev/null").open() as keyboard,
        pytest.raises(SpecError, match=rf"eks.* failed; what its program said stands above\. {AGAIN}"),
    ):
        monkeypatch.setattr(sys, "stdin", keyboard)
        connect(Target(kubeconfig=write_login(tmp_path, EXPIRED)))
    assert capfd.readouterr().err == "SSO session has expired\n"


LOGINS = {
    "a token": credential(token="x"),
    "a certificate": credential(clientCertificateData="x", clientKeyData="y"),
}


@pytest.mark.parametrize("script", LOGINS.values(), ids=LOGINS.keys())
def test_a_login_with_something_to_show_is_used_and_run_once(script, tmp_path):
    file = write_login(tmp_path, f"echo >> {tmp_path / 'runs'}\n{script}")
    assert connect(Target(kubeconfig=file)).default_namespace == "default"
    assert (tmp_path / "runs").read_text() == "\n"


# --- refusals

REQUEST = Request("create", "finetunejobs", "team", "reviews")


def body(reason: str, message: str, **details: Any) -> str:
    return json.dumps({"kind": "Status", "reason": reason, "message": message, "details": details})


REFUSALS: dict[str, tuple[int, str, type[Exception], str]] = {
    "nobody": (401, body("Unauthorized", "Unauthorized"), SpecError, "does not accept who you are"),
    "no right": (
        403,
        body("Forbidden", 'finetunejobs is forbidden: User "ann" cannot create resource'),
        ForbiddenError,
        "user 'ann' may not create finetunejobs in namespace team",
    ),
    "nobody, where a cluster has a name for that": (
        403,
        body("Forbidden", 'finetunejobs is forbidden: User "system:anonymous" cannot create resource'),
        SpecError,
        "does not accept who you are (HTTP 403). Log in again",
    ),
    "a quota": (
        403,
        body("Forbidden", "exceeded quota: jobs, requested: count/finetunejobs=1"),
        ForbiddenError,
        "a rule of the cluster is against FineTuneJob reviews in namespace team: exceeded quota",
    ),
    "no definition": (404, "404 page not found\n", SpecError, "helm install finetune-operator"),
    "no namespace": (
        404,
        body("NotFound", 'namespaces "team" not found', kind="namespaces"),
        NotFoundError,
        "kubectl create namespace team",
    ),
    "no job": (404, body("NotFound", "not found", kind="finetunejobs"), NotFoundError, "there is no FineTuneJob"),
    "a job of that name": (409, body("AlreadyExists", "exists"), AlreadyExistsError, "exists already"),
    "a race": (409, body("Conflict", "the UID does not match"), ClusterError, "Try again"),
    "an overloaded server": (429, body("TooManyRequests", "slow down"), ClusterError, "HTTP 429: slow down"),
    "a proxy's page": (502, "<html>bad gateway</html>", ClusterError, "HTTP 502: <html>bad gateway"),
    "a wrong object": (422, body("Invalid", "is invalid", causes=[]), InvalidObjectError, "is invalid"),
}


@pytest.mark.parametrize("code, content, kind, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_told_in_the_users_words(code, content, kind, message):
    error = explain_refusal(REQUEST, code, content)
    assert type(error) is kind
    assert message in str(error)


CAUSES: dict[str, tuple[dict[str, str], str]] = {
    "a value out of range": (
        {
            "field": "spec.method.type",
            "message": 'Invalid value: "lora": spec.method.type in body should be at least 5 chars long',
        },
        'spec.method.type ("lora"): should be at least 5 chars long.',
    ),
    "a wrong type": (
        {
            "field": "spec.data",
            "message": 'Invalid value: "object": spec.data in body must be of type string: "object"',
        },
        "spec.data ({tasks}): must be of type string.",
    ),
    "no choice": (
        {"field": "spec.method.type", "message": 'Unsupported value: "lora": supported values: "full", "ia3"'},
        'spec.method.type ("lora"): is none of the choices "full", "ia3".',
    ),
    "a missing field": (
        {"field": "spec.output.endpoint", "message": "Required value"},
        "spec.output.endpoint: is missing.",
    ),
    "a duplicate": (
        {"field": "spec.data.tasks[0]", "message": 'Duplicate value: {"name":"sentiment"}'},
        'spec.data.tasks[0] ({labels, name, source, templates}): stands twice: {"name":"sentiment"}.',
    ),
    "a rule": (
        {"field": "spec.output.uri", "message": 'Invalid value: "object": uri: must be short'},
        'spec.output.uri ("pvc://models/tuned"): uri: must be short.',
    ),
    "an administrator's rule": (
        {
            "message": "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: spec.output.uri must begin with "
            "s3://team/"
        },
        'spec.output.uri ("pvc://models/tuned"): must begin with s3://team/.',
    ),
    "an administrator's rule without a field": (
        {"message": "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: not on Sundays"},
        "the cluster's answer: not on Sundays.",
    ),
}


@pytest.mark.parametrize("cause, expected", CAUSES.values(), ids=CAUSES.keys())
def test_what_the_server_has_against_a_field_is_told_with_its_value_and_line(cause, expected):
    error = explain_refusal(REQUEST, 422, body("Invalid", "is invalid", causes=[cause]))
    assert isinstance(error, InvalidObjectError)
    document = read_manifest(yaml.safe_dump(make_manifest(IN_A_CLUSTER)), "job.yaml")
    [found] = field_errors(error, document)
    assert expected in str(found)
    assert (found.line is not None) == ("spec." in expected)


def test_fields_that_the_cluster_does_not_know_are_all_named():
    message = 'strict decoding error: unknown field "spec.method.type", unknown field "spec.data.newField"'
    error = explain_refusal(REQUEST, 400, body("BadRequest", message))
    assert isinstance(error, InvalidObjectError)
    document = read_manifest(yaml.safe_dump(make_manifest(IN_A_CLUSTER)), "job.yaml")
    shown = str(InvalidJobError("job.yaml", field_errors(error, document)))
    assert "spec.method.type" in shown
    assert "spec.data.newField: is no field in this cluster's definition" in shown


# --- cancel


def test_a_person_who_says_no_keeps_the_job(capsys):
    api, asked = FakeJobApi(make_object({"phase": "Training"})), []

    def no(question: str) -> bool:
        asked.append(question)
        return False

    assert cancel(api, JobName(NAMESPACE, NAME), no) == ExitCode.OK
    assert api.job is not None
    assert asked == ["Delete FineTuneJob reviews in namespace team?"]
    out = capsys.readouterr().out
    assert "Work since the beginning is lost; --keep stops the job so that it can go on later." in out
    assert "Nothing was deleted." in out


# --- render


def test_what_is_rendered_is_what_the_operator_creates_in_its_order(tmp_path, capsys):
    assert run_command(["render", str(write_manifest(tmp_path)), "-n", "team"]) == ExitCode.OK
    text = capsys.readouterr().out
    objects = list(yaml.safe_load_all(text))
    assert [(one["kind"], one["metadata"]["name"].removeprefix("reviews-")) for one in objects] == [
        ("ConfigMap", f"spec-{objects[2]['metadata']['annotations']['finetune.dev/spec-hash'][:8]}"),
        ("ConfigMap", "trust"),
        ("Job", "check-a1"),
        ("Job", "train-a1"),
        ("Job", "evaluate-a1"),
    ]
    assert {one["metadata"]["namespace"] for one in objects} == {"team"}
    assert {one["metadata"]["ownerReferences"][0]["uid"] for one in objects} == {UNKNOWN_UID}
    assert f"# {UNKNOWN_UID} and its beginning in names" in text


def test_the_same_job_is_rendered_in_the_same_bytes_on_any_machine(tmp_path):
    file = write_manifest(tmp_path)
    command = [sys.executable, "-m", "finetune_cli", "render", str(file)]
    texts = {
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": seed, "PATH": ""}).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_a_job_from_a_cluster_is_rendered_with_its_uid(tmp_path, capsys):
    file = write_manifest(tmp_path, {"metadata.uid": "1a2b3c4d-5", "metadata.resourceVersion": "7", "status": {}})
    assert run_command(["render", str(file), "-o", "json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert {one["metadata"]["ownerReferences"][0]["uid"] for one in document["items"]} == {"1a2b3c4d-5"}


@pytest.mark.parametrize(
    ("example", "engine"), [("04-full-deepspeed", "RayJob"), ("05-multi-gpu-lora", "RayJob"), ("06-kubernetes", "Job")]
)
def test_an_example_for_a_cluster_is_rendered_for_its_engine(example: str, engine: str, capsys):
    file = Path(__file__).parents[2] / "examples" / example / "finetunejob.yaml"
    assert run_command(["render", str(file), "-o", "json"]) == ExitCode.OK
    children = [one["kind"] for one in json.loads(capsys.readouterr().out)["items"] if one["kind"] != "ConfigMap"]
    assert children == ["Job", engine, "Job"]


def test_no_check_is_rendered_where_it_is_skipped(tmp_path, capsys):
    run_command(["render", str(write_manifest(tmp_path, {"spec.runPolicy.preflight": "skip"})), "-o", "json"])
    kinds = [one["metadata"]["name"] for one in json.loads(capsys.readouterr().out)["items"]]
    assert kinds[2:] == ["reviews-train-a1", "reviews-evaluate-a1"]


SETTINGS = """\
image: {name: registry.example/trainer:2}
progress: {url: "https://operator.example:10443"}
profiles: {big: {resources: {cpu: "12"}}}
"""


def test_the_operators_own_settings_are_used(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    file = write_manifest(tmp_path, {"spec.compute": {"profile": "big", "gpusPerWorker": 0}})
    assert run_command(["render", str(file), "--settings", str(tmp_path / "settings.yaml")]) == ExitCode.OK
    train = list(yaml.safe_load_all(capsys.readouterr().out))[3]
    [container] = train["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/trainer:2"
    assert container["resources"]["limits"] == {"cpu": "12"}


def test_what_the_operator_would_refuse_is_refused_here(tmp_path, capsys):
    file = write_manifest(tmp_path, {"spec.compute": {"profile": "big"}})
    assert run_command(["render", str(file)]) == ExitCode.BAD_SPEC
    assert "the operator would refuse it (ProfileNotFound)" in capsys.readouterr().err


def test_broken_settings_are_told(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("image: {}\nmood: good\n")
    code = run_command(["render", str(write_manifest(tmp_path)), "--settings", str(tmp_path / "settings.yaml")])
    assert code == ExitCode.BAD_SPEC
    error = capsys.readouterr().err
    assert "mood" in error
    assert "progress" in error


def test_a_folder_of_this_machine_is_not_rendered(tmp_path, capsys):
    file = write_manifest(tmp_path, {"spec.output.uri": "file:///models"})
    assert run_command(["render", str(file)]) == ExitCode.BAD_SPEC
    assert 'spec.output.uri ("file:///models"): is a folder of one machine' in capsys.readouterr().err


# --- terminals


def test_a_terminal_without_unicode_shows_everything(tmp_path):
    file = write_manifest(tmp_path, {"spec.data.tasks[0].labels": ["négatif", "positif"]})
    done = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "render", str(file)],
        capture_output=True,
        check=False,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"n?gatif" in done.stdout


def test_the_rest_of_the_command_line_needs_no_kubernetes_client(tmp_path):
    code = (
        "import sys; from finetune_cli.__main__ import run_command; code = run_command(['render', sys.argv[1]]); "
        "found = sorted(set(sys.modules) & {'kubernetes', 'kopf', 'torch', 'boto3', 'rich', 'aiohttp'}); "
        "assert not found, found; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(write_manifest(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_settings_those_of_the_chart_hold():
    chart = ROOT / "charts" / "finetune-operator"
    version = yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"]
    settings = yaml.safe_load((chart / "values.yaml").read_text())["settings"]
    settings["image"]["name"] = f"finetune-trainer:{version}"
    settings["progress"]["url"] = "https://finetune-operator.finetune-system.svc:10443"
    assert default_settings() == Settings.model_validate(settings, by_alias=True, by_name=False)


# --- documents


def test_every_command_in_the_documents_is_one():
    documents = [ROOT / "README.md", ROOT / "docs" / "cluster.md", ROOT / "docs" / "install.md"]
    lines = [line for document in documents for line in document.read_text(encoding="utf-8").splitlines()]
    shown = [line.partition("#")[0].split()[1:] for line in lines if line.startswith("finetune ")]
    assert len(shown) >= 9
    for arguments in shown:
        _parser().parse_args(itertools.takewhile(lambda argument: argument not in (">", "|"), arguments))
