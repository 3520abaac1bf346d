"""FineTuneJobs on a real cluster: what a user applies, sees and gets, and what survives which fault.

Inputs: a kind cluster with the chart installed, an S3 server in it, a tiny random model, made-up reviews.
"""

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_api.report import ArtifactKind, ExitCode, Report, Stage
from finetune_api.status import ConditionStatus, ConditionType, Phase, Reason
from finetune_cli.__main__ import run_command
from finetune_trainer.manifest import read_manifest, verify_manifest

from ..cluster.cluster import Cluster
from ..cluster.object_store import ObjectStore, start_object_store
from ..integration.jobs import write_reviews
from .object import Job, Jobs
from .release import OperatorRelease
from .sample import (
    LONG,
    NO_SHARE,
    ONE_CPU,
    SECRET,
    UNCHECKED,
    add_claim,
    add_secret,
    download,
    example,
    fill_bucket,
    has_checkpoint,
    is_training,
    uploaded_steps,
)


@pytest.fixture
def finetune(cluster: Cluster, jobs: Jobs) -> Callable[..., ExitCode]:
    """Run one command in the namespace of the test."""
    where = ["-n", jobs.namespace, "--kubeconfig", str(cluster.kubeconfig)]
    return lambda command, *rest: run_command([command, *map(str, rest), *where])


def test_applied_job_is_checked_trained_evaluated_and_published(jobs: Jobs, s3: ObjectStore, tmp_path: Path) -> None:
    jobs.apply(example(s3, compute=ONE_CPU))
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=500)

    for kind in ("Accepted", "Checked", "Trained", "Evaluated", "Published", "Complete"):
        assert job.holds(ConditionType(kind)), f"{kind} does not hold: {job.status.conditions}"
    assert [one.stage for one in job.status.attempts] == [Stage.CHECK, Stage.TRAIN, Stage.EVALUATE]
    assert job.status.data is not None and job.status.data.rows.test > 0
    assert job.status.evaluation is not None
    accuracy = next(one for one in job.status.evaluation.tasks if one.metric == "accuracy")
    assert accuracy.base is not None and float(accuracy.tuned) > float(accuracy.base)
    assert job.status.summary is not None and "accuracy" in job.status.summary.metric
    phases = jobs.seen[job.uid]
    assert [one for one in phases if one in (Phase.CHECKING, Phase.TRAINING, Phase.EVALUATING)] == [
        Phase.CHECKING,
        Phase.TRAINING,
        Phase.EVALUATING,
    ]

    kinds = {one.kind.value: one for one in job.status.artifacts}
    assert set(kinds) == {"adapter", "report"}, kinds
    adapter = download(s3, kinds["adapter"].uri, tmp_path / "model")
    verify_manifest(adapter)
    assert (adapter / "adapter_model.safetensors").is_file()
    report = download(s3, kinds["report"].uri, tmp_path / "report")
    verify_manifest(report)
    content = Report.model_validate_json((report / "report.json").read_text())
    assert content.published and content.spec_hash == job.status.resolved.spec_hash
    assert content.image is not None and "sha256:" in content.image, "which bytes ran"

    jobs.patch("reviews-lora", {"runPolicy": {"childTtlSeconds": 0}})
    await_until(lambda: not jobs.children(job.uid) and not jobs.pods(job.uid), "children are gone", 120)
    assert jobs.get("reviews-lora").status.artifacts == job.status.artifacts

    # As after a restored backup: the same manifest, another object.
    jobs.delete("reviews-lora")
    jobs.apply(example(s3, compute=ONE_CPU))
    again = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=240)
    assert again.uid != job.uid
    complete = again.condition(ConditionType.COMPLETE)
    assert complete is not None and complete.reason is Reason.ALREADY_PUBLISHED
    assert [one.stage for one in again.status.attempts] == [Stage.CHECK]
    assert again.status.artifacts == job.status.artifacts
    assert again.status.evaluation == job.status.evaluation


