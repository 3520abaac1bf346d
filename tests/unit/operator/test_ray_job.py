"""RayJobs: what KubeRay is asked for, what is made of its answers, and what is said without it."""

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Stage
from finetune_api.status import Attempt, ConditionType, FineTuneJobStatus, Reason
from finetune_operator import naming
from finetune_operator.action import Create, Delete, Plan
from finetune_operator.condition import find, holds
from finetune_operator.fence import Standing, standing
from finetune_operator.manifest import child_kind, stage_child
from finetune_operator.observed import ChildKind, ChildView, DeliveredResult, KubeRayState, PodPhase
from finetune_operator.outcome import classify
from finetune_operator.planner import plan
from finetune_operator.pod import Role, Run, pod_template
from finetune_operator.ray_job import KUBERAY_NEEDED, ray_job_spec
from finetune_operator.view import child_view, pod_view

from ...conftest import Golden
from .objects import UID, after, make_child, make_pod, make_resolved, make_result
from .raw_objects import CREATED, raw_child, raw_pod
from .test_manifests import EVERYTHING, HASH, IMAGE, PRIVATE
from .test_planner import NOW, SETTINGS, accepted_job, condition, recorded, seen

WORKERS = {"spec.compute.workers": 2}
TRAIN = Stage.TRAIN


def run_of(job: FineTuneJob, spec_hash: str = HASH) -> Run:
    name = naming.child_name(job.metadata.name, TRAIN, 1)
    return Run(job, Attempt(stage=TRAIN, number=1, child=name), IMAGE, spec_hash, PRIVATE)


def ray_job() -> dict[str, Any]:
    return stage_child(
        run_of(make_resolved(EVERYTHING | {"spec.compute": {**EVERYTHING["spec.compute"], "workers": 2}}))
    )


def templates() -> dict[str, dict[str, Any]]:
    spec = ray_job()["spec"]
    cluster = spec["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": spec["submitterPodTemplate"],
    }


@pytest.mark.parametrize(
    ("compute", "kind"),
    [
        ({}, ChildKind.JOB),
        ({"workers": 2}, ChildKind.RAY_JOB),
        ({"gpusPerWorker": 2}, ChildKind.RAY_JOB),
        ({"engine": "ray"}, ChildKind.RAY_JOB),
        ({"gpusPerWorker": 0}, ChildKind.JOB),
    ],
    ids=str,
)
def test_training_on_several_workers_or_gpus_is_a_ray_job(compute: dict[str, Any], kind: ChildKind):
    job = make_resolved({"spec.compute": compute})
    assert child_kind(job, TRAIN) is kind
    assert child_kind(job, Stage.CHECK) is child_kind(job, Stage.EVALUATE) is ChildKind.JOB


def test_a_ray_job_is_as_it_was_looked_at(golden: Golden):
    golden("workers-train.yaml", yaml.safe_dump(ray_job(), sort_keys=False, width=120))


