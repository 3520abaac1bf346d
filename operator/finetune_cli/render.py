"""``finetune render``: the objects that the operator would create for a job, stage by stage. Needs no cluster."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import yaml

from finetune_api import __version__
from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Stage
from finetune_api.spec import Preflight, evaluates_only
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_cli.cluster_job import own_namespace
from finetune_cli.job_api import JsonObject
from finetune_cli.manifest import read_text
from finetune_cli.submit import read_for_cluster
from finetune_operator import acceptance, manifest, naming
from finetune_operator.acceptance import Accepted, Refused
from finetune_operator.observed import JobView
from finetune_operator.pod import Run
from finetune_operator.settings import ImageSettings, ProgressSettings, Settings, SettingsError, parse_settings
from finetune_trainer.errors import SpecError

UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"
"""Stands for what the API server gives a job when it is created."""
UNKNOWN_AUTHORITY = "the operator's own certificate authority\n"

_INTRODUCTION = """\
# What the operator creates for FineTuneJob {name} in namespace {namespace}: first what all stages share, then the first
# attempt of each stage; a stage follows when the one before has succeeded.
# To read and to compare, not to apply: the operator creates these objects itself.
"""
_WITHOUT_UID = f"""\
# {UNKNOWN_UID} and its beginning in names stand for the UID that the job gets in the cluster.
"""


def render(file: Path, settings_file: Path | None, namespace: str | None, output: str) -> ExitCode:
    """Print the objects as YAML or, as one List, as JSON; the same arguments give the same bytes.

    Args:
        file: the job. One that comes from a cluster has a UID, which is used.
        settings_file: the operator's settings, as in its ConfigMap. Absent: the chart's defaults.
        namespace: what the command line says; else what the manifest says, else ``default``.
        output: ``yaml`` or ``json``.

    Raises:
        InvalidJobError: the file holds no job that a cluster could do.
        SpecError: the settings cannot be used, or the operator would refuse the job with them.
    """
    job, document = read_for_cluster(file)
    settings = read_settings(settings_file) if settings_file else default_settings()
    view = _as_in_cluster(job, own_namespace(job, namespace, "default", str(file)), document.content["spec"])
    verdict = acceptance.judge(view, settings)
    if isinstance(verdict, Refused):
        raise SpecError(f"{file}: the operator would refuse it ({verdict.reason.value}): {verdict.message}")
    # As fresh objects: YAML would refer to a part that stands in two of them.
    objects = json.loads(json.dumps(list(manifests(verdict, settings))))
    sys.stdout.write(_as_json(objects) if output == "json" else _introduction(view) + _as_yaml(objects))
    return ExitCode.OK


def manifests(accepted: Accepted, settings: Settings) -> Iterator[JsonObject]:
    """Yield what is created for a job, in the order in which it is."""
    job = accepted.job
    yield manifest.spec_config_map(job, accepted.spec_hash)
    yield manifest.trust_config_map(job, UNKNOWN_AUTHORITY, settings)
    for stage in _stages(job):
        attempt = Attempt(stage=stage, number=1, child=naming.child_name(job.metadata.name, stage, 1))
        yield manifest.stage_child(Run(job, attempt, accepted.image, accepted.spec_hash, settings))


def default_settings() -> Settings:
    """Return what the chart of this version sets where its values are left as they are."""
    url = f"https://{naming.OPERATOR}.finetune-system.svc:10443"
    image = f"finetune-trainer:{__version__}"
    return Settings(image=ImageSettings(name=image), progress=ProgressSettings(url=url))


def read_settings(file: Path) -> Settings:
    """Return the settings in ``file``.

    Raises:
        SpecError: the file cannot be read, or all that is wrong with it.
    """
    try:
        return parse_settings(read_text(file))
    except SettingsError as error:
        raise SpecError(f"{file}: {error}") from error


def _stages(job: FineTuneJob) -> tuple[Stage, ...]:
    checks = () if job.spec.run_policy.preflight is Preflight.SKIP else (Stage.CHECK,)
    trains = () if evaluates_only(job.spec.training) else (Stage.TRAIN,)
    return (*checks, *trains, Stage.EVALUATE)


def _as_in_cluster(job: FineTuneJob, namespace: str, spec: JsonObject) -> JobView:
    return JobView(
        namespace=namespace,
        name=job.metadata.name,
        uid=job.metadata.uid or UNKNOWN_UID,
        generation=1,
        resource_version="1",
        created=datetime.fromtimestamp(0, UTC),
        deleting=False,
        labels=job.metadata.labels,
        annotations=job.metadata.annotations,
        spec=spec,
        status=FineTuneJobStatus(),
    )


def _introduction(view: JobView) -> str:
    text = _INTRODUCTION.format(name=view.name, namespace=view.namespace)
    return text + (_WITHOUT_UID if view.uid == UNKNOWN_UID else "")


def _as_yaml(objects: list[JsonObject]) -> str:
    return "".join(f"---\n{yaml.safe_dump(one, sort_keys=False, width=120, allow_unicode=True)}" for one in objects)


def _as_json(objects: list[JsonObject]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n"
