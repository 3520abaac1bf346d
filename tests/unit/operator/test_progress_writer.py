import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from finetune_api.report import Stage
from finetune_api.status import ProgressStatus
from finetune_operator.progress import Moment
from finetune_operator.progress_writer import ProgressWriter

from .trainers import NOW, Jobs, make_job


def moment(percent: int) -> Moment:
    return Moment(ProgressStatus(stage=Stage.TRAIN, percent=percent, last_update_time=NOW), {})


class Timed(Jobs):
    """Notes when each job was written."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, str]] = []

    async def patch_progress(self, key: tuple[str, str], patch: Mapping[str, Any]) -> bool:
        self.times.append((asyncio.get_running_loop().time(), key[1]))
        return await super().patch_progress(key, patch)


def run(
    scenario: Callable[[ProgressWriter, Timed], Awaitable[None]], pause: float, writes_per_second: float = 1e6
) -> None:
    async def main() -> None:
        jobs = Timed()
        writer = ProgressWriter(jobs, jobs, pause, asyncio.get_running_loop().time, writes_per_second)
        task = asyncio.create_task(writer.run())
        try:
            async with asyncio.timeout(20):
                await scenario(writer, jobs)
        finally:
            task.cancel()

    asyncio.run(main())


def start(jobs: Jobs, name: str = "reviews") -> str:
    """Let a job train, and return the UID of its pod."""
    job = make_job(name)
    jobs.put(job)
    return jobs.start(job, Stage.TRAIN, 1).uid


def test_jobs_are_written_in_turn_and_never_faster_than_the_cap() -> None:
    async def scenario(writer: ProgressWriter, jobs: Timed) -> None:
        pods = {f"job-{number}": start(jobs, f"job-{number}") for number in range(5)}
        for percent in range(4):
            for name, pod in pods.items():
                writer.offer(make_job(name), Stage.TRAIN, 1, pod, moment(percent))
            while len(jobs.times) < 5 * (percent + 1):
                await asyncio.sleep(0.005)
        names = [name for _, name in jobs.times]
        assert all(sorted(names[first : first + 5]) == sorted(pods) for first in range(0, 20, 5))
        elapsed = jobs.times[-1][0] - jobs.times[0][0]
        assert elapsed >= 19 * 0.02

    run(scenario, pause=0.0, writes_per_second=50)


def test_a_job_is_not_written_more_often_than_it_may_be() -> None:
    async def scenario(writer: ProgressWriter, jobs: Timed) -> None:
        pod = start(jobs)
        for percent in range(60):
            writer.offer(make_job(), Stage.TRAIN, 1, pod, moment(percent))
            await asyncio.sleep(0.005)
        while jobs.status()["progress"]["percent"] != 59:
            await asyncio.sleep(0.005)
        pauses = [later - earlier for (earlier, _), (later, _) in zip(jobs.times, jobs.times[1:], strict=False)]
        assert all(pause >= 0.1 for pause in pauses)

    run(scenario, pause=0.1)


def test_a_moment_told_before_a_newer_attempt_is_dropped() -> None:
    async def scenario(writer: ProgressWriter, jobs: Timed) -> None:
        old = start(jobs)
        writer.offer(make_job(), Stage.TRAIN, 1, old, moment(1))
        await jobs.written.wait()
        jobs.written.clear()
        writer.offer(make_job(), Stage.TRAIN, 1, old, moment(90))
        new = jobs.start(make_job(), Stage.TRAIN, 2)
        writer.offer(make_job(), Stage.TRAIN, 2, new.uid, moment(2))
        await jobs.written.wait()
        assert [patch["status"]["progress"]["percent"] for _, patch in jobs.patches] == [1, 2]

    run(scenario, pause=0.05)


def test_a_job_that_is_gone_is_forgotten() -> None:
    async def scenario(writer: ProgressWriter, jobs: Timed) -> None:
        pod = start(jobs)
        job = make_job()
        writer.offer(job, Stage.TRAIN, 1, pod, moment(1))
        await jobs.written.wait()
        del jobs.by_name[job.key]
        writer.offer(job, Stage.TRAIN, 1, pod, moment(2))
        await writer.write_now(job.uid)
        jobs.put(replace(job, resource_version="8"))
        await asyncio.sleep(0.2)
        assert len(jobs.patches) == 1

    run(scenario, pause=0.05)
