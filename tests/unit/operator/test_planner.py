"""Single decisions that a whole life does not show: what is said while a job waits, and what is done at its edges."""

import time
from dataclasses import replace
from typing import Any

import pytest

from finetune_api.job import spec_hash
from finetune_api.report import ExitCode, GateResult, Stage
from finetune_api.status import (
    Condition,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    ProgressStatus,
    Reason,
    ResolvedStatus,
    StageStatus,
    Summary,
)
from finetune_api.stored_status import read_status
from finetune_operator import naming
from finetune_operator.action import Action, Create, Delete, Emit, EventType, Plan, RecordStatus, Replace
from finetune_operator.attempt import following
from finetune_operator.condition import LONGEST_HEADLINE, Statement, derive_phase, find, stated
from finetune_operator.manifest import JOB_FILE, trust_hash
from finetune_operator.observed import DeliveredResult, JobView, Observed, PodPhase, PodView
from finetune_operator.planner import plan

from .objects import (
    CA,
    IMAGE,
    NOW,
    after,
    make_child,
    make_pod,
    make_resolved,
    make_result,
    make_settings,
    make_view,
)
from .raw_objects import CREATED

SETTINGS = make_settings()
SAID = '{"stage":"check","exitCode":0}'
CHECK, TRAIN = Stage.CHECK, Stage.TRAIN
CHECKED = Statement(ConditionType.CHECKED, ConditionStatus.TRUE, Reason.STAGE_SUCCEEDED)


def pinned_status(given: dict[str, Any] | None = None, **fields: Any) -> FineTuneJobStatus:
    """Return the status of a job that has been accepted."""
    hash_of_spec = spec_hash(make_resolved(given).spec)
    resolved = ResolvedStatus(
        config_map=naming.spec_config_map_name("reviews", hash_of_spec), spec_hash=hash_of_spec, image=IMAGE
    )
    status = FineTuneJobStatus(resolved=resolved, **fields)
    accepted = Statement(ConditionType.ACCEPTED, ConditionStatus.TRUE, Reason.SPEC_VALID)
    return stated(status, [accepted], NOW, 1)


def accepted_job(given: dict[str, Any] | None = None, **fields: Any) -> JobView:
    return make_view(given, pinned_status(given, **fields))


def checking_job(given: dict[str, Any] | None = None, **attempt: Any) -> JobView:
    """Return a job whose first attempt at the check stage has been recorded."""
    first = following(FineTuneJobStatus(), CHECK, make_resolved(given), NOW).model_copy(update=attempt)
    return accepted_job(given, attempts=(first,))


def seen(given: dict[str, Any] | None = None, **fields: Any) -> Observed:
    known = {"resolved": make_resolved(given), "progress_ca": CA, "trust_hash": trust_hash(CA, "")}
    return Observed(**(known | fields))


def kinds(actions: tuple[Action, ...]) -> list[str]:
    return [type(action).__name__ for action in actions if not isinstance(action, Emit)]


def recorded(made: Plan) -> FineTuneJobStatus:
    [record] = [action for action in made.actions if isinstance(action, RecordStatus)]
    return record.status


def told(made: Plan) -> list[Reason]:
    return [action.reason for action in made.actions if isinstance(action, Emit)]


def condition(made: Plan, kind: ConditionType) -> Condition:
    found = find(recorded(made), kind)
    assert found is not None, recorded(made).conditions
    return found


# --- order


def test_an_attempt_is_recorded_before_its_job_is_created():
    made = plan(accepted_job(), seen(trust_hash=None), SETTINGS, NOW)
    assert kinds(made.actions) == ["RecordStatus", "Replace", "Create"]
    assert recorded(made).attempts[0].child == "reviews-check-a1"


def test_the_image_that_a_pod_ran_is_recorded_and_told_to_the_next_stage():
    image_id = f"registry.example/trainer@sha256:{'c' * 64}"
    job = checking_job()
    pods = (make_pod(CHECK, started=NOW, node="n", image_id=image_id),)
    job = replace(job, status=recorded(plan(job, seen(children=(make_child(CHECK),), pods=pods), SETTINGS, NOW)))
    assert job.status.attempts[0].image_id == image_id
    assert following(job.status, TRAIN, make_resolved(), NOW).image_id == image_id


def test_the_end_is_recorded_before_anything_is_deleted():
    job = checking_job({"spec.runPolicy.startDeadlineSeconds": 60})
    made = plan(job, seen(children=(make_child(CHECK),)), SETTINGS, after(61))
    assert kinds(made.actions) == ["RecordStatus", "Delete"]
    assert recorded(made).phase is Phase.FAILED


