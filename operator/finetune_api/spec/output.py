"""``spec.output``, ``spec.checkpoint`` and ``spec.runPolicy``: where results go, and how the run is looked after."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.spec.field import Endpoint, Flag, Int, Name, OutputUri, Seconds, SecretRef


class PublishOn(StrEnum):
    """When the model is published."""

    GATES = "gates"
    ALWAYS = "always"
    NEVER = "never"


class Preflight(StrEnum):
    """What becomes of findings of the check stage. Not off, which is a boolean to YAML 1.1."""

    SKIP = "skip"
    WARN = "warn"
    ENFORCE = "enforce"


def _endpoint_is_of_a_store(uri: str, endpoint: str | None) -> Iterator[Problem]:
    if endpoint is not None and not uri.startswith("s3://"):
        yield Problem(
            ("endpoint",),
            endpoint,
            "has no effect on an output that is not s3://",
            "Leave it out, or write an s3:// uri.",
        )


def _merged_means_published(merge: bool, publish_on: PublishOn) -> Iterator[Problem]:
    if merge and publish_on is PublishOn.NEVER:
        yield Problem(("merge",), True, "has no effect with publishOn: never", "Leave one of them out.")


class OutputSpec(Block):
    """Where the results go: ``<uri>/<namespace>/<name>-<id>/{checkpoints,model,report}``."""

    rules = (_endpoint_is_of_a_store, _merged_means_published)

    uri: OutputUri
    """s3://bucket/path, pvc://claim/path or file:///folder (file://./folder is relative to the manifest)."""
    endpoint: Endpoint | None = None
    """Address of an S3-compatible store: http://minio:9000. Absent: AWS_ENDPOINT_URL of the Secret, else AWS. An s3://
    source without a secretRef of its own is read from here, too, with this Secret."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if needed, AWS_SESSION_TOKEN, AWS_REGION and
    AWS_ENDPOINT_URL. Absent: workload identity."""
    merge: Flag = False
    """Also publish full weights with the adapter merged in: as large as the base model, usable without PEFT."""
    publish_on: PublishOn = PublishOn.GATES
    """gates: when all of spec.evaluation.gates pass; where there are none, unless the verdict is that the tuned model
    is worse than its base. always: whatever was measured. never: the report alone, which is published anyway."""


class CheckpointSpec(Block):
    """States that training can go on from."""

    every_steps: Annotated[Int, Field(ge=1, le=1_000_000)] = 200
    """Optimiser steps between checkpoints: what a crash costs at most, unless storing one takes longer. One is also
    written when the run is stopped."""
    keep: Annotated[Int, Field(ge=1, le=100)] = 2
    """Newest complete checkpoints that are kept while training."""


class RunPolicySpec(Block):
    """How the run is looked after in a cluster. Without effect on a laptop, where it is in sight."""

    suspend: Flag = False
    """true stops the job and keeps its checkpoint; false goes on. May be changed while the job exists."""
    active_deadline_seconds: Seconds | None = None
    """The job fails when it has run for longer. May be changed while the job exists. Absent: no limit."""
    start_deadline_seconds: Seconds = 1800
    """The job fails when a stage's pod has not started this long after it was admitted, or while no Job can be made."""
    child_ttl_seconds: Annotated[Int, Field(ge=0, le=31_536_000)] = 86400
    """Finished pods are removed after this; the job itself, its report and its model stay. May be changed."""
    retries: Annotated[Int, Field(ge=0, le=20)] = 3
    """New attempts after faults of the infrastructure, and after a want of memory or a loss that is no number, with
    what may mend these; faults of spec or data are never tried again."""
    preflight: Preflight = Preflight.ENFORCE
    """What becomes of leaks that the check stage finds, rows of a test source and whole questions of a suite or
    benchmark that are trained on, and of a model that cannot fit GPUs of compute.gpuMemory: enforce stops the job
    before a GPU is asked for, warn only tells, skip leaves the stage out, and the rehearsal with it. On a laptop the
    rows are read all the same."""
    check_queue_name: Name | None = None
    """Kueue queue of the check stage, for clusters whose GPU queue is long. Absent: it is not queued."""
