"""FineTuneJobs whose training runs on a Ray cluster: the real KubeRay, two workers, what survives which fault.

Inputs: as tests/e2e/test_jobs.py, and KubeRay built from its Go module.
"""

import contextlib
import re
from collections.abc import Callable

import pytest
from kubernetes.client import ApiException

from finetune_api.report import ExitCode, Stage
from finetune_api.status import ConditionType, Phase, Reason

from ..cluster.cluster import Cluster, await_condition
from ..cluster.kuberay import KubeRay, remove_definitions
from ..cluster.object_store import ObjectStore
from .node import Node
from .object import Job, Jobs
from .release import OperatorRelease
from .sample import (
    CPUS,
    LONG,
    example,
    full_on_two,
    has_checkpoint,
    is_training,
    lora_on_two,
    soak_only,
    uploaded_steps,
)


def ray_clusters(cluster: Cluster, namespace: str) -> list[str]:
    """Names of the Ray clusters in ``namespace``."""
    return cluster.kubectl("get", "rayclusters.ray.io", f"--namespace={namespace}", "--output=name").split()


def answer_without_a_token(jobs: Jobs) -> int | None:
    """Return what the only head answers to somebody who would see its programs or send it one, as an HTTP status."""
    # KubeRay gives it one for the cluster and one for the RayJob.
    head = jobs.core.list_namespaced_service(jobs.namespace, label_selector="ray.io/node-type=head").items[0]
    with pytest.raises(ApiException) as refusal:
        jobs.core.connect_get_namespaced_service_proxy_with_path(
            f"{head.metadata.name}:dashboard", jobs.namespace, "api/jobs/"
        )
    return refusal.value.status


def workers(jobs: Jobs, job: Job) -> list[str]:
    """Names of the pods that train."""
    return [pod.metadata.name for pod in jobs.pods(job.uid) if pod.metadata.labels.get("ray.io/node-type") == "worker"]


def lose(pod: str, jobs: Jobs, cluster: Cluster) -> None:
    """Let a pod die unasked, as with its node; one that is deleted without grace still has time to save."""
    if cluster.docker is not None:
        Node(cluster).kill_pods("name", pod)
    jobs.core.delete_namespaced_pod(pod, jobs.namespace, grace_period_seconds=0)


def submitter(jobs: Jobs, job: Job, attempt: int) -> str:
    """Name of the pod that hands the attempt to its Ray cluster, and tells what is said there."""
    (name,) = [
        str(pod.metadata.name)
        for pod in jobs.pods(job.uid)
        if pod.metadata.labels["finetune.dev/attempt"] == str(attempt) and "ray.io/node-type" not in pod.metadata.labels
    ]
    return name


def delete_and_find_nothing(jobs: Jobs, cluster: Cluster, job: Job) -> None:
    jobs.delete("reviews-lora")
    await_condition(
        lambda: not jobs.pods(job.uid) and not ray_clusters(cluster, jobs.namespace), "the end of all pods", 180
    )
    await_condition(lambda: not cluster.list("rayjobs.ray.io", jobs.namespace), "the end of the RayJob", 120)
    await_condition(lambda: not owned(jobs), "the end of what KubeRay and the operator put beside it", 120)


def owned(jobs: Jobs) -> list[str]:
    """Names of what belongs to other objects of the namespace, as a job's does to the job."""
    core, namespace = jobs.core, jobs.namespace
    lists = (
        core.list_namespaced_config_map(namespace),
        core.list_namespaced_service(namespace),
        core.list_namespaced_secret(namespace),
    )
    return [one.metadata.name for found in lists for one in found.items if one.metadata.owner_references]


def is_training_again(steps: int, behind: int = 1) -> Callable[[Job], bool]:
    """Say whether a later attempt than ``behind`` is at work: a worker that Ray loses while it starts costs one."""

    def reached(job: Job) -> bool:
        newest = job.trainings[-1].number
        return newest > behind and is_training(steps, newest)(job)

    return reached


def saved_steps(s3: ObjectStore, job: Job) -> list[int]:
    """Steps of the complete checkpoints, oldest first; every node's part of one is complete as well."""
    markers = (re.search(r"/step-(\d+)/COMPLETE$", key) for key in uploaded_steps(s3, job))
    return [int(marker[1]) for marker in markers if marker]


def waits_for_kuberay(job: Job) -> bool:
    trained = job.condition(ConditionType.TRAINED)
    return trained is not None and trained.reason is Reason.KUBERAY_MISSING