def test_a_job_that_is_being_deleted_is_left_alone():
    assert plan(replace(accepted_job(), deleting=True), seen(), SETTINGS, NOW) == Plan()


def test_a_job_that_evaluates_only_says_why_it_does_not_train():
    given = {"spec.model.startFrom": {"source": "pvc://models/earlier/model"}, "spec.training.epochs": 0}
    ended = StageStatus(stage=CHECK, attempt=1, exit_code=0, end_time=NOW)
    job = accepted_job(given, stages=(ended,))
    job = replace(job, status=stated(job.status, [CHECKED], NOW, 1))
    made = plan(job, seen(given), SETTINGS, NOW)
    assert recorded(made).attempts[0].child == "reviews-evaluate-a1"
    assert recorded(made).phase is Phase.EVALUATING
    trained = condition(made, ConditionType.TRAINED)
    assert (trained.status, trained.reason) == (ConditionStatus.UNKNOWN, Reason.SKIPPED)
    assert "spec.training.epochs is 0" in trained.message


# --- acceptance


def test_a_job_waits_for_the_one_that_it_goes_on_from():
    given = {"spec.model.startFrom": {"job": "general"}}
    made = plan(make_view(given), Observed(), SETTINGS, NOW)
    accepted = condition(made, ConditionType.ACCEPTED)
    assert (accepted.status, accepted.reason) == (ConditionStatus.UNKNOWN, Reason.WAITING_FOR_JOB)
    assert recorded(made).phase is Phase.PENDING
    assert made.wake_at == after(60)


def test_a_job_is_pinned_recorded_and_begun_at_its_first_look():
    made = plan(make_view(), Observed(progress_ca=CA), SETTINGS, NOW)
    assert kinds(made.actions) == ["Create", "RecordStatus", "Replace", "Create"]
    assert recorded(made).attempts[0].child == "reviews-check-a1"
    assert condition(made, ConditionType.ACCEPTED).status is ConditionStatus.TRUE
    pin = made.actions[0]
    assert isinstance(pin, Create)
    assert made.pinned == pin.manifest["data"][JOB_FILE]


def test_a_suspended_job_is_pinned_and_not_begun():
    made = plan(make_view({"spec.runPolicy.suspend": True}), Observed(progress_ca=CA), SETTINGS, NOW)
    assert kinds(made.actions) == ["Create", "RecordStatus"]
    assert recorded(made).phase is Phase.SUSPENDED


# --- watches that lag


def test_a_job_that_has_ended_is_not_lost_before_its_pod_must_have_been_told_of():
    job, child = checking_job(), make_child(CHECK, succeeded=True, finished=NOW)
    made = plan(job, seen(children=(child,)), SETTINGS, after(3))
    assert recorded(made).attempts[0].end_time is None
    assert made.wake_at == after(10)
    pod = make_pod(CHECK, phase=PodPhase.SUCCEEDED, exit_code=0, finished=NOW, termination_message=SAID)
    told_of = plan(job, seen(children=(child,), pods=(pod,)), SETTINGS, after(4))
    assert recorded(told_of).attempts[0].reason is Reason.STAGE_SUCCEEDED
    lost = plan(job, seen(children=(child,)), SETTINGS, after(10))
    assert recorded(lost).attempts[0].reason is Reason.CHILD_LOST


def test_a_pod_that_tells_after_its_trainer_why_it_was_stopped_makes_a_fault_of_it():
    job, child = checking_job(), make_child(CHECK)
    pod = make_pod(CHECK, started=NOW)
    said = DeliveredResult(CHECK, 1, make_result(CHECK, ExitCode.PREEMPTED))
    stopped = recorded(plan(job, seen(children=(child,), pods=(pod,), results=(said,)), SETTINGS, after(9)))
    assert (stopped.attempts[0].reason, stopped.attempts[0].failures) == (Reason.PREEMPTED, 0)
    evicted = replace(pod, phase=PodPhase.FAILED, over_limit="Pod ephemeral local storage usage exceeds 20Gi.")
    made = plan(replace(job, status=stopped), seen(children=(child,), pods=(evicted,)), SETTINGS, after(10))
    [attempt] = recorded(made).attempts
    assert (attempt.reason, attempt.failures, attempt.end_time) == (Reason.STORAGE, 1, after(9))
    assert "usage exceeds 20Gi" in condition(made, ConditionType.CHECKED).message
    assert told(made) == [Reason.RETRYING]
    again = seen(children=(child,), pods=(evicted,))
    assert plan(replace(job, status=recorded(made)), again, SETTINGS, after(11)).actions == ()