def test_ray_tries_nothing_again_and_leaves_nothing_running():
    spec = ray_job()["spec"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (0, True, 0)
    assert spec["preRunningDeadlineSeconds"] > make_resolved().spec.run_policy.start_deadline_seconds


def test_ray_obeys_only_who_knows_its_token():
    cluster = ray_job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    # KubeRay asks for a version that knows tokens, and believes it.
    assert cluster["rayVersion"] == version("ray")


def test_gpus_and_other_devices_are_the_workers_alone():
    limits = {role: template["spec"]["containers"][0]["resources"]["limits"] for role, template in templates().items()}
    for resource in ("example.com/gpu", "rdma/hca_shared_devices_a", "vpc.amazonaws.com/efa"):
        assert {role for role, limit in limits.items() if resource in limit} == {"worker"}
    assert [role for role, template in templates().items() if "nodeSelector" in template["spec"]] == ["worker"]


@pytest.mark.parametrize("compute", [{"gpusPerWorker": 8}, {"gpusPerWorker": 8, "gpuResource": "example.com/slice"}])
def test_ray_is_told_of_the_gpus_whatever_they_are_called_and_of_none_on_the_head(compute: dict[str, Any]):
    cluster = ray_job_spec(run_of(make_resolved({"spec.compute": {"workers": 2, **compute}})))["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    # Otherwise Ray counts what the head's node shows it.
    assert cluster["headGroupSpec"]["rayStartParams"].items() >= {"num-cpus": "0", "num-gpus": "0"}.items()
    assert workers["rayStartParams"]["num-gpus"] == "8"


@pytest.mark.parametrize(
    ("compute", "threads"),
    [
        ({"gpusPerWorker": 8, "resources": {"cpu": "64"}}, "8"),
        ({"gpusPerWorker": 8, "resources": {"cpu": "4"}}, "1"),
        ({"gpusPerWorker": 0, "resources": {"cpu": "4"}}, "4"),
        ({"gpusPerWorker": 0, "resources": {"cpu": "500m"}}, "1"),
    ],
    ids=str,
)
def test_a_workers_processes_share_its_cpus(compute: dict[str, Any], threads: str):
    job = make_resolved({"spec.compute": {"workers": 2, **compute}})
    [container] = pod_template(run_of(job), Role.WORKER)["spec"]["containers"]
    assert {"name": "OMP_NUM_THREADS", "value": threads} in container["env"]


def test_the_queue_is_told_of_the_ray_job_and_of_no_part_of_it():
    assert ray_job()["metadata"]["labels"][naming.QUEUE_LABEL] == "gpu"
    assert not any(naming.QUEUE_LABEL in template["metadata"]["labels"] for template in templates().values())


def test_no_pod_of_a_ray_job_may_more_than_a_jobs():
    whole = pod_template(run_of(make_resolved(EVERYTHING)))["spec"]
    for template in templates().values():
        pod, [container] = template["spec"], template["spec"]["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"] == whole["securityContext"]
        assert container["securityContext"] == whole["containers"][0]["securityContext"]


def test_the_submitter_holds_nothing_of_the_job():
    pod, [container] = templates()["submitter"]["spec"], templates()["submitter"]["spec"]["containers"]
    assert [volume["name"] for volume in pod["volumes"]] == ["finetune-tmp"]
    assert [variable["name"] for variable in container["env"]] == ["HOME"]


def test_no_word_of_a_user_gets_into_the_shell_line():
    job = make_resolved(WORKERS)
    assert ray_job_spec(run_of(job))["entrypoint"].split()[:4] == ["python", "-m", "finetune_trainer", "train"]
    with pytest.raises(ValueError, match="shell line"):
        ray_job_spec(run_of(job, "$(id)"))


@pytest.mark.parametrize("length", [1, 32, 33, 40])
def test_a_name_is_never_longer_than_kuberay_allows(length: int):
    names = {naming.child_name("a" * length, TRAIN, number) for number in (1, 12, 9999)}
    assert len(names) == 3 and max(map(len, names)) <= 47


def test_long_names_with_the_same_beginning_differ():
    assert naming.child_name("a" * 39 + "b", TRAIN, 1) != naming.child_name("a" * 39 + "c", TRAIN, 1)


# --- what KubeRay answers


def ray_view(**parts: Any) -> ChildView:
    view = child_view(raw_child(TRAIN, kind="RayJob", **parts))
    assert view is not None
    return view


STATES = [
    ({}, "waiting"),
    ({"jobDeploymentStatus": "Initializing"}, "waiting"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, "waiting"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "startTime": CREATED}, "running"),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "startTime": CREATED}, "succeeded"),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "startTime": CREATED}, "failed"),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "startTime": CREATED}, "failed"),
    ({"jobDeploymentStatus": "ValidationFailed"}, "failed"),
    ({"jobDeploymentStatus": "Suspended", "startTime": CREATED}, "suspended"),
    ({"jobDeploymentStatus": "SomethingNew", "jobStatus": "SOMETHING_NEW"}, "waiting"),
]


