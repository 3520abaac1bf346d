"""The chart in a real cluster: installed, upgraded and removed as the document says, with the rights that it needs."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..cluster.cluster import Cluster, await_condition
from ..cluster.command import CommandError
from ..cluster.folder import ROOT
from ..unit.attacks import FOREIGN, FOREIGN_WORDS, LOCKS
from ..unit.builders import make_manifest
from .release import CHART, DEFINITION, NAME, NAMESPACE, OperatorRelease

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{NAME}"
POLICY = f"{NAME}-{NAMESPACE}"
SECONDS_TO_ACT = 60
GONE_SECONDS = 180


def job(name: str = "reviews", **overrides: Any) -> dict[str, Any]:
    """Return a job whose check stage waits for a claim that is not there."""
    places = {"spec.data.tasks[0].source": "pvc://rows/reviews.jsonl", "spec.output.uri": "pvc://models/out"}
    return make_manifest({"spec.model.source": "pvc://models/base", **places, "metadata.name": name, **overrides})


def has_child(cluster: Cluster, namespace: str, name: str = "reviews") -> bool:
    labels = f"finetune.dev/job={name},app.kubernetes.io/managed-by={NAME}"
    return bool(cluster.list("jobs", namespace, labels))


def assert_acts(cluster: Cluster, namespace: str, name: str = "reviews") -> None:
    """Fail unless a job of ``namespace`` is taken on."""
    cluster.apply(job(name), namespace)
    await_condition(lambda: has_child(cluster, namespace, name), f"a child of {namespace}/{name}", SECONDS_TO_ACT)


def may(cluster: Cluster, user: str, verb: str, resource: str, namespace: str, name: str = "") -> bool:
    """Return whether ``user`` may do that to ``group/resource/subresource`` (``/pods/log``)."""
    group, resource, *subresource = resource.split("/")
    attributes = {"group": group, "resource": resource, "subresource": "".join(subresource), "verb": verb}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": {**attributes, "namespace": namespace, "name": name}},
    }
    answer = cluster.kubectl("create", "--filename=-", "--output=json", input=json.dumps(review))
    return bool(json.loads(answer)["status"]["allowed"])


# --- rights


def test_operator_takes_jobs_on_in_any_namespace(cluster: Cluster, operator: OperatorRelease, namespace: str) -> None:
    assert_acts(cluster, namespace)


def test_pods_of_stages_are_restricted(cluster: Cluster, operator: OperatorRelease, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    assert_acts(cluster, namespace)
    await_condition(lambda: bool(cluster.list("pods", namespace)), "a pod that the API server lets in", 60)


def test_figures_are_served_where_prometheus_looks(cluster: Cluster, operator: OperatorRelease) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/services/{NAME}:http/proxy/metrics"
    await_condition(lambda: "finetune_leader 1.0" in cluster.kubectl("get", "--raw", path), "the lease", SECONDS_TO_ACT)


FORBIDDEN = (
    "get /secrets",
    "list /secrets",
    "list /configmaps",
    "create /pods",
    "create /pods/exec",
    "get /pods/log",
    "create /serviceaccounts/token",
    "create finetune.dev/finetunejobs",
    "update finetune.dev/finetunejobs",
    "delete finetune.dev/finetunejobs",
    "patch batch/jobs",
    "get coordination.k8s.io/leases",
    "create rbac.authorization.k8s.io/rolebindings",
)
JOBS = "finetune.dev/finetunejobs"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_operator_may_not(cluster: Cluster, operator: OperatorRelease, namespace: str, what: str) -> None:
    assert may(cluster, ACCOUNT, "create", "batch/jobs", namespace), "the question is wrong, not the answer"
    assert not may(cluster, ACCOUNT, *what.split(), namespace)


def test_operator_may_read_one_secret_of_its_namespace(cluster: Cluster, operator: OperatorRelease) -> None:
    assert may(cluster, ACCOUNT, "get", "/secrets", NAMESPACE, f"{NAME}-tls")
    assert not may(cluster, ACCOUNT, "get", "/secrets", NAMESPACE, "other")
    assert not may(cluster, ACCOUNT, "list", "/secrets", NAMESPACE)


def test_roles_of_people_include_jobs(cluster: Cluster, operator: OperatorRelease, namespace: str) -> None:
    for role, user in (("edit", "anna"), ("view", "otto")):
        cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", namespace)
    # A controller adds the rules to the roles.
    await_condition(lambda: may(cluster, "otto", "list", JOBS, namespace), "rights of the role view", 60)
    await_condition(lambda: may(cluster, "anna", "create", JOBS, namespace), "rights of the role edit", 60)
    assert may(cluster, "anna", "delete", JOBS, namespace)
    assert may(cluster, "anna", "watch", JOBS, namespace)
    assert not may(cluster, "anna", "patch", f"{JOBS}/status", namespace), "the status is the operator's"
    assert not may(cluster, "otto", "create", JOBS, namespace)
    assert not may(cluster, "anna", "list", JOBS, "default")


# --- values


@pytest.fixture(scope="module")
def changed(operator: OperatorRelease) -> Iterator[OperatorRelease]:
    """A release that tests may change or remove; what others expect is there again after the last of them."""
    yield operator
    operator.install()


@pytest.mark.alone
def test_operator_with_a_list_looks_after_these_namespaces_alone(
    cluster: Cluster, changed: OperatorRelease, namespace: str
) -> None:
    changed.install(f"--set=settings.watchNamespaces={{{namespace}}}")
    cluster.kubectl("create", "namespace", f"{namespace}-other")
    try:
        cluster.apply(job("left-alone"), f"{namespace}-other")
        assert_acts(cluster, namespace)
        assert not has_child(cluster, f"{namespace}-other", "left-alone")
        assert not may(cluster, ACCOUNT, "create", "batch/jobs", f"{namespace}-other")
    finally:
        cluster.kubectl("delete", "namespace", f"{namespace}-other", "--wait=false")


@pytest.mark.alone
def test_locks_are_expressions_of_the_right_type_and_are_enforced(
    cluster: Cluster, changed: OperatorRelease, namespace: str, tmp_path: Path
) -> None:
    values = {"settings": {"policy": LOCKS}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    changed.install(f"--values={tmp_path / 'values.yaml'}")

    def checked() -> bool:
        policy = cluster.get("validatingadmissionpolicy", POLICY)
        return bool(policy.get("status", {}).get("observedGeneration") == policy["metadata"]["generation"])

    # The API server compiles the expressions; a controller compares them with the definition's types.
    await_condition(checked, "the check of the policy's types", 120)
    assert cluster.get("validatingadmissionpolicy", POLICY)["status"]["typeChecking"] == {}
    assert_acts(cluster, namespace)
    with pytest.raises(CommandError) as refusal:
        cluster.kubectl(
            *("create", f"--namespace={namespace}", "--filename=-"), input=yaml.safe_dump(job("foreign", **FOREIGN))
        )
    assert [word for word in FOREIGN_WORDS if word not in str(refusal.value)] == []


# --- install, upgrade, uninstall


@pytest.fixture
def none_installed(cluster: Cluster, changed: OperatorRelease) -> OperatorRelease:
    """A cluster without release and definition, as a stranger has it."""
    changed.uninstall()
    for what in (("crd", DEFINITION), ("namespace", NAMESPACE)):
        cluster.kubectl("delete", *what, f"--timeout={GONE_SECONDS}s", timeout=GONE_SECONDS + 10)
    return changed


def document_commands(release: OperatorRelease) -> list[list[str]]:
    """Return what docs/install.md has people type after images were pushed, with the images that are here."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(block for language, block in blocks if not language).replace("\\\n", "").splitlines()
    commands = [line.split() for line in lines if line.startswith(("helm ", "kubectl "))]
    for command in commands:
        if command[:2] in (["helm", "install"], ["helm", "upgrade"]):
            command.extend(release.image_values)
    return commands