def test_a_head_that_is_found_killed_later_makes_no_other_end_of_it():
    job, child = checking_job(), make_child(CHECK)
    said = DeliveredResult(CHECK, 1, make_result(CHECK, ExitCode.WORKER_LOST))
    lost = recorded(plan(job, seen(children=(child,), results=(said,)), SETTINGS, after(9)))
    head = make_pod(CHECK, phase=PodPhase.FAILED, started=NOW, out_of_memory=True, is_head=True)
    found = seen(children=(child,), pods=(head,))
    assert plan(replace(job, status=lost), found, SETTINGS, after(10)).actions == ()


# --- what is worth a write


def test_a_job_and_a_pod_that_take_their_time_are_no_news():
    job = checking_job()
    about_to_start = recorded(plan(job, seen(), SETTINGS, NOW))
    waiting, child = replace(job, status=about_to_start), make_child(CHECK)
    pod = make_pod(CHECK, phase=PodPhase.PENDING)
    assert plan(waiting, seen(children=(child,)), SETTINGS, after(1)).actions == ()
    assert plan(waiting, seen(children=(child,), pods=(pod,)), SETTINGS, after(2)).actions == ()


def test_a_pod_that_runs_is_recorded_and_told_by_no_event_unless_something_was_wrong():
    job, child = checking_job(), make_child(CHECK)
    stuck = make_pod(CHECK, phase=PodPhase.PENDING, waiting_reason="Unschedulable", waiting_message="0/3 nodes")
    runs = seen(children=(child,), pods=(make_pod(CHECK, phase=PodPhase.RUNNING, started=NOW),))
    at_once = plan(job, runs, SETTINGS, after(2))
    assert condition(at_once, ConditionType.ADMITTED).status is ConditionStatus.TRUE
    assert told(at_once) == []
    trouble = plan(job, seen(children=(child,), pods=(stuck,)), SETTINGS, after(2))
    assert told(trouble) == [Reason.UNSCHEDULABLE]
    after_all = plan(replace(job, status=recorded(trouble)), runs, SETTINGS, after(3))
    assert told(after_all) == [Reason.RUNNING]


def test_a_refused_job_is_looked_at_again_while_settings_may_help():
    made = plan(make_view({"spec.compute.profile": "h100"}), Observed(), SETTINGS, NOW)
    assert kinds(made.actions) == ["RecordStatus"]
    assert (recorded(made).phase, condition(made, ConditionType.ACCEPTED).reason) == (
        Phase.PENDING,
        Reason.PROFILE_NOT_FOUND,
    )
    assert made.wake_at == after(60)


def test_a_refused_job_that_was_told_so_is_told_nothing_more():
    job = make_view({"spec.compute.profile": "h100"})
    told = recorded(plan(job, Observed(), SETTINGS, NOW))
    again = plan(replace(job, status=told), Observed(), SETTINGS, after(60))
    assert again.actions == ()
    with_profile = make_settings(profiles={"h100": {}})
    assert "Create" in kinds(plan(replace(job, status=told), Observed(), with_profile, after(60)).actions)


def test_a_job_that_cannot_be_pinned_says_why():
    name = pinned_status().resolved.config_map  # type: ignore[union-attr]
    made = plan(make_view(), Observed(refused={name: "exceeded quota: configmaps"}), SETTINGS, NOW)
    assert kinds(made.actions) == ["RecordStatus", "Create"]
    assert condition(made, ConditionType.ACCEPTED).reason is Reason.QUOTA_EXCEEDED
    assert recorded(made).phase is Phase.PENDING
    made = plan(make_view(), Observed(taken_names=frozenset({name})), SETTINGS, NOW)
    assert kinds(made.actions) == ["RecordStatus", "Create"]
    assert condition(made, ConditionType.ACCEPTED).reason is Reason.NAME_TAKEN


def test_a_job_that_cannot_be_pinned_again_says_why():
    name = pinned_status().resolved.config_map  # type: ignore[union-attr]
    made = plan(checking_job(), seen(resolved=None, refused={name: "exceeded quota: configmaps"}), SETTINGS, NOW)
    assert kinds(made.actions) == ["RecordStatus", "Create"]
    told = condition(made, ConditionType.CHECKED)
    assert told.reason is Reason.QUOTA_EXCEEDED
    assert f"ConfigMap {name}" in told.message
    made = plan(replace(checking_job(), status=recorded(made)), seen(), SETTINGS, NOW)
    assert condition(made, ConditionType.CHECKED).reason is Reason.WAITING