@pytest.mark.parametrize(("status", "expected"), STATES, ids=lambda value: str(value))
def test_what_becomes_of_a_ray_job(status: dict[str, Any], expected: str):
    view = ray_view(status=status)
    states = {"succeeded": view.succeeded, "failed": view.failed, "suspended": view.suspended}
    assert [name for name, holds in states.items() if holds] == [expected] * (expected in states)
    has_begun = status.get("jobStatus") in ("RUNNING", "SUCCEEDED", "STOPPED", "FAILED")
    assert (view.started is not None) is has_begun


def cluster_pod(cluster: str = "reviews-train-a1-x7k2p", **labels: str) -> dict[str, Any]:
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": cluster, "uid": "cluster", "controller": True}
    known = raw_pod(TRAIN)["metadata"]["labels"]
    return raw_pod(TRAIN, metadata={"ownerReferences": [owner], "labels": known | labels})


def test_a_pod_belongs_to_the_ray_job_of_its_cluster_whatever_its_labels_say():
    pod = pod_view(cluster_pod())
    assert pod is not None and pod.child == "reviews-train-a1"
    assert ray_view(status={"rayClusterName": "reviews-train-a1-x7k2p"}).owns(pod)
    assert not ray_view(status={"rayClusterName": "reviews-train-a1-other"}).owns(pod)
    assert not ray_view().owns(pod)


def test_the_head_is_known_by_the_label_that_kuberay_gives_it():
    head, worker = (pod_view(cluster_pod(**{"ray.io/node-type": kind})) for kind in ("head", "worker"))
    assert head is not None and head.is_head
    assert worker is not None and not worker.is_head
    of_a_job = pod_view(raw_pod(metadata={"labels": raw_pod()["metadata"]["labels"] | {"ray.io/node-type": "head"}}))
    assert of_a_job is not None and not of_a_job.is_head


def test_a_pod_whose_labels_name_no_job_is_none_of_ours():
    raw = cluster_pod()
    raw["metadata"]["labels"][naming.JOB_LABEL] = "a" * 63
    assert pod_view(raw) is None


# --- what is planned


FIRST = {"spec.runPolicy.preflight": "skip"}
"""Training is the first stage."""
DISTRIBUTED = FIRST | WORKERS


def plan_of_training(given: dict[str, Any], **observed: Any) -> Plan:
    return plan(accepted_job(given), seen(given, **observed), SETTINGS, NOW)


def created(made: Plan) -> list[dict[str, Any]]:
    return [dict(action.manifest) for action in made.actions if isinstance(action, Create)]


def test_without_kuberay_the_job_waits_and_says_what_to_install():
    made = plan_of_training(DISTRIBUTED, kuberay=KubeRayState.MISSING)
    trained = condition(made, ConditionType.TRAINED)
    assert trained.reason is Reason.KUBERAY_MISSING
    assert "helm install kuberay-operator" in trained.message
    assert created(made) == [] and recorded(made).attempts == ()


def test_a_kuberay_that_is_too_old_is_not_asked_and_the_job_says_which_one_it_needs():
    made = plan_of_training(DISTRIBUTED, kuberay=KubeRayState.TOO_OLD)
    trained = condition(made, ConditionType.TRAINED)
    assert trained.reason is Reason.KUBERAY_MISSING
    assert f"KubeRay {KUBERAY_NEEDED} or newer" in trained.message and "too old" in trained.message
    assert created(made) == [] and recorded(made).attempts == ()
    # Whoever installs the newer one is noticed; nothing is asked until then.
    assert made.wake_at is None


def test_an_attempt_that_an_older_kuberay_came_before_waits_for_the_newer_one_without_end():
    attempts = recorded(plan_of_training(DISTRIBUTED, kuberay=KubeRayState.READY)).attempts
    job = accepted_job(DISTRIBUTED, attempts=attempts)
    made = plan(job, seen(DISTRIBUTED, kuberay=KubeRayState.TOO_OLD), SETTINGS, after(10**6))
    assert condition(made, ConditionType.TRAINED).reason is Reason.KUBERAY_MISSING
    assert created(made) == []


