"""``finetune debug``: all that a cluster knows of one job in one file, for whoever is asked for help.

No Secret is read. What looks like one in a log or a message is masked, and so is every value of an environment
variable; still, look at the file before you send it.
"""

import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import yaml

from finetune_api import __version__
from finetune_api.plain_text import one_line, printable
from finetune_api.report import ExitCode
from finetune_api.secret_text import MASK, masked
from finetune_cli.cluster_job import ClusterJob, JobName
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.job_status import fetch
from finetune_cli.logs import pod_labels
from finetune_cli.status_text import status_lines
from finetune_cli.wording import aligned
from finetune_trainer.durable import write_file
from finetune_trainer.errors import FineTuneError

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""The whole manifest once more, as a text in which nothing would be masked."""

LOG_LINES = 200
"""The last ones of every container."""


def debug(api: JobApi, name: JobName, path: Path | None) -> ExitCode:
    """Write the file and say where it is.

    Args:
        api: the cluster.
        name: the job.
        path: the file, replaced when it is there. Default: ``<name>-debug.txt`` in the current folder.

    Raises:
        FineTuneError: there is no such job, or the file cannot be written.
    """
    job = fetch(api, name)
    path = path or Path(f"{name.name}-debug.txt")
    text = "\n".join(debug_lines(api, job, datetime.now(UTC)))
    write_file(path, f"{text}\n".encode())
    sys.stdout.write(f"{path}: status, object, events, pods and logs of FineTuneJob {name}. Read it before sending.\n")
    return ExitCode.OK


def debug_lines(api: JobApi, job: ClusterJob, now: datetime) -> Iterator[str]:
    """Yield the file line by line; what cannot be read says why in its place."""
    namespace = job.name.namespace
    yield f"FineTuneJob {job.name}, {now:%Y-%m-%d %H:%M:%S} UTC"
    yield f"finetune {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from _part("Status", lambda: status_lines(job, now))
    yield from _part("Object", lambda: yaml.safe_dump(_without_values(job.document), sort_keys=False).splitlines())
    pods: list[JsonObject] = []

    def describe_pods() -> Iterable[str]:
        found = api.pods(namespace, pod_labels(job))
        pods.extend(sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))))
        return [line for pod in pods for line in _describe_pod(pod)] or ["There are none."]

    yield from _part("Pods", describe_pods)
    names = {job.name.name, *(pod["metadata"]["name"] for pod in pods)}
    children = f"{job.name.name}-"
    yield from _part(
        "Events",
        lambda: _events(
            event
            for event in api.events(namespace)
            if (about := event["involvedObject"].get("name", "")) in names or about.startswith(children)
        ),
    )
    for pod in pods:
        for container in _begun(pod):
            title = f"Log of {pod['metadata']['name']}, {container}, last {LOG_LINES} lines"
            yield from _part(title, partial(_log, api, namespace, pod["metadata"]["name"], container))


def _part(title: str, lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    yield from ("", f"--- {title}", "")
    try:
        # As a whole: a private key goes over many lines.
        yield masked(printable("\n".join(lines())))
    except FineTuneError as error:
        yield f"not readable: {masked(one_line(str(error)))}"


def _without_values(document: JsonObject) -> JsonObject:
    """Return the object with the values of its environment variables masked, wherever they stand."""
    match document:
        case {"env": list(env), **rest}:
            hidden = [{**one, "value": MASK} if isinstance(one, dict) and "value" in one else one for one in env]
            return {**_without_values(rest), "env": hidden}
        case dict():
            return {
                key: _without_values(value) if isinstance(value, dict) else value
                for key, value in document.items()
                if key != _LAST_APPLIED
            }
    return document


def _describe_pod(pod: JsonObject) -> Iterator[str]:
    metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    place = f" on {spec['nodeName']}" if spec.get("nodeName") else ""
    yield f"{metadata['name']}: {status.get('phase', 'unknown')}{place}, created {metadata.get('creationTimestamp')}"
    for condition in status.get("conditions") or ():
        if condition.get("status") != "True":
            said = f"{condition.get('reason', '')} {condition.get('message', '')}"
            yield f"  {condition.get('type')} is {condition.get('status')}: {one_line(said)}"
    for one in _container_statuses(status):
        state, details = next(iter((one.get("state") or {"unknown": {}}).items()))
        code = f", exit code {details['exitCode']}" if "exitCode" in details else ""
        said = one_line(f"{details.get('reason', '')} {details.get('message', '')}")
        yield f"  container {one.get('name')}: {state}{code}, {one.get('restartCount', 0)} restarts {said}".rstrip()
        if one.get("image"):
            yield f"    image {one['image']} {one.get('imageID', '')}".rstrip()


def _container_statuses(status: JsonObject) -> list[JsonObject]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _begun(pod: JsonObject) -> list[str]:
    """Return the names of the pod's containers that have a log."""
    return [
        str(one["name"])
        for one in _container_statuses(pod.get("status") or {})
        if {"running", "terminated"} & set(one.get("state") or ())
    ]


def _events(events: Iterable[JsonObject]) -> list[str]:
    rows = [
        (
            str(event.get("lastTimestamp") or event.get("eventTime") or ""),
            str(event.get("type", "")),
            f"{event['involvedObject'].get('kind', '')}/{event['involvedObject'].get('name', '')}",
            str(event.get("reason", "")),
            f"{event.get('count') or 1}x",
            one_line(str(event.get("message", ""))),
        )
        for event in events
    ]
    return aligned(sorted(rows), texts=6) if rows else ["There are none; the cluster keeps them for about an hour."]


def _log(api: JobApi, namespace: str, pod: str, container: str) -> Iterable[str]:
    return deque(api.log(namespace, pod, container, None, follow=False), LOG_LINES)
