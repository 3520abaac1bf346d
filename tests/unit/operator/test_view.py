"""Raw objects become small views; what is not understood is left out and breaks nothing."""

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_api.status import Phase
from finetune_operator.observed import PodPhase
from finetune_operator.view import child_view, job_view, packed_job, pod_view, queue_told, trouble_told

from .objects import NAME, NAMESPACE, UID
from .raw_objects import CREATED, container, queue_condition, raw_child, raw_job, raw_pod, raw_workload

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
IMAGE_ID = f"registry.example/finetune-trainer@sha256:{'a' * 64}"
LATER = "2026-01-02T04:00:00Z"

ACCEPTED = {"type": "Accepted", "status": "True"}
SUSPENDED = {"spec.runPolicy": {"suspend": True}}
HELD_BACK = {
    "type": "Admitted",
    "status": "False",
    "reason": "QuotaExceeded",
    "lastTransitionTime": CREATED,
}


# --- FineTuneJobs


def test_job_is_what_was_packed() -> None:
    raw = raw_job(status={"phase": "Training"}, labels={"team": "a"}, managedFields=[{"manager": "kubectl"}])
    job = job_view(packed_job(raw))
    assert (job.key, job.uid, job.generation, job.resource_version) == ((NAMESPACE, NAME), UID, 1, "7")
    assert (job.created, job.deleting, job.labels) == (TIME, False, {"team": "a"})
    assert job.spec == raw["spec"]
    assert job.status.phase is Phase.TRAINING


def test_packed_job_is_small() -> None:
    managed = [{"manager": "kubectl", "fieldsV1": {f"f:{number}": {} for number in range(500)}}]
    assert len(packed_job(raw_job(managedFields=managed)).content) < 2048


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        pytest.param({"progress": {"stage": "train", "step": 2}}, False, id="a step further"),
        pytest.param({"latestMetrics": [{"name": "loss", "value": "1"}]}, False, id="another loss"),
        pytest.param({"summary": {"progress": "3 %", "eta": "1m", "message": "runs"}}, False, id="another percentage"),
        pytest.param({"progress": {"stage": "publish", "step": 1}}, True, id="publishing has begun"),
        pytest.param({"summary": {"message": "waits"}}, True, id="another headline"),
        pytest.param({"phase": "Failed"}, True, id="another phase"),
    ],
)
def test_essence_changes_with_anything_but_progress(status: dict[str, Any], changes: bool) -> None:
    before = {"phase": "Training", "progress": {"stage": "train", "step": 1}, "summary": {"message": "runs"}}
    old = packed_job(raw_job(status=before))
    new = packed_job(raw_job(status=before | status, resourceVersion="8"))
    assert (old.essence != new.essence) is changes


@pytest.mark.parametrize("change", [{"labels": {"a": "b"}}, {"generation": 2}, {"deletionTimestamp": CREATED}])
def test_essence_changes_with_the_metadata(change: dict[str, Any]) -> None:
    assert packed_job(raw_job()).essence != packed_job(raw_job(**change)).essence


def test_phase_of_another_version_is_no_phase() -> None:
    assert packed_job(raw_job(status={"phase": "Dreaming"})).phase is None


def test_job_held_back_by_the_cap_is_known_without_unpacking() -> None:
    assert packed_job(raw_job(status={"conditions": [ACCEPTED, HELD_BACK]})).held_back
    assert not packed_job(raw_job(status={"conditions": [ACCEPTED, HELD_BACK | {"reason": "InQueue"}]})).held_back
    assert not packed_job(raw_job(SUSPENDED, status={"conditions": [ACCEPTED, HELD_BACK]})).held_back


@pytest.mark.parametrize(
    ("given", "status", "metadata", "wants"),
    [
        pytest.param({}, {"conditions": [ACCEPTED]}, {}, True, id="an accepted job wants to run"),
        pytest.param({}, {}, {}, True, id="so may one that is not judged yet"),
        pytest.param({}, {"conditions": [ACCEPTED | {"status": "False"}]}, {}, False, id="a refused one has no turn"),
        pytest.param(
            {}, {"conditions": [ACCEPTED | {"status": "Unknown"}]}, {}, False, id="nor one that is not pinned"
        ),
        pytest.param({}, {"conditions": [ACCEPTED], "phase": "Failed"}, {}, False, id="nor one that has ended"),
        pytest.param({}, {"conditions": [ACCEPTED]}, {"deletionTimestamp": CREATED}, False, id="nor a deleted one"),
        pytest.param(SUSPENDED, {"conditions": [ACCEPTED]}, {}, False, id="nor a suspended one"),
        pytest.param(
            {},
            {"conditions": [ACCEPTED, {"type": "Trained", "status": "Unknown", "reason": "KubeRayMissing"}]},
            {},
            False,
            id="nor one that waits for KubeRay",
        ),
    ],
)
def test_who_has_a_turn(given: dict[str, Any], status: dict[str, Any], metadata: dict[str, Any], wants: bool) -> None:
    assert packed_job(raw_job(given, status, **metadata)).wants_to_run is wants