def test_pods_of_a_job_have_no_access_to_the_api(jobs: Jobs, s3: ObjectStore) -> None:
    jobs.apply(example(s3))
    job = jobs.wait("reviews-lora", "a pod", lambda job: bool(jobs.pods(job.uid)))
    (pod,) = jobs.pods(job.uid)
    assert pod.spec.automount_service_account_token is False
    tokens = [source for one in pod.spec.volumes if one.projected for source in one.projected.sources]
    audiences = [one.service_account_token.audience for one in tokens if one.service_account_token]
    assert audiences == [
        f"finetune.dev/v1alpha1/namespaces/{jobs.namespace}/finetunejobs/reviews-lora/{job.uid}/check/a1"
    ]
    assert not any(SECRET in json.dumps(one.to_dict(), default=str) for one in pod.spec.containers[0].env or [])
    jobs.delete("reviews-lora")


def test_the_command_line_looks_after_a_prompt_tuning_on_rows_of_a_config_map(
    jobs: Jobs,
    s3: ObjectStore,
    finetune: Callable[..., ExitCode],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write_reviews(tmp_path / "reviews.jsonl").read_text()
    jobs.core.create_namespaced_config_map(
        jobs.namespace, client.V1ConfigMap(metadata=client.V1ObjectMeta(name="reviews"), data={"reviews.jsonl": rows})
    )
    document = example(s3, "reviews-prompt", runPolicy=UNCHECKED)
    document["spec"]["data"]["tasks"][0]["source"] = "configMap://reviews/reviews.jsonl"
    document["spec"]["method"] = {"type": "promptTuning", "promptTuning": {"virtualTokens": 8}}
    document["spec"]["training"]["maxSteps"] = 20
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert finetune("submit", file, "-w") is ExitCode.OK
    job = jobs.get("reviews-prompt")
    assert {one.kind.value for one in job.status.artifacts} == {"adapter", "report"}
    capsys.readouterr()

    assert finetune("status", file) is ExitCode.OK
    assert "Succeeded" in capsys.readouterr().out
    assert finetune("logs", "reviews-prompt", "--stage", "train") is ExitCode.OK
    assert '"message":"training"' in capsys.readouterr().out
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    fetched = tmp_path / "report"
    assert finetune("report", file, "--output", fetched, "--endpoint", s3.endpoint_local) is ExitCode.OK
    assert (fetched / "report.html").is_file()
    assert finetune("cancel", file, "--yes") is ExitCode.OK
    await_until(lambda: not jobs.pods(job.uid), "its pods are gone", 120)


@pytest.mark.alone
def test_what_is_published_to_a_volume_can_be_had_by_the_commands_that_are_told(
    jobs: Jobs,
    s3: ObjectStore,
    finetune: Callable[..., ExitCode],
    cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_claim(jobs, "models")
    add_secret(jobs, s3, "sources", AWS_ENDPOINT_URL=s3.endpoint_in_cluster)
    document = example(s3, runPolicy=UNCHECKED, training={"maxSteps": 10})
    document["spec"]["output"] = {"uri": "pvc://models/out"}
    for source in (document["spec"]["model"], *document["spec"]["data"]["tasks"]):
        source["secretRef"] = {"name": "sources"}
    jobs.apply(document)
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=1200)
    assert all(one.uri.startswith("pvc://models/out/") for one in job.status.artifacts)

    assert finetune("report", "reviews-lora") is ExitCode.BAD_SPEC
    commands = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  kubectl ")]
    for command in commands:
        subprocess.run(shlex.split(command), check=True, cwd=tmp_path, env=cluster.environment, timeout=120)
    verify_manifest(tmp_path / "report")
    [report] = [one.sha256 for one in job.status.artifacts if one.kind is ArtifactKind.REPORT]
    assert read_manifest(tmp_path / "report").sha256 == report


def test_bad_spec_is_refused_at_admission(jobs: Jobs, s3: ObjectStore) -> None:
    document = example(s3, training={"globalBatchSize": 0})
    with pytest.raises(client.ApiException) as refusal:
        jobs.apply(document)
    assert refusal.value.status == 422
    assert "spec.training.globalBatchSize" in refusal.value.body


def test_what_admission_cannot_see_is_said_in_the_accepted_condition(jobs: Jobs, s3: ObjectStore) -> None:
    jobs.apply(example(s3, training={"maxSteps": 10, "evalEverySteps": 20}))
    job = jobs.wait_phase("reviews-lora", Phase.FAILED, seconds=60)
    accepted = job.condition(ConditionType.ACCEPTED)
    assert accepted is not None and accepted.status is ConditionStatus.FALSE
    assert "spec.training.evalEverySteps" in accepted.message
    assert jobs.children(job.uid) == []


def test_unknown_field_is_reported_and_not_lost(jobs: Jobs, s3: ObjectStore) -> None:
    document = example(s3)
    document["spec"]["training"]["learnRate"] = 0.1
    with pytest.raises(client.ApiException) as refusal:
        jobs.apply(document)
    assert "learnRate" in refusal.value.body


def test_missing_column_ends_in_the_check_stage_without_any_training_pod(jobs: Jobs, s3: ObjectStore) -> None:
    document = example(s3)
    document["spec"]["data"]["tasks"][0]["templates"][0]["prompt"] = "{{ review_text }}"
    jobs.apply(document)
    job = jobs.wait_phase("reviews-lora", Phase.FAILED)
    failed = job.condition(ConditionType.FAILED)
    assert failed is not None and failed.reason is Reason.BAD_DATA
    assert "review_text" in failed.message and "text" in failed.message
    assert [one.exit_code for one in job.status.attempts] == [ExitCode.BAD_DATA]
    assert {child.metadata.labels["finetune.dev/stage"] for child in jobs.children(job.uid)} == {"check"}


@pytest.mark.alone
def test_operator_killed_in_every_stage_still_ends_once(jobs: Jobs, s3: ObjectStore, operator: OperatorRelease) -> None:
    jobs.apply(example(s3))
    for phase in (Phase.CHECKING, Phase.TRAINING, Phase.EVALUATING):
        jobs.wait_phase("reviews-lora", phase, seconds=400)
        operator.kill()
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=500)
    assert [(one.stage, one.number) for one in job.status.attempts] == [
        (Stage.CHECK, 1),
        (Stage.TRAIN, 1),
        (Stage.EVALUATE, 1),
    ]
    assert len(jobs.children(job.uid)) == 3