def test_what_was_pinned_is_pinned_again_when_it_is_gone():
    made = plan(checking_job(), seen(resolved=None), SETTINGS, NOW)
    [create] = made.actions
    assert isinstance(create, Create)
    assert create.manifest["metadata"]["name"] == checking_job().status.resolved.config_map  # type: ignore[union-attr]


def test_a_job_fails_when_what_was_pinned_cannot_be_made_again():
    job = make_view({"spec.compute.profile": "cpu"}, pinned_status({"spec.training.epochs": 9}))
    made = plan(job, Observed(), make_settings(profiles={"cpu": {"gpusPerWorker": 0}}), NOW)
    assert (recorded(made).phase, condition(made, ConditionType.FAILED).reason) == (
        Phase.FAILED,
        Reason.REFERENCE_MISSING,
    )


def test_a_later_profile_does_not_touch_a_job_that_was_accepted():
    given = {"spec.compute.profile": "cpu"}
    made = plan(accepted_job(given), seen(given), make_settings(profiles={}), NOW)
    assert "Create" in kinds(made.actions)


def test_a_running_job_keeps_its_image():
    newer = make_settings(image={"name": "registry.example/finetune-trainer:2.0"})
    made = plan(accepted_job(), seen(), newer, NOW)
    [create] = [action for action in made.actions if isinstance(action, Create)]
    [container] = create.manifest["spec"]["template"]["spec"]["containers"]
    assert container["image"] == IMAGE


# --- the cap


@pytest.mark.parametrize(("running", "before", "starts"), [(1, 0, True), (2, 0, False), (1, 1, False)])
def test_jobs_beyond_the_cap_wait_for_their_turn(running: int, before: int, starts: bool):
    capped = make_settings(policy={"maxRunningJobs": 2})
    made = plan(accepted_job(), seen(running_in_namespace=running, waiting_before=before), capped, NOW)
    assert ("Create" in kinds(made.actions)) is starts
    if not starts:
        assert recorded(made).phase is Phase.QUEUED
        assert condition(made, ConditionType.ADMITTED).reason is Reason.QUOTA_EXCEEDED
        assert recorded(made).attempts == ()
        assert made.wake_at is not None


# --- what is said while a stage waits


def test_the_reason_of_a_waiting_pod_is_the_stages():
    pod = make_pod(CHECK, phase=PodPhase.PENDING, waiting_reason="ErrImagePull", waiting_message="no such image")
    made = plan(checking_job(), seen(children=(make_child(CHECK),), pods=(pod,)), SETTINGS, after(1))
    checked = condition(made, ConditionType.CHECKED)
    assert (checked.status, checked.reason) == (ConditionStatus.UNKNOWN, Reason.IMAGE_PULL_FAILED)
    assert "no such image" in checked.message
    assert recorded(made).summary.message == checked.message  # type: ignore[union-attr]
    warnings = [one for one in made.actions if isinstance(one, Emit) and one.type is EventType.WARNING]
    assert [warning.reason for warning in warnings] == [Reason.IMAGE_PULL_FAILED]


def test_the_start_deadline_names_what_was_waited_for():
    pod = make_pod(CHECK, phase=PodPhase.PENDING, waiting_reason="Unschedulable", waiting_message="0/3 nodes")
    made = plan(checking_job(), seen(children=(make_child(CHECK),), pods=(pod,)), SETTINGS, after(1800))
    assert condition(made, ConditionType.FAILED).reason is Reason.START_DEADLINE_EXCEEDED
    assert "0/3 nodes" in condition(made, ConditionType.FAILED).message


def test_a_queued_job_has_no_start_deadline():
    child = make_child(CHECK, suspended=True, admitted=None)
    made = plan(checking_job(), seen(children=(child,)), SETTINGS, after(10_000))
    assert recorded(made).phase is Phase.QUEUED
    assert made.wake_at is None


