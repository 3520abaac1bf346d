"""A cluster for one job, small enough to be tried from every state: the API server, the Job controller, the kubelet, a
trainer that does what the test says, and a clock that only the test moves.

It holds what an API server holds to: names are taken once, deletion needs the right UID, and whoever writes with an old
resourceVersion is refused. `FakeCluster.execute` refuses any action of a plan that was made from an outdated job, which
is what the reconciler's live read before it acts amounts to, or the version that its record names.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Stage
from finetune_api.stage_result import StageResult, bounded
from finetune_api.status import Checkpoint, FineTuneJobStatus, Phase
from finetune_operator import naming
from finetune_operator.action import Action, Create, Delete, Emit, RecordStatus, Replace
from finetune_operator.manifest import content_hash
from finetune_operator.observed import (
    ChildKind,
    ChildView,
    DeliveredResult,
    JobView,
    KubeRayState,
    Observed,
    PodPhase,
    PodView,
)

from .objects import CA, NOW, make_result, make_view

FOREVER = 1_000_000
GRACE = timedelta(seconds=30)


class RefusedError(Exception):
    """The API server did not do it."""


@dataclass(frozen=True)
class Life:
    """What becomes of the pod of one attempt; of a RayJob, the pod in which its program runs."""

    exit_code: int = 0
    result: StageResult | None = None
    """What the trainer says; None for what it usually says with that exit code."""
    is_mute: bool = False
    """Neither posts a result nor leaves a termination message."""
    posts: bool = True
    """Posts its result until it is acknowledged; else only the termination message tells."""
    out_of_memory: bool = False
    disrupted: bool = False
    over_limit: str = ""
    """What the kubelet says as it evicts the pod for what it stored; the trainer may have said that it was stopped."""
    vanishes: bool = False
    """Job and pod are gone while it runs."""
    waits: tuple[str, str] = ("", "")
    """Reason and message of a pod that does not start."""
    waiting_ticks: int = 0
    running_ticks: int = 2
    queued_ticks: int = 0
    """Its queue holds the Job back at first."""
    ray_fails: bool = False
    """A RayJob ends badly although its program ends well."""
    ray_hangs: bool = False
    """A RayJob does not end although its program does."""
    taken_back_after: int | None = None
    """Its queue takes the node away after this many ticks of running, once."""


@dataclass
class _Pod:
    view: PodView
    life: Life
    left: int
    posting: int = 0
    dying: int = 0


@dataclass
class _Child:
    view: ChildView
    life: Life
    queued: int
    was_taken_back: bool = False


Lives = Mapping[tuple[Stage, int], Life]
Happening = Callable[["FakeCluster"], None]


@dataclass
class FakeCluster:
    """The world around one job."""

    given: dict[str, Any] = field(default_factory=dict)
    """Overrides of the minimal manifest."""
    lives: Lives = field(default_factory=dict)
    happenings: list[tuple[Callable[["FakeCluster"], bool], Happening]] = field(default_factory=list)
    """What users and administrators do, each once, as soon as its condition holds."""
    now: datetime = NOW
    progress_ca: str = CA
    foreign: set[str] = field(default_factory=set)
    """Names that belong to somebody else's objects."""
    around: dict[str, Any] = field(default_factory=dict)
    """What else `Observed` tells: of KubeRay, of other jobs of the namespace, of those that this one goes on from."""

    def __post_init__(self) -> None:
        self.job: JobView = make_view(self.given)
        self.children: dict[str, _Child] = {}
        self.pods: dict[str, _Pod] = {}
        self.config_maps: dict[str, Mapping[str, Any]] = {}
        self.acknowledged: set[tuple[Stage, int]] = set()
        self.events: list[Emit] = []
        self.log: list[str] = []
        self.taken: set[str] = set()
        self.version = 0
        self._uids = 0
        self._history: list[tuple[tuple[ChildView, ...], tuple[PodView, ...]]] = []
        self._seen = 0
        self._created: dict[str, ChildView] = {}

    # --- what the operator sees

    def observe(self, lag: int = 0) -> tuple[JobView, Observed]:
        """Return the job and its children, the latter as they were up to ``lag`` changes ago, but never older than
        what was returned before, and never without what the operator itself has created."""
        self._remember()
        self._seen = max(self._seen, len(self._history) - 1 - lag)
        children, pods = self._history[self._seen]
        for uid in {child.uid for seen, _ in self._history[: self._seen + 1] for child in seen}:
            self._created.pop(uid, None)
        children = (*children, *self._created.values())
        pinned = self.job.status.resolved and self.job.status.resolved.config_map
        trust = self.config_maps.get(naming.trust_config_map_name(self.job.name))
        return self.job, Observed(
            children=children,
            pods=pods,
            results=tuple(
                DeliveredResult(pod.view.stage, pod.view.attempt, self._word(pod))
                for pod in self.pods.values()
                # The endpoint asks the caches whose pod it is.
                if pod.posting and pod.view.uid in {seen.uid for seen in pods}
            ),
            resolved=self._read(pinned) if pinned in self.config_maps else None,
            trust_hash=content_hash(trust["data"]) if trust else None,
            progress_ca=self.progress_ca,
            taken_names=frozenset(self.taken),
            **{"kuberay": KubeRayState.READY} | self.around,
        )

    def forget(self) -> None:
        """Let the operator begin anew: with fresh lists, and knowing nothing."""
        self._remember()
        self._seen = len(self._history) - 1
        self._created.clear()
        self.taken.clear()

    def _remember(self) -> None:
        children = tuple(child.view for child in self.children.values())
        pods = tuple(pod.view for pod in self.pods.values())
        if not self._history or self._history[-1] != (children, pods):
            self._history.append((children, pods))

    def _read(self, name: str) -> FineTuneJob:
        return _parsed(self.config_maps[name]["data"]["job.json"])

    # --- what the operator does

    def execute(self, action: Action, resource_version: str) -> None:
        """Do what ``action`` says, as an API server would.

        Raises:
            RefusedError: the plan was made from an outdated job, or a name is taken.
        """
        if isinstance(action, Emit):
            self.events.append(action)
            return
        if resource_version != self.job.resource_version:
            raise RefusedError("the job has changed")
        match action:
            case Create(manifest):
                self._create(manifest)
            case Replace(manifest):
                self.config_maps[self._claim(manifest)] = manifest
            case Delete(ref):
                self._delete(ref.kind, ref.name, ref.uid)
            case RecordStatus(status):
                self._record(status)

    def acknowledge(self, results: tuple[DeliveredResult, ...]) -> None:
        """Tell trainers that their results have been recorded, which is so once their attempt has ended."""
        ended = {(one.stage, one.number) for one in self.job.status.attempts if one.end_time is not None}
        self.acknowledged |= ended & {(one.stage, one.attempt) for one in results}

    def _create(self, manifest: Mapping[str, Any]) -> None:
        name = self._claim(manifest)
        if manifest["kind"] == "ConfigMap":
            self.config_maps.setdefault(name, manifest)
            return
        if name in self.children:
            self._created[self.children[name].view.uid] = self.children[name].view
            return
        live = [pod.view.name for pod in self.pods.values() if not pod.view.is_over]
        assert not live, f"{name} is created beside {live}"
        stage, attempt = _identity(manifest["metadata"]["labels"])
        recorded = [(one.stage, one.number) for one in self.job.status.attempts]
        assert (stage, attempt) in recorded, f"{name} is created without being recorded"
        life = self.lives.get((stage, attempt), Life())
        queued, kind = life.queued_ticks > 0, ChildKind(manifest["kind"])
        self.children[name] = _Child(
            ChildView(
                kind=kind,
                name=name,
                ray_cluster=f"{name}-abcde" if kind is ChildKind.RAY_JOB else "",
                uid=self._uid(),
                owner_uid=self.job.uid,
                stage=stage,
                attempt=attempt,
                created=self.now,
                suspended=queued,
                admitted=None if queued else self.now,
            ),
            life,
            life.queued_ticks,
        )
        self._created[self.children[name].view.uid] = self.children[name].view
        self.log.append(f"create {name}")

    def _claim(self, manifest: Mapping[str, Any]) -> str:
        """Return the name of an object that is to be written."""
        name: str = manifest["metadata"]["name"]
        if name in self.foreign:
            self.taken.add(name)
            raise RefusedError(f"{name} belongs to somebody else")
        self.taken.discard(name)
        self._forbid_after_the_end()
        return name

    def adopt(self, child: ChildView) -> None:
        """Let a child be there that somebody else has created."""
        self.children[child.name] = _Child(child, self.lives.get((child.stage, child.attempt), Life()), 0)

    def _forbid_after_the_end(self) -> None:
        phase = self.job.status.phase
        assert phase is None or not phase.is_terminal, f"something is created in phase {phase}"

    def _delete(self, kind: str, name: str, uid: str) -> None:
        if kind == "ConfigMap":
            self.config_maps.pop(name, None)
            return
        child = self.children.get(name)
        if child is None or child.view.uid != uid:
            return
        # In the background, the hard case: the Job is gone while its pods still write their checkpoints.
        del self.children[name]
        self._created.pop(uid, None)
        self._kill_pods(name)
        self.log.append(f"delete {name}")

    def _kill_pods(self, child: str) -> None:
        for pod in [pod for pod in self.pods.values() if pod.view.child == child]:
            if pod.view.phase is PodPhase.RUNNING:
                pod.view, pod.dying = replace(pod.view, gone_by=self.now + GRACE), 2
            else:
                del self.pods[pod.view.uid]

    def _record(self, status: FineTuneJobStatus) -> None:
        FineTuneJobStatus.model_validate_json(status.model_dump_json(by_alias=True, exclude_none=True))
        phase = self.job.status.phase
        assert phase is None or not phase.is_terminal or phase is status.phase, "a terminal phase is left"
        self._put(status=status)

    def _put(self, **changes: Any) -> None:
        self.version += 1
        self.job = replace(self.job, resource_version=str(self.version + 1), **changes)

    # --- what users do

    def set_run_policy(self, **fields: Any) -> None:
        policy = {**self.job.spec.get("runPolicy", {}), **fields}
        self._put(spec={**self.job.spec, "runPolicy": policy}, generation=self.job.generation + 1)

    # --- what happens by itself

    @property
    def phase(self) -> Phase | None:
        return self.job.status.phase

    def is_running(self, stage: Stage) -> bool:
        return any(pod.view.stage is stage and pod.view.phase is PodPhase.RUNNING for pod in self.pods.values())

    def tick(self, seconds: float = 5) -> bool:
        """Let some time pass; return whether anything has happened."""
        self.now += timedelta(seconds=seconds)
        before = self._snapshot()
        for condition, happening in list(self.happenings):
            if condition(self):
                self.happenings.remove((condition, happening))
                happening(self)
        for pod in list(self.pods.values()):
            self._advance_pod(pod)
        for child in list(self.children.values()):
            self._advance_child(child)
        live = [pod.view.name for pod in self.pods.values() if not pod.view.is_over]
        assert len(live) <= 1, f"{live} run at the same time"
        self._remember()
        return self._snapshot() != before

    def _snapshot(self) -> object:
        return (
            [(pod.view, pod.left, pod.posting, pod.dying) for pod in self.pods.values()],
            [(child.view, child.queued) for child in self.children.values()],
            self.job.resource_version,
        )

    def _advance_child(self, child: _Child) -> None:
        view, pods = child.view, [pod for pod in self.pods.values() if pod.view.child == child.view.name]
        if view.is_over:
            return
        if view.suspended:
            child.queued -= 1
            if child.queued <= 0 and not pods:
                # As Kubernetes: it tells since when it may run later than it may.
                child.view = replace(view, suspended=False, admitted=view.created)
        elif not pods:
            self._start_pod(child)
        elif view.ray_cluster and view.started is None and pods[-1].view.started is not None:
            child.view = replace(view, started=pods[-1].view.started)
        elif pods[-1].view.is_over and not child.life.ray_hangs:
            child.view = _ended(view, pods[-1].view, child.life, self.now)

    def _start_pod(self, child: _Child) -> None:
        view, life = child.view, child.life
        uid = self._uid()
        reason, message = life.waits
        self.pods[uid] = _Pod(
            PodView(
                name=f"{view.name}-{uid[-3:]}",
                uid=uid,
                child=view.name,
                job_uid=self.job.uid,
                stage=view.stage,
                attempt=view.attempt,
                phase=PodPhase.PENDING,
                created=self.now,
                child_uid="" if view.ray_cluster else view.uid,
                ray_cluster=view.ray_cluster,
                waiting_reason=reason,
                waiting_message=message,
            ),
            life,
            life.waiting_ticks,
        )

    def _advance_pod(self, pod: _Pod) -> None:
        if pod.view.is_over:
            return
        if pod.dying:
            self._die(pod)
        elif pod.view.phase is PodPhase.PENDING:
            self._wait(pod)
        elif pod.posting:
            pod.posting += 1
            if (pod.view.stage, pod.view.attempt) in self.acknowledged or pod.posting > 20:
                self._finish(pod, pod.life.exit_code)
        else:
            self._run(pod)

    def _wait(self, pod: _Pod) -> None:
        pod.left -= 1
        if pod.left < 0:
            pod.left = pod.life.running_ticks
            pod.view = replace(
                pod.view,
                phase=PodPhase.RUNNING,
                started=self.now,
                node="node-1",
                waiting_reason="",
                waiting_message="",
            )

    def _run(self, pod: _Pod) -> None:
        pod.left -= 1
        child = self.children.get(pod.view.child)
        back = pod.life.taken_back_after
        if child is not None and back is not None and not child.was_taken_back and pod.left <= back:
            child.was_taken_back, child.queued = True, 3
            child.view = replace(child.view, suspended=True, admitted=None)
            pod.view, pod.dying = replace(pod.view, gone_by=self.now + GRACE), 1
        elif pod.left > 0:
            return
        elif pod.life.vanishes:
            del self.pods[pod.view.uid]
            self.children.pop(pod.view.child, None)
        elif pod.life.posts and not pod.life.is_mute and pod.life.exit_code in set(ExitCode):
            pod.posting = 1
        else:
            self._finish(pod, pod.life.exit_code)

    def _die(self, pod: _Pod) -> None:
        pod.dying -= 1
        if pod.dying == 0:
            del self.pods[pod.view.uid]

    def _finish(self, pod: _Pod, exit_code: int) -> None:
        said = "" if pod.life.is_mute or exit_code not in set(ExitCode) else bounded(self._word(pod)).decode()
        pod.posting = 0
        pod.view = replace(
            pod.view,
            phase=PodPhase.SUCCEEDED if exit_code == 0 else PodPhase.FAILED,
            exit_code=exit_code,
            finished=self.now,
            termination_message=said,
            out_of_memory=pod.life.out_of_memory,
            disrupted=pod.life.disrupted,
            over_limit=pod.life.over_limit,
        )

    def _word(self, pod: _Pod) -> StageResult:
        if pod.life.result is not None:
            return pod.life.result
        code = ExitCode(pod.life.exit_code)
        checkpoints = (
            (Checkpoint(step=100, uri="pvc://models/tuned/step-000100"),) if pod.view.stage is Stage.TRAIN else ()
        )
        message = "" if code is ExitCode.OK else f"it ended with {code.name}"
        return make_result(pod.view.stage, code, message=message, checkpoints=checkpoints)

    def _uid(self) -> str:
        self._uids += 1
        return f"uid-{self._uids:03}"