@pytest.mark.alone
def test_document_s_commands_install_upgrade_and_uninstall(
    cluster: Cluster, none_installed: OperatorRelease, namespace: str
) -> None:
    commands = document_commands(none_installed)
    told = [" ".join(command[:2]) for command in commands]
    assert [told.count(f"helm {step}") for step in ("install", "upgrade", "uninstall")] == [1, 1, 1]
    for command in commands:
        run = cluster.helm if command[0] == "helm" else cluster.kubectl
        output = run(*[str(CHART) if part == "charts/finetune-operator" else part for part in command[1:]])
        match command[1]:
            case "install":
                assert "rollout status deployment/finetune-operator" in output, "what to do next"
            case "upgrade":
                none_installed.wait_ready()
                assert_acts(cluster, namespace)
            case "uninstall":
                assert cluster.list("deployments", NAMESPACE) == []
                assert cluster.list("finetunejobs", namespace), "a job went with the operator"
    cluster.kubectl("delete", "namespace", "team-a", "--wait=false")


@pytest.mark.alone
def test_upgrade_brings_the_new_definition_and_keeps_the_certificate(
    cluster: Cluster, none_installed: OperatorRelease, namespace: str, tmp_path: Path
) -> None:
    older = tmp_path / "finetune-operator"
    shutil.copytree(CHART, older)
    file = older / "files" / "finetune.dev_finetunejobs.yaml"
    definition = yaml.safe_load(file.read_text(encoding="utf-8"))
    column = definition["spec"]["versions"][0]["additionalPrinterColumns"].pop()
    file.write_text(yaml.safe_dump(definition), encoding="utf-8")
    none_installed.install(chart=older)
    await_condition(lambda: bool(certificate(cluster)), "a certificate", SECONDS_TO_ACT)
    before, pods = certificate(cluster), none_installed.pods()
    assert_acts(cluster, namespace, "before")

    none_installed.install("--set=settings.workers=4")
    columns = cluster.get("crd", DEFINITION)["spec"]["versions"][0]["additionalPrinterColumns"]
    assert column in columns
    assert certificate(cluster) == before
    assert none_installed.pods() != pods, "changed settings need a new pod"
    assert_acts(cluster, namespace, "after")
    assert has_child(cluster, namespace, "before")


def certificate(cluster: Cluster) -> dict[str, str]:
    return dict(cluster.get("secret", f"{NAME}-tls", NAMESPACE).get("data", {}))


@pytest.mark.alone
def test_reinstalled_operator_goes_on_with_the_jobs_that_are_there(
    cluster: Cluster, changed: OperatorRelease, namespace: str
) -> None:
    assert_acts(cluster, namespace, "earlier")
    uid = cluster.get("finetunejob", "earlier", namespace)["metadata"]["uid"]
    changed.uninstall()
    cluster.apply(job("meanwhile"), namespace)
    # Nobody may have to be there to delete a job.
    cluster.apply(job("unwanted"), namespace)
    cluster.kubectl("delete", "finetunejob", "unwanted", f"--namespace={namespace}", "--timeout=20s")
    changed.install()
    started = time.monotonic()
    await_condition(lambda: has_child(cluster, namespace, "meanwhile"), "a child of the new job", SECONDS_TO_ACT)
    assert time.monotonic() - started < SECONDS_TO_ACT
    assert cluster.get("finetunejob", "earlier", namespace)["metadata"]["uid"] == uid
    assert len(cluster.list("jobs", namespace, "finetune.dev/job=earlier")) == 1