def test_training_goes_on_from_its_checkpoints_when_its_pod_is_deleted_and_when_it_was_suspended(
    jobs: Jobs, s3: ObjectStore
) -> None:
    jobs.apply(example(s3, **LONG))
    job = jobs.wait("reviews-lora", "checkpoint", has_checkpoint(s3), seconds=400)
    (pod,) = [one for one in jobs.pods(job.uid) if one.metadata.labels["finetune.dev/stage"] == "train"]
    jobs.core.delete_namespaced_pod(pod.metadata.name, jobs.namespace)

    job = jobs.wait("reviews-lora", "second attempt", is_training(21, attempt=2), seconds=400)
    assert "resuming at step" in jobs.logs(pod_of(jobs, job, attempt=2), lines=2000)
    jobs.patch("reviews-lora", {"runPolicy": {"suspend": True}})
    job = jobs.wait_phase("reviews-lora", Phase.SUSPENDED, seconds=300)
    assert job.holds(ConditionType.SUSPENDED)
    assert not [one for one in jobs.pods(job.uid) if one.status.phase == "Running"]
    assert uploaded_steps(s3, job)

    jobs.patch("reviews-lora", {"runPolicy": {"suspend": False}})
    job = jobs.wait("reviews-lora", "third attempt", is_training(21, attempt=3), seconds=300)
    assert "resuming at step" in jobs.logs(pod_of(jobs, job, attempt=3), lines=2000)
    assert [one.number for one in job.trainings] == [1, 2, 3]
    deleted, suspended, _ = (one.reason for one in job.trainings)
    assert deleted in (Reason.PREEMPTED, Reason.CHILD_LOST)
    assert suspended is Reason.SUSPENDED_BY_USER
    jobs.delete("reviews-lora")


def pod_of(jobs: Jobs, job: Job, attempt: int) -> str:
    (name,) = [
        str(one.metadata.name)
        for one in jobs.pods(job.uid)
        if one.metadata.labels["finetune.dev/stage"] == "train"
        and one.metadata.labels["finetune.dev/attempt"] == str(attempt)
    ]
    return name


def own_config_maps(jobs: Jobs) -> list[str]:
    found = jobs.core.list_namespaced_config_map(jobs.namespace).items
    return [one.metadata.name for one in found if one.metadata.owner_references]


