"""``finetune logs``: what the pods of a job print, across its stages and attempts."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from finetune_api.plain_text import printable
from finetune_api.report import ExitCode, Stage
from finetune_cli.cluster_job import ClusterJob, JobName
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.job_status import fetch
from finetune_cli.patience import Patience
from finetune_cli.refusal import ClusterError, NotFoundError
from finetune_operator import naming
from finetune_trainer.errors import SpecError

SECONDS_BETWEEN_LOGS = 1.0
"""Between two requests for the log of a container that is still said to run."""


@dataclass(frozen=True, slots=True)
class StagePod:
    """A pod that ran or will run one attempt."""

    name: str
    uid: str
    stage: Stage
    attempt: int
    created: str
    has_begun: bool
    """Whether there is a log to read."""
    is_over: bool
    waits_for: str
    """Why its container does not run yet; empty when it does."""

    @property
    def order(self) -> tuple[int, int, str]:
        """Pods run in this order."""
        return list(Stage).index(self.stage), self.attempt, self.created


def show_logs(
    api: JobApi,
    name: JobName,
    stage: Stage | None,
    follow: bool,
    pause: Callable[[float], None] = time.sleep,
) -> ExitCode:
    """Print the log of the newest attempt, of ``stage`` or of the one that runs; with ``follow``, of all that come.

    Args:
        api: the cluster.
        name: the job.
        stage: read nothing else.
        follow: go on until the job, or the stage, has ended.
        pause: waits between tries.

    Raises:
        SpecError: there is no log; says why.
    """
    job = fetch(api, name)
    logs = _Logs(api, name, pod_labels(job, stage), Patience(_tell, pause))
    if not follow:
        return _print_newest(logs, job, stage)
    try:
        return _follow(logs, stage)
    except KeyboardInterrupt:
        sys.stderr.write("The job goes on in the cluster.\n")
        return ExitCode.PREEMPTED


def stage_pods(pods: list[JsonObject]) -> list[StagePod]:
    """Return the pods of stages in the order in which they run; others are left out."""
    found = [stage_pod(pod) for pod in pods]
    return sorted((pod for pod in found if pod is not None), key=lambda pod: pod.order)


def stage_pod(pod: JsonObject) -> StagePod | None:
    """Return what is known of one pod; nothing when it is of no stage."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    stage, attempt = labels.get(naming.STAGE_LABEL), labels.get(naming.ATTEMPT_LABEL, "")
    if stage not in list(Stage) or not attempt.isdigit():
        return None
    containers = [one for one in status.get("containerStatuses") or () if one.get("name") == naming.CONTAINER]
    state = containers[0].get("state") or {} if containers else {}
    waiting = state.get("waiting") or {}
    return StagePod(
        name=metadata["name"],
        uid=metadata["uid"],
        stage=Stage(stage),
        attempt=int(attempt),
        created=metadata.get("creationTimestamp") or "",
        has_begun="running" in state or "terminated" in state,
        is_over="terminated" in state or status.get("phase") in ("Succeeded", "Failed"),
        waits_for="" if "running" in state else str(waiting.get("reason") or status.get("phase") or "Pending"),
    )


def why_no_log(job: ClusterJob, pods: list[StagePod], stage: Stage | None) -> str:
    """Return why there is nothing to print, and what to do."""
    what = f"FineTuneJob {job.name}"
    if pods:
        return (
            f"the {pods[-1].stage.value} stage of {what} has not begun: pod {pods[-1].name} waits "
            f"({pods[-1].waits_for}). finetune logs -f waits for it; finetune status says more."
        )
    phase = job.status.phase
    if phase is not None and phase.is_terminal:
        seconds = (job.spec.get("runPolicy") or {}).get("childTtlSeconds", 86400)
        report = shlex.join(["finetune", "report", job.name.name, "-n", job.name.namespace])
        return (
            f"there are no pods of {what} any more: they are removed {seconds} s after the end "
            f"(spec.runPolicy.childTtlSeconds), and their logs with them. The numbers are in the report: {report}"
        )
    of = f"the {stage.value} stage of " if stage else ""
    return f"no pod of {of}{what} is there yet. finetune logs -f waits for one; finetune status says why."


# --- reading


