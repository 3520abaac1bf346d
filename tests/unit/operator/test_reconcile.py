"""One look at a job, against an API server in memory: what is read, what is written, what is left alone."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest

from finetune_api.report import ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import (
    Attempt,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    Phase,
    Reason,
    ResolvedStatus,
    StageStatus,
)
from finetune_operator import event_recorder, naming, planner
from finetune_operator.action import Create, Delete, Emit, EventType, Plan, RecordStatus, Ref, Replace
from finetune_operator.cache import Cache, Indices, namespace_key, uid_key
from finetune_operator.cluster import ClusterError, RefusedError, UnavailableError
from finetune_operator.condition import Statement, stated
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.inbox import Inbox
from finetune_operator.manifest import content_hash, job_file
from finetune_operator.metric import Metrics
from finetune_operator.observed import DeliveredResult, JobView, KubeRayState, Observed
from finetune_operator.queue import Result, RetryError
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.view import Raw, child_view, job_view, packed_job, pod_view

from .fake_api_server import FakeApiServer
from .objects import CA, NAME, NAMESPACE, NOW, UID, after, make_resolved, make_settings
from .raw_objects import CREATED, queue_condition, raw_child, raw_job, raw_pod, raw_workload

KEY = (NAMESPACE, NAME)
OVER = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}
NOTHING = Plan()


@dataclass
class Gate:
    is_open: bool = True


@dataclass
class World:
    """A reconciler whose plans are the test's."""

    settings: Settings = field(default_factory=make_settings)
    plans: list[Plan] = field(default_factory=list)
    seen: list[tuple[JobView, Observed]] = field(default_factory=list)
    now: datetime = NOW
    server: FakeApiServer = field(default_factory=FakeApiServer)

    def __post_init__(self) -> None:
        self.gate = Gate()
        self.cache = Cache(clock=lambda: self.now.timestamp())
        self.woken: list[tuple[str, str]] = []
        self.inbox = Inbox(self.woken.append)
        self.metrics = Metrics()
        self.events = EventRecorder(self.server, self.metrics)
        self.reconciler = Reconciler(
            self.server,
            self.cache,
            self.settings,
            self.inbox,
            self.gate,
            self.metrics,
            self.events,
            self.plan,
            lambda: CA,
            lambda: self.now,
            kuberay=KubeRayState.READY,
        )

    def plan(self, job: JobView, observed: Observed, settings: Settings, now: datetime) -> Plan:
        self.seen.append((job, observed))
        return self.plans.pop(0) if self.plans else NOTHING

    def watch(self, job: Raw | None, children: list[Raw] = [], pods: list[Raw] = []) -> None:  # noqa: B006
        """Let the watches have told of these objects."""
        jobs: dict[Any, Any] = {}
        if job is not None:
            packed = packed_job(job)
            jobs = {packed.key: [packed], namespace_key(NAMESPACE): [packed]}
        views = [[child_view(one) for one in children], [pod_view(one) for one in pods]]
        indices = [
            {KEY: found, namespace_key(NAMESPACE): found} | {uid_key(one.uid): [one] for one in found if one}
            for found in views
        ]
        self.cache.indices = Indices(jobs, *indices)  # type: ignore[arg-type]

    def look(self) -> Result:
        async def scenario() -> Result:
            try:
                return await self.reconciler(KEY)
            finally:
                await self.events.write_all()

        return asyncio.run(scenario())

    def written(self) -> list[tuple[str, str]]:
        return [call for call in self.server.calls if call[0] not in ("get", "list")]


def make_world(*plans: Plan, status: dict[str, Any] | None = None, **changes: Any) -> World:
    """Return a world whose one job both the watches and the API server know."""
    world = World(plans=list(plans), **changes)
    world.watch(world.server.put("FineTuneJob", raw_job(status=status)))
    return world


def manifest(kind: str = "Job", name: str = "reviews-train-a1", owner: str = UID, **more: Any) -> dict[str, Any]:
    metadata = raw_child()["metadata"] | {"name": name}
    metadata["ownerReferences"][0]["uid"] = owner
    del metadata["uid"], metadata["resourceVersion"]
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **more}


