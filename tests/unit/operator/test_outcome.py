"""How attempts end, why they wait, when they are tried again: tables over what Kubernetes and the trainer say."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.report import CONTRACT_VERSION, ExitCode, Stage
from finetune_api.status import Attempt, Reason
from finetune_operator import waiting
from finetune_operator.attempt import FREE, deadline, may_start_at
from finetune_operator.observed import ChildKind, DeliveredResult, PodPhase
from finetune_operator.outcome import EXIT_REASONS, RETRYABLE, classify

from .objects import NOW, after, make_child, make_pod, make_result, make_settings

TRAIN = Stage.TRAIN
OVER = {"phase": PodPhase.FAILED}
FAILED = {"failed": True, "failure_reason": "PodFailurePolicy"}
TOO_MUCH_STORED = "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi. "


def said(exit_code: ExitCode, **changes: Any) -> str:
    return make_result(TRAIN, exit_code, **changes).model_dump_json(by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Ending:
    sentence: str
    reason: Reason | None
    """None: not known yet."""
    child: dict[str, Any] | None = field(default_factory=lambda: dict(FAILED))
    pod: dict[str, Any] | None = field(default_factory=dict)
    delivered: ExitCode | None = None
    exit_code: int | None = None
    says: str = ""


ENDINGS = (
    *(
        Ending(f"exit code {code.name}", EXIT_REASONS[code], pod=OVER | {"exit_code": code.value}, exit_code=code.value)
        for code in ExitCode
        if code is not ExitCode.OK
    ),
    Ending("it runs", None, child={}, pod={}),
    Ending("its Job has ended and its pod is still seen running", None, pod={}),
    Ending("its pod has ended and its Job is not yet told", None, child={}, pod=OVER | {"exit_code": 64}),
    Ending("the posted word counts while the pod runs", Reason.BAD_DATA, {}, {}, ExitCode.BAD_DATA, 65),
    Ending(
        "the termination message tells what was wrong",
        Reason.BAD_DATA,
        pod=OVER | {"exit_code": 65, "termination_message": said(ExitCode.BAD_DATA, message="no column x")},
        exit_code=65,
        says="no column x",
    ),
    Ending(
        "the kernel kills it at its memory limit",
        Reason.OUT_OF_MEMORY,
        pod=OVER | {"exit_code": 137, "out_of_memory": True},
        exit_code=137,
        says="spec.compute.resources.memory",
    ),
    Ending(
        "a worker that the kernel kills at its memory limit",
        Reason.OUT_OF_MEMORY,
        child={},
        pod=OVER | {"exit_code": 137, "out_of_memory": True},
        delivered=ExitCode.WORKER_LOST,
        exit_code=ExitCode.WORKER_LOST.value,
        says="was killed at its memory limit",
    ),
    Ending(
        "a worker that was killed and replaced before the program began",
        Reason.WORKER_LOST,
        child={"kind": ChildKind.RAY_JOB, "started": after(60)},
        pod=OVER | {"exit_code": 137, "out_of_memory": True, "finished": after(30)},
        delivered=ExitCode.WORKER_LOST,
        exit_code=ExitCode.WORKER_LOST.value,
    ),
    Ending(
        "the program's own pod is killed before it can say anything",
        Reason.OUT_OF_MEMORY,
        child=FAILED | {"kind": ChildKind.RAY_JOB, "started": after(60)},
        pod=OVER | {"exit_code": 137, "out_of_memory": True, "finished": after(90)},
        says="was killed at its memory limit",
    ),
    Ending(
        "Ray's head, which trains nothing, is killed at the memory limit that the administrator sets",
        Reason.CHILD_LOST,
        child=FAILED | {"kind": ChildKind.RAY_JOB, "started": after(60)},
        pod=OVER | {"exit_code": 137, "out_of_memory": True, "finished": after(90), "is_head": True},
        says="settings.pod.checkResources",
    ),
    Ending("a lost worker", Reason.WORKER_LOST, {}, OVER | {"exit_code": 137}, ExitCode.WORKER_LOST, 68),
    Ending("an evicted pod", Reason.PREEMPTED, pod=OVER | {"exit_code": 137, "disrupted": True}, exit_code=137),
    *(
        Ending(
            f"a pod evicted for what it stored, whose trainer {sentence}",
            Reason.STORAGE,
            pod=OVER | {"over_limit": TOO_MUCH_STORED} | ended,
            exit_code=ended.get("exit_code"),
            says=f"{TOO_MUCH_STORED.strip(' .')}. Raise spec.compute.resources.ephemeralStorage.",
        )
        for sentence, ended in {
            "could still say that it was stopped": {
                "exit_code": 75,
                "termination_message": said(ExitCode.PREEMPTED, message="stopped"),
            },
            "was killed": {"exit_code": 137},
            "nobody saw end": {},
        }.items()
    ),
    Ending(
        "evicted for what it stored, and already known when the trainer says that it was stopped",
        Reason.STORAGE,
        {},
        OVER | {"over_limit": 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". '},
        ExitCode.PREEMPTED,
        75,
        says="sizeLimit in spec.compute.pod.volumes",
    ),
    Ending(
        "a worker evicted for what it stored",
        Reason.STORAGE,
        {"kind": ChildKind.RAY_JOB},
        OVER | {"over_limit": TOO_MUCH_STORED},
        ExitCode.WORKER_LOST,
        68,
        says="spec.compute.resources.ephemeralStorage",
    ),
    Ending(
        "bad data, and evicted meanwhile",
        Reason.BAD_DATA,
        pod=OVER | {"over_limit": TOO_MUCH_STORED, "termination_message": said(ExitCode.BAD_DATA)},
        exit_code=65,
    ),
    Ending(
        "killed when its node went down",
        Reason.CHILD_LOST,
        pod=OVER | {"exit_code": 137},
        exit_code=137,
        says="its node went down or ran out of memory",
    ),
    Ending("a pod whose node is gone", Reason.PREEMPTED, pod=OVER | {"disrupted": True}),
    Ending("asked to stop before it listened", Reason.PREEMPTED, pod=OVER | {"exit_code": 143}, exit_code=143),
    Ending("a crash of the machine code", Reason.INTERNAL, pod=OVER | {"exit_code": 139}, exit_code=139, says="11"),
    Ending(
        "Python's own crash",
        Reason.INTERNAL,
        pod=OVER | {"exit_code": 1, "termination_message": "ModuleNotFoundError: finetune_trainer"},
        exit_code=1,
        says="ModuleNotFoundError",
    ),
    Ending(
        "another image that says nothing",
        Reason.INTERNAL,
        {"succeeded": True},
        {"phase": PodPhase.SUCCEEDED, "exit_code": 0},
        says="spec.compute.image",
    ),
    Ending(
        "it says that all went well and crashes",
        Reason.INTERNAL,
        pod=OVER | {"exit_code": 139, "termination_message": said(ExitCode.OK)},
        exit_code=139,
    ),
    Ending(
        "another contract",
        Reason.CONTRACT_SKEW,
        {"succeeded": True},
        {
            "phase": PodPhase.SUCCEEDED,
            "exit_code": 0,
            "termination_message": '{"contractVersion": 99, "unheardOf": true}',
        },
        says=f"version 99 and this operator {CONTRACT_VERSION}",
    ),
    Ending("Job and pod are gone", Reason.CHILD_LOST, None, None, says="deleted"),
    Ending("the pod of a Job that succeeded is gone", Reason.CHILD_LOST, {"succeeded": True}, None),
    Ending(
        "the Job remembers the exit code of its pod",
        Reason.STORAGE,
        FAILED
        | {
            "failure_message": "Container trainer for pod a/b failed with exit code 69 matching FailJob rule at index 0"
        },
        None,
        exit_code=69,
    ),
    Ending(
        "the Job remembers the disruption of its pod",
        Reason.PREEMPTED,
        FAILED | {"failure_message": "Pod a/b has condition DisruptionTarget matching FailJob rule at index 1"},
        None,
    ),
    Ending("a Job that failed for no known reason", Reason.CHILD_LOST, FAILED | {"failure_message": "x"}, None),
)


@pytest.mark.parametrize("row", ENDINGS, ids=lambda row: row.sentence)
def test_how_an_attempt_ended(row: Ending):
    child = None if row.child is None else make_child(TRAIN, **row.child)
    pods = () if row.pod is None else (make_pod(TRAIN, **row.pod),)
    delivered = row.delivered and DeliveredResult(TRAIN, 1, make_result(TRAIN, row.delivered))
    outcome = classify(child, pods, delivered)
    assert (outcome.reason if outcome else None) is row.reason
    if outcome is not None:
        assert outcome.exit_code == row.exit_code
        assert row.says in outcome.message


def test_the_check_is_sized_by_the_administrator():
    pod = make_pod(Stage.CHECK, **OVER | {"exit_code": 137, "out_of_memory": True})
    outcome = classify(make_child(Stage.CHECK, **FAILED), (pod,), None)
    assert outcome is not None
    assert "settings.pod.checkResources" in outcome.message
    assert "spec.compute" not in outcome.message


def test_the_newest_pod_tells():
    pods = (
        make_pod(TRAIN, uid="1", phase=PodPhase.FAILED, exit_code=75),
        make_pod(TRAIN, uid="2", phase=PodPhase.FAILED, exit_code=65, created=after(9)),
    )
    outcome = classify(make_child(TRAIN, **FAILED), pods, None)
    assert outcome is not None
    assert outcome.reason is Reason.BAD_DATA


def test_the_limit_of_what_a_check_stores_is_the_administrators():
    pod = make_pod(Stage.CHECK, phase=PodPhase.FAILED, exit_code=137, over_limit=TOO_MUCH_STORED)
    outcome = classify(make_child(Stage.CHECK, **FAILED), (pod,), None)
    assert outcome is not None
    assert "Raise ephemeralStorage in settings.pod.checkResources" in outcome.message


def test_a_worker_that_its_memory_limit_killed_counts_more_than_the_head():
    head, worker = (
        make_pod(TRAIN, **OVER, name=name, uid=name, out_of_memory=True, is_head=name == "head")
        for name in ("head", "worker")
    )
    outcome = classify(make_child(TRAIN, **FAILED, kind=ChildKind.RAY_JOB), (head, worker), None)
    assert outcome is not None
    assert outcome.reason is Reason.OUT_OF_MEMORY
    assert "pod worker" in outcome.message and "spec.compute.resources.memory" in outcome.message


def test_what_may_be_tried_again_is_what_the_contract_says():
    for code in ExitCode:
        assert (EXIT_REASONS[code] in RETRYABLE) is code.is_retryable
    assert set(FREE) <= RETRYABLE


@pytest.mark.parametrize(
    "left_behind",
    [
        pytest.param(said(ExitCode.BAD_DATA, message="row 3\x1b[2J is bad"), id="a result"),
        pytest.param("Traceback\x1b[2J is bad", id="something else"),
    ],
)
def test_nothing_that_a_process_left_behind_moves_the_cursor(left_behind: str):
    pod = make_pod(TRAIN, phase=PodPhase.FAILED, exit_code=ExitCode.BAD_DATA.value, termination_message=left_behind)
    outcome = classify(make_child(TRAIN, **FAILED), (pod,), None)
    assert outcome is not None
    assert "[2J is bad" in outcome.message
    assert "\x1b" not in outcome.message


# --- waiting

WAITS = (
    ("ErrImagePull", "not found", Reason.IMAGE_PULL_FAILED, "spec.compute.image"),
    ("ImagePullBackOff", "Back-off pulling image", Reason.IMAGE_PULL_FAILED, "spec.compute.imagePullSecrets"),
    ("Unschedulable", "0/3 nodes are available: insufficient gpu", Reason.UNSCHEDULABLE, "0/3 nodes"),
    ("Unschedulable", 'persistentvolumeclaim "rows" not found', Reason.REFERENCE_MISSING, '"rows"'),
    ("FailedMount", 'MountVolume.SetUp failed: secret "s3" not found', Reason.REFERENCE_MISSING, '"s3"'),
    ("CreateContainerConfigError", 'configmap "x" not found', Reason.REFERENCE_MISSING, "Create it"),
    ("FailedCreate", 'pods "a" is forbidden: exceeded quota: gpus', Reason.QUOTA_EXCEEDED, "quota"),
    (
        "FailedCreate",
        'pods "a" is forbidden: failed quota: compute: must specify limits.cpu for: trainer',
        Reason.QUOTA_EXCEEDED,
        "settings.pod.checkResources",
    ),
    (
        "FailedCreate",
        'pods "a-" is forbidden: error looking up service account team/x: serviceaccount "x" not found',
        Reason.REFERENCE_MISSING,
        "spec.compute.pod.serviceAccountName",
    ),
    (
        "FailedCreate",
        'pods "a-" is forbidden: no PriorityClass with name high was found',
        Reason.REFERENCE_MISSING,
        "spec.compute.priorityClassName",
    ),
    (
        "FailedCreate",
        'pods "a-" is forbidden: violates PodSecurity "restricted:latest": hostPath volumes',
        Reason.POLICY_VIOLATED,
        "spec.compute.pod",
    ),
    ("FailedMount", "timed out waiting for the volume", Reason.WAITING, "timed out"),
    ("", "", Reason.WAITING, "about to start"),
)


@pytest.mark.parametrize(("kubernetes", "message", "reason", "says"), WAITS)
def test_why_a_pod_waits(kubernetes: str, message: str, reason: Reason, says: str):
    pod = make_pod(TRAIN, phase=PodPhase.PENDING, waiting_reason=kubernetes, waiting_message=message)
    wait = waiting.why_waiting(make_child(TRAIN), (pod,))
    assert wait.reason is reason
    assert says in wait.message
    assert pod.name in wait.message


def test_a_job_without_a_pod_says_why():
    child = make_child(TRAIN, waiting_reason="FailedCreate", waiting_message="exceeded quota: compute")
    assert waiting.why_waiting(child, ()).reason is Reason.QUOTA_EXCEEDED


def test_a_refusal_of_the_api_server_is_told_as_it_is():
    assert waiting.refused("Job a", 'jobs.batch "a" is forbidden: exceeded quota').reason is Reason.QUOTA_EXCEEDED
    wait = waiting.refused("Job a", "admission webhook denied the request: no")
    assert wait.reason is Reason.POD_NOT_STARTED
    assert "admission webhook denied" in wait.message


# --- again


def ended(reason: Reason, failures: int) -> Attempt:
    return Attempt(stage=TRAIN, number=1, child="c", reason=reason, failures=failures, end_time=NOW)


@pytest.mark.parametrize(
    ("reason", "failures", "seconds"),
    [
        (Reason.STORAGE, 1, 10),
        (Reason.STORAGE, 2, 20),
        (Reason.STORAGE, 3, 40),
        (Reason.STORAGE, 20, 300),
        (Reason.PREEMPTED, 3, 10),
        (Reason.SUSPENDED_BY_USER, 3, 0),
    ],
)
def test_pauses_double_with_every_fault(reason: Reason, failures: int, seconds: int):
    assert may_start_at(ended(reason, failures), make_settings()) == NOW + timedelta(seconds=seconds)


def test_the_deadline_counts_what_ran_before():
    attempt = Attempt(number=2, child="c", start_time=NOW, earlier_seconds=100)
    assert deadline(attempt, 160) == after(60)
    assert deadline(Attempt(number=1, child="c"), 160) is None
