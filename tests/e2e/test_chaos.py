"""A seeded run of faults over several jobs at once: every job ends once, as it should, and leaves nothing behind.

Inputs: as tests/e2e/test_jobs.py; FINETUNE_CHAOS_SEED and FINETUNE_CHAOS_JOBS. Outputs: the schedule, what was hit, and
figures, on standard output.
"""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kubernetes import client

from finetune_api.report import Report
from finetune_api.status import Phase
from finetune_trainer.manifest import verify_manifest

from ..cluster.cluster import Cluster, await_condition
from ..cluster.object_store import ObjectStore
from .chronicle import Chronicle, chronicle
from .fault import Fate, Fault, FaultKind, PlannedJob, Schedule, schedule
from .faulty_store import FaultyStore, Write, faulty_store
from .injection import Injector
from .judge import Story, complaints, steps_done_again
from .object import JOB_UID_LABEL, Document, Jobs
from .release import OperatorRelease
from .sample import BUCKET, ONE_THREAD, download, example

SEED = int(os.environ.get("FINETUNE_CHAOS_SEED", "8"))
JOBS = int(os.environ.get("FINETUNE_CHAOS_JOBS", "4"))
AT_ONCE = 4
SECONDS = 900 + 90 * JOBS
STEPS = 60
CLEAN_SECONDS = 120
CHECKED = (Fate.PUBLISHED, Fate.BAD_DATA)
"""Jobs that begin with the check stage; the others begin to learn at once, for faults to hit them at it."""
BEFORE = (Phase.PENDING, Phase.QUEUED, Phase.CHECKING, Phase.TRAINING)
"""Phases in which there is something to learn yet."""
PAUSE_SECONDS = 0.5


@pytest.fixture
def store(cluster: Cluster, s3: ObjectStore, operator_image: str) -> Iterator[FaultyStore]:
    if cluster.docker is None:
        pytest.skip("the node of a cluster that is not ours is not rebooted")
    with faulty_store(cluster, s3, operator_image) as store:
        yield store


def document(planned: PlannedJob, s3: ObjectStore, store: FaultyStore) -> Document:
    """Return the manifest of a job with that fate."""
    job = example(
        s3,
        planned.name,
        training={"maxSteps": 1_000_000 if planned.fate is Fate.WITHDRAWN else STEPS, "globalBatchSize": 4},
        checkpoint={"everySteps": 5},
        output={"endpoint": store.endpoint_in_cluster},
        runPolicy={"preflight": "enforce" if planned.fate in CHECKED else "skip", "retries": 20},
    )
    # No limit: the pods share what the machine has.
    job["spec"]["compute"] = {"gpusPerWorker": 0, "pod": ONE_THREAD}
    job["spec"]["data"]["tasks"][0]["maxExamples"] = 60
    match planned.fate:
        case Fate.BAD_DATA:
            job["spec"]["data"]["tasks"][0]["templates"][0]["prompt"] = "{{ review_text }}"
        case Fate.KEPT_BACK:
            job["spec"]["evaluation"]["gates"] = [{"metric": "sentiment.perplexity", "max": 0.5}]
    return job


