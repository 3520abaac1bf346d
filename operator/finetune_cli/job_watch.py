"""Follow a FineTuneJob as it changes, over forgotten versions, closed connections and restarts of the API server."""

from collections.abc import Iterator

from finetune_cli.cluster_job import ClusterJob, JobName, cluster_job
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.patience import Patience
from finetune_cli.refusal import ClusterError, NotFoundError

SECONDS_BETWEEN_WATCHES = 1.0
"""A server that ends every watch at once is not asked in a tight loop."""


def follow(api: JobApi, first: ClusterJob, patience: Patience) -> Iterator[ClusterJob]:
    """Yield ``first`` and the job after every change; never ends by itself.

    Raises:
        NotFoundError: the job was deleted.
        ClusterError: the cluster cannot be reached for five minutes.
    """
    seen = first
    yield seen
    while True:
        has_changed = False
        for change, document in _events(api, seen):
            seen, has_changed = cluster_job(document), True
            if change == "DELETED":
                raise _deleted(seen.name)
            yield seen
        if not has_changed:
            patience.pause(SECONDS_BETWEEN_WATCHES)
        # What happened between two watches, or beyond what the server remembers, is in the job itself.
        now = patience.ask(lambda: _look(api, first.name))
        if now.uid != first.uid:
            raise _deleted(first.name)
        if now.resource_version != seen.resource_version:
            seen = now
            yield seen


def _events(api: JobApi, job: ClusterJob) -> Iterator[tuple[str, JsonObject]]:
    try:
        yield from api.watch(job.name.namespace, job.name.name, job.resource_version)
    except ClusterError:
        # To look at the job, with patience, tells whether the cluster is really away.
        return


def _look(api: JobApi, name: JobName) -> ClusterJob:
    try:
        return cluster_job(api.get(name.namespace, name.name))
    except NotFoundError as error:
        raise _deleted(name) from error


def _deleted(name: JobName) -> NotFoundError:
    return NotFoundError(f"FineTuneJob {name} was deleted. What it had published stays.")