def test_job_has_begun_while_an_attempt_is_open() -> None:
    attempt = {"stage": "check", "number": 1, "child": "c"}
    assert packed_job(raw_job(status={"attempts": [attempt]})).has_begun
    reported = attempt | {"endTime": CREATED}
    assert packed_job(raw_job(status={"attempts": [reported]})).has_begun
    assert not packed_job(raw_job(status={"attempts": [reported | {"reason": "StageSucceeded"}]})).has_begun
    assert not packed_job(raw_job(status={"attempts": [attempt], "phase": "Failed"})).has_begun


# --- children


def test_child_says_whose_it_is() -> None:
    child = child_view(raw_child(Stage.TRAIN, 2))
    assert child is not None
    assert (child.owner_uid, child.stage, child.attempt, child.admitted) == (UID, Stage.TRAIN, 2, TIME)
    assert not child.is_over


@pytest.mark.parametrize(
    ("conditions", "succeeded", "failed"),
    [
        ([("SuccessCriteriaMet", "True")], False, False),
        ([("SuccessCriteriaMet", "True"), ("Complete", "True")], True, False),
        ([("FailureTarget", "True")], False, False),
        ([("FailureTarget", "True"), ("Failed", "True")], False, True),
        ([("Failed", "False")], False, False),
    ],
    ids=str,
)
def test_child_is_over_when_its_pods_are(conditions: list[tuple[str, str]], succeeded: bool, failed: bool) -> None:
    told = [
        {"type": kind, "status": status, "reason": "PodFailurePolicy", "message": "why", "lastTransitionTime": LATER}
        for kind, status in conditions
    ]
    child = child_view(raw_child(status={"conditions": told}))
    assert child is not None
    assert (child.succeeded, child.failed) == (succeeded, failed)
    assert child.failure_reason == ("PodFailurePolicy" if failed else "")


def test_child_in_a_queue_is_not_admitted_and_later_since_it_was_let_go() -> None:
    queued = child_view(raw_child(spec={"suspend": True}))
    assert queued is not None and queued.suspended and queued.admitted is None
    resumed = {"type": "Suspended", "status": "False", "reason": "JobResumed", "lastTransitionTime": LATER}
    running = child_view(raw_child(spec={"suspend": False}, status={"conditions": [resumed]}))
    assert running is not None and running.admitted == datetime(2026, 1, 2, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({"ownerReferences": []}, id="without owner"),
        pytest.param({"ownerReferences": [{"kind": "CronJob", "uid": "x", "controller": True}]}, id="of a CronJob"),
        pytest.param({"labels": {}}, id="without labels"),
        pytest.param({"labels": {"finetune.dev/stage": "train", "finetune.dev/attempt": "x"}}, id="with odd labels"),
    ],
)
def test_stranger_is_no_child(metadata: dict[str, Any]) -> None:
    assert child_view(raw_child(metadata=metadata)) is None


# --- pods


def test_running_pod() -> None:
    status = {"phase": "Running", **container(running={"startedAt": CREATED})}
    status["containerStatuses"][0]["imageID"] = IMAGE_ID
    pod = pod_view(raw_pod(status=status, spec={"nodeName": "node-1"}))
    assert pod is not None
    assert pod.image_id == IMAGE_ID
    assert (pod.phase, pod.started, pod.node, pod.child_uid, pod.job_uid) == (
        PodPhase.RUNNING,
        TIME,
        "node-1",
        "child",
        UID,
    )
    assert (pod.exit_code, pod.waiting_reason) == (None, "")


def test_pod_that_is_deleted_says_when_it_is_to_be_gone() -> None:
    pod = pod_view(raw_pod(metadata={"deletionTimestamp": LATER, "deletionGracePeriodSeconds": 30}))
    assert pod is not None and pod.gone_by == datetime(2026, 1, 2, 4, tzinfo=UTC)


def test_ended_pod_says_how() -> None:
    ended = {"exitCode": 65, "startedAt": CREATED, "finishedAt": LATER, "message": "{}", "reason": "Error"}
    pod = pod_view(raw_pod(status={"phase": "Failed", **container(terminated=ended)}))
    assert pod is not None
    assert (pod.exit_code, pod.termination_message, pod.out_of_memory, pod.is_over) == (65, "{}", False, True)


def test_pod_killed_for_its_memory() -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "startedAt": CREATED, "finishedAt": LATER}
    pod = pod_view(raw_pod(status={"phase": "Failed", **container(terminated=ended)}))
    assert pod is not None and pod.out_of_memory


DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}
EVICTED = {"phase": "Failed", "reason": "Evicted"}


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"phase": "Failed", **DISRUPTED}, id="preempted, or drained from its node"),
        pytest.param(
            EVICTED | DISRUPTED | {"message": "The node was low on resource: ephemeral-storage. "},
            id="evicted for its node's sake",
        ),
        pytest.param(
            EVICTED | DISRUPTED | {"message": "Container trainer was using 9Gi, which exceeds its request of 0. "},
            id="evicted for its node's sake, as the one that stored most",
        ),
        pytest.param(
            EVICTED | {"message": "Pod was rejected: The node had condition: [DiskPressure]. "},
            id="refused by a node that lacks room",
        ),
    ],
)
def test_disrupted_pod(status: dict[str, Any]) -> None:
    pod = pod_view(raw_pod(status=status))
    assert pod is not None and pod.disrupted and not pod.over_limit


@pytest.mark.parametrize(
    "message",
    [
        "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi. ",
        'Container trainer exceeded its local ephemeral storage limit "20Gi". ',
        'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". ',
    ],
)
def test_pod_evicted_for_what_it_stored_was_not_disrupted(message: str) -> None:
    pod = pod_view(raw_pod(status=EVICTED | {"message": message}))
    assert pod is not None
    assert (pod.over_limit, pod.disrupted) == (message, False)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (container(waiting={"reason": "ImagePullBackOff", "message": "no/such:1"}), "ImagePullBackOff"),
        (container(waiting={"reason": "ContainerCreating"}), ""),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}, "Unschedulable"),
        ({}, ""),
    ],
    ids=str,
)
def test_waiting_pod_says_why_as_far_as_its_status_does(status: dict[str, Any], reason: str) -> None:
    pod = pod_view(raw_pod(status={"phase": "Pending", **status}))
    assert pod is not None and pod.waiting_reason == reason


# --- events


def make_event(reason: str, time: str, kind: str = "Warning", **more: Any) -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": reason, "lastTimestamp": time, "metadata": {}, **more}


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        pytest.param([], "", id="nothing is told"),
        pytest.param(
            [make_event("Scheduled", CREATED, "Normal"), make_event("FailedMount", CREATED)],
            "FailedMount",
            id="of one second, the warning counts",
        ),
        pytest.param(
            [make_event("FailedMount", CREATED), make_event("Pulling", LATER, "Normal")],
            "",
            id="what is over is not told",
        ),
        pytest.param(
            [make_event("FailedMount", LATER), make_event("Scheduled", CREATED, "Normal")],
            "FailedMount",
            id="the newest counts in any order",
        ),
        pytest.param(
            [
                make_event("FailedMount", "", lastTimestamp=None, eventTime="2026-01-02T05:00:00.123456Z"),
                make_event("Scheduled", LATER, "Normal"),
            ],
            "FailedMount",
            id="a new client's time is read as well",
        ),
    ],
)
def test_trouble_is_what_the_newest_event_warns_of(events: list[dict[str, Any]], reason: str) -> None:
    assert trouble_told(events)[0] == reason


# --- a queue

SHORT_OF_CPU = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor any, 1 more needed"
PENDING = queue_condition("QuotaReserved", "False", SHORT_OF_CPU)
PREEMPTED = queue_condition("Evicted", "True", "Preempted to accommodate a workload")


@pytest.mark.parametrize(
    ("workloads", "message"),
    [
        pytest.param([], "", id="Kueue has not seen it"),
        pytest.param([{**raw_workload(), "status": None}], "", id="nor looked at it"),
        pytest.param([raw_workload(PENDING)], SHORT_OF_CPU, id="it lacks quota"),
        pytest.param([raw_workload(PENDING, owner="another")], "", id="another one lacks quota"),
        pytest.param([raw_workload(PREEMPTED, PENDING)], SHORT_OF_CPU, id="evicted, it waits again"),
        pytest.param(
            [
                raw_workload(
                    queue_condition("QuotaReserved", "True", "Quota reserved"),
                    PREEMPTED | {"lastTransitionTime": LATER},
                )
            ],
            "Preempted to accommodate a workload",
            id="evicted, it still holds its quota",
        ),
        pytest.param(
            [raw_workload(PENDING, queue_condition("Evicted", "True", "The workload is deactivated", LATER))],
            "The workload is deactivated",
            id="deactivated while it waited",
        ),
        pytest.param(
            [
                raw_workload(
                    queue_condition("Evicted", "False", "Previously: Preempted", LATER),
                    queue_condition("Admitted", "False", "The workload has no reservation", LATER),
                    queue_condition("QuotaReserved", "True", "Quota reserved in ClusterQueue gpu"),
                )
            ],
            "Quota reserved in ClusterQueue gpu",
            id="with quota, it waits for a check of its queue",
        ),
    ],
)
def test_queue_says_what_it_found_last(workloads: list[dict[str, Any]], message: str) -> None:
    assert queue_told(workloads, "child") == ("Pending" if message else "", message)