def record(**fields: Any) -> RecordStatus:
    return RecordStatus(FineTuneJobStatus(**fields), "test")


def warning(reason: str) -> dict[str, Any]:
    return {"type": "Warning", "reason": reason, "message": "", "lastTimestamp": "2026-01-02T03:04:05Z", "metadata": {}}


# --- reading


def test_plan_without_actions_writes_nothing_and_reads_the_job_from_the_cache() -> None:
    world = make_world(Plan(wake_at=after(90)))
    assert world.look() == Result(after_seconds=90)
    assert ("get", "FineTuneJob") not in world.server.calls and world.written() == []


def test_replica_without_the_lease_does_not_even_look() -> None:
    world = make_world()
    world.gate.is_open = False
    assert world.look() == Result()
    assert world.seen == [] and world.server.calls == []


def test_job_that_is_gone_is_forgotten() -> None:
    world = make_world()
    world.watch(None)
    assert world.look() == Result()
    assert world.seen == []


def test_job_is_new_until_it_is_looked_at_and_its_namesake_is_new_again() -> None:
    world = make_world()
    known = [world.reconciler.is_new(KEY)]
    world.look()
    known.append(world.reconciler.is_new(KEY))
    world.watch(None)
    world.look()
    assert [*known, world.reconciler.is_new(KEY)] == [True, False, True]


def test_planner_sees_children_pods_and_authorities() -> None:
    world = make_world()
    world.watch(raw_job(), [raw_child()], [raw_pod(status={"phase": "Running"})])
    world.look()
    ((job, observed),) = world.seen
    assert job.key == KEY
    assert [child.name for child in observed.children] == ["reviews-train-a1"]
    assert [pod.child for pod in observed.pods] == ["reviews-train-a1"]
    assert observed.progress_ca == CA


def test_planner_sees_the_jobs_that_a_job_goes_on_from() -> None:
    world = make_world()
    jobs = []
    for name, start in ((KEY[1], "general"), ("general", "first"), ("first", KEY[1])):
        raw = raw_job()
        raw["metadata"] |= {"name": name, "uid": UID if name == KEY[1] else f"uid-{name}"}
        raw["spec"] = {"model": {"startFrom": {"job": start}}}
        jobs.append(packed_job(raw))
    world.cache.indices = Indices({job.key: [job] for job in jobs})
    world.look()
    assert [job.name for job in world.seen[0][1].starts] == ["general", "first", KEY[1]]


def test_forged_child_of_another_job_is_not_seen() -> None:
    forged = raw_child()
    forged["metadata"]["ownerReferences"][0]["uid"] = "somebody"
    world = make_world()
    world.watch(raw_job(), [forged])
    world.look()
    assert world.seen[0][1].children == ()


def test_pinned_spec_and_trust_are_read_once() -> None:
    name = "reviews-spec-12345678"
    attempts = [{"stage": "check", "number": 1, "child": "reviews-check-a1"}]
    world = make_world(status={"resolved": {"configMap": name}, "attempts": attempts})
    job = {key: value for key, value in raw_job().items() if key != "status"}
    content = json.dumps(job)
    world.server.put("ConfigMap", manifest("ConfigMap", name, data={"job.json": content}))
    trust = {"ca.crt": "old"}
    world.server.put("ConfigMap", manifest("ConfigMap", naming.trust_config_map_name(NAME), data=trust))
    world.look()
    world.look()
    observed = world.seen[1][1]
    assert observed.resolved is not None and observed.resolved.metadata.uid == UID
    assert observed.trust_hash == content_hash(trust)
    assert world.server.calls.count(("get", "ConfigMap")) == 2


def test_job_that_has_not_begun_is_not_asked_for_its_trust() -> None:
    world = make_world()
    world.look()
    assert world.seen[0][1].trust_hash is None
    assert world.server.calls == []