def await_until(holds: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s: {what}"
        time.sleep(0.5)  # the API server has no watch over several kinds of objects


# The promises of seconds begin when the cluster has said why a pod does not run: how long it takes to is its own.


def fits_nowhere(pod: Any) -> bool:
    return any(one.reason == "Unschedulable" for one in pod.status.conditions or ())


def has_no_image(pod: Any) -> bool:
    waiting = (one.state.waiting for one in pod.status.container_statuses or ())
    return any(one and one.reason in ("ErrImagePull", "ImagePullBackOff") for one in waiting)


def is_refused_a_pod(jobs: Jobs) -> bool:
    return bool(jobs.core.list_namespaced_event(jobs.namespace, field_selector="reason=FailedCreate").items)


def waits_for(reason: Reason) -> Callable[[Job], bool]:
    """Say whether the check stage waits, and for that."""

    def reached(job: Job) -> bool:
        checked = job.condition(ConditionType.CHECKED)
        return checked is not None and checked.reason is reason

    return reached


@pytest.mark.alone
def test_gpu_that_no_node_has_is_said_within_15_seconds(jobs: Jobs, s3: ObjectStore) -> None:
    job = jobs.apply(example(s3, of="10-qlora", runPolicy=UNCHECKED))

    def is_said(job: Job) -> bool:
        trained = job.condition(ConditionType.TRAINED)
        return trained is not None and trained.reason is Reason.UNSCHEDULABLE

    await_until(lambda: any(map(fits_nowhere, jobs.pods(job.uid))), "the scheduler has looked for a node", 120)
    job = jobs.wait("reviews-lora", "the reason", is_said, seconds=15)
    trained = job.condition(ConditionType.TRAINED)
    assert trained is not None and "Insufficient nvidia.com/gpu" in trained.message


@pytest.mark.alone
def test_quota_is_said_within_15_seconds_and_waited_for(jobs: Jobs, s3: ObjectStore) -> None:
    quota = client.V1ResourceQuota(metadata=client.V1ObjectMeta(name="none"), spec={"hard": {"pods": "0"}})
    jobs.core.create_namespaced_resource_quota(jobs.namespace, quota)
    jobs.apply(example(s3))
    await_until(lambda: is_refused_a_pod(jobs), "the Job has been refused a pod", 120)
    job = jobs.wait("reviews-lora", "the reason", waits_for(Reason.QUOTA_EXCEEDED), seconds=15)
    checked = job.condition(ConditionType.CHECKED)
    assert checked is not None and "exceeded quota" in checked.message
    jobs.core.delete_namespaced_resource_quota("none", jobs.namespace)
    jobs.wait("reviews-lora", "start of the check stage", has_started, seconds=300)


@pytest.mark.alone
def test_missing_image_is_said_within_15_seconds_and_ends_at_the_start_deadline(jobs: Jobs, s3: ObjectStore) -> None:
    image = NO_SHARE | {"image": "registry.invalid/no/such:1"}
    # Two: the deadline of one may be over before its pod waits for the image.
    jobs.apply(example(s3, "hurried", compute=image, runPolicy={"startDeadlineSeconds": 25, "retries": 0}))
    job = jobs.apply(example(s3, "patient", compute=image))
    await_until(lambda: any(map(has_no_image, jobs.pods(job.uid))), "the kubelet has tried to pull", 120)
    job = jobs.wait("patient", "word about the image", waits_for(Reason.IMAGE_PULL_FAILED), seconds=15)
    assert "registry.invalid/no/such:1" in job.condition(ConditionType.CHECKED).message  # type: ignore[union-attr]
    job = jobs.wait_phase("hurried", Phase.FAILED, seconds=240)
    assert job.condition(ConditionType.FAILED).reason is Reason.START_DEADLINE_EXCEEDED  # type: ignore[union-attr]
    await_until(lambda: not [p for p in jobs.pods(job.uid) if p.status.phase == "Pending"], "pod is gone", 120)


LATE_SECRET, LATE_ROWS, LATE_CLAIM = "late-credentials", "late-rows", "late-claim"


def names_missing(name: str) -> Callable[[Job], bool]:
    def told(job: Job) -> bool:
        checked = job.condition(ConditionType.CHECKED)
        return checked is not None and checked.reason is Reason.REFERENCE_MISSING and name in checked.message

    return told


def has_started(job: Job) -> bool:
    return any(one.start_time is not None for one in job.status.attempts)


def test_what_is_missing_is_said_and_the_job_goes_on_when_it_appears(
    jobs: Jobs, s3: ObjectStore, tmp_path: Path
) -> None:
    # At once: the kubelet tries a failed mount again after at most two minutes.
    by_missing = {name: example(s3, name, training={"maxSteps": 4}) for name in (LATE_SECRET, LATE_ROWS, LATE_CLAIM)}
    by_missing[LATE_SECRET]["spec"]["output"]["secretRef"] = {"name": LATE_SECRET}
    by_missing[LATE_ROWS]["spec"]["data"]["tasks"][0]["source"] = f"configMap://{LATE_ROWS}/reviews.jsonl"
    by_missing[LATE_CLAIM]["spec"]["data"]["tasks"][0]["source"] = f"pvc://{LATE_CLAIM}/reviews.jsonl"
    for document in by_missing.values():
        jobs.apply(document)
    for name in by_missing:
        jobs.wait(name, f"word about {name}", names_missing(name), seconds=120)

    add_secret(jobs, s3, LATE_SECRET)
    rows = {"reviews.jsonl": write_reviews(tmp_path / "reviews.jsonl").read_text()}
    metadata = client.V1ObjectMeta(name=LATE_ROWS)
    jobs.core.create_namespaced_config_map(jobs.namespace, client.V1ConfigMap(metadata=metadata, data=rows))
    add_claim(jobs, LATE_CLAIM)
    for name in (LATE_SECRET, LATE_ROWS):
        jobs.wait(name, "end of the check stage", lambda job: job.holds(ConditionType.CHECKED), seconds=480)
    # The claim holds no rows.
    jobs.wait(LATE_CLAIM, "start of the check stage", has_started, seconds=300)


@pytest.fixture
def own_store(cluster: Cluster, tmp_path: Path) -> Iterator[ObjectStore]:
    """An S3 server that no other test uses, with what example 06 reads."""
    store = start_object_store(cluster, "finetune-storage-of-one")
    fill_bucket(store, tmp_path)
    yield store
    cluster.kubectl("delete", "namespace", store.namespace, "--wait=false")


def test_no_result_is_lost_while_the_store_is_away_for_a_minute(jobs: Jobs, own_store: ObjectStore) -> None:
    jobs.apply(example(own_store, runPolicy=UNCHECKED))
    jobs.wait_phase("reviews-lora", Phase.EVALUATING, seconds=500)
    own_store.stop()
    time.sleep(60)  # the fault itself: a minute without the store
    own_store.start()
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=560)
    assert {one.kind.value for one in job.status.artifacts} == {"adapter", "report"}