@dataclass
class Run:
    """A schedule that is being carried out."""

    plan: Schedule
    jobs: Jobs
    s3: ObjectStore
    store: FaultyStore
    injector: Injector
    seen: Chronicle
    uids: dict[str, str] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    hits: list[str] = field(default_factory=list)
    steps: int = 0
    """Done when the last fault was over."""
    started: float = field(default_factory=time.monotonic)

    def carry_out(self) -> None:
        """Apply all jobs, let all faults happen, and return when every job has ended."""
        waiting, faults = deque(self.plan.jobs), deque(self.plan.faults)
        deadline = time.monotonic() + SECONDS
        while waiting or faults or self._unended():
            assert time.monotonic() < deadline, f"not over within {SECONDS} s: {self._unended()}; {self.hits}"
            while waiting and len(self._unended()) < AT_ONCE:
                planned = waiting.popleft()
                self.uids[planned.name] = self.jobs.apply(document(planned, self.s3, self.store)).uid
            if faults and self._is_due(faults[0]):
                fault = faults.popleft()
                self._note(fault.kind, self.injector.inject(fault, self._to_be_withdrawn()))
                self.steps = self._steps()
            elif not faults and (names := self._to_be_withdrawn()):
                # It was not there when its turn came.
                self.jobs.delete(names[0])
                self.withdrawn.add(names[0])
            else:
                time.sleep(PAUSE_SECONDS)  # the chronicle is written by another thread

    def _is_due(self, fault: Fault) -> bool:
        """Whether enough was learnt since the fault before, or nothing learns any more."""
        newest = self.seen.newest()
        learning = [
            name
            for name in self.uids
            if name not in self.withdrawn and (name not in newest or newest[name].phase in (None, *BEFORE))
        ]
        return not learning or self._steps() - self.steps >= fault.after_steps

    def _steps(self) -> int:
        """Return the steps that all jobs have done, those that were done again included."""
        return sum(step for name in self.uids for step in self.seen.reached(name).values())

    def _note(self, kind: FaultKind, hit: str) -> None:
        self.hits.append(f"{time.monotonic() - self.started:6.0f} s  {kind.value}: {hit}")
        if kind is FaultKind.JOB_WITHDRAWN and hit in self.uids:
            self.withdrawn.add(hit)

    def _unended(self) -> list[str]:
        newest = self.seen.newest()
        return [
            name
            for name in self.uids
            if name not in self.withdrawn
            and not (name in newest and (phase := newest[name].phase) is not None and phase.is_terminal)
        ]

    def _training(self) -> list[str]:
        return [name for name, job in self.seen.newest().items() if job.phase is Phase.TRAINING]

    def _to_be_withdrawn(self) -> list[str]:
        wanted = [one.name for one in self.plan.jobs if one.fate is Fate.WITHDRAWN]
        return [name for name in self._training() if name in wanted and name not in self.withdrawn]

    # --- what is left of it

    def active_pods(self, uid: str) -> tuple[str, ...]:
        return tuple(pod.metadata.name for pod in self.jobs.pods(uid) if pod.status.phase in ("Pending", "Running"))

    def stories(self, folder: Path) -> list[Story]:
        writes = self.store.writes()
        return [self._story(planned, writes, folder / planned.name) for planned in self.plan.jobs]

    def _story(self, planned: PlannedJob, writes: tuple[Write, ...], folder: Path) -> Story:
        uid, job = self.uids[planned.name], self.seen.newest().get(planned.name)
        prefix = f"output/{self.jobs.namespace}/{planned.name}-{uid[:8]}/"
        below = [
            Write(one.at, one.method, one.key.removeprefix(prefix), one.status)
            for one in writes
            if one.key.startswith(prefix)
        ]
        return Story(
            planned,
            self.seen.phases(planned.name),
            job.status if job else None,
            children=tuple(child.metadata.name for child in self.jobs.children(uid)),
            active_pods=self.active_pods(uid),
            writes=tuple(below),
            reached=self.seen.reached(planned.name),
            steps_wanted=STEPS,
            steps_reported=self._verified_steps(planned, prefix, folder),
        )

    def _verified_steps(self, planned: PlannedJob, prefix: str, folder: Path) -> int | None:
        """Return the steps that the published report tells of; what was published is compared with its manifest."""
        if planned.fate in (Fate.BAD_DATA, Fate.WITHDRAWN):
            return None
        if planned.fate is Fate.PUBLISHED:
            verify_manifest(download(self.s3, f"s3://{BUCKET}/{prefix}model", folder / "model"))
        report = download(self.s3, f"s3://{BUCKET}/{prefix}report", folder / "report")
        verify_manifest(report)
        return Report.model_validate_json((report / "report.json").read_text(encoding="utf-8")).training.steps

    def left_behind(self) -> list[str]:
        """Return what there is in the namespace of jobs that are gone."""
        found = [
            *self.jobs.batch.list_namespaced_job(self.jobs.namespace).items,
            *self.jobs.core.list_namespaced_pod(self.jobs.namespace, label_selector=JOB_UID_LABEL).items,
            *(one for one in self._config_maps() if one.metadata.owner_references),
        ]
        alive = {job.uid for job in self.seen.newest().values()}
        owners = ((one.metadata.name, one.metadata.owner_references or []) for one in found)
        # A pod's owner is its Job, which is listed itself.
        return [name for name, refs in owners if not any(ref.uid in alive or ref.kind == "Job" for ref in refs)]

    def _config_maps(self) -> list[client.V1ConfigMap]:
        return list(self.jobs.core.list_namespaced_config_map(self.jobs.namespace).items)

    def figures(self, stories: list[Story]) -> str:
        attempts = [one for story in stories if story.status for one in story.status.attempts]
        ends = Counter(one.reason.value if one.reason else "open" for one in attempts)
        again = [steps_done_again(story) for story in stories]
        return "\n".join(
            [
                f"\nchaos: seed {self.plan.seed}, {len(stories)} jobs, {len(self.plan.faults)} faults, "
                f"{time.monotonic() - self.started:.0f} s",
                *self.hits,
                f"requests to the store: {self.store.harm()}",
                f"attempts: {dict(ends)}",
                f"steps done again: {sum(again)} of {self._steps()}, at most {max(again)} of one job",
                "",
            ]
        )


@pytest.mark.alone
@pytest.mark.timeout(SECONDS + 600)
def test_jobs_end_once_and_as_they_should_whatever_happens(
    cluster: Cluster,
    jobs: Jobs,
    s3: ObjectStore,
    store: FaultyStore,
    operator: OperatorRelease,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with chronicle(jobs) as seen:
        injector = Injector(cluster, jobs, operator, store)
        run = Run(schedule(SEED, JOBS), jobs, s3, store, injector, seen)
        run.carry_out()
        operator.wait_ready()
        # A pod may go on for a moment when its trainer has said how it ended.
        await_condition(
            lambda: not any(run.active_pods(uid) for uid in run.uids.values()) and not run.left_behind(),
            "the end of all pods",
            CLEAN_SECONDS,
        )
        stories = run.stories(tmp_path)
    with capsys.disabled():
        sys.stdout.write(run.figures(stories))
    assert [one for story in stories for one in complaints(story)] == []

    for name in seen.newest():
        jobs.delete(name)
    await_condition(lambda: nothing_is_left(jobs), "the end of what jobs owned", CLEAN_SECONDS)


def nothing_is_left(jobs: Jobs) -> bool:
    core, batch = jobs.core, jobs.batch
    owned = [one for one in core.list_namespaced_config_map(jobs.namespace).items if one.metadata.owner_references]
    return not (
        owned or batch.list_namespaced_job(jobs.namespace).items or core.list_namespaced_pod(jobs.namespace).items
    )
