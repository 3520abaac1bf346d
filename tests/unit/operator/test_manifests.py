"""The objects of a job: as golden files, and what must hold for every one of them."""

import json
from typing import Any

import pytest
import yaml

from finetune_api.job import load_job, spec_hash
from finetune_api.report import IMAGE_VARIABLE, ExitCode, Stage
from finetune_api.status import Attempt
from finetune_operator import naming
from finetune_operator.manifest import (
    content_hash,
    output_path,
    spec_config_map,
    stage_child,
    trust_config_map,
    trust_hash,
)
from finetune_operator.pod import Run, whole_cpus
from finetune_operator.settings import Settings

from ...conftest import Golden
from .objects import CA, IMAGE, NAME, UID, make_resolved, make_settings

HASH = "0123456789abcdef" * 4
STAGES = (Stage.CHECK, Stage.TRAIN, Stage.EVALUATE)
EVERYTHING = {
    "metadata.labels": {"kueue.x-k8s.io/queue-name": "gpu", "team": "reviews"},
    "spec.model": {"source": "s3://models/base", "secretRef": {"name": "s3-read"}},
    "spec.data.tasks[0].source": "configMap://rows/reviews.jsonl",
    "spec.data.tasks[1]": {
        "name": "nli",
        "source": "pvc://rows/nli.jsonl",
        "templates": [{"prompt": "{{ a }}", "completion": "{{ b }}"}],
        "secretRef": {"name": "s3-read"},
    },
    "spec.compute": {
        "imagePullSecrets": [{"name": "pull-own"}],
        "priorityClassName": "high",
        "gpusPerWorker": 1,
        "gpuResource": "example.com/gpu",
        "devicesPerWorker": {"rdma/hca_shared_devices_a": 1, "vpc.amazonaws.com/efa": 4},
        "resources": {"cpu": "3500m", "memory": "32Gi", "ephemeralStorage": "100Gi"},
        "sharedMemory": "8Gi",
        "cacheVolume": {"claimName": "model-cache"},
        "pod": {
            "nodeSelector": {"gpu": "a100"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "kubernetes.io/hostname"}
                    ]
                }
            },
            "labels": {"cost": "research", "own": "research"},
            "annotations": {"note": "mine"},
            "env": [
                {"name": "HTTPS_PROXY", "value": "http://own.example:3128"},
                {"name": "EXTRA", "valueFrom": {"secretKeyRef": {"name": "extra", "key": "value"}}},
            ],
            "volumes": [
                {"name": "own", "secret": {"secretName": "own"}},
                {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
                {"name": "disk", "emptyDir": {}},
            ],
            "volumeMounts": [{"name": "own", "mountPath": "/own", "readOnly": True}],
            "serviceAccountName": "trainer",
            "terminationGracePeriodSeconds": 300,
        },
    },
    "spec.evaluation.resources": {"memory": "16Gi"},
    "spec.evaluation.benchmarks": [{"suite": "mmlu"}, {"suite": "configMap://tasks/pick.yaml"}],
    "spec.output": {"uri": "s3://models/tuned", "endpoint": "http://minio.example:9000", "secretRef": {"name": "s3-w"}},
    "spec.training.reportTo": {
        "mlflow": {"trackingUri": "https://mlflow.example", "secretRef": {"name": "mlflow-keys"}},
        "wandb": {"project": "reviews", "secretRef": {"name": "wandb-keys"}},
    },
    "spec.runPolicy": {"checkQueueName": "cpu"},
}
"""Every field that ends up in a pod."""

