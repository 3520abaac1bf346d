"""Whatever happens on the way (death after any action, late caches, many wake-ups), a job ends in the same place.

Each `Scenario` is a life of a job; each test lives it again with one more thing going wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from typing import Any

import pytest

from finetune_api.report import ExitCode, GateResult, Stage
from finetune_api.status import ConditionStatus, ConditionType, EvaluationStatus, Phase, Reason, Summary
from finetune_operator.action import Emit, Plan, RecordStatus
from finetune_operator.condition import holds
from finetune_operator.observed import JobView, KubeRayState, Observed, PodPhase
from finetune_operator.planner import plan
from finetune_operator.settings import Settings

from ...unit.operator.fake_cluster import FOREVER, FakeCluster, Life, Operator
from ...unit.operator.objects import gate, make_result, make_settings, published_job

SETTINGS = make_settings()
WORKERS = {"spec.compute": {"workers": 2, "gpusPerWorker": 0}}
TOO_MUCH_STORED = "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi. "
NOTHING_TO_TRAIN = {"spec.model.startFrom": {"source": "pvc://models/earlier/model"}, "spec.training.epochs": 0}
CHECK, TRAIN, EVALUATE = Stage.CHECK, Stage.TRAIN, Stage.EVALUATE


@dataclass(frozen=True)
class Scenario:
    """What happens in the world, and where the job must end."""

    sentence: str
    phase: Phase
    reason: Reason
    """Of the condition by which the job ended; of Suspended or Accepted for one that has not."""
    attempts: int
    """How many there were in all; the least, where a death of the operator may cost one."""
    given: dict[str, Any] = field(default_factory=dict)
    lives: dict[tuple[Stage, int], Life] = field(default_factory=dict)
    happenings: Callable[[], list[Any]] = list
    settings: Settings = SETTINGS
    foreign: frozenset[str] = frozenset()
    around: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> FakeCluster:
        return FakeCluster(
            self.given, self.lives, self.happenings(), foreign=set(self.foreign), around=dict(self.around)
        )

    def operator(self, cluster: FakeCluster, **changes: Any) -> Operator:
        return Operator(cluster, self.decide, **changes)

    def decide(self, job: JobView, observed: Observed, now: datetime) -> Plan:
        return plan(job, observed, self.settings, now)


def suspend(value: bool) -> Callable[[FakeCluster], None]:
    return lambda cluster: cluster.set_run_policy(suspend=value)


def training_runs(cluster: FakeCluster) -> bool:
    return cluster.is_running(TRAIN)


def is_suspended(cluster: FakeCluster) -> bool:
    return holds(cluster.job.status, ConditionType.SUSPENDED)


def training_waits(cluster: FakeCluster) -> bool:
    return any(pod.view.stage is TRAIN and pod.view.phase is PodPhase.PENDING for pod in cluster.pods.values())


def stopping(cluster: FakeCluster) -> bool:
    return any(pod.dying for pod in cluster.pods.values())


def training_has_ended(cluster: FakeCluster) -> bool:
    return any(one.stage is TRAIN and one.end_time is not None for one in cluster.job.status.attempts)


def release(name: str) -> Callable[[FakeCluster], None]:
    return lambda cluster: cluster.foreign.discard(name)


def says(kind: ConditionType, reason: Reason) -> Callable[[FakeCluster], bool]:
    return lambda cluster: any((one.type, one.reason) == (kind, reason) for one in cluster.job.status.conditions)


def turn_out(**around: Any) -> Callable[[FakeCluster], None]:
    return lambda cluster: cluster.around.update(around)


def renew(cluster: FakeCluster) -> None:
    cluster.progress_ca = "renewed"


PULL = ("ImagePullBackOff", 'Back-off pulling image "registry.example/typo"')
SCENARIOS = (
    Scenario("all goes well", Phase.SUCCEEDED, Reason.PUBLISHED, 3),
    Scenario(
        "only termination messages tell",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        lives={(stage, 1): Life(posts=False) for stage in (CHECK, TRAIN, EVALUATE)},
    ),
    Scenario("bad rows", Phase.FAILED, Reason.BAD_DATA, 1, lives={(CHECK, 1): Life(ExitCode.BAD_DATA)}),
    Scenario(
        "bad rows are only told of",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        {"spec.runPolicy.preflight": "warn"},
        {(CHECK, 1): Life(ExitCode.BAD_DATA)},
    ),
    Scenario("nothing to train", Phase.SUCCEEDED, Reason.PUBLISHED, 2, NOTHING_TO_TRAIN),
    Scenario(
        "nothing to check or to train",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        1,
        NOTHING_TO_TRAIN | {"spec.runPolicy.preflight": "skip"},
    ),
    Scenario("no check", Phase.SUCCEEDED, Reason.PUBLISHED, 2, {"spec.runPolicy.preflight": "skip"}),
    Scenario("two workers", Phase.SUCCEEDED, Reason.PUBLISHED, 3, WORKERS),
    Scenario(
        "a worker is lost", Phase.SUCCEEDED, Reason.PUBLISHED, 4, WORKERS, {(TRAIN, 1): Life(ExitCode.WORKER_LOST)}
    ),
    Scenario(
        "workers without a word",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        WORKERS,
        {(TRAIN, 1): Life(ExitCode.OUT_OF_MEMORY, is_mute=True)},
    ),
    Scenario(
        "two workers are suspended and go on",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        WORKERS,
        {(TRAIN, 1): Life(ExitCode.PREEMPTED, running_ticks=8)},
        lambda: [(training_runs, suspend(True)), (is_suspended, suspend(False))],
    ),
    Scenario(
        "the Ray cluster breaks down behind a result",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        WORKERS,
        {(TRAIN, 1): Life(ray_fails=True)},
    ),
    Scenario(
        "a RayJob does not end behind a result",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        WORKERS,
        {(TRAIN, 1): Life(ray_hangs=True)},
    ),
    Scenario(
        "no RayJob ever says that all went well",
        Phase.FAILED,
        Reason.RETRIES_EXHAUSTED,
        3,
        WORKERS | {"spec.runPolicy.retries": 1},
        {(TRAIN, number): Life(ray_fails=True) for number in (1, 2)},
    ),
    Scenario(
        "two workers are suspended behind a result",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        WORKERS,
        happenings=lambda: [(training_has_ended, suspend(True)), (is_suspended, suspend(False))],
    ),
    Scenario(
        "divergence, then a lower learning rate",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        lives={(TRAIN, 1): Life(ExitCode.DIVERGED)},
    ),
    Scenario(
        "divergence at the lower learning rate too",
        Phase.FAILED,
        Reason.DIVERGED,
        3,
        lives={(TRAIN, number): Life(ExitCode.DIVERGED) for number in (1, 2)},
    ),
    Scenario(
        "no memory, then half a micro-batch",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        {"spec.training.microBatchSize": 8},
        {(TRAIN, 1): Life(137, out_of_memory=True)},
    ),
    Scenario(
        "no memory for the rows that a trainer chose by itself, then half of them",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        5,
        lives={
            (TRAIN, 1): Life(result=make_result(TRAIN, ExitCode.OUT_OF_MEMORY, micro_batch_size=4)),
            (TRAIN, 2): Life(result=make_result(TRAIN, ExitCode.OUT_OF_MEMORY, micro_batch_size=2)),
        },
    ),
    Scenario(
        "no memory for a micro-batch of one",
        Phase.FAILED,
        Reason.OUT_OF_MEMORY,
        2,
        {"spec.training.microBatchSize": 1, "spec.training.gradientCheckpointing": "never"},
        {(TRAIN, 1): Life(ExitCode.OUT_OF_MEMORY)},
    ),
    Scenario(
        "the store is away for good",
        Phase.FAILED,
        Reason.RETRIES_EXHAUSTED,
        4,
        {"spec.runPolicy.retries": 2},
        {(TRAIN, number): Life(ExitCode.STORAGE) for number in (1, 2, 3)},
    ),
    Scenario(
        "preempted more often than retries allow",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        5,
        {"spec.runPolicy.retries": 0},
        {(TRAIN, 1): Life(ExitCode.PREEMPTED), (TRAIN, 2): Life(137, disrupted=True, is_mute=True)},
    ),
    Scenario(
        "evicted again and again for what it stores",
        Phase.FAILED,
        Reason.RETRIES_EXHAUSTED,
        4,
        {"spec.runPolicy.retries": 2},
        {
            (TRAIN, 1): Life(ExitCode.PREEMPTED, over_limit=TOO_MUCH_STORED),
            (TRAIN, 2): Life(137, over_limit=TOO_MUCH_STORED),
            (TRAIN, 3): Life(ExitCode.PREEMPTED, over_limit=TOO_MUCH_STORED, posts=False),
        },
    ),
    Scenario(
        "two workers are evicted again and again for what they store",
        Phase.FAILED,
        Reason.RETRIES_EXHAUSTED,
        3,
        WORKERS | {"spec.runPolicy.retries": 1},
        {
            (TRAIN, 1): Life(ExitCode.WORKER_LOST, over_limit=TOO_MUCH_STORED),
            (TRAIN, 2): Life(ExitCode.PREEMPTED, over_limit=TOO_MUCH_STORED),
        },
    ),
    Scenario(
        "more attempts than are remembered",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        17,
        lives={(TRAIN, number): Life(ExitCode.PREEMPTED) for number in range(1, 15)},
    ),
    Scenario(
        "suspended and resumed",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        lives={(TRAIN, 1): Life(running_ticks=FOREVER)},
        happenings=lambda: [(training_runs, suspend(True)), (is_suspended, suspend(False))],
    ),
    Scenario(
        "suspended and resumed before it had stopped",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        lives={(TRAIN, 1): Life(running_ticks=FOREVER)},
        happenings=lambda: [(training_runs, suspend(True)), (stopping, suspend(False))],
    ),
    Scenario(
        "suspended for good",
        Phase.SUSPENDED,
        Reason.SUSPENDED_BY_USER,
        2,
        lives={(TRAIN, 1): Life(running_ticks=FOREVER)},
        happenings=lambda: [(training_runs, suspend(True))],
    ),
    Scenario(
        "suspended from the start", Phase.SUSPENDED, Reason.SUSPENDED_BY_USER, 0, {"spec.runPolicy.suspend": True}
    ),
    Scenario(
        "suspended while it waits for an image",
        Phase.SUSPENDED,
        Reason.SUSPENDED_BY_USER,
        2,
        lives={(TRAIN, 1): Life(waits=PULL, waiting_ticks=FOREVER)},
        happenings=lambda: [(training_waits, suspend(True))],
    ),
    Scenario(
        "it takes too long",
        Phase.FAILED,
        Reason.DEADLINE_EXCEEDED,
        2,
        {"spec.runPolicy.activeDeadlineSeconds": 600},
        {(TRAIN, 1): Life(running_ticks=FOREVER)},
    ),
    Scenario(
        "its attempts take too long together",
        Phase.FAILED,
        Reason.DEADLINE_EXCEEDED,
        3,
        {"spec.runPolicy.activeDeadlineSeconds": 150},
        {(TRAIN, number): Life(ExitCode.PREEMPTED, running_ticks=14) for number in range(1, 9)},
    ),
    Scenario(
        "an image that is there a little later",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        lives={(TRAIN, 1): Life(waits=PULL, waiting_ticks=10)},
    ),
    Scenario(
        "an image that is never there",
        Phase.FAILED,
        Reason.START_DEADLINE_EXCEEDED,
        2,
        lives={(TRAIN, 1): Life(waits=PULL, waiting_ticks=FOREVER)},
    ),
    Scenario(
        "a queue longer than the start deadline",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        {"spec.runPolicy.startDeadlineSeconds": 60},
        {(TRAIN, 1): Life(queued_ticks=40)},
    ),
    Scenario(
        "the queue takes the node back for a while",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        lives={(TRAIN, 1): Life(running_ticks=20, taken_back_after=15)},
    ),
    Scenario(
        "the queue takes the nodes of two workers back for a while",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        WORKERS,
        {(TRAIN, 1): Life(running_ticks=20, taken_back_after=15)},
    ),
    Scenario("somebody deletes the Job", Phase.SUCCEEDED, Reason.PUBLISHED, 4, lives={(TRAIN, 1): Life(vanishes=True)}),
    Scenario(
        "an unknown exit code",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        4,
        lives={(EVALUATE, 1): Life(139, is_mute=True)},
    ),
    Scenario(
        "an image without our trainer",
        Phase.FAILED,
        Reason.RETRIES_EXHAUSTED,
        2,
        {"spec.runPolicy.retries": 1},
        {(CHECK, number): Life(is_mute=True) for number in (1, 2)},
    ),
    Scenario(
        "a trainer of another release",
        Phase.FAILED,
        Reason.CONTRACT_SKEW,
        1,
        lives={(CHECK, 1): Life(result=make_result(CHECK, contract_version=99))},
    ),
    Scenario(
        "a gate keeps the model back",
        Phase.SUCCEEDED,
        Reason.GATES_NOT_PASSED,
        3,
        lives={(EVALUATE, 1): Life(result=make_result(EVALUATE, evaluation=gate(False), published=False))},
    ),
    Scenario(
        "a gate keeps the model back and the result has no room for it",
        Phase.SUCCEEDED,
        Reason.GATES_NOT_PASSED,
        3,
        {"spec.evaluation.gates": [{"metric": "sentiment.accuracy", "min": 0.9}]},
        {(EVALUATE, 1): Life(result=make_result(EVALUATE, published=False, artifacts=()))},
    ),
    Scenario(
        "a model that is worse is kept back without gates",
        Phase.SUCCEEDED,
        Reason.WORSE_THAN_BASE,
        3,
        lives={(EVALUATE, 1): Life(result=make_result(EVALUATE, published=False, why_not_published="it fell"))},
    ),
    Scenario(
        "too much is forgotten and the result has no room for it",
        Phase.SUCCEEDED,
        Reason.GATES_NOT_PASSED,
        3,
        {"spec.evaluation.forgetting": {}},
        {(EVALUATE, 1): Life(result=make_result(EVALUATE, published=False, artifacts=()))},
    ),
    Scenario(
        "nothing is to be published",
        Phase.SUCCEEDED,
        Reason.PUBLISH_NEVER,
        3,
        {"spec.output.publishOn": "never"},
        {(EVALUATE, 1): Life(result=make_result(EVALUATE, published=False, artifacts=()))},
    ),
    Scenario(
        "the certificate authority is renewed",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        happenings=lambda: [(training_runs, renew)],
    ),
    Scenario(
        "a name is taken for a while",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        foreign=frozenset({"reviews-train-a1"}),
        happenings=lambda: [(lambda cluster: "reviews-train-a1" in cluster.taken, release("reviews-train-a1"))],
    ),
    Scenario(
        "the name of its certificate authorities is taken for a while",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        foreign=frozenset({"reviews-trust"}),
        happenings=lambda: [(says(ConditionType.CHECKED, Reason.NAME_TAKEN), release("reviews-trust"))],
    ),
    Scenario(
        "it was published before",
        Phase.SUCCEEDED,
        Reason.ALREADY_PUBLISHED,
        1,
        lives={(CHECK, 1): Life(result=make_result(EVALUATE, published=True).model_copy(update={"stage": CHECK}))},
    ),
    *(
        Scenario(
            f"KubeRay is {mended} later",
            Phase.SUCCEEDED,
            Reason.PUBLISHED,
            3,
            WORKERS,
            around={"kuberay": state},
            happenings=lambda: [
                (says(ConditionType.TRAINED, Reason.KUBERAY_MISSING), turn_out(kuberay=KubeRayState.READY))
            ],
        )
        for mended, state in {"installed": KubeRayState.MISSING, "upgraded": KubeRayState.TOO_OLD}.items()
    ),
    Scenario(
        "other jobs of the namespace run first",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        settings=make_settings(policy={"maxRunningJobs": 1}),
        around={"running_in_namespace": 1},
        happenings=lambda: [
            (says(ConditionType.ADMITTED, Reason.QUOTA_EXCEEDED), turn_out(running_in_namespace=0)),
        ],
    ),
    Scenario(
        "it goes on from a job that has not published yet",
        Phase.SUCCEEDED,
        Reason.PUBLISHED,
        3,
        {"spec.model.startFrom": {"job": "general"}},
        happenings=lambda: [
            (says(ConditionType.ACCEPTED, Reason.WAITING_FOR_JOB), turn_out(starts=(published_job("general"),))),
        ],
    ),
    Scenario("a spec that nothing can do", Phase.FAILED, Reason.SPEC_INVALID, 0, {"spec.training.epochs": 0}),
    Scenario(
        "a spec that is not supported",
        Phase.FAILED,
        Reason.NOT_SUPPORTED,
        0,
        {"spec.evaluation.baselines.zeroShot": False},
    ),
)


def essence(cluster: FakeCluster) -> object:
    """Return what must not depend on what went wrong on the way."""
    status = cluster.job.status
    return (
        status.phase,
        {one.type: (one.status, one.reason) for one in status.conditions},
        [(stage.stage, stage.exit_code, stage.published) for stage in status.stages],
        status.artifacts,
        status.data,
        sorted(name for name, child in cluster.children.items() if not child.view.is_over),
        sorted(cluster.config_maps),
        sorted(uid for uid, pod in cluster.pods.items() if not pod.view.is_over),
    )


def lived(scenario: Scenario, **changes: Any) -> FakeCluster:
    cluster = scenario.begin()
    operator = scenario.operator(cluster, **changes)
    operator.run()
    job, observed = cluster.observe()
    assert plan(job, observed, scenario.settings, cluster.now) == Plan(), "the fixed point is none"
    return cluster


def attempts_made(cluster: FakeCluster) -> int:
    return len({line for line in cluster.log if line.startswith("create ")})


by_sentence = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.sentence)


@by_sentence
def test_a_job_ends_where_it_must(scenario: Scenario):
    cluster = lived(scenario)
    status = cluster.job.status
    assert status.phase is scenario.phase
    kinds = (ConditionType.COMPLETE, ConditionType.FAILED, ConditionType.SUSPENDED)
    [reason] = [one.reason for one in status.conditions if one.type in kinds and one.status is ConditionStatus.TRUE]
    assert reason is scenario.reason
    assert attempts_made(cluster) == scenario.attempts


@by_sentence
def test_death_after_any_action_changes_nothing_in_the_end(scenario: Scenario):
    cluster = scenario.begin()
    operator = scenario.operator(cluster)
    operator.run()
    expected = essence(cluster)
    # Beyond the first sixty actions of a long life, they only repeat.
    for dies_after in range(1, min(operator.done, 60) + 1):
        survivor = lived(scenario, dies_after=dies_after)
        assert essence(survivor) == expected, f"dies after action {dies_after} of {operator.done}"
        assert attempts_made(survivor) == attempts_made(cluster), f"dies after action {dies_after}"


@by_sentence
@pytest.mark.parametrize("seed", range(4))
def test_late_caches_and_many_wake_ups_change_nothing_in_the_end(scenario: Scenario, seed: int):
    random = Random(seed)
    troubled = lived(scenario, random=random, dies_after=random.randrange(1, 40))
    assert essence(troubled) == essence(lived(scenario))


@by_sentence
def test_no_phase_is_entered_without_an_event(scenario: Scenario):
    cluster = scenario.begin()
    silent: list[tuple[Phase | None, Phase | None]] = []

    def decide(job: JobView, observed: Observed, now: datetime) -> Plan:
        made = scenario.decide(job, observed, now)
        entered = [one.status.phase for one in made.actions if isinstance(one, RecordStatus)]
        if not any(isinstance(one, Emit) for one in made.actions):
            silent.extend((job.status.phase, phase) for phase in entered if phase is not job.status.phase)
        return made

    Operator(cluster, decide).run()
    assert silent == []


def test_children_and_config_maps_go_when_their_time_is_over_and_the_job_stays():
    cluster = lived(SCENARIOS[0])
    assert not cluster.children
    assert not cluster.config_maps
    assert cluster.job.status.artifacts
    assert (cluster.now - cluster.job.created).total_seconds() >= 86400


@pytest.mark.parametrize("sentence", [one.sentence for one in SCENARIOS if one.sentence.startswith("a gate keeps")])
def test_a_gate_that_keeps_the_model_back_is_told_beside_a_complete_job(sentence: str):
    cluster = lived(next(one for one in SCENARIOS if one.sentence == sentence))
    said = {one.type: (one.status, one.reason) for one in cluster.job.status.conditions}
    kept_back = (ConditionStatus.FALSE, Reason.GATES_NOT_PASSED)
    assert (said[ConditionType.GATES_PASSED], said[ConditionType.PUBLISHED]) == (kept_back, kept_back)
    assert said[ConditionType.COMPLETE] == (ConditionStatus.TRUE, Reason.GATES_NOT_PASSED)


def told(sentence: str) -> tuple[str, str]:
    """Return the headline of that scenario's job, and the verdict that its evaluation came to."""
    cluster = lived(next(one for one in SCENARIOS if one.sentence == sentence))
    evaluated = next(one for one in cluster.job.status.conditions if one.type is ConditionType.EVALUATED)
    assert cluster.job.status.summary is not None
    return cluster.job.status.summary.message, evaluated.message


