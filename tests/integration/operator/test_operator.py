"""The operator against a real API server: what it does within which time, and what it survives."""

import itertools
import json
import time
import urllib.error
from collections.abc import Callable

import pytest

from finetune_api.report import ExitCode, Stage
from finetune_api.status import ConditionStatus, ConditionType, FineTuneJobStatus, Phase, Reason
from finetune_operator.cluster import CLUSTER_ACCESS, JOB_ACCESS

from .api_server import ApiServer
from .conftest import StartOperator, install_crd
from .definition import CRD_PATH
from .operator_process import LEASE, START_SECONDS, Home, await_until
from .workload import MERGE, Workload

LEASE_PATH = "/apis/coordination.k8s.io/v1/namespaces/{}/leases/" + LEASE
STAGES = (Stage.CHECK, Stage.TRAIN, Stage.EVALUATE)

Attempts = list[tuple[Stage, int, Reason | None]]


def attempts(status: FineTuneJobStatus) -> Attempts:
    return [(one.stage, one.number, one.reason) for one in status.attempts]


def is_accepted(status: FineTuneJobStatus) -> bool:
    return any(one.type is ConditionType.ACCEPTED and one.status is ConditionStatus.TRUE for one in status.conditions)


def has_reason(kind: ConditionType, reason: Reason) -> Callable[[FineTuneJobStatus], bool]:
    return lambda status: any(one.type is kind and one.reason is reason for one in status.conditions)


