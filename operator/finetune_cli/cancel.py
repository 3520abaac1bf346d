"""``finetune cancel`` and ``finetune resume``: stop a job for good or for a while, and say what stays."""

import shlex
import sys
from collections.abc import Callable

from finetune_api.plain_text import one_line
from finetune_api.report import ExitCode
from finetune_cli.cluster_job import ClusterJob, JobName
from finetune_cli.job_api import JobApi
from finetune_cli.job_status import fetch
from finetune_trainer.errors import SpecError


def cancel(api: JobApi, name: JobName, ask: Callable[[str], bool] | None) -> ExitCode:
    """Delete a job with its pods after saying what stays.

    Args:
        api: the cluster.
        name: the job.
        ask: asks a person whether to go on; nobody is asked when absent.
    """
    job = fetch(api, name)
    for line in what_stays(job):
        _say(line)
    if ask is not None and not ask(f"Delete FineTuneJob {job.name}?"):
        _say("Nothing was deleted.")
        return ExitCode.OK
    api.delete(job.name.namespace, job.name.name, job.uid)
    _say(f"FineTuneJob {job.name} is deleted.")
    return ExitCode.OK


def suspend(api: JobApi, name: JobName) -> ExitCode:
    """Stop a job so that it can go on from its last checkpoint.

    Raises:
        SpecError: it has ended, so there is nothing to stop.
    """
    job = fetch(api, name)
    _refuse_ended(job, "stop")
    _set_suspend(api, job, True)
    again = shlex.join(["finetune", "resume", job.name.name, "-n", job.name.namespace])
    _say(f"FineTuneJob {job.name} stops behind a checkpoint. To go on from there: {again}")
    return ExitCode.OK


def resume(api: JobApi, name: JobName) -> ExitCode:
    """Let a suspended job go on.

    Raises:
        SpecError: it has ended, so there is nothing to go on with.
    """
    job = fetch(api, name)
    _refuse_ended(job, "go on with")
    _set_suspend(api, job, False)
    _say(f"FineTuneJob {job.name} goes on from its last checkpoint.")
    return ExitCode.OK


def what_stays(job: ClusterJob) -> list[str]:
    """Return, for people, what deleting ``job`` leaves and what it costs."""
    status = job.status
    lines = [f"Published, and stays: {artifact.kind.value} {one_line(artifact.uri)}" for artifact in status.artifacts]
    folder = one_line(status.resolved.output_path) if status.resolved and status.resolved.output_path else None
    if not status.artifacts and folder:
        lines.append(f"Files below {folder} stay, but no other job goes on from their checkpoints.")
    if status.phase is None or not status.phase.is_terminal:
        lines.append("Work since the beginning is lost; --keep stops the job so that it can go on later.")
    return lines


def _refuse_ended(job: ClusterJob, what: str) -> None:
    phase = job.status.phase
    if phase is not None and phase.is_terminal:
        raise SpecError(f"FineTuneJob {job.name} has ended ({phase.value}); there is nothing to {what}.")


def _set_suspend(api: JobApi, job: ClusterJob, value: bool) -> None:
    # With the UID, a job that was deleted and made anew meanwhile is not touched unseen.
    change = {"metadata": {"uid": job.uid}, "spec": {"runPolicy": {"suspend": value}}}
    api.patch(job.name.namespace, job.name.name, change)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