def test_config_map_of_somebody_else_pins_nothing() -> None:
    name = "reviews-spec-12345678"
    world = make_world(status={"resolved": {"configMap": name}})
    world.server.put("ConfigMap", manifest("ConfigMap", name, owner="somebody", data={"job.json": "{}"}))
    world.look()
    assert world.seen[0][1].resolved is None


def test_ended_job_costs_no_request() -> None:
    world = make_world(status={"phase": "Succeeded", "resolved": {"configMap": "x"}})
    world.look()
    assert world.server.calls == []


@pytest.mark.parametrize(("age", "reason"), [(1, ""), (5, "FailedMount")])
def test_silent_pod_is_asked_for_its_events_after_some_seconds(age: float, reason: str) -> None:
    world = make_world(now=after(age))
    world.watch(raw_job(), [raw_child()], [raw_pod()])
    event = {
        "type": "Warning",
        "reason": "FailedMount",
        "message": "no secret",
        "lastTimestamp": "2026",
        "metadata": {},
    }
    world.server.told["pod"] = [event]
    assert world.look() == Result(after_seconds=4.0)
    (pod,) = world.seen[0][1].pods
    assert pod.waiting_reason == reason


@pytest.mark.parametrize(("age", "pause"), [(1, 4), (15, 4), (120, 30), (86400, 60)])
def test_what_does_not_start_for_long_is_asked_less_often(age: float, pause: float) -> None:
    world = make_world(now=after(age))
    world.watch(raw_job(), [raw_child()])
    assert world.look() == Result(after_seconds=pause)


def test_child_without_pod_is_asked_for_its_events() -> None:
    world = make_world(now=after(5))
    world.watch(raw_job(), [raw_child()])
    world.server.told["child"] = [warning("FailedCreate")]
    world.look()
    assert world.seen[0][1].children[0].waiting_reason == "FailedCreate"


def test_events_that_may_not_be_read_stop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(now=after(5))
    world.watch(raw_job(), [raw_child()], [raw_pod()])
    world.server.fails = lambda verb, kind: RefusedError("forbidden") if kind == "Event" else None
    world.look()
    assert world.seen[0][1].pods[0].waiting_reason == ""
    assert "cannot read events" in caplog.text


@pytest.mark.parametrize(("age", "message"), [(1, ""), (5, "insufficient unused quota")])
def test_kueue_is_asked_why_it_holds_a_child_back_after_some_seconds(age: float, message: str) -> None:
    world = make_world(now=after(age))
    world.watch(raw_job(), [raw_child(spec={"suspend": True})])
    waits = queue_condition("QuotaReserved", "False", "insufficient unused quota")
    world.server.queued["child"] = [raw_workload(waits)]
    assert world.look() == Result(after_seconds=4.0)
    assert world.seen[0][1].children[0].waiting_message == message
    assert ("list", "Event") not in world.server.calls


@pytest.mark.parametrize(
    "over", [{"metadata": {"deletionTimestamp": CREATED}}, {"status": OVER}], ids=["deleted", "over"]
)
def test_kueue_is_not_asked_about_a_child_that_will_not_run(over: dict[str, Any]) -> None:
    world = make_world(now=after(5))
    world.watch(raw_job(), [raw_child(spec={"suspend": True}, **over)])
    assert world.look() == Result()
    assert ("list", "Workload") not in world.server.calls