@dataclass(frozen=True, slots=True)
class _Logs:
    """Where the logs of one job are read."""

    api: JobApi
    name: JobName
    labels: Mapping[str, str]
    """Of the pods that are looked at."""
    patience: Patience

    def job(self) -> ClusterJob:
        return self.patience.ask(lambda: fetch(self.api, self.name))

    def pods(self) -> list[StagePod]:
        return stage_pods(self.patience.ask(lambda: self.api.pods(self.name.namespace, self.labels)))

    def pod(self, uid: str) -> StagePod | None:
        return next((pod for pod in self.pods() if pod.uid == uid), None)

    def lines(self, pod: StagePod, follow: bool, since: str | None = None) -> Iterator[str]:
        """Yield lines after ``since``; the API server begins with those of the same second, which are known."""
        for line in self.api.log(self.name.namespace, pod.name, naming.CONTAINER, since, follow):
            if since is None or _instant(line) > _instant(since):
                yield line

    def await_change(self, job: ClusterJob, waiting: Collection[StagePod], done: Collection[str]) -> None:
        """Return when there may be more to read, or when the watch ends after a minute.

        Args:
            job: every new attempt and the end are told by it.
            waiting: pods that have not begun; when there are any, they are watched instead.
            done: pods that have been read.
        """
        with contextlib.suppress(ClusterError):  # who looks next has patience
            if not waiting:
                for _ in self.api.watch(self.name.namespace, self.name.name, job.resource_version):
                    return
            for document in self.api.watch_pods(self.name.namespace, self.labels) if waiting else ():
                pod = stage_pod(document)
                if pod is not None and pod.uid not in done and pod not in waiting:
                    return
        # A server that ends every watch at once is not asked in a tight loop.
        self.patience.pause(SECONDS_BETWEEN_LOGS)


def pod_labels(job: ClusterJob, stage: Stage | None = None) -> dict[str, str]:
    """Return the labels of all pods of ``job``, or of those of one stage."""
    labels = {**naming.CHILD_SELECTOR, naming.JOB_UID_LABEL: job.uid}
    return {**labels, naming.STAGE_LABEL: stage.value} if stage else labels


def _print_newest(logs: _Logs, job: ClusterJob, stage: Stage | None) -> ExitCode:
    pods = logs.pods()
    begun = [pod for pod in pods if pod.has_begun]
    if not begun:
        raise SpecError(why_no_log(job, pods, stage))
    for line in logs.lines(begun[-1], follow=False):
        _write(line)
    return ExitCode.OK


def _follow(logs: _Logs, stage: Stage | None) -> ExitCode:
    """Print what comes until the job, or the stage, has ended; begins with the newest attempt."""
    done = {pod.uid for pod in [pod for pod in logs.pods() if pod.has_begun][:-1]}
    told = ""
    while True:
        # Before the pods: the one that ends the job is among them then.
        job = logs.job()
        pods = [pod for pod in logs.pods() if pod.uid not in done]
        ready = next((pod for pod in pods if pod.has_begun), None)
        if ready is not None:
            _tell(f"{ready.stage.value}, attempt {ready.attempt}: pod {ready.name}")
            _print_to_its_end(logs, ready)
            done.add(ready.uid)
        elif not _has_ended(job, stage):
            wait = f"waiting for pod {pods[0].name} ({pods[0].waits_for})" if pods else "waiting for a pod"
            if wait != told:
                _tell(wait)
                told = wait
            logs.await_change(job, pods, done)
        elif done:
            return ExitCode.OK
        else:
            raise SpecError(why_no_log(job, pods, stage))


def _has_ended(job: ClusterJob, stage: Stage | None) -> bool:
    is_terminal = job.status.phase is not None and job.status.phase.is_terminal
    return is_terminal or (stage is not None and any(one.stage is stage for one in job.status.stages))


def _print_to_its_end(logs: _Logs, pod: StagePod) -> None:
    """Print the log of one pod, over broken connections, until its container has ended."""
    since: str | None = None
    while True:
        # Looking at the pod, with patience, tells whether it is gone or the cluster is away.
        with contextlib.suppress(NotFoundError, ClusterError):
            for line in logs.lines(pod, follow=True, since=since):
                since = line.partition(" ")[0]
                _write(line)
        now = logs.pod(pod.uid)
        if now is None or (now.is_over and pod.is_over):
            return
        # Once more: what it printed after the connection broke. That a container has just ended is told late.
        logs.patience.pause(0 if now.is_over else SECONDS_BETWEEN_LOGS)
        pod = now


def _instant(line: str) -> tuple[str, str]:
    """Return the time in front of a line so that it can be compared: its fraction has no zeros at the end."""
    seconds, _, fraction = line.partition(" ")[0].rstrip("Z").partition(".")
    return seconds, fraction


def _write(line: str) -> None:
    """Print a line without the time that the API server put in front."""
    sys.stdout.write(f"{printable(line.partition(' ')[2])}\n")
    sys.stdout.flush()


def _tell(message: str) -> None:
    """Say what is no part of the log where it is in nobody's way."""
    sys.stderr.write(f"--- {printable(message)}\n")
    sys.stderr.flush()
