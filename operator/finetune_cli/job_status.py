"""``finetune status``: what a cluster knows of a job, once or as it changes."""

import json
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import yaml

from finetune_api.report import ExitCode, Progress, Stage
from finetune_api.status import ConditionStatus, ConditionType, FineTuneJobStatus, Phase
from finetune_cli.cluster_job import ClusterJob, JobName, cluster_job
from finetune_cli.display import Display, open_display
from finetune_cli.job_api import JobApi
from finetune_cli.job_end import failure_of
from finetune_cli.job_watch import follow
from finetune_cli.patience import Patience
from finetune_cli.refusal import NotFoundError
from finetune_cli.similar_name import with_similar_names
from finetune_cli.status_text import as_progress, job_table, latest_metrics, news, result_lines, status_lines


def show_jobs(api: JobApi, namespace: str, output: str) -> ExitCode:
    """Print one line for every job of ``namespace``."""
    jobs = [cluster_job(document) for document in api.jobs(namespace)]
    if output == "text":
        _write_lines(
            job_table(jobs, datetime.now(UTC)) if jobs else [f"There is no FineTuneJob in namespace {namespace}."]
        )
    else:
        _write_object({"apiVersion": "v1", "kind": "List", "items": [job.document for job in jobs]}, output)
    return ExitCode.OK


def watch_status(api: JobApi, job: ClusterJob, output: str) -> ExitCode:
    """Show ``job``, as it is now, until it has ended.

    Raises:
        FineTuneError: it failed; the exit code is the trainer's.
    """
    try:
        if output == "text":
            return _watch_on_display(api, job, open_display("auto", sys.stdout))
        return _watch_as_objects(api, job, output)
    except KeyboardInterrupt:
        again = shlex.join(["finetune", "status", job.name.name, "-n", job.name.namespace, "-w"])
        sys.stderr.write(f"The job goes on in the cluster. To watch it again: {again}\n")
        return ExitCode.PREEMPTED


def fetch(api: JobApi, name: JobName) -> ClusterJob:
    """Return the job as it is now.

    Raises:
        NotFoundError: there is none of that name; the message says which are like it.
    """
    try:
        return cluster_job(api.get(name.namespace, name.name))
    except NotFoundError as error:
        raise with_similar_names(api, name, error) from error


def write_job(job: ClusterJob, output: str) -> ExitCode:
    """Write what is known of one job to standard output as ``text``, ``json`` or ``yaml``."""
    if output == "text":
        _write_lines(status_lines(job, datetime.now(UTC)))
    else:
        _write_object(job.document, output)
    return ExitCode.OK


# --- watching


def _watch_on_display(api: JobApi, first: ClusterJob, display: Display) -> ExitCode:
    with display:
        job = _show_until_end(follow(api, first, Patience(display.notice)), display)
        failure = failure_of(job)
        if failure is not None:
            # Within the display, so that it marks the stage that failed.
            raise failure
    _write_lines([line for part in (result_lines(job.status), [_ending(job)]) if part for line in ("", *part)])
    return ExitCode.OK


def _show_until_end(jobs: Iterator[ClusterJob], display: Display) -> ClusterJob:
    before: FineTuneJobStatus | None = None
    for job in jobs:
        for moment in _moments(before, job.status):
            display.report(moment)
        for line in news(before, job.status):
            display.notice(line)
        if job.status.phase is not None and job.status.phase.is_terminal:
            return job
        before = job.status
    raise AssertionError("a job is followed until it ends or is deleted")


def _moments(before: FineTuneJobStatus | None, now: FineTuneJobStatus) -> Iterator[Progress]:
    """Yield what the display does not know yet: stages that ended, and how far the running one is."""
    known = {stage.stage for stage in before.stages} if before else set[Stage]()
    ended = [one for one in now.stages if one.stage not in known and one.exit_code == ExitCode.OK]
    # Who begins to watch late sees those that ended before only by what followed.
    for stage in ended if before else ended[-1:] if now.progress is None else ():
        yield Progress(stage=stage.stage, message="done", percent=100)
    if now.progress is not None and (before is None or now.progress != before.progress):
        yield as_progress(now.progress, latest_metrics(now))
    if before is not None and _is_published(now) and not _is_published(before):
        yield Progress(stage=Stage.PUBLISH, message="published", percent=100)


def _is_published(status: FineTuneJobStatus) -> bool:
    return any(one.type is ConditionType.PUBLISHED and one.status is ConditionStatus.TRUE for one in status.conditions)


def _ending(job: ClusterJob) -> str:
    complete = next((one for one in job.status.conditions if one.type is ConditionType.COMPLETE), None)
    words = complete.message or complete.reason.value if complete else ""
    return f"FineTuneJob {job.name} has succeeded{f': {words}' if words else ''}"


def _watch_as_objects(api: JobApi, first: ClusterJob, output: str) -> ExitCode:
    for job in follow(api, first, Patience(_say_to_stderr)):
        _write_object(job.document, output, is_one_of_many=True)
        if job.status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            failure = failure_of(job)
            if failure is not None:
                raise failure
            break
    return ExitCode.OK


def _say_to_stderr(message: str) -> None:
    sys.stderr.write(f"{message}\n")


# --- writing


def _write_lines(lines: list[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _write_object(content: dict[str, object], output: str, is_one_of_many: bool = False) -> None:
    if output == "json":
        text = json.dumps(content, indent=None if is_one_of_many else 2) + "\n"
    else:
        text = ("---\n" if is_one_of_many else "") + yaml.safe_dump(content, sort_keys=False, allow_unicode=False)
    sys.stdout.write(text)
    sys.stdout.flush()