@pytest.mark.parametrize("error", [RefusedError("forbidden"), UnavailableError("HTTP 500: conversion webhook failed")])
def test_kueue_that_does_not_answer_stops_nothing(error: ClusterError, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(now=after(5))
    world.watch(raw_job(), [raw_child(spec={"suspend": True})])
    world.server.fails = lambda verb, kind: error if kind == "Workload" else None
    assert world.look() == Result(after_seconds=4.0)
    assert world.seen[0][1].children[0].waiting_message == ""
    assert f"cannot read workloads namespace={NAMESPACE} error={error}" in caplog.text


def test_cap_counts_jobs_that_run_and_older_ones_that_want_to() -> None:
    accepted = [{"type": "Accepted", "status": "True"}]
    world = make_world(settings=make_settings(policy={"maxRunningJobs": 2}))
    jobs = [packed_job(raw_job())]
    for name, created, conditions in (
        ("older", "2026-01-02T03:00:00Z", accepted),
        ("younger", "2026-01-02T04:00:00Z", accepted),
        ("running", "2026-01-02T02:00:00Z", []),
    ):
        raw = raw_job(status={"conditions": conditions}, name=name, uid=name, creationTimestamp=created)
        jobs.append(packed_job(raw))
    child = raw_child()
    child["metadata"]["ownerReferences"][0]["uid"] = "running"
    view = child_view(child)
    indexed: dict[Any, Any] = {job.key: [job] for job in jobs} | {namespace_key(NAMESPACE): jobs}
    assert view is not None
    world.cache.indices = Indices(indexed, {(NAMESPACE, "running"): [view], namespace_key(NAMESPACE): [view]}, {})
    world.look()
    observed = world.seen[0][1]
    assert (observed.running_in_namespace, observed.waiting_before) == (1, 1)


class SlowApiServer(FakeApiServer):
    """Lets everybody else go on before it answers."""

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        await asyncio.sleep(0)
        return await super().get(kind, namespace, name)

    async def patch(self, *arguments: Any) -> Raw:
        await asyncio.sleep(0)
        return await super().patch(*arguments)

    async def create(self, manifest: Raw) -> Raw:
        await asyncio.sleep(0)
        return await super().create(manifest)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
@pytest.mark.parametrize("cap", [1, 2])
def test_jobs_that_come_at_once_do_not_exceed_the_cap(cap: int, order: tuple[str, ...]) -> None:
    settings = make_settings(policy={"maxRunningJobs": cap})
    server, cache, inbox = SlowApiServer(), Cache(clock=lambda: 0.0), Inbox(lambda key: None)
    jobs = [packed_job(server.put("FineTuneJob", raw_job(name=name, uid=f"{name:0<8}"))) for name in order]
    cache.indices = Indices({job.key: [job] for job in jobs} | {namespace_key(NAMESPACE): jobs})
    metrics = Metrics()
    events = EventRecorder(server, metrics)
    reconciler = Reconciler(
        server, cache, settings, inbox, Gate(), metrics, events, planner.plan, lambda: CA, lambda: NOW, True
    )

    async def settle() -> None:
        for _ in range(6):
            await asyncio.gather(*(reconciler(job.key) for job in jobs))

    asyncio.run(settle())
    started = [name for kind, _, name in server.objects if kind == "Job"]
    assert len(started) == cap


# --- writing


BEGUN = Attempt(stage=Stage.TRAIN, number=1, child="reviews-train-a1", record_time=NOW)


def test_plan_that_begins_with_a_record_asks_nothing_first() -> None:
    world = make_world(Plan((Create(manifest("ConfigMap", "pin"), "test"), record(attempts=(BEGUN,)))))
    assert world.look() == Result(settled=False)
    assert world.server.calls == [("create", "ConfigMap"), ("patch", "FineTuneJob")]


def test_what_was_pinned_a_moment_ago_is_not_read_again() -> None:
    pin, resolved = manifest("ConfigMap", "pin"), make_resolved()
    status = FineTuneJobStatus(attempts=(BEGUN,), resolved=ResolvedStatus(config_map="pin"))
    world = make_world(Plan((Create(pin, "test"), RecordStatus(status, "test")), pinned=job_file(resolved)))
    world.look()
    world.look()
    assert world.seen[1][1].resolved == resolved
    assert ("get", "ConfigMap") in world.server.calls, "the trust, of which nothing is known"
    assert world.server.calls.count(("get", "ConfigMap")) == 1


def test_news_is_told_last_and_also_when_the_rest_has_failed() -> None:
    world = make_world(Plan((record(attempts=(BEGUN,)), *emit().actions, Create(manifest(), "test"))))
    world.server.fails = lambda verb, kind: UnavailableError("away") if (verb, kind) == ("create", "Job") else None
    with pytest.raises(RetryError):
        world.look()
    assert told(world) == [("started", 1)]
    assert [kind for _, kind in world.written()] == ["FineTuneJob", "Job", "Event"]


def test_record_leaves_what_only_a_later_release_can_read() -> None:
    accepted = {"type": "Accepted", "status": "True", "reason": "SpecValid", "lastTransitionTime": CREATED}
    blessed = accepted | {"type": "Blessed"}
    world = make_world(status={"conditions": [blessed, accepted], "mood": "good"})
    read = job_view(packed_job(world.server.objects["FineTuneJob", NAMESPACE, NAME])).status
    told = Statement(ConditionType.CHECKED, ConditionStatus.TRUE, Reason.STAGE_SUCCEEDED)
    world.plans = [Plan((RecordStatus(stated(read, [told], NOW, 1), "test"),))]
    assert world.look() == Result(settled=False)
    written = world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"]
    assert written["mood"] == "good"
    assert [one["type"] for one in written["conditions"]] == ["Accepted", "Checked", "Blessed"]


def test_record_for_a_job_that_has_changed_is_refused_and_the_next_plan_is_made_from_what_it_is() -> None:
    world = make_world(Plan((record(attempts=(BEGUN,)), Create(manifest(), "test"))))
    world.server.put("FineTuneJob", raw_job({"spec.runPolicy": {"suspend": True}}, generation=2, resourceVersion="8"))
    assert world.look() == Result(settled=False)
    assert world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"] == {}
    assert ("Job", NAMESPACE, "reviews-train-a1") not in world.server.objects
    world.look()
    assert world.seen[1][0].generation == 2


def test_record_for_a_job_of_the_same_name_is_refused_and_the_old_one_is_a_ghost() -> None:
    world = make_world(Plan((record(attempts=(BEGUN,)), Create(manifest(), "test"))))
    world.server.put("FineTuneJob", raw_job(uid="another", resourceVersion="8"))
    assert world.look() == Result(settled=False)
    assert world.look() == Result()
    assert len(world.seen) == 1


def test_ghost_is_found_out_before_anything_is_written() -> None:
    world = make_world(Plan((Create(manifest(), "test"),)))
    world.server.objects.clear()
    assert world.look() == Result(settled=False)
    assert world.written() == []
    assert world.look() == Result()
    assert len(world.seen) == 1


def test_plan_for_a_job_that_has_changed_is_thrown_away() -> None:
    world = make_world(Plan((Create(manifest(), "test"),)))
    world.server.put("FineTuneJob", raw_job({"spec.runPolicy": {"suspend": True}}, generation=2))
    assert world.look() == Result(settled=False)
    assert world.written() == []
    world.look()
    assert world.seen[1][0].generation == 2


def test_progress_that_was_written_meanwhile_is_no_conflict_and_stays() -> None:
    # No condition and no attempt: the job is read before anything is written.
    world = make_world(Plan((record(phase=Phase.TRAINING),)))
    progress = {"stage": "train", "step": 7, "lastUpdateTime": "2026-01-02T03:04:05Z"}
    world.server.put("FineTuneJob", raw_job(status={"progress": progress}, resourceVersion="8"))
    world.look()
    status = world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"]
    assert status == {"phase": "Training", "progress": progress}


def test_created_child_is_seen_before_the_watch_tells_of_it() -> None:
    world = make_world(Plan((record(phase=Phase.TRAINING), Create(manifest(), "test"))))
    assert world.look() == Result(settled=False)
    world.look()
    job, observed = world.seen[1]
    assert [child.name for child in observed.children] == ["reviews-train-a1"]
    assert job.status.phase is Phase.TRAINING


def test_deleted_child_counts_as_being_deleted_before_the_watch_tells() -> None:
    world = make_world(Plan((Delete(Ref("Job", NAMESPACE, "reviews-train-a1", "child"), "test"),)))
    child = world.server.put("Job", raw_child())
    world.watch(world.server.objects["FineTuneJob", NAMESPACE, NAME], [child])
    world.look()
    assert ("Job", NAMESPACE, "reviews-train-a1") not in world.server.objects
    world.look()
    assert [child.deleting for child in world.seen[1][1].children] == [True]


def test_child_that_is_there_already_is_adopted() -> None:
    world = make_world(Plan((Create(manifest(), "test"), record(phase=Phase.TRAINING))))
    world.server.put("Job", manifest())
    world.look()
    assert world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"]["phase"] == "Training"


def test_name_of_somebody_else_stops_the_plan_and_is_told_next() -> None:
    world = make_world(Plan((Create(manifest(), "test"), record(phase=Phase.TRAINING))))
    other = manifest()
    del other["metadata"]["ownerReferences"]
    world.server.put("Job", other)
    with pytest.raises(RetryError, match="reviews-train-a1 belongs to somebody else"):
        world.look()
    world.look()
    assert world.seen[1][1].taken_names == {"reviews-train-a1"}


def test_name_that_a_deleted_namesake_holds_is_told_after_a_while() -> None:
    plan = Plan((Create(manifest(), "test"), record(phase=Phase.TRAINING)))
    world = make_world(plan)
    world.server.put("Job", manifest(owner="somebody"))
    with pytest.raises(RetryError, match="reviews-train-a1 belongs to somebody else"):
        world.look()
    world.look()
    assert world.seen[1][1].taken_names == frozenset()
    world.now = after(31)
    world.look()
    assert world.seen[2][1].taken_names == {"reviews-train-a1"}
    world.server.objects.pop(("Job", NAMESPACE, "reviews-train-a1"))
    world.look()
    assert world.seen[3][1].taken_names == frozenset()


def test_refused_creation_is_planned_with_and_then_tried_again_later() -> None:
    plan = Plan((Create(manifest(), "test"), Emit(EventType.NORMAL, Reason.STAGE_STARTED, "started")))
    world = make_world(plan, plan, plan)
    said = 'jobs.batch "x" is forbidden: exceeded quota: team'
    world.server.fails = lambda verb, kind: RefusedError(said) if (verb, kind) == ("create", "Job") else None
    assert world.look() == Result(settled=False)
    with pytest.raises(RetryError, match="exceeded quota"):
        world.look()
    assert world.seen[1][1].refused == {"reviews-train-a1": said}
    assert ("create", "Event") not in world.server.calls
    world.server.fails = lambda verb, kind: None
    world.look()
    world.look()
    assert world.seen[3][1].refused == {}


def test_config_map_that_may_not_be_written_stops_the_plan_and_is_planned_with() -> None:
    name = naming.trust_config_map_name(NAME)
    plan = Plan((Replace(manifest("ConfigMap", name, data={"ca.crt": "new"}), "test"), Create(manifest(), "test")))
    world = make_world(plan, plan, plan)
    world.server.put("ConfigMap", manifest("ConfigMap", name, data={"ca.crt": "old"}))
    said = "admission webhook denied the request"
    world.server.fails = lambda verb, kind: RefusedError(said) if (verb, kind) == ("update", "ConfigMap") else None
    assert world.look() == Result(settled=False)
    with pytest.raises(RetryError, match=said):
        world.look()
    assert world.seen[1][1].refused == {name: said}
    assert ("create", "Job") not in world.server.calls
    world.server.fails = lambda verb, kind: None
    world.look()
    world.look()
    assert world.seen[3][1].refused == {}
    assert world.seen[3][1].trust_hash == content_hash({"ca.crt": "new"})


def test_config_map_of_somebody_else_stops_the_plan_and_is_told_until_it_is_gone() -> None:
    name = naming.trust_config_map_name(NAME)
    plan = Plan((Replace(manifest("ConfigMap", name, data={}), "test"), Create(manifest(), "test")))
    world = make_world(plan, plan)
    other = manifest("ConfigMap", name, data={"theirs": ""})
    del other["metadata"]["ownerReferences"]
    world.server.put("ConfigMap", other)
    for _ in range(2):
        with pytest.raises(RetryError, match="reviews-trust belongs to somebody else"):
            world.look()
    assert world.seen[1][1].taken_names == {name}
    assert world.server.objects["ConfigMap", NAMESPACE, name]["data"] == {"theirs": ""}
    del world.server.objects["ConfigMap", NAMESPACE, name]
    world.look()
    assert world.seen[2][1].taken_names == frozenset()


@pytest.mark.parametrize("name", ["reviews-trust", "reviews-check-a1"])
def test_job_ends_at_its_start_deadline_when_what_it_needs_is_refused(name: str) -> None:
    class FullNamespace(FakeApiServer):
        async def create(self, manifest: Raw) -> Raw:
            if manifest["metadata"]["name"] == name:
                raise RefusedError(f'"{name}" is forbidden: exceeded quota: team')
            return await super().create(manifest)

    class PlannedWorld(World):
        def plan(self, job: JobView, observed: Observed, settings: Settings, now: datetime) -> Plan:
            return planner.plan(job, observed, settings, now)

    world = PlannedWorld(server=FullNamespace())
    world.server.put("FineTuneJob", raw_job())
    for minutes in range(40):
        world.now = after(60 * minutes)
        world.watch(world.server.objects["FineTuneJob", NAMESPACE, NAME])
        with contextlib.suppress(RetryError):
            world.look()
    status = world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"]
    assert [attempt["reason"] for attempt in status["attempts"]] == ["StartDeadlineExceeded"]
    assert name in status["summary"]["message"]
    assert not [place for place in world.server.objects if place[0] == "Job"]


def test_config_map_is_created_and_later_replaced() -> None:
    name = naming.trust_config_map_name(NAME)
    first, second = (manifest("ConfigMap", name, data={"ca.crt": text}) for text in ("old", "new"))
    world = make_world(Plan((Replace(first, "test"),)), Plan((Replace(second, "test"),)))
    world.look()
    world.look()
    assert world.server.objects["ConfigMap", NAMESPACE, name]["data"] == {"ca.crt": "new"}
    world.look()
    assert world.seen[2][1].trust_hash == content_hash({"ca.crt": "new"})


def test_config_map_without_known_uid_is_deleted_if_it_is_the_jobs_own() -> None:
    refs = [Ref("ConfigMap", NAMESPACE, name, "") for name in ("ours", "theirs", "gone")]
    world = make_world(Plan(tuple(Delete(ref, "test") for ref in refs)))
    world.server.put("ConfigMap", manifest("ConfigMap", "ours"))
    world.server.put("ConfigMap", manifest("ConfigMap", "theirs", owner="somebody"))
    world.look()
    assert {place[2] for place in world.server.objects if place[0] == "ConfigMap"} == {"theirs"}


def test_first_failure_ends_the_plan() -> None:
    world = make_world(Plan((record(phase=Phase.CHECKING), Create(manifest(), "test"))))
    world.server.fails = lambda verb, kind: UnavailableError("away") if verb == "patch" else None
    with pytest.raises(RetryError, match="away"):
        world.look()
    assert ("create", "Job") not in world.server.calls


def test_lost_lease_ends_the_plan() -> None:
    world = make_world(Plan((record(phase=Phase.CHECKING), Create(manifest(), "test"))))

    def lose(verb: str, kind: str) -> None:
        world.gate.is_open = verb != "patch"

    world.server.fails = lose
    with pytest.raises(RetryError, match="lease"):
        world.look()
    assert ("create", "Job") not in world.server.calls


def test_status_that_is_what_it_was_is_not_written() -> None:
    world = make_world(Plan((record(phase=Phase.CHECKING),)), status={"phase": "Checking"})
    assert world.look() == Result()
    assert world.written() == []


# --- telling


def emit(message: str = "started") -> Plan:
    return Plan((Emit(EventType.NORMAL, Reason.STAGE_STARTED, message),))


def told(world: World) -> list[tuple[str, int]]:
    return [(raw["message"], raw["count"]) for place, raw in world.server.objects.items() if place[0] == "Event"]


def test_event_that_is_told_again_is_counted() -> None:
    world = make_world(emit(), emit(), emit("stopped"))
    for _ in range(3):
        world.look()
    assert told(world) == [("started", 2), ("stopped", 1)]


def test_event_that_the_api_server_has_dropped_is_written_anew() -> None:
    world = make_world(emit(), emit())
    world.look()
    world.server.objects.pop(next(place for place in world.server.objects if place[0] == "Event"))
    world.look()
    assert told(world) == [("started", 2)]


def test_lost_event_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(Plan((*emit().actions, record(phase=Phase.CHECKING))))
    world.server.fails = lambda verb, kind: RefusedError("forbidden") if kind == "Event" else None
    world.look()
    assert world.server.objects["FineTuneJob", NAMESPACE, NAME]["status"]["phase"] == "Checking"
    assert "event not written" in caplog.text


def test_nobody_waits_for_an_event_to_be_written() -> None:
    world = make_world(emit())
    asyncio.run(world.reconciler(KEY))
    assert told(world) == []
    asyncio.run(world.events.write_all())
    assert told(world) == [("started", 1)]


def test_events_behind_a_line_that_is_full_are_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_recorder, "MOST_WAITING", 1)
    world = make_world(Plan((*emit("first").actions, *emit("second").actions)))
    world.look()
    assert told(world) == [("first", 1)]
    assert "too many others wait" in caplog.text