def test_full_fine_tuning_on_two_workers_begins_when_kuberay_appears_and_is_evaluated_and_published(
    jobs: Jobs, s3: ObjectStore, cluster: Cluster, request: pytest.FixtureRequest
) -> None:
    remove_definitions(cluster)
    jobs.apply(example(s3, "reviews-full", of="04-full-deepspeed", compute=CPUS))
    jobs.wait("reviews-full", "word about KubeRay", waits_for_kuberay, seconds=240)
    request.getfixturevalue("kuberay")
    # Its few steps may be over before any of them is seen.
    jobs.wait("reviews-full", "its workers", is_training(0), seconds=480)
    assert answer_without_a_token(jobs) == 401
    job = jobs.wait_phase("reviews-full", Phase.SUCCEEDED, seconds=900)
    assert [one.stage for one in job.status.attempts] == [Stage.CHECK, Stage.TRAIN, Stage.EVALUATE]
    assert job.status.evaluation is not None
    accuracy = next(one for one in job.status.evaluation.tasks if one.metric == "accuracy")
    assert accuracy.base is not None and float(accuracy.tuned) > float(accuracy.base)
    assert {one.kind.value for one in job.status.artifacts} == {"weights", "report"}
    await_condition(lambda: not ray_clusters(cluster, jobs.namespace), "the end of the Ray cluster", 120)


def test_workers_that_are_stopped_go_on_from_the_step_at_which_they_were(
    jobs: Jobs, s3: ObjectStore, kuberay: KubeRay, operator: OperatorRelease
) -> None:
    jobs.apply(full_on_two(s3))
    job = jobs.wait("reviews-full", "training", is_training(5), seconds=720)
    jobs.core.delete_namespaced_pod(workers(jobs, job)[0], jobs.namespace)

    job = jobs.wait("reviews-full", "another attempt", lambda job: len(job.trainings) > 1, seconds=400)
    [saved] = saved_steps(s3, job)
    operator.kill()
    # A new operator takes the step over that the status has, which is the first attempt's until the second has one.
    job = jobs.wait("reviews-full", "training again", is_training_again(saved + 1), seconds=800)
    first, last = job.trainings[0], job.trainings[-1]
    assert (first.reason, first.exit_code) == (Reason.PREEMPTED, ExitCode.PREEMPTED)
    assert f"resuming at step {saved}" in jobs.logs(submitter(jobs, job, attempt=last.number), lines=2000)

    job = jobs.wait_phase("reviews-full", Phase.SUCCEEDED, seconds=800)
    assert job.trainings[-1].resumed_from_step == saved


@soak_only
def test_workers_that_are_lost_go_on_from_the_last_step_that_was_saved(
    jobs: Jobs, s3: ObjectStore, kuberay: KubeRay, cluster: Cluster
) -> None:
    document = lora_on_two(s3)
    document["spec"]["checkpoint"]["everySteps"] = 20
    jobs.apply(document)
    job = jobs.wait("reviews-lora", "a checkpoint", has_checkpoint(s3), seconds=720)
    lose(workers(jobs, job)[0], jobs, cluster)
    jobs.wait("reviews-lora", "training again", is_training_again(21), seconds=800)
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=800)
    lost, last = job.trainings[0], job.trainings[-1]
    assert lost.reason is Reason.WORKER_LOST
    assert last.resumed_from_step is not None and last.resumed_from_step % 20 == 0


@soak_only
def test_suspended_workers_go_on_from_the_step_at_which_they_were_stopped(
    jobs: Jobs, s3: ObjectStore, kuberay: KubeRay
) -> None:
    jobs.apply(lora_on_two(s3))
    jobs.wait("reviews-lora", "training", is_training(5), seconds=720)
    jobs.patch("reviews-lora", {"runPolicy": {"suspend": True}})
    job = jobs.wait_phase("reviews-lora", Phase.SUSPENDED, seconds=300)
    [saved] = saved_steps(s3, job)
    suspended = job.trainings[-1]
    assert suspended.reason is Reason.SUSPENDED_BY_USER
    jobs.patch("reviews-lora", {"runPolicy": {"suspend": False}})
    jobs.wait("reviews-lora", "training again", is_training_again(saved + 1, suspended.number), seconds=800)
    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=800)
    assert job.trainings[-1].resumed_from_step == saved


@pytest.mark.parametrize("is_there", [True, False], ids=["KubeRay works", "KubeRay is down"])
def test_a_job_deleted_while_its_workers_train_leaves_nothing(
    jobs: Jobs, s3: ObjectStore, kuberay: KubeRay, cluster: Cluster, is_there: bool
) -> None:
    jobs.apply(example(s3, of="05-multi-gpu-lora", **LONG, compute=CPUS))
    job = jobs.wait("reviews-lora", "training", is_training(1), seconds=480)
    with contextlib.nullcontext() if is_there else kuberay.away():
        delete_and_find_nothing(jobs, cluster, job)
