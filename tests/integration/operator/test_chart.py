"""The chart against a real API server: it takes every object, and refuses what the operator would refuse."""

import json
import subprocess
import time
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_operator.policy import violations
from finetune_operator.settings import LOCKABLE, PolicySettings

from ...cluster.binary import PROMETHEUS, source_folder
from ...cluster.folder import BIN
from ...unit.attacks import FOREIGN, REDIRECTING
from ...unit.builders import make_manifest
from ...unit.chart import CHART, EVERYTHING, HelmError, Manifest, helm, only, render
from .api_server import ApiServer

CRD = "finetunejobs.finetune.dev"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def kubectl(api_server: ApiServer, *arguments: str, given: object = None) -> subprocess.CompletedProcess[str]:
    command = [BIN / "kubectl", f"--kubeconfig={api_server.kubeconfig}", *arguments]
    return subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def system(api_server: ApiServer) -> str:
    """The namespaces that the values name; returns the operator's."""
    for name in ("finetune-system", "team-a", "team-b"):
        api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return "finetune-system"


@pytest.fixture(scope="module")
def prometheus_definitions(api_server: ApiServer) -> Iterator[None]:
    """The Prometheus operator's own definitions of what the chart can make for it."""
    folder = source_folder(PROMETHEUS) / "example" / "prometheus-operator-crd"
    names = ("servicemonitors", "prometheusrules")
    for name in names:
        definition = yaml.safe_load((folder / f"monitoring.coreos.com_{name}.yaml").read_text(encoding="utf-8"))
        api_server.request("POST", DEFINITIONS, definition)
        api_server.await_path(f"/apis/monitoring.coreos.com/v1/{name}")
    yield
    for name in names:
        api_server.request("DELETE", f"{DEFINITIONS}/{name}.monitoring.coreos.com")


@pytest.mark.parametrize("files", [(), (EVERYTHING,)], ids=["default values", "every value"])
def test_api_server_takes_every_object(
    api_server: ApiServer, system: str, prometheus_definitions: None, files: tuple[Path, ...]
) -> None:
    manifests = render(files=files)
    kinds = {one["kind"] for one in manifests}
    assert {"ServiceMonitor", "PrometheusRule"} <= kinds or not files
    options = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename=-")
    done = kubectl(api_server, "apply", *options, given={"apiVersion": "v1", "kind": "List", "items": manifests})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("serverside-applied") == len(manifests)


def test_foreign_definition_is_adopted_as_the_message_says(api_server: ApiServer, system: str) -> None:
    place = (f"--namespace={system}", f"--kubeconfig={api_server.kubeconfig}")
    with pytest.raises(HelmError, match="was not installed by release finetune-system/adopting") as refusal:
        helm("install", "adopting", CHART, *place)
    commands = [line.split() for line in str(refusal.value).splitlines() if line.strip().startswith("kubectl ")]
    assert len(commands) == 2
    for command in commands:
        done = kubectl(api_server, *command[1:])
        assert done.returncode == 0, done.stderr
    helm("install", "adopting", CHART, *place)
    helm("uninstall", "adopting", *place)
    assert CRD in kubectl(api_server, "get", "crd", "--output=name").stdout, "uninstalling keeps the definition"


# --- what the administrator locks

LOCKS: Manifest = {
    "imageRegistries": ["registry.example/team/", "registry.example/trainer:"],
    "storagePrefixes": ["s3://models/", "pvc://claim/shared/", "hf://acme/"],
    "storageEndpoints": ["https://minio.example/"],
    "serviceAccounts": ["trainer", "store-writer"],
    "lockedPodFields": [name for name in LOCKABLE if name not in ("serviceAccountName", "env")],
}
OBEYING: dict[str, Any] = {"spec.data.tasks[0].source": "s3://models/rows.jsonl", "spec.output.uri": "s3://models/out"}
TOO_MUCH: dict[str, Any] = {
    "spec.compute": {"image": "other.example/a:1", "pod": {"serviceAccountName": "admin"}},
    "spec.model.source": "pvc://other/model",
    "spec.output.uri": "s3://other/out",
}

