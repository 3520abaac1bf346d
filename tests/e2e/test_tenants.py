"""What a user cannot reach through a FineTuneJob: other namespaces, the node, root, what the administrator locked.

Inputs: a cluster with the chart installed, and anna, who has the role `edit` in one namespace and nothing elsewhere.
Creating a FineTuneJob equals creating pods in that namespace; nothing here is about what such a person may do there.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finetune_api.status import ConditionStatus, ConditionType, Reason

from ..cluster.cluster import Cluster, await_condition
from ..cluster.command import CommandError
from ..unit.attacks import ATTACKS, FOREIGN, LOCKS, Attack
from ..unit.builders import make_manifest
from .object import Job
from .release import NAME, OperatorRelease

USER = "--as=anna"
PLACES = {
    "spec.model.source": "pvc://models/base",
    "spec.data.tasks[0].source": "pvc://rows/reviews.jsonl",
    "spec.output.uri": "pvc://models/out",
}
"""A job whose check stage waits for claims that are not there."""


@pytest.fixture(scope="module")
def team(cluster: Cluster, operator: OperatorRelease) -> Iterator[str]:
    """A namespace in which anna may do what the role `edit` lets her."""
    name = f"team-of-anna-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("create", "rolebinding", "anna", "--clusterrole=edit", "--user=anna", f"--namespace={name}")
    await_condition(lambda: may_create(cluster, name), "the rights of the role edit", 60)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def may_create(cluster: Cluster, namespace: str) -> bool:
    question = ("auth", "can-i", "create", "finetunejobs.finetune.dev", USER, f"--namespace={namespace}")
    try:
        return cluster.kubectl(*question).strip() == "yes"
    except CommandError:
        return False


def send(cluster: Cluster, namespace: str, given: dict[str, Any], *flags: str) -> dict[str, Any]:
    """Create a job as anna, and return what the API server stores."""
    manifest = yaml.safe_dump(make_manifest(PLACES | given))
    command = ("create", "--filename=-", "--output=json", USER, f"--namespace={namespace}")
    return dict(json.loads(cluster.kubectl(*command, *flags, input=manifest)))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.sentence)
def test_the_api_server_refuses_what_leads_out_of_the_own_pod_and_namespace(
    cluster: Cluster, team: str, attack: Attack
) -> None:
    with pytest.raises(CommandError) as refusal:
        send(cluster, team, attack.given, "--dry-run=server")
    assert attack.field in str(refusal.value)


@pytest.mark.parametrize("attack", [one for one in ATTACKS if one.is_unknown], ids=lambda attack: attack.sentence)
def test_what_is_sent_without_validation_is_refused_or_not_stored(cluster: Cluster, team: str, attack: Attack) -> None:
    try:
        stored = send(cluster, team, attack.given, "--dry-run=server", "--validate=ignore")
    except CommandError as refusal:
        assert "is invalid" in str(refusal)
    else:
        assert attack.field not in json.dumps(stored["spec"])


def test_a_user_creates_jobs_in_the_own_namespace_alone(cluster: Cluster, team: str, namespace: str) -> None:
    send(cluster, team, {}, "--dry-run=server")
    with pytest.raises(CommandError, match="forbidden"):
        send(cluster, namespace, {}, "--dry-run=server")


CLAIM = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Secret": ({"spec.output.secretRef": {"name": "theirs"}}, {"stringData": {"k": "v"}}),
    "ConfigMap": ({"spec.data.tasks[0].source": "configMap://theirs/rows.jsonl"}, {"data": {"rows.jsonl": "x"}}),
    "PersistentVolumeClaim": ({"spec.data.tasks[0].source": "pvc://theirs/rows.jsonl"}, {"spec": CLAIM}),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_another_namespace_has_is_missing_here(cluster: Cluster, team: str, namespace: str, kind: str) -> None:
    given, content = THEIRS[kind]
    cluster.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": "theirs"}, **content}, namespace)
    name = f"wants-{kind.lower()}"
    # Only what is asked for may be missing.
    places = {"spec.model.source": "hf://acme/tiny", "spec.output.uri": "s3://bucket/out"}
    rows = {"spec.data.tasks[0].source": "s3://bucket/rows.jsonl"}
    send(cluster, team, places | rows | given | {"metadata.name": name})

    def is_said() -> bool:
        checked = look(cluster, team, name).condition(ConditionType.CHECKED)
        return checked is not None and checked.reason is Reason.REFERENCE_MISSING and "theirs" in checked.message

    await_condition(is_said, f"word about the missing {kind}", 120)
    cluster.kubectl("delete", "finetunejob", name, f"--namespace={team}")


def look(cluster: Cluster, namespace: str, name: str) -> Job:
    return Job(cluster.get("finetunejob", name, namespace))


def pod_spec(cluster: Cluster, namespace: str, job: str) -> dict[str, Any]:
    """Return the template of the pods of a job's first stage."""

    def found() -> list[dict[str, Any]]:
        return cluster.list("jobs", namespace, f"finetune.dev/job={job}")

    await_condition(lambda: bool(found()), f"a child of {job}", 120)
    return dict(found()[0]["spec"]["template"])