@functools.cache
def _parsed(content: str) -> FineTuneJob:
    return FineTuneJob.model_validate_json(content, by_alias=True, by_name=False)


def _identity(labels: Mapping[str, str]) -> tuple[Stage, int]:
    return Stage(labels[naming.STAGE_LABEL]), int(labels[naming.ATTEMPT_LABEL])


def _ended(child: ChildView, pod: PodView, life: Life, now: datetime) -> ChildView:
    if pod.phase is PodPhase.SUCCEEDED and not life.ray_fails:
        return replace(child, succeeded=True, finished=now)
    reason, said = "PodFailurePolicy", "it failed"
    if child.kind is ChildKind.RAY_JOB:
        reason, said = "AppFailed", f"Job entrypoint command failed with exit code {pod.exit_code}, last available logs"
    return replace(child, failed=True, finished=now, failure_reason=reason, failure_message=said)


@dataclass
class Operator:
    """An operator that may die after any action, be woken at any time, and see its caches late."""

    cluster: FakeCluster
    plan: Callable[[JobView, Observed, datetime], Any]
    dies_after: int | None = None
    """Number of the action after which it dies, once; counted from 1."""
    random: Random | None = None
    """Chooses lags and repetitions; None for neither."""
    done: int = 0

    def reconcile(self, is_late: bool = False) -> tuple[bool, datetime | None]:
        """Plan once and do it; return whether anything was to be done, and when to look again."""
        lag = self.random.randrange(4) if self.random and is_late else 0
        job, observed = self.cluster.observe(lag)
        plan = self.plan(job, observed, self.cluster.now)
        version = job.resource_version
        for action in plan.actions:
            try:
                self.cluster.execute(action, version)
            except RefusedError:
                return True, None
            self.done += 1
            if self.done == self.dies_after:
                self.cluster.forget()
                return True, None
            if isinstance(action, RecordStatus):
                version = self.cluster.job.resource_version
        self.cluster.acknowledge(observed.results)
        return bool(plan.actions), plan.wake_at

    def run(self, most_rounds: int = 2000) -> None:
        """Go on until nothing is left to do and nothing is left to wait for."""
        idle = 0
        for _ in range(most_rounds):
            busy = False
            for _ in range(self.random.choice([0, 1, 1, 2, 3]) if self.random else 1):
                acted, _ = self.reconcile(is_late=True)
                busy |= acted
            moved = self.cluster.tick()
            idle = 0 if busy or moved else idle + 1
            if idle < 8:
                continue
            acted, wake_at = self.reconcile()
            if acted:
                idle = 0
            elif wake_at is None:
                return
            else:
                # Nothing happens until then: the clock is put forward.
                self.cluster.now = max(self.cluster.now, wake_at)
                idle = 6
        raise AssertionError(f"no fixed point: {self.cluster.job.status!r}")
