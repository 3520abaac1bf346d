"""Which jobs are accepted, what is said of the others, and what profile and defaults make of a spec."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune_api.job import spec_hash
from finetune_api.status import ConditionStatus, ConditionType, FineTuneJobStatus, Reason
from finetune_operator.acceptance import Accepted, Refused, judge
from finetune_operator.condition import Statement, stated
from finetune_operator.observed import JobView
from finetune_operator.settings import LOCKABLE, Settings

from ..attacks import ATTACKS, FOREIGN, FOREIGN_WORDS, LOCKS, Attack
from .objects import ADAPTER, IMAGE, NOW, make_settings, make_view, published_job

PROFILE = {
    "image": "registry.example/gpu:1",
    "gpuResource": "example.com/gpu",
    "devicesPerWorker": {"rdma/nic": 1},
    "resources": {"cpu": "8", "memory": "64Gi"},
    "pod": {
        "nodeSelector": {"gpu": "a100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "NCCL_IB_HCA", "value": "mlx5"}],
    },
}
DISKS = {"workers": 2, "deepspeed": {"stage": 3, "offload": "nvme"}}
PROFILES = make_settings(profiles={"a100": PROFILE, "broken": {"gpusPerWorker": 0}, "many": DISKS})


def accepted(given: dict[str, Any] | None = None, settings: Settings = PROFILES) -> Accepted:
    verdict = judge(make_view(given), settings)
    assert isinstance(verdict, Accepted), verdict
    return verdict


@dataclass(frozen=True)
class Refusal:
    sentence: str
    given: dict[str, Any]
    reason: Reason
    says: tuple[str, ...]
    is_final: bool
    policy: dict[str, Any] = field(default_factory=dict)


NAMED = Reason.POLICY_VIOLATED
REFUSALS = (
    Refusal(
        "all mistakes are told at once",
        {"spec.training.epochs": -1, "spec.method.type": "lore"},
        Reason.SPEC_INVALID,
        ("spec.training.epochs", "spec.method.type", "lora"),
        True,
    ),
    Refusal(
        "what is not there yet",
        {"spec.compute": DISKS},
        Reason.NOT_SUPPORTED,
        ("spec.compute.deepspeed", "nvme"),
        True,
    ),
    Refusal(
        "a folder of one machine",
        {"spec.output.uri": "file:///models"},
        Reason.NOT_SUPPORTED,
        ("spec.output.uri", "pvc://"),
        True,
    ),
    Refusal(
        "a profile that is not there",
        {"spec.compute.profile": "h100"},
        Reason.PROFILE_NOT_FOUND,
        ('spec.compute.profile ("h100")', "a100"),
        False,
    ),
    Refusal(
        "a profile that does not go with the spec",
        {"spec.compute": {"profile": "broken", "gpuResource": "example.com/gpu"}},
        Reason.SPEC_INVALID,
        ("with profile broken", "spec.compute.gpuResource"),
        False,
    ),
    Refusal(
        "the profile's GPUs under another name",
        {"spec.compute": {"profile": "a100", "devicesPerWorker": {"example.com/gpu": 8}}},
        Reason.SPEC_INVALID,
        ("with profile a100", "spec.compute.devicesPerWorker.example.com/gpu"),
        False,
    ),
    Refusal(
        "a profile that asks for what is not there yet",
        {"spec.compute.profile": "many"},
        Reason.SPEC_INVALID,
        ("with profile many", "spec.compute.deepspeed"),
        False,
    ),
    Refusal(
        "a registry that is not allowed",
        {"spec.compute.image": "docker.example/mine:1"},
        NAMED,
        ("spec.compute.image", "docker.example/mine:1", "registry.example/"),
        False,
        {"imageRegistries": ["registry.example/"]},
    ),
    Refusal(
        "a store that only begins like the allowed one",
        {"spec.output.uri": "s3://models-of-others/here"},
        NAMED,
        ("spec.output.uri", "s3://models/"),
        False,
        {"storagePrefixes": ["s3://models/", "pvc://", "hf://"]},
    ),
    Refusal(
        "a path that climbs out of the allowed place",
        {"spec.data.tasks[0].source": "pvc://rows/%2e%2e/others.jsonl"},
        NAMED,
        ("spec.data.tasks[0].source",),
        False,
        {"storagePrefixes": ["pvc://", "hf://"]},
    ),
    Refusal(
        "a store whose name begins like the allowed one",
        {"spec.output": {"uri": "s3://models/a", "endpoint": "https://minio.example.other"}},
        NAMED,
        ("spec.output.endpoint", "https://minio.example.other", "https://minio.example/"),
        False,
        {"storageEndpoints": ["https://minio.example/"]},
    ),
    Refusal(
        "a tracker that is not allowed",
        {"spec.training.reportTo": {"mlflow": {"trackingUri": "https://mlflow.example.other"}}},
        NAMED,
        ("spec.training.reportTo.mlflow.trackingUri", "https://mlflow.example.other", "https://mlflow.example/"),
        False,
        {"storageEndpoints": ["https://mlflow.example/"]},
    ),
    Refusal(
        "the public tracker, which is meant where none is named",
        {"spec.training.reportTo": {"wandb": {"project": "reviews"}}},
        NAMED,
        ("spec.training.reportTo.wandb.baseUrl", "https://api.forge.coreweave.com", "https://mlflow.example/"),
        False,
        {"storageEndpoints": ["https://mlflow.example/"]},
    ),
    Refusal(
        "a variable that leads to another store",
        {"spec.compute.pod": {"env": [{"name": "AWS_ENDPOINT_URL_S3", "value": "https://other.example"}]}},
        NAMED,
        ("spec.compute.pod.env[0].name", "AWS_ENDPOINT_URL_S3", "spec.output.endpoint"),
        False,
        {"storagePrefixes": ["pvc://", "hf://"]},
    ),
    Refusal(
        "a suite whose rows come from the hub",
        {"spec.evaluation.benchmarks": [{"suite": "mmlu"}]},
        NAMED,
        ("spec.evaluation.benchmarks[0].suite", "mmlu", "hf://", "task file of your own"),
        False,
        {"storagePrefixes": ["s3://models/", "pvc://", "hf://acme/"]},
    ),
    Refusal(
        "a variable that leads to another hub",
        {"spec.compute.pod": {"env": [{"name": "HF_ENDPOINT", "value": "https://other.example"}]}},
        NAMED,
        ("spec.compute.pod.env[0].name", "HF_ENDPOINT"),
        False,
        {"storageEndpoints": ["https://minio.example/"]},
    ),
    Refusal(
        "a service account that is not allowed",
        {"spec.compute.pod": {"serviceAccountName": "cluster-admin"}},
        NAMED,
        ("spec.compute.pod.serviceAccountName", "cluster-admin", "trainer"),
        False,
        {"serviceAccounts": ["trainer"]},
    ),
    Refusal(
        "a taint that the administrator keeps for others",
        {"spec.compute.pod": {"tolerations": [{"operator": "Exists"}]}},
        NAMED,
        ("spec.compute.pod.tolerations (1 entry): is locked", "ask the administrator"),
        False,
        {"lockedPodFields": ["nodeSelector", "tolerations"]},
    ),
    Refusal(
        "nothing in place of what the profile sets",
        {"spec.compute": {"profile": "a100", "pod": {"affinity": {}}}},
        NAMED,
        ("spec.compute.pod.affinity ({}): is locked",),
        False,
        {"lockedPodFields": ["affinity"]},
    ),
    Refusal(
        "a priority above others'",
        {"spec.compute.priorityClassName": "system-node-critical"},
        NAMED,
        ('spec.compute.priorityClassName ("system-node-critical"): is locked',),
        False,
        {"lockedPodFields": ["priorityClassName"]},
    ),
    Refusal(
        "a volume that is called like one of ours",
        {"spec.compute.pod": {"volumes": [{"name": "finetune-tmp", "emptyDir": {}}]}},
        Reason.SPEC_INVALID,
        ("spec.compute.pod.volumes[0].name",),
        True,
    ),
    Refusal(
        "a volume where one of ours is",
        {
            "spec.compute.pod": {
                "volumes": [{"name": "own", "emptyDir": {}}],
                "volumeMounts": [{"name": "own", "mountPath": "/workspace/"}],
            }
        },
        Reason.SPEC_INVALID,
        ("spec.compute.pod.volumeMounts[0].mountPath", "/workspace"),
        True,
    ),
    Refusal(
        "more templates than a ConfigMap holds",
        {"spec.data.tasks[0].templates": [{"prompt": "{{ t }}" + "€" * 16000, "completion": "€" * 16000}] * 12},
        Reason.SPEC_INVALID,
        ("bytes", "Shorten the templates"),
        True,
    ),
)


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.sentence)
def test_a_job_is_refused_with_the_field_and_what_to_do(row: Refusal):
    settings = PROFILES.model_copy(update={"policy": make_settings(policy=row.policy).policy})
    verdict = judge(make_view(row.given), settings)
    assert isinstance(verdict, Refused)
    assert (verdict.reason, verdict.is_final) == (row.reason, row.is_final)
    for words in row.says:
        assert words in verdict.message


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.sentence)
def test_what_leads_out_of_the_own_pod_and_namespace_is_refused(attack: Attack):
    verdict = judge(make_view(attack.given), PROFILES)
    assert isinstance(verdict, Refused)
    assert verdict.reason is Reason.SPEC_INVALID
    assert attack.field in verdict.message


def test_every_field_that_can_be_locked_is_judged():
    verdict = judge(make_view(FOREIGN), make_settings(policy=LOCKS))
    assert isinstance(verdict, Refused)
    assert verdict.reason is Reason.POLICY_VIOLATED
    assert [word for word in FOREIGN_WORDS if word not in verdict.message] == []


@pytest.mark.parametrize("name", LOCKABLE)
def test_a_pod_field_that_is_locked_alone_is_refused_alone(name: str):
    verdict = judge(make_view(FOREIGN), make_settings(policy={"lockedPodFields": [name]}))
    assert isinstance(verdict, Refused)
    assert re.findall(r"^spec\.compute\.(?:pod\.)?(\w+) .* is locked", verdict.message, re.MULTILINE) == [name]


def test_what_is_allowed_is_accepted():
    policy = {
        "imageRegistries": ["registry.example/"],
        "storagePrefixes": ["pvc://rows/", "pvc://models/", "hf://acme/"],
        "serviceAccounts": ["trainer"],
    }
    policy["lockedPodFields"] = [name for name in LOCKABLE if name != "serviceAccountName"]
    given = {"spec.compute": {"image": "registry.example/own:1", "pod": {"serviceAccountName": "trainer"}}}
    assert accepted(given, make_settings(policy=policy)).image == "registry.example/own:1"


@pytest.mark.parametrize("endpoint", ["https://minio.example", "https://minio.example/", "https://minio.example/s3"])
def test_an_allowed_store_is_accepted(endpoint: str):
    policy = {"storageEndpoints": ["https://minio.example/"]}
    accepted({"spec.output": {"uri": "s3://models/a", "endpoint": endpoint}}, make_settings(policy=policy))


def test_without_locked_storage_any_store_is_accepted():
    env = [{"name": "HF_ENDPOINT", "value": "https://hub.example"}]
    accepted({"spec.compute.pod": {"env": env}}, make_settings(policy={"serviceAccounts": ["trainer"]}))


def test_the_image_is_the_jobs_or_the_profiles_or_the_operators():
    assert accepted().image == IMAGE
    assert accepted({"spec.compute.profile": "a100"}).image == "registry.example/gpu:1"
    assert accepted({"spec.compute": {"profile": "a100", "image": "registry.example/own:1"}}).image.endswith("own:1")


@pytest.mark.parametrize("begins", ["bare", "with another job's model"])
def test_a_profile_is_not_judged_by_what_users_may(begins: str):
    policy = {"imageRegistries": ["other.example/"], "lockedPodFields": ["nodeSelector", "tolerations", "env"]}
    settings = make_settings(policy=policy, profiles={"a100": PROFILE})
    start = {} if begins == "bare" else FROM_GENERAL
    verdict = judge(make_view({"spec.compute.profile": "a100"} | start), settings, (PUBLISHED,))
    assert isinstance(verdict, Accepted), verdict
    assert verdict.image == "registry.example/gpu:1"
    assert verdict.job.spec.compute.pod is not None
    assert verdict.job.spec.compute.pod.node_selector == {"gpu": "a100"}


def test_a_profile_names_the_proxy_where_no_job_may():
    profile = {"pod": {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy.example"}]}}
    settings = make_settings(policy={"storageEndpoints": ["https://minio.example/"]}, profiles={"proxied": profile})
    assert accepted({"spec.compute.profile": "proxied"}, settings).job.spec.compute.pod is not None
    assert isinstance(judge(make_view({"spec.compute": profile}), settings), Refused)


def test_a_suite_is_accepted_where_the_hub_is():
    policy = {"storagePrefixes": ["pvc://rows/", "pvc://models/", "hf://"]}
    accepted({"spec.evaluation.benchmarks": [{"suite": "mmlu"}]}, make_settings(policy=policy))


def test_what_a_job_sets_itself_wins_over_its_profile_entry_by_entry():
    own = {
        "profile": "a100",
        "devicesPerWorker": {"example.com/fpga": 2},
        "resources": {"cpu": "4"},
        "pod": {
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        },
    }
    compute = accepted({"spec.compute": own}).job.spec.compute
    assert (compute.resources.cpu, compute.resources.memory) == ("4", "64Gi")  # type: ignore[union-attr]
    assert compute.devices_per_worker == {"rdma/nic": 1, "example.com/fpga": 2}
    pod = compute.pod
    assert pod is not None
    assert pod.node_selector == {"gpu": "a100", "zone": "a"}
    assert [toleration.key for toleration in pod.tolerations] == ["gpu", "spot"]
    assert {one.name: one.value for one in pod.env} == {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}


def test_what_is_accepted_is_resolved_and_hashed():
    verdict = accepted()
    assert verdict.job.spec.method.lora is not None
    assert verdict.spec_hash == spec_hash(verdict.job.spec)
    assert verdict.output_path == "pvc://models/tuned/team-a/reviews-0a1b2c3d"


def test_suspension_is_no_part_of_what_is_hashed():
    assert accepted({"spec.runPolicy.suspend": True}).spec_hash == accepted().spec_hash


def test_another_profile_is_another_hash():
    assert accepted({"spec.compute.profile": "a100"}).spec_hash != accepted().spec_hash


def test_a_profile_that_says_how_large_its_gpus_are_leaves_the_hash():
    told = accepted({"spec.compute.profile": "a100"}, make_settings(profiles={"a100": PROFILE | {"gpuMemory": "80Gi"}}))
    assert told.job.spec.compute.gpu_memory == "80Gi"
    assert told.spec_hash == accepted({"spec.compute.profile": "a100"}).spec_hash


# --- a job that goes on from another one's

FROM_GENERAL = {"spec.model.startFrom": {"job": "general"}}


def general(given: dict[str, Any] | None = None, *statements: Statement, **status: Any) -> JobView:
    return make_view(given, stated(FineTuneJobStatus(**status), statements, NOW, 1), name="general")


PUBLISHED = published_job("general")
KEPT_BACK = general(
    None, Statement(ConditionType.COMPLETE, ConditionStatus.TRUE, Reason.GATES_NOT_PASSED, "accuracy fell")
)


def test_what_the_other_job_has_published_is_pinned():
    verdict = judge(make_view(FROM_GENERAL), PROFILES, (PUBLISHED,))
    assert isinstance(verdict, Accepted), verdict
    start = verdict.job.spec.model.start_from
    assert start is not None
    assert (start.job, start.source, start.sha256) == (None, ADAPTER.uri, ADAPTER.sha256)
    assert verdict.spec_hash == spec_hash(verdict.job.spec)


@pytest.mark.parametrize(
    "starts, reason, says",
    [
        ((), Reason.WAITING_FOR_JOB, "general is not there"),
        ((general(),), Reason.WAITING_FOR_JOB, "has not published yet"),
        ((KEPT_BACK,), Reason.WAITING_FOR_JOB, "has ended and published nothing: accuracy fell"),
        (
            (general({"spec.model.startFrom": {"job": "reviews"}}), make_view(FROM_GENERAL)),
            Reason.SPEC_INVALID,
            "reviews goes on from general goes on from reviews",
        ),
    ],
    ids=["missing", "at work", "kept back", "a circle"],
)
def test_a_job_does_not_begin_before_the_other_one_has_published(
    starts: tuple[JobView, ...], reason: Reason, says: str
):
    verdict = judge(make_view(FROM_GENERAL), PROFILES, starts)
    assert isinstance(verdict, Refused)
    assert (verdict.reason, verdict.is_final) == (reason, reason is Reason.SPEC_INVALID)
    assert says in verdict.message


def test_what_the_other_job_has_published_must_lie_where_the_administrator_allows_it():
    settings = make_settings(policy={"storagePrefixes": ["pvc://rows/", "hf://", "pvc://own/"]})
    verdict = judge(make_view(FROM_GENERAL | {"spec.output.uri": "pvc://own/tuned"}), settings, (PUBLISHED,))
    assert isinstance(verdict, Refused)
    assert verdict.reason is Reason.POLICY_VIOLATED
    assert "spec.model.startFrom.source" in verdict.message