@pytest.mark.parametrize("waited", [5, 3000], ids=["shorter than the deadline", "longer"])
def test_the_start_deadline_begins_when_the_queue_lets_go_whatever_the_child_says(waited: int):
    held_back = seen(children=(make_child(CHECK, suspended=True, admitted=None),))
    # A Job tells since when it may run later than it may; until then it seems to have been let from the beginning.
    let_go = seen(children=(make_child(CHECK, admitted=NOW),))
    queued = replace(checking_job(), status=recorded(plan(checking_job(), held_back, SETTINGS, after(1))))
    first = plan(queued, let_go, SETTINGS, after(waited))
    assert recorded(first).phase is Phase.CHECKING
    assert condition(first, ConditionType.ADMITTED).status is ConditionStatus.TRUE
    waits = replace(queued, status=recorded(first))
    assert plan(waits, let_go, SETTINGS, after(waited + 1799)).wake_at == after(waited + 1800)
    late = plan(waits, let_go, SETTINGS, after(waited + 1800))
    assert condition(late, ConditionType.FAILED).reason is Reason.START_DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("said", "told"),
    [("", ""), ("insufficient unused\n quota.", ": insufficient unused quota"), ("x" * 900, f": {'x' * 500}")],
    ids=["nothing yet", "a line", "too much"],
)
def test_a_queued_job_quotes_its_queue(said: str, told: str):
    child = make_child(CHECK, suspended=True, admitted=None, waiting_reason="Pending", waiting_message=said)
    made = plan(checking_job(), seen(children=(child,)), SETTINGS, after(5))
    for kind in (ConditionType.ADMITTED, ConditionType.CHECKED):
        assert condition(made, kind).reason is Reason.IN_QUEUE
        assert condition(made, kind).message == f"Job reviews-check-a1 is held back by its queue{told}"
    assert recorded(made).phase is Phase.QUEUED


def test_a_refused_job_object_says_why_and_is_tried_again():
    observed = seen(refused={"reviews-check-a1": 'jobs.batch "x" is forbidden: exceeded quota: jobs'})
    made = plan(checking_job(), observed, SETTINGS, after(1))
    assert condition(made, ConditionType.CHECKED).reason is Reason.QUOTA_EXCEEDED
    assert kinds(made.actions) == ["RecordStatus", "Create"]


@pytest.mark.parametrize(
    "seen_of_it",
    [{"refused": {"reviews-check-a1": "exceeded quota"}}, {"taken_names": frozenset({"reviews-check-a1"})}],
)
def test_a_job_object_that_cannot_be_created_meets_the_start_deadline(seen_of_it: dict[str, Any]):
    assert "Create" in kinds(plan(checking_job(), seen(**seen_of_it), SETTINGS, after(1799)).actions)
    made = plan(checking_job(), seen(**seen_of_it), SETTINGS, after(1800))
    assert kinds(made.actions) == ["RecordStatus"]
    failed = condition(made, ConditionType.FAILED)
    assert failed.reason is Reason.START_DEADLINE_EXCEEDED
    assert "reviews-check-a1" in failed.message


@pytest.mark.parametrize(
    ("seen_of_it", "reason"),
    [
        ({"refused": {"reviews-trust": "exceeded quota: configmaps"}}, Reason.QUOTA_EXCEEDED),
        ({"taken_names": frozenset({"reviews-trust"})}, Reason.NAME_TAKEN),
    ],
)
def test_what_its_pods_trust_and_cannot_be_written_is_told_and_meets_the_start_deadline(
    seen_of_it: dict[str, Any], reason: Reason
):
    observed = seen(trust_hash=None, **seen_of_it)
    waits = plan(checking_job(), observed, SETTINGS, after(1799))
    assert kinds(waits.actions) == ["RecordStatus", "Replace", "Create"]
    assert condition(waits, ConditionType.CHECKED).reason is reason
    made = plan(checking_job(), observed, SETTINGS, after(1800))
    assert kinds(made.actions) == ["RecordStatus"]
    failed = condition(made, ConditionType.FAILED)
    assert failed.reason is Reason.START_DEADLINE_EXCEEDED
    assert "ConfigMap reviews-trust" in failed.message


def test_a_refusal_of_what_its_pods_trust_is_forgotten_when_they_trust_the_right_ones():
    observed = seen(refused={"reviews-trust": "exceeded quota: configmaps"})
    made = plan(checking_job(), observed, SETTINGS, after(1800))
    assert condition(made, ConditionType.CHECKED).reason is Reason.WAITING


def test_a_job_object_that_nobody_refuses_is_created_however_late():
    assert "Create" in kinds(plan(checking_job(), seen(), SETTINGS, after(10_000)).actions)


def test_a_pod_that_terminates_keeps_its_successor_waiting():
    job = checking_job(number=1)
    made = plan(job, seen(pods=(make_pod(CHECK, gone_by=NOW),)), SETTINGS, after(1))
    assert "Create" not in kinds(made.actions)


# --- a node that does not answer


def stuck_pod(**changes: Any) -> PodView:
    """Return a pod that was to be gone a minute after `NOW`."""
    return make_pod(CHECK, started=NOW, node="gpu-7", gone_by=after(60), disrupted=True, **changes)