def test_what_waits_is_written_before_the_end() -> None:
    world = make_world(emit())

    async def scenario() -> None:
        writing = asyncio.create_task(world.events.run())
        await world.reconciler(KEY)
        world.events.stop()
        await asyncio.wait_for(writing, 5)

    asyncio.run(scenario())
    assert told(world) == [("started", 1)]


# --- results


def deliver(world: World, until: Callable[[], object]) -> bool:
    """Post a result and let the reconciler look until it is answered."""
    result = StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK)
    job = world.cache.job(*KEY)
    assert job is not None

    async def scenario() -> bool:
        posting = asyncio.create_task(world.inbox.deliver(job, DeliveredResult(Stage.CHECK, 1, result), 0.5))
        await asyncio.sleep(0)
        assert world.woken == [KEY]
        while not posting.done() and until():
            await world.reconciler(KEY)
            await asyncio.sleep(0)
        return await posting

    return asyncio.run(scenario())


def test_result_is_acknowledged_when_the_status_holds_it() -> None:
    ended = StageStatus(stage=Stage.CHECK, attempt=1, exit_code=0, end_time=NOW)
    world = make_world(Plan((record(stages=(ended,)),)))
    assert deliver(world, until=lambda: True)
    assert [one.stage for one in world.seen[0][1].results] == [Stage.CHECK]
    assert world.inbox.take(UID) == ()