def test_the_headline_of_a_job_begins_with_why_its_model_is_not_published():
    line, verdict = told("a model that is worse is kept back without gates")
    assert line == f"not published: it fell. {verdict}"
    line, _ = told("nothing is to be published")
    assert line.startswith("not published: spec.output.publishOn is never")
    line, verdict = told("all goes well")
    assert line.startswith(verdict)


def test_a_long_verdict_does_not_take_the_reason_out_of_the_headline():
    tasks = "; ".join(f"better on task-with-a-long-name-{number}" for number in range(20))
    verdict = f"The tuned model is better on 20 of 22 tasks: {tasks}"[:256]
    gates = tuple(GateResult(metric=f"task-{n}.accuracy", passed=False, why="x" * 512) for n in range(3))
    why = f"the gate on task-0.accuracy did not pass: {'x' * 512}"[:256]
    result = make_result(
        EVALUATE,
        evaluation=EvaluationStatus(gates=gates),
        summary=Summary(message=verdict),
        published=False,
        why_not_published=why,
    )
    kept_back = Scenario("", Phase.SUCCEEDED, Reason.GATES_NOT_PASSED, 3, lives={(EVALUATE, 1): Life(result=result)})
    status = lived(kept_back).job.status
    assert status.summary is not None
    assert status.summary.message.startswith("not published: the gate on task-0.accuracy did not pass: x")
    assert len(status.summary.message) == 256
    complete = next(one for one in status.conditions if one.type is ConditionType.COMPLETE)
    assert verdict in complete.message


def test_half_the_micro_batch_is_told_and_handed_on():
    cluster = lived(next(one for one in SCENARIOS if one.sentence.startswith("no memory, then")))
    first, second = (one for one in cluster.job.status.attempts if one.stage is TRAIN)
    assert (first.reason, first.micro_batch_size) == (Reason.OUT_OF_MEMORY, None)
    assert second.change == "microBatchSize 8 -> 4; gradientCheckpointing auto -> always"
    assert (second.micro_batch_size, second.gradient_checkpointing, second.failures) == (4, True, 1)


def test_half_of_what_a_trainer_chose_by_itself_is_handed_on():
    cluster = lived(next(one for one in SCENARIOS if "chose by itself" in one.sentence))
    trainings = [one for one in cluster.job.status.attempts if one.stage is TRAIN]
    assert [(one.micro_batch_size, one.change) for one in trainings] == [
        (4, ""),
        (2, "microBatchSize 4 -> 2; gradientCheckpointing auto -> always"),
        (1, "microBatchSize 2 -> 1"),
    ]