def test_a_node_that_does_not_answer_is_told_when_its_pod_should_long_be_gone_and_nothing_is_begun():
    job, child = checking_job(), make_child(CHECK)
    early = plan(job, seen(children=(child,), pods=(stuck_pod(),)), SETTINGS, after(119))
    assert condition(early, ConditionType.CHECKED).reason is Reason.RUNNING
    assert early.wake_at == after(120)
    job = replace(job, status=recorded(early))
    late = plan(job, seen(children=(child,), pods=(stuck_pod(),)), SETTINGS, after(120))
    assert kinds(late.actions) == ["RecordStatus"]
    [news] = [action for action in late.actions if isinstance(action, Emit)]
    assert (news.type, news.reason) == (EventType.WARNING, Reason.NODE_UNREACHABLE)
    assert "node gpu-7 does not answer" in news.message
    assert "delete the Node, or taint it node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in news.message
    job = replace(job, status=recorded(late))
    another = stuck_pod(name="reviews-check-a1-x2", uid="another")
    for pods in ((stuck_pod(), another), (another, stuck_pod())):
        assert plan(job, seen(children=(child,), pods=pods), SETTINGS, after(999)) == Plan()


def test_a_pod_of_a_node_that_is_given_up_ends_as_preempted():
    job = checking_job(start_time=NOW, node="gpu-7")
    collected = stuck_pod(phase=PodPhase.FAILED)
    observed = seen(children=(make_child(CHECK, failed=True),), pods=(collected,))
    assert recorded(plan(job, observed, SETTINGS, after(999))).attempts[0].reason is Reason.PREEMPTED


@pytest.mark.parametrize(
    ("given", "ended"),
    [
        pytest.param({}, {"reason": Reason.WORKER_LOST, "end_time": NOW, "failures": 1}, id="the next attempt waits"),
        pytest.param({}, {}, id="somebody has deleted the Job"),
        pytest.param(
            {"spec.runPolicy.suspend": True},
            {"reason": Reason.WORKER_LOST, "end_time": NOW, "failures": 1},
            id="its user has suspended the job",
        ),
        pytest.param({"spec.runPolicy.suspend": True}, {}, id="its user suspends the job"),
    ],
)
def test_what_a_node_that_does_not_answer_holds_up_says_so(given: dict[str, Any], ended: dict[str, Any]):
    made = plan(checking_job(given, start_time=NOW, **ended), seen(given, pods=(stuck_pod(),)), SETTINGS, after(120))
    assert kinds(made.actions) == ["RecordStatus"]
    checked = condition(made, ConditionType.CHECKED)
    assert (checked.status, checked.reason) == (ConditionStatus.UNKNOWN, Reason.NODE_UNREACHABLE)
    assert made.wake_at == after(180)


# --- the end


def ended_job(given: dict[str, Any] | None = None, **fields: Any) -> JobView:
    failed = Statement(ConditionType.FAILED, ConditionStatus.TRUE, Reason.BAD_DATA, "no rows")
    status = stated(pinned_status(given, **fields), [failed], NOW, 1)
    return make_view(given, status.model_copy(update={"phase": Phase.FAILED}))


def test_a_pod_may_finish_after_it_said_how_it_ended_but_not_for_long():
    attempt = following(FineTuneJobStatus(), CHECK, make_resolved(), NOW)
    closed = attempt.model_copy(update={"end_time": NOW, "reason": Reason.BAD_DATA})
    job, observed = ended_job(attempts=(closed,)), Observed(children=(make_child(CHECK),))
    assert plan(job, observed, SETTINGS, after(10)) == Plan(wake_at=after(60))
    assert kinds(plan(job, observed, SETTINGS, after(60)).actions) == ["Delete"]


def test_an_ended_jobs_own_time_to_live_may_still_be_changed():
    job = replace(ended_job(), spec={**ended_job().spec, "runPolicy": {"childTtlSeconds": 0}})
    made = plan(job, Observed(children=(make_child(CHECK, failed=True),)), SETTINGS, after(1))
    assert kinds(made.actions) == ["Delete", "Delete", "Delete", "RecordStatus"]
    assert [one.ref.kind for one in made.actions if isinstance(one, Delete)] == ["Job", "ConfigMap", "ConfigMap"]
    assert plan(replace(job, status=recorded(made)), Observed(), SETTINGS, after(2)) == Plan()