def stays(holds: Callable[[], object], seconds: float) -> bool:
    """Return whether ``holds()`` is true all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not holds():
            return False
        time.sleep(0.1)
    return True


# --- what it does


def test_job_runs_through_all_stages(start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    workload.apply()
    for stage in STAGES:
        workload.play(stage)
    status = workload.wait_phase(Phase.SUCCEEDED)
    assert attempts(status) == [(stage, 1, Reason.STAGE_SUCCEEDED) for stage in STAGES]
    assert len(workload.children()) == 3
    assert "finalizers" not in workload.get()["metadata"]
    assert "annotations" not in workload.get()["metadata"]

    # What alerts and dashboards count.
    await_until(lambda: operator.metric("finetune_jobs", phase="Succeeded") == 1, "the job among those that succeeded")
    assert operator.metric("finetune_jobs") == 1
    ended = [operator.metric("finetune_stage_duration_seconds_count", stage=stage) for stage in STAGES]
    assert ended == [1, 1, 1]
    assert operator.metric("finetune_job_duration_seconds_count", phase="Succeeded") == 1
    await_until(lambda: operator.metric("finetune_queue_depth") == 0, "an empty queue")


@pytest.mark.parametrize(
    "change",
    [{"compute": {"workers": 4}}, {"compute": {"deepspeed": {"stage": 3}}}, {"method": {"type": "lora"}}],
    ids=["workers", "ZeRO stage", "method"],
)
def test_what_attempts_have_in_common_does_not_change(workload: Workload, change: dict[str, object]) -> None:
    workload.apply(**{"spec.method": {"type": "full"}, "spec.compute": {"workers": 2, "gpusPerWorker": 1}})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        workload.patch_spec("reviews", change)
    assert refusal.value.code == 422
    assert "the spec cannot be changed" in json.load(refusal.value)["message"]
    workload.patch_spec("reviews", {"runPolicy": {"suspend": True}})


def test_applied_job_is_taken_up_within_a_second(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    took: list[float] = []

    def is_taken_up_in_time() -> bool:
        applied = time.monotonic()
        workload.apply(name := f"reviews-{len(took)}")
        workload.wait(is_accepted, "accepted", name)
        workload.wait_child(Stage.CHECK, job=name)
        took.append(time.monotonic() - applied)
        return took[-1] < 1

    # One of many: what else this machine does is not what is measured.
    await_until(is_taken_up_in_time, "a job that is taken up within a second", seconds=90)


def test_operator_of_the_whole_cluster_finds_jobs_everywhere(start_operator: StartOperator, workload: Workload) -> None:
    start_operator(watchNamespaces=[])
    workload.apply()
    workload.wait(is_accepted, "accepted")


def test_job_that_cannot_be_is_failed_without_children(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply(**{"spec__data__tasks[0]__labels": ["one"]})
    status = workload.wait_phase(Phase.FAILED)
    accepted = next(one for one in status.conditions if one.type is ConditionType.ACCEPTED)
    assert "spec.data.tasks[0].labels" in accepted.message
    assert workload.children() == []


def test_failed_attempt_is_followed_by_another(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    workload.play(Stage.CHECK, exit_code=ExitCode.STORAGE, message="the hub is away")
    workload.play(Stage.CHECK, attempt=2)
    status = workload.wait_phase(Phase.TRAINING)
    assert attempts(status)[:2] == [(Stage.CHECK, 1, Reason.STORAGE), (Stage.CHECK, 2, Reason.STAGE_SUCCEEDED)]


def test_memory_limit_is_known_as_the_cause_though_the_pod_is_deleted_at_once(
    start_operator: StartOperator, workload: Workload
) -> None:
    start_operator()
    workload.apply(spec__training={"microBatchSize": 8})
    workload.play(Stage.CHECK)
    pod = workload.start_pod(child := workload.wait_child(Stage.TRAIN))
    workload.wait(has_reason(ConditionType.TRAINED, Reason.RUNNING), "running")
    workload.set_pod(pod, "Failed", {"terminated": {"exitCode": 137, "reason": "OOMKilled"}})
    workload.delete_pod(pod)
    workload.end_child(child, well=False)
    again = workload.wait_child(Stage.TRAIN, attempt=2)
    assert attempts(workload.status())[1] == (Stage.TRAIN, 1, Reason.OUT_OF_MEMORY)
    [container] = again["spec"]["template"]["spec"]["containers"]
    assert ("--micro-batch-size", "4") in itertools.pairwise(container["args"])


def test_suspended_job_waits_for_its_pod_and_goes_on_later(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    pod = workload.start_pod(workload.wait_child(Stage.CHECK))
    workload.wait(has_reason(ConditionType.CHECKED, Reason.RUNNING), "running")
    workload.patch_spec("reviews", {"runPolicy": {"suspend": True}})
    await_until(lambda: workload.children() == [], "its Job is deleted")
    assert workload.status().phase is not Phase.SUSPENDED, "its pod still runs"
    workload.delete_pod(pod)
    workload.wait_phase(Phase.SUSPENDED)
    workload.patch_spec("reviews", {"runPolicy": {"suspend": False}})
    workload.wait_child(Stage.CHECK, attempt=2)
    assert attempts(workload.status())[0] == (Stage.CHECK, 1, Reason.SUSPENDED_BY_USER)


def test_job_that_has_run_for_as_long_as_it_may_is_ended_while_its_pod_runs(
    start_operator: StartOperator, workload: Workload
) -> None:
    start_operator()
    workload.apply(spec__runPolicy__activeDeadlineSeconds=2)
    workload.start_pod(workload.wait_child(Stage.CHECK))
    status = workload.wait_phase(Phase.FAILED)
    assert attempts(status) == [(Stage.CHECK, 1, Reason.DEADLINE_EXCEEDED)]
    await_until(lambda: workload.children() == [], "its Job is deleted")


def test_transitions_are_told_as_events(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    workload.wait_child(Stage.CHECK)
    await_until(lambda: "StageStarted" in {one["reason"] for one in workload.events()}, "an event")
    (event,) = [one for one in workload.events() if one["reason"] == "StageStarted"]
    assert "reviews-check-a1" in event["message"]
    assert event["source"]["component"] == "finetune-operator"


def test_progress_does_not_wake_the_reconciler(
    api_server: ApiServer, start_operator: StartOperator, workload: Workload
) -> None:
    operator = start_operator()
    workload.apply()
    workload.start_pod(workload.wait_child(Stage.CHECK))
    workload.wait(has_reason(ConditionType.CHECKED, Reason.RUNNING), "running")
    looks = "finetune_reconcile_duration_seconds_count"
    await_until(
        lambda: (before := operator.metric(looks)) and stays(lambda: operator.metric(looks) == before, 1), "rest"
    )
    before = operator.metric(looks)
    for step in range(20):
        progress = {"stage": "check", "step": step, "lastUpdateTime": "2026-01-01T00:00:00Z"}
        path = f"{workload.path('finetunejobs', 'reviews')}/status"
        api_server.request("PATCH", path, {"status": {"progress": progress}}, MERGE)
    assert stays(lambda: operator.metric(looks) == before, 1)
    assert workload.status().progress is not None


# --- what keeps a job waiting


def test_missing_secret_is_told_within_15_seconds(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    pod = workload.start_pod(workload.wait_child(Stage.CHECK), running=False)
    workload.set_pod(pod, "Pending", {"waiting": {"reason": "ContainerCreating"}})
    uid = workload.server.request("GET", workload.path("pods", pod))["metadata"]["uid"]
    message = 'MountVolume.SetUp failed for volume "s3-read" : secret "s3-read" not found'
    workload.add_event("Pod", uid, "FailedMount", message)
    workload.wait(has_reason(ConditionType.CHECKED, Reason.REFERENCE_MISSING), "what is missing", seconds=15)
    assert "s3-read" in workload.message(ConditionType.CHECKED)
    workload.run_pod(pod)
    workload.wait(has_reason(ConditionType.CHECKED, Reason.RUNNING), "running after all")


def test_used_up_quota_is_told_within_15_seconds(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    child = workload.wait_child(Stage.CHECK)
    message = 'Error creating: pods "reviews-check-a1-x" is forbidden: exceeded quota: team, requested: cpu=2'
    workload.add_event("Job", child["metadata"]["uid"], "FailedCreate", message)
    workload.wait(has_reason(ConditionType.CHECKED, Reason.QUOTA_EXCEEDED), "the quota", seconds=15)


def test_image_that_cannot_be_pulled_is_told(start_operator: StartOperator, workload: Workload) -> None:
    start_operator()
    workload.apply()
    pod = workload.start_pod(workload.wait_child(Stage.CHECK), running=False)
    workload.set_pod(pod, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no/such:1"}})
    workload.wait(has_reason(ConditionType.CHECKED, Reason.IMAGE_PULL_FAILED), "the image")


def test_refused_job_is_told_and_created_when_it_may_be(
    api_server: ApiServer, start_operator: StartOperator, workload: Workload
) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    api_server.request("POST", workload.path("resourcequotas"), quota)
    used = {"status": {"hard": {"count/jobs.batch": "0"}, "used": {"count/jobs.batch": "0"}}}
    # What the quota controller would do.
    api_server.request("PATCH", f"{workload.path('resourcequotas', 'none')}/status", used, MERGE)
    start_operator()
    workload.apply()
    workload.wait(has_reason(ConditionType.CHECKED, Reason.QUOTA_EXCEEDED), "the quota")
    api_server.request("DELETE", workload.path("resourcequotas", "none"))
    workload.wait_child(Stage.CHECK, seconds=70)


def test_cap_lets_jobs_run_one_after_the_other(start_operator: StartOperator, workload: Workload) -> None:
    start_operator(policy={"maxRunningJobs": 1})
    for name in ("first", "second", "third"):
        workload.apply(name)
        workload.wait(
            lambda status: status.attempts or has_reason(ConditionType.ADMITTED, Reason.QUOTA_EXCEEDED)(status),
            "its turn or not",
            name,
        )
    workload.wait_child(Stage.CHECK, job="first")
    assert workload.children("second") == workload.children("third") == []
    workload.play(Stage.CHECK, job="first", exit_code=ExitCode.BAD_DATA)
    workload.wait_child(Stage.CHECK, job="second", seconds=5)
    assert workload.children("third") == []


# --- what it survives


def test_operator_killed_in_every_stage_repeats_nothing(start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    workload.apply()
    for stage in STAGES:
        pod = workload.start_pod(child := workload.wait_child(stage))
        operator.kill()
        workload.end_pod(pod, workload.result(stage))
        workload.end_child(child, well=True)
        operator.start()
    status = workload.wait_phase(Phase.SUCCEEDED)
    assert attempts(status) == [(stage, 1, Reason.STAGE_SUCCEEDED) for stage in STAGES]
    assert len(workload.children()) == 3


def test_stopped_operator_leaves_in_order(
    api_server: ApiServer, home: Home, start_operator: StartOperator, workload: Workload
) -> None:
    operator = start_operator()
    workload.apply()
    workload.wait_child(Stage.CHECK)
    started = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - started < 15
    lease = api_server.request("GET", LEASE_PATH.format(home.namespace))
    assert not lease["spec"].get("holderIdentity")
    assert "Traceback" not in operator.log()


def test_job_deleted_while_no_operator_runs_is_gone_for_good(start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    workload.apply()
    workload.wait_child(Stage.CHECK)
    operator.kill()
    workload.delete("reviews")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        workload.get()
    workload.delete_child("reviews-check-a1")
    operator.start()
    assert stays(lambda: workload.children() == [], 3)


def test_job_deleted_while_the_watch_is_broken_is_not_brought_back(
    api_server: ApiServer, start_operator: StartOperator, workload: Workload
) -> None:
    operator = start_operator()
    workload.apply("ghost")
    pod = workload.start_pod(workload.wait_child(Stage.CHECK, job="ghost"))
    workload.wait(has_reason(ConditionType.CHECKED, Reason.RUNNING), "running", "ghost")
    operator.pause()
    workload.delete("ghost")
    workload.delete_child("ghost-check-a1")
    workload.delete_pod(pod)
    # A new API server knows no versions of before its start: every watch has to begin anew.
    api_server.stop_server()
    api_server.start_server()
    operator.go_on()
    workload.apply()
    workload.play(Stage.CHECK)
    workload.wait_child(Stage.TRAIN)
    assert stays(lambda: workload.children("ghost") == [], 3)


def test_absent_api_server_is_waited_for(
    api_server: ApiServer, start_operator: StartOperator, workload: Workload
) -> None:
    operator = start_operator()
    pid = operator.pid
    workload.apply()
    child = workload.wait_child(Stage.CHECK)
    api_server.stop_server()
    assert stays(lambda: operator.get("/healthz") == "ok", 3)
    api_server.start_server()
    pod = workload.start_pod(child)
    workload.end_pod(pod, workload.result(Stage.CHECK))
    workload.end_child(child, well=True)
    workload.wait_child(Stage.TRAIN)
    assert operator.pid == pid


def test_lost_rights_are_survived(home: Home, start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    pid = operator.pid
    workload.apply("before")
    workload.wait_child(Stage.CHECK, job="before")
    home.set_rules([rule for rule in (*JOB_ACCESS, *CLUSTER_ACCESS) if rule[1] != "jobs"])
    workload.apply()
    workload.wait(is_accepted, "accepted")
    await_until(lambda: operator.metric("finetune_reconcile_retries_total") > 0, "another try")
    assert stays(lambda: workload.children() == [], 2)
    home.set_rules((*JOB_ACCESS, *CLUSTER_ACCESS))
    workload.wait_child(Stage.CHECK, seconds=70)
    assert operator.is_ready() and operator.pid == pid


def test_operator_without_rights_starts_when_it_gets_them(
    home: Home, start_operator: StartOperator, workload: Workload
) -> None:
    home.set_rules(())
    operator = start_operator(wait=False)
    workload.apply()
    await_until(lambda: "forbidden" in operator.log(), "a refusal in the log", START_SECONDS)
    home.set_rules((*JOB_ACCESS, *CLUSTER_ACCESS))
    workload.wait_child(Stage.CHECK, seconds=60)


def test_definition_may_come_and_go(api_server: ApiServer, start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    pid = operator.pid
    workload.apply()
    workload.wait_child(Stage.CHECK)
    api_server.request("DELETE", CRD_PATH)
    await_until(lambda: is_absent(api_server, CRD_PATH), "the definition is gone")
    workload.delete_child("reviews-check-a1")
    assert stays(lambda: operator.get("/healthz") == "ok", 3)
    install_crd(api_server)
    workload.apply("after")
    # Where kopf has asked too early, what is defined is found by another look within half a minute.
    workload.wait_child(Stage.CHECK, job="after", seconds=100)
    assert operator.pid == pid


def is_absent(server: ApiServer, path: str) -> bool:
    try:
        server.request("GET", path)
    except urllib.error.HTTPError as refusal:
        return refusal.code == 404
    return False


def test_one_of_two_replicas_acts_and_the_other_takes_over(
    api_server: ApiServer, home: Home, start_operator: StartOperator, workload: Workload
) -> None:
    first = start_operator("operator-0")
    workload.apply("early")
    workload.wait_child(Stage.CHECK, job="early")
    second = start_operator("operator-1")
    assert (first.metric("finetune_leader"), second.metric("finetune_leader")) == (1, 0)
    first.pause()
    workload.apply()
    # A frozen replica's lease runs out.
    workload.wait_child(Stage.CHECK, seconds=40)
    assert second.metric("finetune_leader") == 1
    first.go_on()
    await_until(lambda: first.metric("finetune_leader") == 0, "the first one has noticed")
    assert second.stop() == 0
    workload.play(Stage.CHECK, job="early")
    started = time.monotonic()
    workload.wait_child(Stage.TRAIN, job="early")
    assert time.monotonic() - started < 10
    assert api_server.request("GET", LEASE_PATH.format(home.namespace))["spec"]["holderIdentity"] == "operator-0"


def test_job_of_somebody_else_with_the_name_is_left_alone(
    api_server: ApiServer, start_operator: StartOperator, workload: Workload
) -> None:
    template = {"spec": {"containers": [{"name": "any", "image": "any"}], "restartPolicy": "Never"}}
    other = {"metadata": {"name": "reviews-check-a1"}, "spec": {"template": template}}
    uid = api_server.request("POST", workload.path("jobs"), other)["metadata"]["uid"]
    start_operator()
    workload.apply()
    workload.wait(has_reason(ConditionType.CHECKED, Reason.NAME_TAKEN), "the name is taken", seconds=15)
    assert api_server.request("GET", workload.path("jobs", "reviews-check-a1"))["metadata"]["uid"] == uid
    workload.delete_child("reviews-check-a1")
    await_until(lambda: workload.children() == ["reviews-check-a1"], "the name is free", 70)


def test_idle_operator_needs_little_memory(start_operator: StartOperator, workload: Workload) -> None:
    operator = start_operator()
    for number in range(30):
        workload.apply(f"reviews-{number}")
    await_until(lambda: all(workload.children(f"reviews-{number}") for number in range(30)), "all have begun", 60)
    assert operator.memory_bytes() < 150 * 2**20