def test_pods_are_no_root_see_no_node_and_keep_their_labels(cluster: Cluster, team: str) -> None:
    labels = {"app.kubernetes.io/managed-by": "me", "finetune.dev/job": "another"}
    send(cluster, team, {"metadata.name": "disguised", "spec.compute.pod": {"labels": labels}})
    template = pod_spec(cluster, team, "disguised")
    # A NetworkPolicy finds them by it.
    assert template["metadata"]["labels"]["app.kubernetes.io/managed-by"] == NAME
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["automountServiceAccountToken"] is False
    assert not [flag for flag in ("hostNetwork", "hostPID", "hostIPC") if spec.get(flag)]
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    cluster.kubectl("delete", "finetunejob", "disguised", f"--namespace={team}")


# --- what the administrator locks, with no admission policy to refuse it before


@pytest.fixture(scope="module")
def locked(operator: OperatorRelease, team: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorRelease]:
    """The locks of the table and a wall before the metadata address, enforced by nobody but the operator."""
    values = {
        "settings": {"policy": LOCKS},
        "admissionPolicy": {"enabled": False},
        "networkPolicy": {"jobs": {"enabled": True, "namespaces": [team]}},
    }
    file = tmp_path_factory.mktemp("values") / "values.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    operator.install(f"--values={file}")
    yield operator
    operator.install()


@pytest.mark.alone
def test_what_is_locked_is_refused_by_the_operator_too(cluster: Cluster, team: str, locked: OperatorRelease) -> None:
    send(cluster, team, FOREIGN | {"metadata.name": "foreign"})

    def answer() -> tuple[ConditionStatus, Reason, str] | None:
        accepted = look(cluster, team, "foreign").condition(ConditionType.ACCEPTED)
        return accepted and (accepted.status, accepted.reason, accepted.message)

    await_condition(lambda: answer() is not None, "the operator's answer", 120)
    status, reason, message = answer() or pytest.fail("it was there")
    assert (status, reason) == (ConditionStatus.FALSE, Reason.POLICY_VIOLATED)
    assert "s3://other/base" in message
    assert cluster.list("jobs", team, "finetune.dev/job=foreign") == []
    cluster.kubectl("delete", "finetunejob", "foreign", f"--namespace={team}")


@pytest.mark.alone
def test_the_wall_before_the_metadata_address_stands_before_every_pod_of_a_job(
    cluster: Cluster, team: str, locked: OperatorRelease
) -> None:
    # Whether it holds is up to the cluster's network; kind's own does not know walls.
    [wall] = [one for one in cluster.list("networkpolicies", team) if one["spec"]["policyTypes"] == ["Egress"]]
    blocks = [peer["ipBlock"] for rule in wall["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer]
    [everywhere] = [block for block in blocks if block["cidr"] == "0.0.0.0/0"]
    assert everywhere["except"] == ["169.254.169.254/32"]
    send(cluster, team, {"metadata.name": "behind-the-wall"})
    labels = pod_spec(cluster, team, "behind-the-wall")["metadata"]["labels"]
    assert wall["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    cluster.kubectl("delete", "finetunejob", "behind-the-wall", f"--namespace={team}")
