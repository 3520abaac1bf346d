"""``finetune submit``: check a job here, hand it to a cluster, and say what the cluster has against it."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.crd import CHANGEABLE
from finetune_api.explanation import line_of
from finetune_api.job import FieldError, FineTuneJob, InvalidJobError, load_job
from finetune_api.manifest_text import Document, read_manifest
from finetune_api.problem import shown, written
from finetune_api.report import ExitCode
from finetune_api.support import Place, unreachable_fields
from finetune_cli.cluster_job import ClusterJob, JobName, cluster_job, own_namespace
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.job_status import watch_status, write_job
from finetune_cli.manifest import read_text
from finetune_cli.refusal import AlreadyExistsError, InvalidObjectError, field_errors
from finetune_trainer.errors import SpecError


def submit(api: JobApi, file: Path, namespace: str | None, output: str, watch: bool) -> ExitCode:
    """Create the job in ``file``.

    Args:
        api: the cluster.
        file: the manifest.
        namespace: what the command line says; else what the manifest or the context says.
        output: ``text``, ``json`` or ``yaml``.
        watch: follow it to its end, as `finetune status -w` does.

    Raises:
        InvalidJobError: it is no job, or none for this cluster; all errors that are known at once.
        SpecError: there is another job of that name.
    """
    job, document = read_for_cluster(file)
    name = JobName(own_namespace(job, namespace, api.default_namespace, str(file)), job.metadata.name)
    manifest = _with_namespace(document.content, name.namespace)
    try:
        created, is_new = cluster_job(api.create(name.namespace, manifest)), True
    except AlreadyExistsError:
        created, is_new = _same_job(api, name, manifest, file), False
    except InvalidObjectError as error:
        raise InvalidJobError(str(file), field_errors(error, document)) from error
    if output == "text":
        _say(created, is_new, watch)
    elif not watch:
        write_job(created, output)
    return watch_status(api, created, output) if watch else ExitCode.OK


def read_for_cluster(file: Path) -> tuple[FineTuneJob, Document]:
    """Return the job in ``file``, as read and as written.

    Raises:
        SpecError: the file cannot be read.
        InvalidJobError: it is no job, or names what pods cannot reach.
    """
    text = read_text(file)
    job, document = load_job(text, str(file)), read_manifest(text, str(file))
    errors = [
        FieldError(written(path), shown(value), problem, remedy, line_of(path, document.lines))
        for path, value, problem, remedy in unreachable_fields(document.content.get("spec"), Place.CLUSTER)
    ]
    if errors:
        raise InvalidJobError(str(file), errors)
    return job, document


def _with_namespace(manifest: JsonObject, namespace: str) -> JsonObject:
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}


def _same_job(api: JobApi, name: JobName, manifest: JsonObject, file: Path) -> ClusterJob:
    """Return the job that is there when it asks for the same.

    Raises:
        SpecError: it asks for something else; says for what, and what to do.
    """
    there = cluster_job(api.get(name.namespace, name.name))
    if there.is_deleting:
        raise SpecError(f"FineTuneJob {name} is just being deleted. Try again in a moment.")
    different = sorted(_differences(there.spec, manifest.get("spec"), ()))
    if not different:
        return there
    fields = ", ".join(f"spec.{field}" for field in different)
    if set(different) <= set(CHANGEABLE):
        apply = shlex.join(["kubectl", "apply", "-n", name.namespace, "-f", str(file)])
        raise SpecError(f"FineTuneJob {name} exists and differs in {fields}, which may change: {apply}")
    cancel = shlex.join(["finetune", "cancel", name.name, "-n", name.namespace])
    raise SpecError(
        f"FineTuneJob {name} exists and differs in {fields}. A job's spec is frozen: give this one another "
        f"metadata.name, or remove the one that is there: {cancel}"
    )


def _differences(there: Any, wanted: Any, path: tuple[str | int, ...]) -> Iterator[str]:
    """Yield the places in which two specs differ; lists as a whole."""
    if isinstance(there, dict) or isinstance(wanted, dict):
        # An absent block and an empty one ask for the same.
        one, other = (value if isinstance(value, dict) else {} for value in (there, wanted))
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), (*path, key))
    elif there != wanted:
        yield written(path)


def _say(job: ClusterJob, is_new: bool, watch: bool) -> None:
    phase = f" ({job.status.phase.value})" if job.status.phase else ""
    there = "is submitted" if is_new else f"is there already, with the same spec{phase}"
    sys.stdout.write(f"FineTuneJob {job.name} {there}.\n")
    if not watch:
        again = shlex.join(["finetune", "status", job.name.name, "-n", job.name.namespace, "-w"])
        sys.stdout.write(f"To watch it: {again}\n")
    sys.stdout.flush()
