"""FineTuneJobs from their creation to their end, and what the operator takes for it."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.operator.conftest import install_crd
from tests.integration.operator.operator_process import Home, OperatorProcess, await_until
from tests.integration.operator.workload import CLUSTER_SPEC
from tests.unit.builders import make_manifest

from finetune_operator.cluster import PROGRESS_MANAGER
from finetune_operator.naming import JOB_LABEL

from .cluster import HERE, ControlPlane, Cpu, cpu, usage
from .load import Client, latencies, patience, percentile

NAMESPACES = 10
SYSTEM = "finetune-system"
LOOKS = "finetune_reconcile_duration_seconds_count"
REST_SECONDS = 60.0
QUIET_SECONDS = 3.0
"""The operator is quiet when it has looked at every job, and for so long at none and told nobody of any."""
WRITES = frozenset({"create", "update", "patch", "delete"})
OVERRIDES = {**CLUSTER_SPEC, "spec.compute.gpusPerWorker": 0, "spec.compute.pod.serviceAccountName": "default"}


@dataclass(frozen=True, slots=True)
class Life:
    """Figures of one life of many jobs."""

    jobs: int
    apply_p50: float
    apply_p99: float
    """Seconds from the request that creates a job to its first child, while nothing else is done."""
    life_seconds: float
    """From the moment that pods may end to the end of the last job; three stages of 5 to 15 s each."""
    looks_per_second: float
    """Reconciles, during that time."""
    writes_per_job: float
    """Over the whole life, events left out."""
    events_per_job: float
    writes: dict[str, float]
    """Both, for one job."""
    memory_mb: float
    """The most that the operator ever had."""
    apply_cpu: Cpu
    """What a job costs until its child is there."""
    cpu_seconds_per_job: float
    """Of the operator, over the whole life with two restarts."""
    restart_running: float
    """Seconds from the start of a killed operator until it is quiet, all jobs running."""
    restart_ended: float
    """The same, all jobs ended."""
    writes_at_rest: int
    """In a minute, all jobs running, and in another, all ended."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Figures of many jobs until each has its first child; there are no pods."""

    jobs: int
    apply_p50: float
    apply_p99: float
    apply_cpu: Cpu
    writes: dict[str, float]
    """For one job."""
    memory_mb: float
    """The most that the operator ever had, a restart with all jobs present included."""
    restart: float
    """Seconds from the start of a killed operator until it has looked at every job and none waits."""


async def begin(jobs: int, folder: Path, workers: int) -> Beginning:
    """Let ``jobs`` FineTuneJobs begin and return the figures."""
    plane = ControlPlane(folder)
    try:
        plane.start()
        return await _Run(plane, jobs, workers).begin()
    finally:
        plane.stop()


async def live(jobs: int, folder: Path, workers: int) -> Life:
    """Let ``jobs`` FineTuneJobs live and return the figures."""
    plane = ControlPlane(folder)
    try:
        plane.start()
        return await _Run(plane, jobs, workers).live()
    finally:
        plane.stop()


