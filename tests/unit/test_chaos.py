"""The chaos run without a cluster: a seed is a schedule, and the judge sees what went wrong."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.report import ExitCode, Stage
from finetune_api.status import (
    Attempt,
    Condition,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    Reason,
)

from ..e2e.fault import Fate, FaultKind, PlannedJob, schedule
from ..e2e.faulty_store import Write
from ..e2e.judge import Story, complaints, steps_done_again

START = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_seed_is_a_schedule() -> None:
    assert schedule(8, 30) == schedule(8, 30)
    assert schedule(8, 30) != schedule(9, 30)


@pytest.mark.parametrize("jobs", [1, 4, 30])
@pytest.mark.parametrize("seed", range(5))
def test_every_round_has_every_fault_once(seed: int, jobs: int) -> None:
    plan = schedule(seed, jobs)
    rounds = max(1, jobs // 5)
    assert Counter(fault.kind for fault in plan.faults) == dict.fromkeys(FaultKind, rounds)
    assert all(0 <= fault.aim < 1 for fault in plan.faults)


def test_jobs_have_names_of_their_own_and_every_fate() -> None:
    plan = schedule(8, 30)
    assert len({job.name for job in plan.jobs}) == 30
    fates = Counter(job.fate for job in plan.jobs)
    assert fates == {Fate.PUBLISHED: 12, Fate.BAD_DATA: 6, Fate.KEPT_BACK: 6, Fate.WITHDRAWN: 6}


# --- the judge


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def attempt(stage: Stage, number: int, reason: Reason, start: float, **more: Any) -> Attempt:
    return Attempt(
        stage=stage, number=number, child=f"a-{stage.value}-a{number}", reason=reason, start_time=at(start), **more
    )


def put(key: str, seconds: float, status: int = 200) -> Write:
    return Write(at(seconds).timestamp(), "PUT", key, status)


ATTEMPTS = (
    attempt(Stage.TRAIN, 1, Reason.PREEMPTED, 0, exit_code=ExitCode.PREEMPTED),
    attempt(Stage.TRAIN, 2, Reason.STAGE_SUCCEEDED, 50, exit_code=ExitCode.OK, resumed_from_step=20),
    attempt(Stage.EVALUATE, 1, Reason.STAGE_SUCCEEDED, 90, exit_code=ExitCode.OK),
)
WRITES = (
    put("checkpoints/step-000010/COMPLETE", 10),
    put("checkpoints/step-000020/COMPLETE", 20),
    put("checkpoints/step-000040/COMPLETE", 70),
    put("model/COMPLETE", 95),
    put("model/COMPLETE", 96, status=412),
    put("report/COMPLETE", 97),
)
ENDINGS = {
    Fate.PUBLISHED: (Phase.SUCCEEDED, ConditionType.PUBLISHED, Reason.PUBLISHED),
    Fate.KEPT_BACK: (Phase.SUCCEEDED, ConditionType.PUBLISHED, Reason.GATES_NOT_PASSED),
    Fate.BAD_DATA: (Phase.FAILED, ConditionType.FAILED, Reason.BAD_DATA),
}


def story(fate: Fate = Fate.PUBLISHED, **changes: Any) -> Story:
    """Return how a job with that fate goes when all is well."""
    phase, kind, reason = ENDINGS[fate]
    status = FineTuneJobStatus(
        attempts=ATTEMPTS,
        conditions=(Condition(type=kind, status=ConditionStatus.TRUE, reason=reason, last_transition_time=at(100)),),
    )
    due = {Fate.PUBLISHED: ("model", "report"), Fate.KEPT_BACK: ("report",)}.get(fate, ())
    writes = tuple(one for one in WRITES if one.key.startswith(("checkpoints", *due)))
    good = Story(
        PlannedJob("job", fate),
        (Phase.PENDING, Phase.TRAINING, Phase.EVALUATING, phase),
        status,
        children=tuple(one.child for one in ATTEMPTS),
        active_pods=(),
        writes=writes,
        reached={1: 27, 2: 60},
        steps_wanted=60,
        steps_reported=60,
    )
    return dataclasses.replace(good, **changes)


def with_attempts(*attempts: Attempt) -> FineTuneJobStatus:
    status = story().status
    assert status is not None
    return status.model_copy(update={"attempts": attempts})


WITHDRAWN = PlannedJob("job", Fate.WITHDRAWN)
GONE = story(planned=WITHDRAWN, status=None, children=(), writes=(), phases=(Phase.TRAINING,))


@pytest.mark.parametrize("fate", ENDINGS)
def test_the_judge_has_nothing_against_a_job_that_ends_as_it_should(fate: Fate) -> None:
    assert complaints(story(fate)) == []


def test_the_judge_has_nothing_against_a_job_that_is_gone_when_it_was_withdrawn() -> None:
    assert complaints(GONE) == []


BAD = {
    "it ends twice": (lambda: story(phases=(Phase.SUCCEEDED, Phase.TRAINING, Phase.SUCCEEDED)), "ended"),
    "it goes on behind its end": (lambda: story(phases=(Phase.SUCCEEDED, Phase.TRAINING)), "went on to Training"),
    "it fails": (lambda: story(phases=(Phase.FAILED,)), "should have ended Succeeded"),
    "it ends for another reason": (lambda: story(status=FineTuneJobStatus(attempts=ATTEMPTS)), "Published has reason"),
    "it vanishes": (lambda: story(status=None), "it is gone"),
    "a withdrawn job stays": (lambda: story(planned=WITHDRAWN), "still there"),
    "a withdrawn job leaves a child": (lambda: dataclasses.replace(GONE, children=("a-train-a1",)), "it left"),
    "a withdrawn job is published": (lambda: dataclasses.replace(GONE, writes=WRITES), "model was completed 1 times"),
    "a pod runs on": (lambda: story(active_pods=("a-1",)), "pods run on: a-1"),
    "a child belongs to no attempt": (lambda: story(children=("a-train-a9",)), "no attempt knows a-train-a9"),
    "an attempt is missing": (lambda: story(status=with_attempts(ATTEMPTS[0], replace(3))), "are numbered [1, 3]"),
    "a stage succeeds twice": (lambda: story(status=with_attempts(*ATTEMPTS, replace(3))), "train succeeded 2 times"),
    "it is published twice": (lambda: story(writes=(*WRITES, put("model/COMPLETE", 99))), "completed 2 times"),
    "it is not published": (lambda: story(writes=WRITES[:3]), "model was completed 0 times"),
    "it is published in spite of its gate": (lambda: story(Fate.KEPT_BACK, writes=WRITES), "and 0 was due"),
    "steps are done again": (lambda: story(writes=(WRITES[2], *WRITES)), "steps were done again"),
    "it goes on from an old checkpoint": (lambda: story(status=with_attempts(ATTEMPTS[0], early())), "20 was stored"),
    "steps are missing": (lambda: story(steps_reported=59), "59 steps, not 60"),
}


def replace(number: int) -> Attempt:
    return ATTEMPTS[1].model_copy(update={"number": number})


def early() -> Attempt:
    return ATTEMPTS[1].model_copy(update={"resumed_from_step": 10})


@pytest.mark.parametrize(("given", "says"), BAD.values(), ids=BAD)
def test_the_judge_complains_when(given: Callable[[], Story], says: str) -> None:
    assert any(says in one for one in complaints(given())), complaints(given())


def test_steps_that_were_done_again_are_counted_from_the_checkpoint() -> None:
    assert steps_done_again(story()) == 27 - 20