def test_result_is_not_acknowledged_while_the_status_cannot_be_written() -> None:
    ended = StageStatus(stage=Stage.CHECK, attempt=1, exit_code=0, end_time=NOW)
    world = make_world(Plan((record(stages=(ended,)),)))
    world.server.fails = lambda verb, kind: UnavailableError("away") if verb == "patch" else None

    async def scenario() -> bool:
        job = world.cache.job(*KEY)
        assert job is not None
        result = DeliveredResult(Stage.CHECK, 1, StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK))
        posting = asyncio.create_task(world.inbox.deliver(job, result, 0.1))
        await asyncio.sleep(0)
        with pytest.raises(RetryError):
            await world.reconciler(KEY)
        return await posting

    assert not asyncio.run(scenario())
    assert len(world.inbox.take(UID)) == 1


# --- logs


def test_every_line_about_a_job_names_it(caplog: pytest.LogCaptureFixture) -> None:
    actions = (Create(manifest(), "test"), record(phase=Phase.CHECKING), *emit('a "quoted" text').actions)
    world = make_world(Plan(actions))
    with caplog.at_level(logging.INFO):
        world.look()
    lines = [record.getMessage() for record in caplog.records if record.name == "finetune_operator.executor"]
    assert len(lines) == 3
    assert all(line.endswith(f" job={NAMESPACE}/{NAME}") for line in lines)