def test_time_to_the_end_is_not_shown_any_more():
    attempt = following(FineTuneJobStatus(), CHECK, make_resolved(), NOW)
    job = accepted_job(attempts=(attempt,), summary=Summary(progress="42 %", eta="3m"))
    pod = make_pod(CHECK, phase=PodPhase.FAILED, exit_code=ExitCode.BAD_DATA)
    made = plan(job, seen(children=(make_child(CHECK, failed=True),), pods=(pod,)), SETTINGS, after(1))
    assert recorded(made).summary == Summary(progress="42 %", message=recorded(made).summary.message)  # type: ignore[union-attr]


def test_a_stage_that_succeeded_may_have_something_to_say():
    result = make_result(CHECK, message="a tracker missed 3 reports", data=None)
    pod = make_pod(CHECK, phase=PodPhase.SUCCEEDED, exit_code=ExitCode.OK)
    observed = seen(
        children=(make_child(CHECK, succeeded=True),), pods=(pod,), results=(DeliveredResult(CHECK, 1, result),)
    )
    checked = condition(plan(checking_job(), observed, SETTINGS, after(5)), ConditionType.CHECKED)
    assert (checked.status, checked.reason) == (ConditionStatus.TRUE, Reason.STAGE_SUCCEEDED)
    assert checked.message == "attempt 1 succeeded; a tracker missed 3 reports"


@pytest.mark.parametrize("gate", [None, GateResult(metric="t.accuracy", passed=True, why="0.9 is not below 0.8")])
def test_a_spec_that_was_published_before_is_not_trained_again(gate: GateResult | None):
    given = {"spec.evaluation.gates": [{"metric": "sentiment.accuracy"}]} if gate else None
    found = make_result(Stage.EVALUATE, published=True).model_copy(update={"stage": CHECK})
    pod = make_pod(CHECK, phase=PodPhase.SUCCEEDED, exit_code=ExitCode.OK)
    delivered = DeliveredResult(CHECK, 1, found)
    observed = seen(given, children=(make_child(CHECK, succeeded=True),), pods=(pod,), results=(delivered,))
    job = checking_job(given)
    made = plan(job, observed, SETTINGS, after(5))
    assert "Create" not in kinds(made.actions)
    complete = condition(made, ConditionType.COMPLETE)
    assert (complete.status, complete.reason) == (ConditionStatus.TRUE, Reason.ALREADY_PUBLISHED)
    assert recorded(made).phase is Phase.SUCCEEDED
    assert recorded(made).artifacts == found.artifacts
    for kind in (ConditionType.CHECKED, ConditionType.TRAINED, ConditionType.EVALUATED, ConditionType.PUBLISHED):
        assert condition(made, kind).reason is Reason.ALREADY_PUBLISHED
    assert condition(made, ConditionType.GATES_PASSED).reason is (Reason.GATES_PASSED if gate else Reason.NO_GATES)
    later = plan(replace(job, status=recorded(made)), observed, SETTINGS, after(6))
    assert "Create" not in kinds(later.actions)


# --- after a rollback


def rolled_back(job: JobView, **fields: Any) -> JobView:
    """Return the job as it is read of a status that has ``fields`` as a later release wrote them."""
    stored = job.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return replace(job, status=read_status(stored | fields))


def training_job(**of_the_check: Any) -> JobView:
    """Return a job that trains, of whose ended check only a later release can read all."""
    ended = {"start_time": NOW, "end_time": NOW, "reason": Reason.STAGE_SUCCEEDED, "exit_code": 0}
    job = checking_job(**ended)
    training = following(job.status, TRAIN, make_resolved(), NOW).model_copy(update={"start_time": NOW, "node": "n"})
    status = job.status.model_copy(
        update={
            "attempts": (*job.status.attempts, training),
            "stages": (StageStatus(stage=CHECK, attempt=1, exit_code=0),),
        }
    )
    job = replace(job, status=stated(status, [CHECKED], NOW, 1))
    check, train = (one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in job.status.attempts)
    return rolled_back(job, attempts=[check | of_the_check, train])


@pytest.mark.parametrize("unknown", [{"reason": "Praised"}, {"watts": 700}, {"stage": "distill"}])
def test_running_work_is_left_alone_beside_an_attempt_that_only_a_later_release_can_read(unknown):
    observed = seen(children=(make_child(TRAIN),), pods=(make_pod(TRAIN, started=NOW, node="n"),))
    job = training_job(**unknown)
    made = plan(job, observed, SETTINGS, after(600))
    assert kinds(made.actions) == ["RecordStatus"]
    assert recorded(made).phase is Phase.TRAINING
    assert plan(replace(job, status=recorded(made)), observed, SETTINGS, after(601)).actions == ()


