"""Write the newest progress of every job into its status: rarely, and never after the stage has ended."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.report import Stage
from finetune_operator.authentication import Jobs
from finetune_operator.fence import Standing, standing
from finetune_operator.observed import JobView
from finetune_operator.progress import Moment, followed, is_outdated, status_patch

logger = logging.getLogger(__name__)

WRITES_PER_SECOND = 20.0
"""Over all jobs: the API server has other things to do. With many jobs each is written less often."""
SECONDS_TO_RETRY = 1.0
SECONDS_FOR_A_WRITE = 10.0
SECONDS_BETWEEN_SWEEPS = 60.0


class StatusPatcher(Protocol):
    """Writes progress to the API server."""

    async def patch_progress(self, key: tuple[str, str], patch: Mapping[str, Any]) -> bool:
        """Merge ``patch`` into the job's status subresource by a field manager of its own.

        Return False when it is to be tried again with what is newest then: the API server could not be asked, or the
        job is not what ``patch["metadata"]`` names, its UID and resource version. Never raises for the API server.
        """


@dataclass(slots=True)
class _Entry:
    key: tuple[str, str]
    stage: Stage
    attempt: int
    pod_uid: str
    moment: Moment
    is_new: bool = True
    """Whether the moment is still to be written."""
    not_before: float = float("-inf")


class ProgressWriter:
    """Keeps one moment for each job, by its UID. Belongs to one event loop."""

    def __init__(
        self,
        jobs: Jobs,
        patcher: StatusPatcher,
        seconds_between_writes: float,
        clock: Callable[[], float],
        writes_per_second: float = WRITES_PER_SECOND,
    ):
        """Write each job at most every ``seconds_between_writes``; ``clock`` counts seconds."""
        self._jobs = jobs
        self._patcher = patcher
        self._pause = seconds_between_writes
        self._clock = clock
        self._shortest_pause = 1 / writes_per_second
        self._entries: dict[str, _Entry] = {}
        self._something_new = asyncio.Event()
        self._sweep_at = clock() + SECONDS_BETWEEN_SWEEPS

    def offer(self, job: JobView, stage: Stage, attempt: int, pod_uid: str, moment: Moment) -> None:
        """Take note of a moment; it is written soon unless a newer one comes first."""
        entry = self._entries.get(job.uid)
        if entry is None:
            self._entries[job.uid] = _Entry(job.key, stage, attempt, pod_uid, moment)
        elif (entry.stage, entry.attempt, entry.pod_uid) == (stage, attempt, pod_uid):
            if is_outdated(entry.moment, moment):
                return
            entry.moment, entry.is_new = followed(entry.moment, moment), True
        else:
            # Who may speak for the job has been decided; the pause between writes goes on.
            self._entries[job.uid] = _Entry(job.key, stage, attempt, pod_uid, moment, not_before=entry.not_before)
        self._something_new.set()

    async def write_now(self, uid: str) -> None:
        """Write what is known about a job without waiting for its turn; given up when it cannot be written."""
        for pause in (0.0, 0.1, 0.5):
            # A job that was written a moment ago is refused until the watch has brought its new version.
            await asyncio.sleep(pause)
            entry = self._entries.get(uid)
            if entry is None or not entry.is_new:
                return
            await self._write(uid, entry)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            self._something_new.clear()
            waiting = [(entry.not_before, uid) for uid, entry in self._entries.items() if entry.is_new]
            not_before, uid = min(waiting, default=(self._sweep_at, ""))
            if (seconds := not_before - self._clock()) > 0:
                await self._wait_for_news(seconds)
            elif uid:
                await self._write(uid, self._entries[uid])
                await asyncio.sleep(self._shortest_pause)
            if self._clock() >= self._sweep_at:
                self._sweep()

    async def _wait_for_news(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._something_new.wait()
        except TimeoutError:
            return

    async def _write(self, uid: str, entry: _Entry) -> None:
        job = self._jobs.job(*entry.key)
        if job is None or not self._may_write(job, uid, entry):
            del self._entries[uid]
            return
        entry.is_new = False
        entry.not_before = self._clock() + self._pause
        metadata = {"uid": job.uid, "resourceVersion": job.resource_version}
        is_written = await self._patch(entry.key, {"metadata": metadata, "status": status_patch(entry.moment)})
        # Counted again from the answer: an API server that is slow to answer is not to be asked more often for that.
        entry.not_before = self._clock() + (self._pause if is_written else min(self._pause, SECONDS_TO_RETRY))
        entry.is_new = entry.is_new or not is_written

    async def _patch(self, key: tuple[str, str], patch: Mapping[str, Any]) -> bool:
        try:
            async with asyncio.timeout(SECONDS_FOR_A_WRITE):
                return await self._patcher.patch_progress(key, patch)
        except TimeoutError:
            logger.warning("progress not written in time namespace=%s job=%s", *key)
            return False

    def _may_write(self, job: JobView, uid: str, entry: _Entry) -> bool:
        return job.uid == uid and standing(job.status, entry.stage, entry.attempt) is Standing.CURRENT

    def _sweep(self) -> None:
        self._sweep_at = self._clock() + SECONDS_BETWEEN_SWEEPS
        for uid, entry in list(self._entries.items()):
            job = self._jobs.job(*entry.key)
            if job is None or not self._may_write(job, uid, entry):
                del self._entries[uid]