def test_with_kuberay_the_ray_job_is_created():
    [child] = created(plan_of_training(DISTRIBUTED, kuberay=KubeRayState.READY))
    assert (child["kind"], child["metadata"]["name"]) == ("RayJob", "reviews-train-a1")
    assert child["metadata"]["ownerReferences"][0]["uid"] == UID


@pytest.mark.parametrize("state", [KubeRayState.MISSING, KubeRayState.TOO_OLD])
def test_one_worker_needs_no_kuberay(state: KubeRayState):
    [child] = created(plan_of_training(FIRST, kuberay=state))
    assert child["kind"] == "Job"


def supervised(**child: Any) -> Attempt:
    """Return the first attempt once its RayJob, with a pod that runs, has been looked at."""
    attempts = recorded(plan_of_training(DISTRIBUTED, kuberay=KubeRayState.READY)).attempts
    children = (make_child(TRAIN, kind=ChildKind.RAY_JOB, **child),)
    observed = seen(DISTRIBUTED, kuberay=KubeRayState.READY, children=children, pods=(make_pod(TRAIN, started=NOW),))
    return recorded(plan(accepted_job(DISTRIBUTED, attempts=attempts), observed, SETTINGS, after(9))).attempts[0]


def test_a_ray_job_starts_with_its_program_and_not_with_its_pods():
    assert supervised().start_time is None
    assert supervised(started=after(5)).start_time == after(5)


LOG = ", last available logs (truncated to 20,000 chars):\nfailed with exit code 64\n"


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ({}, None),
        ({"succeeded": True}, Reason.CHILD_LOST),
        ({"failed": True, "failure_message": "Job entrypoint command failed with exit code 69" + LOG}, Reason.STORAGE),
        (
            {"failed": True, "failure_message": "Job entrypoint command failed with exit code 1" + LOG},
            Reason.CHILD_LOST,
        ),
        ({"failed": True, "failure_reason": "JobStatusCheckTimeoutExceeded"}, Reason.CHILD_LOST),
    ],
    ids=str,
)
def test_how_a_ray_job_that_posted_no_result_ended(child: dict[str, Any], reason: Reason | None):
    # Its pods live for some seconds more, and end as KubeRay ends them.
    pods = (make_pod(TRAIN), make_pod(TRAIN, phase=PodPhase.FAILED, exit_code=65))
    outcome = classify(make_child(TRAIN, kind=ChildKind.RAY_JOB, **child), pods, None)
    assert (outcome.reason if outcome else None) is reason


# --- what it takes for success

POSTED = DeliveredResult(TRAIN, 1, make_result(TRAIN, ExitCode.OK, message="the rate is high", resumed_from_step=40))


def look(
    posted: bool = False,
    status: FineTuneJobStatus | None = None,
    seconds: float = 9,
    policy: dict[str, Any] | None = None,
    **child: Any,
) -> Plan:
    """Return what is planned for the first attempt, whose RayJob is as ``child`` says."""
    status = status or recorded(plan_of_training(DISTRIBUTED, kuberay=KubeRayState.READY))
    ray_job = make_child(TRAIN, kind=ChildKind.RAY_JOB, started=after(5), **child)
    observed = seen(DISTRIBUTED, kuberay=KubeRayState.READY, children=(ray_job,), results=(POSTED,) if posted else ())
    given = DISTRIBUTED | {f"spec.runPolicy.{name}": value for name, value in (policy or {}).items()}
    return plan(replace(accepted_job(given), status=status), observed, SETTINGS, after(seconds))


def looked_at(**given: Any) -> FineTuneJobStatus:
    """Return the status behind that look."""
    return recorded(look(**given))