@pytest.mark.parametrize("unknown", [{"reason": "Praised"}, {"type": "Cancelled"}, {"status": "Perhaps"}])
def test_a_job_that_has_ended_stays_so_whatever_a_later_release_said_of_it(unknown):
    over = {"type": "Complete", "status": "True", "reason": "Published", "lastTransitionTime": NOW} | unknown
    accepted = accepted_job().status.conditions[0].model_dump(mode="json", by_alias=True, exclude_none=True)
    job = rolled_back(accepted_job(), phase="Succeeded", conditions=[accepted, over])
    assert plan(job, seen(), SETTINGS, after(60)).actions == ()
    [delete] = plan(job, seen(children=(make_child(TRAIN),)), SETTINGS, after(60)).actions
    assert isinstance(delete, Delete) and delete.why == "its attempt has ended"


def test_an_attempt_that_was_to_end_for_a_reason_of_a_later_release_is_tried_again_for_free():
    job = checking_job({"spec.runPolicy.retries": 0})
    first = job.status.attempts[0].model_dump(mode="json", by_alias=True, exclude_none=True)
    job = rolled_back(job, attempts=[first | {"reason": "Overheated", "startTime": CREATED}])
    observed = seen({"spec.runPolicy.retries": 0})
    job = replace(job, status=recorded(plan(job, observed, SETTINGS, NOW)))
    assert (job.status.attempts[0].reason, job.status.attempts[0].failures) == (Reason.UNKNOWN, 0)
    made = plan(job, observed, SETTINGS, after(60))
    assert [one.number for one in recorded(made).attempts] == [1, 2]


# --- certificates


def test_trust_is_renewed_while_pods_run_and_only_then():
    job, observed = checking_job(), seen(children=(make_child(CHECK),), trust_hash="another")
    assert any(isinstance(action, Replace) for action in plan(job, observed, SETTINGS, NOW).actions)
    assert not any(isinstance(action, Replace) for action in plan(ended_job(), observed, SETTINGS, NOW).actions)


def test_trust_that_cannot_be_renewed_keeps_nothing_from_being_stopped():
    suspended = {"spec.runPolicy.suspend": True}
    observed = seen(suspended, children=(make_child(CHECK),), trust_hash="another")
    assert kinds(plan(checking_job(suspended), observed, SETTINGS, NOW).actions) == [
        "RecordStatus",
        "Delete",
        "Replace",
    ]


# --- words


def test_publishing_is_a_phase_of_its_own():
    progress = ProgressStatus(stage=Stage.PUBLISH, last_update_time=NOW)
    status = pinned_status(progress=progress)
    assert derive_phase(status) is Phase.CHECKING
    trained = [
        {"stage": "check", "attempt": 1, "exitCode": 0},
        {"stage": "train", "attempt": 1, "exitCode": 0},
    ]
    ended = FineTuneJobStatus.model_validate({"stages": trained}).stages
    assert derive_phase(status.model_copy(update={"stages": ended})) is Phase.PUBLISHING


def test_messages_are_bounded_and_the_headline_is_one_line():
    spec = {f"nonsense{number}": "x" * 200 for number in range(50)}
    job = make_view()
    status = recorded(plan(replace(job, spec={**job.spec, **spec}), Observed(), SETTINGS, NOW))
    assert all(len(one.message) <= 1024 for one in status.conditions)
    headline = status.summary.message  # type: ignore[union-attr]
    assert len(headline) <= LONGEST_HEADLINE
    assert "\n" not in headline
    FineTuneJobStatus.model_validate_json(status.model_dump_json(by_alias=True, exclude_none=True))


def test_a_condition_said_again_keeps_its_time():
    statement = Statement(ConditionType.TRAINED, ConditionStatus.UNKNOWN, Reason.RUNNING, "runs")
    first = stated(FineTuneJobStatus(), [statement], NOW, 1)
    assert stated(first, [statement], after(9), 2) is first
    other = stated(first, [replace(statement, reason=Reason.RETRYING)], after(9), 2)
    assert other.conditions[0].last_transition_time == NOW
    ended = stated(first, [replace(statement, status=ConditionStatus.TRUE)], after(9), 2)
    assert ended.conditions[0].last_transition_time == after(9)


# --- speed


def test_a_plan_takes_little_time():
    observed = seen(children=(make_child(CHECK),), pods=(make_pod(CHECK, started=NOW, node="n"),))
    job = checking_job()
    job = replace(job, status=recorded(plan(job, observed, SETTINGS, NOW)))
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        plan(job, observed, SETTINGS, NOW)
        times.append(time.perf_counter() - begun)
    # 0.3 ms on an idle processor; the quickest of many is not disturbed by others.
    assert min(times) < 0.002
