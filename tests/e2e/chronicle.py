"""What FineTuneJobs said of themselves while a cluster was in trouble: watched from the first to the last moment."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client, watch
from urllib3.exceptions import HTTPError

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_api.report import Stage
from finetune_api.status import Phase

from .object import Job, Jobs

WATCH_SECONDS = 5
PAUSE_SECONDS = 0.5


class Chronicle:
    """The phases of every job of a namespace, in their order, how far each attempt came, and the newest state."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._phases: dict[str, list[Phase]] = {}
        self._reached: dict[str, dict[int, int]] = {}
        self._newest: dict[str, Job] = {}

    def newest(self) -> dict[str, Job]:
        """Return the last look at every job that is there, by name."""
        with self._lock:
            return dict(self._newest)

    def phases(self, name: str) -> tuple[Phase, ...]:
        with self._lock:
            return tuple(self._phases.get(name, ()))

    def reached(self, name: str) -> dict[int, int]:
        """Return the last step that was told of, by attempt at training."""
        with self._lock:
            return dict(self._reached.get(name, {}))

    def _write(self) -> None:
        while not self._over.is_set():
            try:
                self._watch()
            except (client.ApiException, HTTPError):
                # The API server is away; what it tells when it is back starts with all there is.
                self._over.wait(PAUSE_SECONDS)

    def _watch(self) -> None:
        stream = watch.Watch()
        listed = self._jobs.objects.list_namespaced_custom_object(GROUP, VERSION, self._jobs.namespace, PLURAL)
        with self._lock:
            self._newest = {item["metadata"]["name"]: Job(item) for item in listed["items"]}
        for item in listed["items"]:
            self._enter("ADDED", item)
        for event in stream.stream(
            self._jobs.objects.list_namespaced_custom_object,
            GROUP,
            VERSION,
            self._jobs.namespace,
            PLURAL,
            resource_version=listed["metadata"]["resourceVersion"],
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=WATCH_SECONDS + 5,
        ):
            self._enter(event["type"], event["object"])

    def _enter(self, event: str, document: dict[str, Any]) -> None:
        name, job = document["metadata"]["name"], Job(document)
        with self._lock:
            phases = self._phases.setdefault(name, [])
            if job.phase is not None and phases[-1:] != [job.phase]:
                phases.append(job.phase)
            if (told := _step(job)) is not None:
                attempt, step = told
                self._reached.setdefault(name, {})[attempt] = step
            self._newest[name] = job
            if event == "DELETED":
                del self._newest[name]


def _step(job: Job) -> tuple[int, int] | None:
    """Return the newest attempt at training and how far it is; None unless it is the one that told last."""
    progress = job.status.progress
    attempts = job.trainings
    if progress is None or progress.step is None or progress.stage is not Stage.TRAIN or not attempts:
        return None
    started = attempts[-1].start_time
    return (attempts[-1].number, progress.step) if started and progress.last_update_time > started else None


@contextmanager
def chronicle(jobs: Jobs) -> Iterator[Chronicle]:
    """Watch the jobs until the block ends."""
    written = Chronicle(jobs)
    thread = threading.Thread(target=written._write)
    thread.start()
    try:
        yield written
    finally:
        written._over.set()
        thread.join()