class _Run:
    def __init__(self, plane: ControlPlane, jobs: int, workers: int) -> None:
        self._plane = plane
        self._jobs = jobs
        self._namespaces = [f"team-{number}" for number in range(NAMESPACES)]
        install_crd(plane.server)
        for namespace in (SYSTEM, *self._namespaces):
            plane.server.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        home = Home(plane.server, SYSTEM)
        self._operator = OperatorProcess(home, plane.folder, workers=workers, backoffSeconds=10.0)
        self._cpu_before = 0.0
        self._most_memory = 0

    async def begin(self) -> Beginning:
        try:
            self._operator.start()
            before = self._cpu()
            waited = await self._apply()
            apply_cpu = self._cpu().since(before, self._jobs)
            writes = self._writes_per_job()
            restart = self._restart(self._await_looks)
            self._take_stock()
        finally:
            self._operator.kill()
        return Beginning(
            jobs=self._jobs,
            apply_p50=percentile(waited, 0.5),
            apply_p99=percentile(waited, 0.99),
            apply_cpu=apply_cpu,
            writes=writes,
            memory_mb=self._most_memory / 1e6,
            restart=restart,
        )

    async def live(self) -> Life:
        try:
            self._operator.start()
            return await self._live()
        finally:
            self._operator.kill()

    async def _live(self) -> Life:
        before = self._cpu()
        waited = await self._apply()
        apply_cpu = self._cpu().since(before, self._jobs)
        runs, ends = _stages()
        self._plane.start_nodes(runs)
        self._await_pods()
        self._await_quiet()
        at_rest = self._writes_in_a_minute()
        restart_running = self._restart(self._await_quiet)
        looks, began = self._operator.metric(LOOKS), time.monotonic()
        self._plane.start_nodes(runs + ends)
        # Each answer costs the operator a look at every job.
        await_until(lambda: self._count("Succeeded") == self._jobs, "all have succeeded", patience(self._jobs), pause=2)
        life_seconds = time.monotonic() - began
        looks = self._operator.metric(LOOKS) - looks
        self._await_quiet()
        at_rest += self._writes_in_a_minute()
        restart_ended = self._restart(self._await_quiet)
        self._take_stock()
        writes = self._writes_per_job()
        events = sum(count for kind, count in writes.items() if "events" in kind)
        return Life(
            jobs=self._jobs,
            apply_p50=percentile(waited, 0.5),
            apply_p99=percentile(waited, 0.99),
            life_seconds=life_seconds,
            looks_per_second=looks / life_seconds,
            writes_per_job=sum(writes.values()) - events,
            events_per_job=events,
            writes=writes,
            memory_mb=self._most_memory / 1e6,
            apply_cpu=apply_cpu,
            cpu_seconds_per_job=self._cpu_before / self._jobs,
            restart_running=restart_running,
            restart_ended=restart_ended,
            writes_at_rest=at_rest,
        )

    async def _apply(self) -> list[float]:
        manifests = []
        for number in range(self._jobs):
            manifest = make_manifest(OVERRIDES)
            manifest["metadata"] = {"name": f"job-{number}", "namespace": self._namespaces[number % NAMESPACES]}
            manifests.append(manifest)
        path = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
        async with Client(self._plane.server) as client:
            return await latencies(client, manifests, path, "/apis/batch/v1/jobs", _job_of)

    def _cpu(self) -> Cpu:
        return cpu(self._operator.pid, self._plane)

    # --- what the operator does

    def _await_pods(self) -> None:
        """Wait until the pod of every job runs."""

        def all_run() -> bool:
            pods = self._plane.server.request("GET", "/api/v1/pods?limit=1")
            count = len(pods["items"]) + pods["metadata"].get("remainingItemCount", 0)
            pending = self._plane.server.request("GET", "/api/v1/pods?fieldSelector=status.phase%3DPending&limit=1")
            return count == self._jobs and not pending["items"]

        await_until(all_run, "all pods run", patience(self._jobs), pause=1)

    def _await_quiet(self) -> float:
        """Return when the operator last did something, as soon as that is a while ago."""
        seen, since = -1.0, time.monotonic()
        deadline = since + patience(self._jobs)
        while time.monotonic() - since < QUIET_SECONDS:
            if time.monotonic() > deadline:
                raise SystemExit(f"the operator does not come to rest; see {self._operator.log_file}")
            looks = self._operator.metric(LOOKS)
            if looks != seen or looks < self._jobs or self._is_busy():
                seen, since = looks, time.monotonic()
            time.sleep(0.5)
        return since

    def _await_looks(self) -> float:
        """Return when the operator has looked at every job and none waits."""
        await_until(
            lambda: self._operator.metric(LOOKS) >= self._jobs and not self._operator.metric("finetune_queue_depth"),
            "every job is looked at",
            patience(self._jobs),
        )
        return time.monotonic()

    def _is_busy(self) -> bool:
        return any(self._operator.metric(name) for name in ("finetune_queue_depth", "finetune_events_waiting"))

    def _restart(self, until: Callable[[], float]) -> float:
        self._take_stock()
        self._operator.kill()
        began = time.monotonic()
        self._operator.start()
        return until() - began

    def _take_stock(self) -> None:
        """Add up what the process that runs has taken."""
        taken = usage(self._operator.pid)
        self._cpu_before += taken.cpu_seconds
        self._most_memory = max(self._most_memory, taken.most_memory_bytes)

    def _count(self, phase: str) -> int:
        lines = [line for line in self._operator.get("/metrics").splitlines() if line.startswith("finetune_jobs{")]
        return sum(round(float(line.rpartition(" ")[2])) for line in lines if f'phase="{phase}"' in line)

    # --- what it asked of the API server

    def _writes_in_a_minute(self) -> int:
        before = self._writes().total()
        time.sleep(REST_SECONDS)
        return self._writes().total() - before

    def _writes_per_job(self) -> dict[str, float]:
        return {kind: count / self._jobs for kind, count in sorted(self._writes().items())}

    def _writes(self) -> Counter[str]:
        """Return how often what was written; neither the lease, nor reviews of tokens, nor progress."""
        return Counter(
            _kind(request)
            for request in self._plane.requests()
            if request["verb"] in WRITES
            and request["objectRef"]["resource"] not in ("leases", "tokenreviews")
            and f"fieldManager={PROGRESS_MANAGER}" not in request["requestURI"]
        )


def _kind(request: dict[str, Any]) -> str:
    reference = request["objectRef"]
    parts = (reference["resource"], *filter(None, [reference.get("subresource")]))
    failed = "" if request["responseStatus"]["code"] < 300 else f" ({request['responseStatus']['code']})"
    return f"{request['verb']} {'/'.join(parts)}{failed}"


def _job_of(metadata: dict[str, Any]) -> str | None:
    name: str | None = (metadata.get("labels") or {}).get(JOB_LABEL)
    return name


def _stages() -> tuple[str, str]:
    """Return what kwok plays: pods run, and pods end."""
    parts = re.split(r"^---\n", (HERE / "kwok.yaml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    runs, ends, goes = parts
    return f"{runs}---\n{goes}", f"---\n{ends}"