JOBS: dict[str, dict[str, Any]] = {
    "a job that obeys": {},
    "what is allowed": {
        "spec.compute": {"image": "registry.example/team/a:1", "pod": {"serviceAccountName": "trainer"}}
    },
    "an allowed image in another version": {"spec.compute.image": "registry.example/trainer:2"},
    "a foreign registry": {"spec.compute.image": "other.example/team/a:1"},
    "a registry that is named alike": {"spec.compute.image": "registry.example/team-of-others/a:1"},
    "a foreign service account": {"spec.compute.pod.serviceAccountName": "admin"},
    "a foreign output": {"spec.output.uri": "s3://other/out"},
    "a bucket that is named alike": {"spec.output.uri": "s3://models-of-others/out"},
    "a bucket without a folder": {"spec.output.uri": "s3://models"},
    "a way out of a claim": {"spec.output.uri": "pvc://claim/shared/../private"},
    "a way out in other letters": {"spec.output.uri": "pvc://claim/shared/%2E%2e/private"},
    "dots that lead nowhere": {"spec.output.uri": "pvc://claim/shared/..a/b..c/..."},
    "a foreign model": {"spec.model.source": "s3://other/model"},
    "a foreign start": {"spec.model.startFrom.source": "s3://other/adapter"},
    "a start from a job": {"spec.model.startFrom.job": "earlier"},
    "foreign rows": {"spec.data.tasks[0].source": "configMap://rows/rows.jsonl"},
    "foreign rows for validation": {"spec.data.tasks[0].validationSource": "s3://other/v.jsonl"},
    "foreign rows for the test": {"spec.data.tasks[0].testSource": "s3://other/t.jsonl"},
    "foreign rows to rehearse": {"spec.data.replay": {"source": "s3://other/r.jsonl", "fraction": 0.1}},
    "foreign rows against forgetting": {"spec.evaluation.forgetting.sources": ["hf://acme/b", "s3://other/f.jsonl"]},
    "a suite that the hub has": {"spec.evaluation.benchmarks": [{"suite": "mmlu"}]},
    "an allowed suite": {"spec.evaluation.benchmarks": [{"suite": "s3://models/task.yaml"}]},
    "an allowed store": {"spec.output.endpoint": "https://minio.example"},
    "a foreign store": {"spec.output.endpoint": "https://minio.example.other/"},
    "a foreign tracker": {"spec.training.reportTo.mlflow.trackingUri": "https://mlflow.example/"},
    "a tracker that is allowed": {"spec.training.reportTo.mlflow.trackingUri": "https://minio.example/mlflow"},
    "the public tracker by default": {"spec.training.reportTo.wandb.project": "reviews"},
    "another tracker that is allowed": {
        "spec.training.reportTo.wandb": {"project": "reviews", "baseUrl": "https://minio.example/wandb"}
    },
    "variables that lead to a foreign store": {
        "spec.compute.pod.env": [{"name": name, "value": "https://other.example"} for name in REDIRECTING]
    },
    "allowed variables": {
        "spec.compute.pod.env": [{"name": name, "value": "x"} for name in ("NCCL_DEBUG", "NO_PROXY", "MY_HF_ENDPOINT")]
    },
    "a taint, a node and a grace period": {
        "spec.compute.pod": {
            "tolerations": [{"operator": "Exists"}],
            "nodeSelector": {"pool": "others"},
            "terminationGracePeriodSeconds": 86400,
        }
    },
    "nothing in place of what a profile sets": {"spec.compute.pod": {"affinity": {}, "labels": {}, "volumes": []}},
    "a priority above others'": {"spec.compute.priorityClassName": "system-node-critical"},
    "everything at once": TOO_MUCH,
    "everything that can be locked": FOREIGN,
}


@pytest.fixture(scope="module")
def locked(api_server: ApiServer) -> Iterator[str]:
    """A namespace that is looked after by an operator with LOCKS, and has a job from before, called earlier."""
    namespace = f"locked-{uuid.uuid4().hex[:8]}"
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    earlier = make_manifest({**OBEYING, **TOO_MUCH, "metadata.name": "earlier"})
    api_server.request("POST", f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs", earlier)
    manifests = render({"settings": {"watchNamespaces": [namespace], "policy": LOCKS}})
    policies = [only(manifests, f"ValidatingAdmissionPolicy{suffix}") for suffix in ("", "Binding")]
    path = "/apis/admissionregistration.k8s.io/v1/validatingadmission"
    for kind, policy in zip(("policies", "policybindings"), policies, strict=True):
        api_server.request("POST", path + kind, policy)
    deadline = time.monotonic() + 30
    while not refusal(api_server, TOO_MUCH, namespace):
        assert time.monotonic() < deadline, "the policy is not enforced"
        time.sleep(0.1)
    yield namespace
    for kind, policy in zip(("policies", "policybindings"), policies, strict=True):
        api_server.request("DELETE", f"{path}{kind}/{policy['metadata']['name']}")


def refusal(api_server: ApiServer, overrides: dict[str, Any], namespace: str) -> str:
    """Return why the API server does not take a job; empty when it does."""
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs?dryRun=All&fieldValidation=Strict"
    try:
        api_server.request("POST", path, make_manifest({**OBEYING, **overrides}))
    except urllib.error.HTTPError as error:
        return str(json.load(error)["message"])
    return ""


def judgement(overrides: dict[str, Any]) -> list[tuple[str, object]]:
    """Return what the operator refuses: fields and values."""
    job = FineTuneJob.model_validate(make_manifest({**OBEYING, **overrides}))
    found = violations(job.spec, PolicySettings.model_validate(LOCKS))
    return [(next(str(part) for part in reversed(path) if isinstance(part, str)), value) for path, value, _, _ in found]


@pytest.mark.parametrize("case", JOBS)
def test_api_server_and_operator_judge_alike(api_server: ApiServer, locked: str, case: str) -> None:
    expected = judgement(JOBS[case])
    message = refusal(api_server, JOBS[case], locked)
    assert message.count(" is not allowed here") == len(expected), message
    for field, value in expected:
        subject = "setting it" if field in LOCKS["lockedPodFields"] else value
        assert f"{field}: {subject} is not allowed here" in message


def test_judgements_differ() -> None:
    judged = [bool(judgement(overrides)) for overrides in JOBS.values()]
    assert judged.count(True) >= 12
    assert judged.count(False) >= 4


def test_other_namespaces_are_not_locked(api_server: ApiServer, locked: str, namespace: str) -> None:
    assert refusal(api_server, TOO_MUCH, namespace) == ""


def test_job_from_before_can_still_be_suspended(api_server: ApiServer, locked: str) -> None:
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{locked}/finetunejobs/earlier"
    change = {"spec": {"runPolicy": {"suspend": True}}, "metadata": {"labels": {"note": "old"}}}
    changed = api_server.request("PATCH", path, change, "application/merge-patch+json")
    assert changed["spec"]["runPolicy"] == {"suspend": True}