@pytest.mark.alone
def test_progress_is_in_the_status_within_ten_seconds_and_a_deleted_job_leaves_nothing(
    jobs: Jobs, s3: ObjectStore
) -> None:
    jobs.apply(example(s3, **LONG | {"training": {"maxSteps": 4000, "evalEverySteps": 40}}))
    job = jobs.wait("reviews-lora", "progress", is_training(41), seconds=400)
    progress = job.status.progress
    assert progress is not None and progress.total_steps == 4000
    assert progress.percent is not None and progress.step is not None
    assert 1 <= progress.percent <= 1 + 100 * progress.step / 4000
    assert progress.eta_seconds is not None and progress.eta_seconds > 0
    assert (datetime.now(UTC) - progress.last_update_time).total_seconds() < 10
    later = jobs.wait("reviews-lora", "later progress", is_training(progress.step + 1), seconds=10)
    assert {"loss", "validation_loss"} <= {one.name for one in later.status.latest_metrics}

    jobs.delete("reviews-lora")
    await_until(
        lambda: not jobs.children(job.uid) and not jobs.pods(job.uid) and not own_config_maps(jobs),
        "children and ConfigMaps are gone",
        seconds=300,
    )


def test_columns_and_explanations_need_no_documentation(cluster: Cluster, jobs: Jobs, s3: ObjectStore) -> None:
    explained = cluster.kubectl("explain", "finetunejob.spec.method.lora.rank")
    assert "memory" in explained.lower()
    jobs.apply(example(s3, runPolicy={"suspend": True}))
    header, row = cluster.kubectl("get", "ftj", "-n", jobs.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "METHOD", "PROGRESS", "METRIC", "DELTA", "PUBLISHED", "AGE"]
    assert row.startswith("reviews-lora")