def deleted(made: Plan) -> list[str]:
    return [action.ref.name for action in made.actions if isinstance(action, Delete)]


def test_success_takes_a_result_and_a_ray_job_that_has_succeeded():
    status = looked_at(posted=True)
    [attempt] = status.attempts
    assert (attempt.reason, attempt.exit_code, attempt.resumed_from_step) == (None, 0, 40)
    assert standing(status, TRAIN, 1) is Standing.RECORDED, "its trainer need not stay"
    assert not holds(status, ConditionType.TRAINED)
    status = looked_at(posted=False, status=status, succeeded=True)
    [attempt] = [one for one in status.attempts if one.stage is TRAIN]
    assert (attempt.reason, attempt.exit_code, attempt.resumed_from_step) == (Reason.STAGE_SUCCEEDED, 0, 40)
    assert attempt.end_time == after(9)
    trained = find(status, ConditionType.TRAINED)
    assert trained is not None and trained.message == "attempt 1 succeeded; the rate is high"


def test_a_ray_job_that_fails_behind_a_good_result_is_tried_again():
    status = looked_at(posted=False, status=looked_at(posted=True), failed=True, failure_message="the head is gone")
    [attempt] = status.attempts
    assert (attempt.reason, attempt.exit_code, attempt.failures) == (Reason.CHILD_LOST, None, 1)
    trained = find(status, ConditionType.TRAINED)
    assert trained is not None and "the head is gone" in trained.message


def test_a_ray_job_that_does_not_end_behind_its_program_is_given_up_after_a_while():
    reported = looked_at(posted=True)
    early = look(status=reported, seconds=9 + 599)
    assert deleted(early) == [] and early.wake_at == after(9 + 600)
    late = look(status=reported, seconds=9 + 600)
    assert deleted(late) == ["reviews-train-a1"] and late.wake_at is None
    assert look(status=reported, seconds=9 + 700, deleting=True) == Plan()


def test_the_deadline_and_a_suspension_wait_for_a_ray_job_whose_program_has_ended():
    reported = looked_at(posted=True)
    assert deleted(look(status=reported, seconds=60, policy={"activeDeadlineSeconds": 30})) == []
    assert deleted(look(status=reported, seconds=60, policy={"suspend": True})) == []


def test_a_queue_that_takes_the_node_back_behind_a_result_lets_the_program_speak_again():
    status = looked_at(status=looked_at(posted=True), seconds=12, suspended=True)
    [attempt] = status.attempts
    assert (attempt.end_time, attempt.exit_code, attempt.start_time, attempt.earlier_seconds) == (None, None, None, 7)
    assert standing(status, TRAIN, 1) is Standing.CURRENT


def test_what_was_stopped_by_its_user_and_has_ended_well_costs_no_retry():
    stopping = looked_at(status=looked_at(), policy={"suspend": True})
    assert stopping.attempts[0].reason is Reason.SUSPENDED_BY_USER
    [attempt] = looked_at(posted=True, status=stopping, policy={"suspend": True}, deleting=True).attempts
    assert (attempt.reason, attempt.failures, attempt.end_time) == (Reason.SUSPENDED_BY_USER, 0, after(9))


def test_a_result_whose_ray_job_is_gone_is_not_believed():
    started = looked_at()
    observed = seen(DISTRIBUTED, kuberay=KubeRayState.READY, results=(POSTED,))
    status = recorded(plan(replace(accepted_job(DISTRIBUTED), status=started), observed, SETTINGS, after(9)))
    assert status.attempts[0].reason is Reason.CHILD_LOST


def test_what_a_program_posted_of_a_fault_stands_whatever_becomes_of_its_ray_job():
    posted = DeliveredResult(TRAIN, 1, make_result(TRAIN, ExitCode.BAD_DATA))
    outcome = classify(make_child(TRAIN, kind=ChildKind.RAY_JOB), (), posted)
    assert outcome is not None and outcome.reason is Reason.BAD_DATA