PRIVATE = make_settings(
    image={"name": IMAGE, "pullSecrets": ["pull-all"]},
    pod={
        "labels": {"cost": "none", "from": "administrator"},
        "annotations": {"note": "theirs", "seen": "true"},
        "priorityClassName": "low",
        "env": {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": ".svc"},
        "caBundle": "-----BEGIN CERTIFICATE-----\nprivate\n-----END CERTIFICATE-----\n",
        "checkResources": {"cpu": "1", "memory": "2Gi"},
        "defaultResources": {"cpu": "2", "memory": "4Gi"},
    },
)
JOBS: dict[str, tuple[dict[str, Any], Settings]] = {
    "minimal": ({}, make_settings()),
    "everything": (EVERYTHING, PRIVATE),
}


def run_of(job: str, stage: Stage, **attempt: Any) -> Run:
    given, settings = JOBS[job]
    resolved = make_resolved(given)
    fields = {"stage": stage, "number": 1, "child": naming.child_name(NAME, stage, 1)} | attempt
    return Run(resolved, Attempt(**fields), IMAGE, HASH, settings)


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return pod


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    [container] = pod_of(manifest)["containers"]
    return dict(container)


def env_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") for one in container_of(manifest)["env"]}


all_jobs = pytest.mark.parametrize("job", JOBS)
all_stages = pytest.mark.parametrize("stage", STAGES)


@all_jobs
@all_stages
def test_a_stages_job_is_as_it_was_looked_at(job: str, stage: Stage, golden: Golden):
    golden(f"{job}-{stage.value}.yaml", yaml.safe_dump(stage_child(run_of(job, stage)), sort_keys=False, width=120))


def test_what_is_pinned_cannot_be_changed_and_goes_with_its_job():
    pinned = spec_config_map(make_resolved(), HASH)
    assert pinned["immutable"] is True
    assert pinned["metadata"]["name"] == "reviews-spec-01234567"
    [owner] = pinned["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == ("FineTuneJob", NAME, UID, True)
    assert pinned["data"].keys() == {"job.json"}


@all_jobs
def test_the_trust_config_map_holds_what_pods_trust(job: str):
    given, settings = JOBS[job]
    trust = trust_config_map(make_resolved(given), CA, settings)
    bundle = {"ca-bundle.crt": settings.pod.ca_bundle} if settings.pod.ca_bundle else {}
    assert trust["data"] == {"ca.crt": CA, **bundle}
    assert "immutable" not in trust
    assert trust_hash(CA, settings.pod.ca_bundle) == content_hash(trust["data"])


@all_jobs
@all_stages
def test_a_manifest_is_fresh_and_the_same_each_time(job: str, stage: Stage):
    first, second = stage_child(run_of(job, stage)), stage_child(run_of(job, stage))
    assert first == second
    pod_of(first)["containers"].clear()
    assert pod_of(second)["containers"]


@all_jobs
@all_stages
def test_a_pod_may_nothing_that_it_needs_not(job: str, stage: Stage):
    pod = pod_of(stage_child(run_of(job, stage)))
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    tokens = [
        source["serviceAccountToken"]["audience"]
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "serviceAccountToken" in source
    ]
    assert tokens == [naming.audience("team-a", NAME, UID, stage, 1)]


@all_jobs
@all_stages
def test_every_mount_has_a_volume_and_every_folder_one_mount(job: str, stage: Stage):
    manifest = stage_child(run_of(job, stage))
    mounts, volumes = container_of(manifest)["volumeMounts"], pod_of(manifest)["volumes"]
    assert {mount["name"] for mount in mounts} <= {volume["name"] for volume in volumes}
    assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
    assert len({volume["name"] for volume in volumes}) == len(volumes)


def test_only_training_and_evaluation_ask_for_a_gpu():
    limits = {stage: container_of(stage_child(run_of("minimal", stage)))["resources"] for stage in STAGES}
    assert limits[Stage.CHECK] == {}
    assert limits[Stage.TRAIN]["limits"] == limits[Stage.EVALUATE]["limits"] == {"nvidia.com/gpu": "1"}


def test_only_training_asks_for_other_devices():
    pods = {stage: container_of(stage_child(run_of("everything", stage)))["resources"] for stage in STAGES}
    devices = {"rdma/hca_shared_devices_a": "1", "vpc.amazonaws.com/efa": "4"}
    assert devices.items() <= pods[Stage.TRAIN]["limits"].items()
    for stage in (Stage.CHECK, Stage.EVALUATE):
        assert not devices.keys() & pods[stage]["limits"].keys()
    assert all(pod["requests"] == pod["limits"] for pod in pods.values())


def test_a_job_on_the_cpu_asks_for_no_gpu_and_is_checked_where_it_trains():
    job = make_resolved({"spec.compute": {"gpusPerWorker": 0, "pod": {"nodeSelector": {"disk": "fast"}}}})
    for stage in STAGES:
        run = Run(job, Attempt(stage=stage, number=1, child="c"), IMAGE, HASH, make_settings())
        assert container_of(stage_child(run))["resources"] == {}
        assert pod_of(stage_child(run))["nodeSelector"] == {"disk": "fast"}


def test_the_check_stage_has_a_size_where_only_others_are_given_one():
    settings = make_settings(pod={"defaultResources": {"cpu": "2", "memory": "4Gi"}})
    run = Run(make_resolved(), Attempt(stage=Stage.CHECK, number=1, child="c"), IMAGE, HASH, settings)
    assert container_of(stage_child(run))["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}


def test_the_check_stage_starts_no_gpu_node():
    pod = pod_of(stage_child(run_of("everything", Stage.CHECK)))
    assert not {"nodeSelector", "affinity"} & pod.keys()


def test_the_check_stage_runs_where_every_node_is_tainted():
    pods = [pod_of(stage_child(run_of("everything", stage))) for stage in STAGES]
    assert [pod["tolerations"] for pod in pods] == [
        [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}] for _ in STAGES
    ]


def test_only_jobs_are_queued_and_the_check_in_its_own_queue():
    queues = {
        stage: stage_child(run_of("everything", stage))["metadata"]["labels"].get(naming.QUEUE_LABEL)
        for stage in STAGES
    }
    assert queues == {Stage.CHECK: "cpu", Stage.TRAIN: "gpu", Stage.EVALUATE: "gpu"}
    for stage in STAGES:
        assert (
            naming.QUEUE_LABEL not in stage_child(run_of("everything", stage))["spec"]["template"]["metadata"]["labels"]
        )


def test_the_check_is_not_queued_unless_a_queue_is_named():
    job = make_resolved({"metadata.labels": {naming.QUEUE_LABEL: "gpu"}})
    run = Run(job, Attempt(stage=Stage.CHECK, number=1, child="c"), IMAGE, HASH, make_settings())
    assert naming.QUEUE_LABEL not in stage_child(run)["metadata"]["labels"]


def test_own_wishes_win_over_the_administrators_and_ours_over_both():
    manifest = stage_child(run_of("everything", Stage.TRAIN))
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    assert (labels["own"], labels["team"]) == ("research", "reviews")
    assert env_of(manifest)["HTTPS_PROXY"] == "http://own.example:3128"
    assert pod_of(manifest)["priorityClassName"] == "high"
    assert labels[naming.JOB_UID_LABEL] == UID


@all_stages
def test_costs_are_booked_as_the_administrator_says(stage: Stage):
    manifest = stage_child(run_of("everything", stage))
    for metadata in (manifest["metadata"], manifest["spec"]["template"]["metadata"]):
        assert (metadata["labels"]["cost"], metadata["labels"]["from"]) == ("none", "administrator")
        assert metadata["annotations"]["note"] == "theirs"


def test_with_labels_locked_those_of_the_job_stay_off_its_pods():
    job = make_resolved({"metadata.labels": {"egress": "open"}})
    settings = make_settings(policy={"lockedPodFields": ["labels"]}, pod={"labels": {"cost": "none"}})
    child = stage_child(Run(job, Attempt(stage=Stage.TRAIN, number=1, child="c"), IMAGE, HASH, settings))
    labels = child["spec"]["template"]["metadata"]["labels"]
    assert "egress" not in labels
    assert labels["cost"] == "none"


def test_no_job_can_say_that_its_progress_goes_elsewhere():
    given = {"spec.compute.pod": {"env": [{"name": "KUBEFLOW_TRAINER_SERVER_URL", "value": "https://other.example"}]}}
    run = Run(make_resolved(given), Attempt(stage=Stage.TRAIN, number=1, child="c"), IMAGE, HASH, make_settings())
    assert env_of(stage_child(run))["KUBEFLOW_TRAINER_SERVER_URL"].startswith("https://finetune-operator.")


@all_stages
def test_a_stage_is_told_the_image_that_it_runs_whatever_the_job_says(stage: Stage):
    pinned = f"registry.example/finetune-trainer@sha256:{'a' * 64}"
    job = make_resolved({"spec.compute.pod": {"env": [{"name": IMAGE_VARIABLE, "value": "registry.example/other:1"}]}})
    manifest = stage_child(Run(job, Attempt(stage=stage, number=1, child="c"), pinned, HASH, make_settings()))
    assert env_of(manifest)[IMAGE_VARIABLE] == container_of(manifest)["image"] == pinned


def test_a_tag_is_told_with_the_digest_that_an_earlier_pod_ran():
    job, digest = make_resolved(), f"registry.example/finetune-trainer@sha256:{'b' * 64}"
    attempt = Attempt(stage=Stage.EVALUATE, number=1, child="c", image_id=digest)
    by_tag = stage_child(Run(job, attempt, "registry.example/finetune-trainer:1", HASH, make_settings()))
    assert env_of(by_tag)[IMAGE_VARIABLE] == f"registry.example/finetune-trainer:1 ({digest})"
    assert container_of(by_tag)["image"] == "registry.example/finetune-trainer:1"
    by_digest = stage_child(Run(job, attempt, digest, HASH, make_settings()))
    assert env_of(by_digest)[IMAGE_VARIABLE] == digest


def test_a_private_authority_does_not_replace_the_public_ones():
    env = env_of(stage_child(run_of("everything", Stage.CHECK)))
    assert env["FINETUNE_CA_BUNDLE"] == naming.CA_BUNDLE_FILE
    assert not {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"} & env.keys()
    assert "FINETUNE_CA_BUNDLE" not in env_of(stage_child(run_of("minimal", Stage.CHECK)))


def test_what_an_attempt_changes_is_an_argument():
    changed = {"gradient_checkpointing": True, "micro_batch_size": 4, "zero_stage": 3, "learning_rate_scale": 0.5}
    args = container_of(stage_child(run_of("minimal", Stage.TRAIN, **changed)))["args"]
    changes = "--gradient-checkpointing --micro-batch-size 4 --zero-stage 3 --learning-rate-scale 0.5"
    assert f" {changes} " in f" {' '.join(args)} "
    assert not {"--zero-stage", "--micro-batch-size"} & {
        *container_of(stage_child(run_of("minimal", Stage.TRAIN)))["args"]
    }


def test_the_jobs_condition_tells_every_exit_code_of_the_trainer():
    rules = stage_child(run_of("minimal", Stage.TRAIN))["spec"]["podFailurePolicy"]["rules"]
    codes = rules[0]["onExitCodes"]["values"]
    assert codes == sorted(set(ExitCode) - {ExitCode.OK})
    assert {rule["action"] for rule in rules} == {"FailJob"}


def test_the_trainer_reads_what_was_pinned():
    resolved = make_resolved({"spec.compute": {"gpusPerWorker": 0}, "spec.runPolicy.suspend": True})
    file = spec_config_map(resolved, spec_hash(resolved.spec))["data"]["job.json"]
    assert json.loads(file)["metadata"]["uid"] == UID
    assert load_job(file, "job.json") == resolved
    assert spec_hash(load_job(file, "job.json").spec) == spec_hash(resolved.spec)


def test_the_output_of_a_job_is_its_own():
    assert output_path(make_resolved()) == "pvc://models/tuned/team-a/reviews-0a1b2c3d"


def test_another_authority_is_another_trust():
    assert trust_hash("a", "") != trust_hash("b", "") != trust_hash("b", "c")


@pytest.mark.parametrize(("quantity", "cpus"), [("4", 4), ("500m", 1), ("3500m", 3), ("2.5", 2), ("0", 1)])
def test_threads_are_whole_cpus(quantity: str, cpus: int):
    assert whole_cpus(quantity) == cpus
