"""Builders for the operator's tests: a job, its children and pods, settings. A test names only what matters to it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, GateResult, Stage
from finetune_api.resolve import resolve
from finetune_api.stage_result import StageResult
from finetune_api.status import (
    ArtifactKind,
    ConditionStatus,
    ConditionType,
    DataStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    PublishedArtifact,
    Reason,
    RowsStatus,
    Summary,
)
from finetune_operator import naming
from finetune_operator.condition import Statement, stated
from finetune_operator.observed import ChildKind, ChildView, JobView, PodPhase, PodView
from finetune_operator.settings import Settings

from ..builders import make_manifest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAMESPACE = "team-a"
NAME = "reviews"
UID = "0a1b2c3d-0000-4000-8000-000000000000"
IMAGE = "registry.example/finetune-trainer:1.0"
CA = "-----BEGIN CERTIFICATE-----\nprogress\n-----END CERTIFICATE-----\n"
IN_A_CLUSTER = {
    "metadata.name": NAME,
    "metadata.namespace": NAMESPACE,
    "metadata.uid": UID,
    "spec.data.tasks[0].source": "pvc://rows/reviews.jsonl",
    "spec.output.uri": "pvc://models/tuned",
}
"""What makes the minimal manifest one that a cluster can do with what every version supports."""
ADAPTER = PublishedArtifact(kind=ArtifactKind.ADAPTER, uri="pvc://models/general/model", sha256="a" * 64, bytes=1)
MERGED = PublishedArtifact(kind=ArtifactKind.MERGED, uri="pvc://models/general/merged", sha256="b" * 64, bytes=1)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def make_settings(**changes: Any) -> Settings:
    content: dict[str, Any] = {
        "image": {"name": IMAGE},
        "progress": {"url": "https://finetune-operator.finetune-system.svc:10443"},
    }
    return Settings.model_validate(content | changes, by_alias=True, by_name=False)


def make_spec(given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a spec as a user writes it."""
    spec: dict[str, Any] = make_manifest(IN_A_CLUSTER | (given or {}))["spec"]
    return spec


def make_resolved(given: dict[str, Any] | None = None) -> FineTuneJob:
    """Return the job as the operator pins it."""
    manifest = make_manifest(IN_A_CLUSTER | (given or {}))
    return resolve(FineTuneJob.model_validate(manifest, by_alias=True, by_name=False))


def make_view(given: dict[str, Any] | None = None, status: FineTuneJobStatus | None = None, **changes: Any) -> JobView:
    """Return the FineTuneJob as it is watched."""
    manifest = make_manifest(IN_A_CLUSTER | (given or {}))
    fields: dict[str, Any] = {
        "namespace": manifest["metadata"]["namespace"],
        "name": manifest["metadata"]["name"],
        "uid": manifest["metadata"]["uid"],
        "generation": 1,
        "resource_version": "1",
        "created": NOW,
        "deleting": False,
        "labels": manifest["metadata"].get("labels", {}),
        "annotations": {},
        "spec": manifest["spec"],
        "status": status or FineTuneJobStatus(),
    }
    return JobView(**(fields | changes))


def published_job(name: str) -> JobView:
    """Return a job that has published `ADAPTER` and `MERGED`."""
    told = Statement(ConditionType.PUBLISHED, ConditionStatus.TRUE, Reason.PUBLISHED)
    return make_view(None, stated(FineTuneJobStatus(artifacts=(MERGED, ADAPTER)), [told], NOW, 1), name=name)


def make_child(stage: Stage, attempt: int = 1, **changes: Any) -> ChildView:
    fields: dict[str, Any] = {
        "kind": ChildKind.JOB,
        "name": naming.child_name(NAME, stage, attempt),
        "uid": f"job-{stage.value}-{attempt}",
        "owner_uid": UID,
        "stage": stage,
        "attempt": attempt,
        "created": NOW,
        "admitted": NOW,
    }
    return ChildView(**(fields | changes))


def make_pod(stage: Stage, attempt: int = 1, phase: PodPhase = PodPhase.RUNNING, **changes: Any) -> PodView:
    fields: dict[str, Any] = {
        "name": f"{naming.child_name(NAME, stage, attempt)}-x1",
        "uid": f"pod-{stage.value}-{attempt}",
        "child": naming.child_name(NAME, stage, attempt),
        "job_uid": UID,
        "stage": stage,
        "attempt": attempt,
        "phase": phase,
        "created": NOW,
    }
    return PodView(**(fields | changes))


def make_result(stage: Stage, exit_code: ExitCode = ExitCode.OK, **changes: Any) -> StageResult:
    """Return what the trainer says at the end of ``stage``."""
    if exit_code is ExitCode.OK:
        changes = _FOUND[stage] | changes
    return StageResult(stage=stage, exit_code=exit_code, **changes)


_FOUND: dict[Stage, dict[str, Any]] = {
    Stage.CHECK: {
        "data": DataStatus(rows=RowsStatus(train=80, validation=10, test=10)),
        "model_revision": "0123abc",
    },
    Stage.TRAIN: {},
    Stage.EVALUATE: {
        "evaluation": EvaluationStatus(),
        "summary": Summary(metric="sentiment accuracy 0.950", delta="+0.075", message="sentiment accuracy 0.950"),
        "artifacts": (
            PublishedArtifact(kind=ArtifactKind.ADAPTER, uri="pvc://models/tuned/model", sha256="0" * 64, bytes=1),
        ),
        "report_sha256": "1" * 64,
        "published": True,
    },
}


def gate(passed: bool) -> EvaluationStatus:
    return EvaluationStatus(gates=(GateResult(metric="sentiment.accuracy", passed=passed, why="-0.01 is below 0.02"),))
