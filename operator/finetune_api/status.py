"""What the operator says about a FineTuneJob: ``status``. Conditions are the truth, the phase is their summary.

Everything is bounded, because the object lives in etcd. Measured values are text: one NaN in a number field makes the
API server refuse the whole patch, and with it everything else that the operator had to say.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from finetune_api.model import ApiModel
from finetune_api.report import ArtifactKind, GateResult, Stage

LONGEST_WARNING = 512
MOST_WARNINGS = 16
LONGEST_MESSAGE = 1024
"""Characters of a condition's message."""

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of things; larger ones do not survive JSON."""

Figure = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^(-?([0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?|inf)|nan)$")]
"""A measured value as text, with nan and inf."""

Text = Annotated[str, Field(max_length=256)]
Uri = Annotated[str, Field(max_length=2048)]
Sha256 = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]
MetricName = Annotated[str, Field(min_length=1, max_length=128)]
LabelText = Annotated[str, Field(max_length=64)]
TaskName = Annotated[str, Field(min_length=1, max_length=63)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253)]


def figure(value: float) -> str:
    """Return ``value`` with six significant digits, as a `Figure`."""
    return f"{value:.6g}"


class Phase(StrEnum):
    """Where a job stands, in one word."""

    PENDING = "Pending"
    CHECKING = "Checking"
    QUEUED = "Queued"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return self in (Phase.SUCCEEDED, Phase.FAILED)


class ConditionType(StrEnum):
    """What can be said about a job. Complete, Failed and Suspended mean what they mean for batch/v1 Job."""

    ACCEPTED = "Accepted"
    CHECKED = "Checked"
    ADMITTED = "Admitted"
    TRAINED = "Trained"
    EVALUATED = "Evaluated"
    GATES_PASSED = "GatesPassed"
    PUBLISHED = "Published"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Reason(StrEnum):
    """Why a condition is as it is."""

    # Accepted
    SPEC_VALID = "SpecValid"
    SPEC_INVALID = "SpecInvalid"
    NOT_SUPPORTED = "NotSupported"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    POLICY_VIOLATED = "PolicyViolated"
    KUBERAY_MISSING = "KubeRayMissing"
    CONTRACT_SKEW = "ContractSkew"
    WAITING_FOR_JOB = "WaitingForJob"
    # Admitted
    ADMITTED = "Admitted"
    # any stage
    WAITING = "Waiting"
    IN_QUEUE = "InQueue"
    RUNNING = "Running"
    NODE_UNREACHABLE = "NodeUnreachable"
    RETRYING = "Retrying"
    SKIPPED = "Skipped"
    STAGE_SUCCEEDED = "StageSucceeded"
    # how a stage can end badly; the first seven are named as its exit codes
    BAD_SPEC = "BadSpec"
    BAD_DATA = "BadData"
    STORAGE = "StorageUnreachable"
    INTERNAL = "InternalError"
    OUT_OF_MEMORY = "OutOfMemory"
    DIVERGED = "Diverged"
    PREEMPTED = "Preempted"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    WORKER_LOST = "WorkerLost"
    CHILD_LOST = "ChildLost"
    REFERENCE_MISSING = "ReferenceMissing"
    POD_NOT_STARTED = "PodNotStarted"
    NAME_TAKEN = "NameTaken"
    STAGE_STARTED = "StageStarted"
    # how a job ends
    GATES_PASSED = "GatesPassed"
    GATES_NOT_PASSED = "GatesNotPassed"
    NO_GATES = "NoGates"
    WORSE_THAN_BASE = "WorseThanBase"
    PUBLISHED = "Published"
    PUBLISH_NEVER = "PublishNever"
    ALREADY_PUBLISHED = "AlreadyPublished"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    START_DEADLINE_EXCEEDED = "StartDeadlineExceeded"
    SUSPENDED_BY_USER = "SuspendedByUser"
    RESUMED = "Resumed"
    # read for one that only a later release knows
    UNKNOWN = "Unknown"


class Condition(ApiModel):
    """One thing that is so, is not so, or is not known yet."""

    type: ConditionType
    """What is spoken of."""
    status: ConditionStatus
    """Whether it holds."""
    reason: Reason
    """Why, in one word for programs."""
    message: Annotated[str, Field(max_length=LONGEST_MESSAGE)] = ""
    """Why, in a sentence for people, with what to do."""
    last_transition_time: AwareDatetime
    """When ``status`` last changed."""
    observed_generation: Count | None = None
    """The generation of the spec that this was said about."""


class Summary(ApiModel):
    """Text for the columns of ``kubectl get``."""

    progress: Text = ""
    """``42 %`` of the running stage."""
    metric: Text = ""
    """``sentiment accuracy 0.950``."""
    delta: Text = ""
    """Tuned minus base: ``+0.075``."""
    eta: Text = ""
    """Time to the end of the running stage: ``12m``."""
    message: Text = ""
    """What matters most at the moment."""


class ProgressStatus(ApiModel):
    """How far the running stage is."""

    stage: Stage
    """The running stage."""
    message: Text = ""
    """What is being done: ``reading rows``."""
    percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Of the stage; absent while unknown."""
    step: Count | None = None
    """Optimiser steps done."""
    total_steps: Count | None = None
    """Optimiser steps in all."""
    epoch: Figure | None = None
    """Passes over the training rows."""
    eta_seconds: Count | None = None
    """Time to the end of the stage."""
    tokens_per_second: Figure | None = None
    """Over all workers, prompts included."""
    last_update_time: AwareDatetime
    """When the operator heard of it, by its own clock."""


class MetricValue(ApiModel):
    """A value that the trainer reported."""

    name: MetricName
    """``loss``, ``validation_loss``, ``learning_rate``."""
    value: Figure
    """As text, so that a NaN can be told."""


class MemoryStatus(ApiModel):
    """Bytes that one worker holds when it holds most."""

    weights: Count
    """Of the whole model, in the number format that training keeps them in."""
    gradients: Count
    """Of what is trained, with the copies that a step of ZeRO makes of them where these take more than rows do."""
    optimiser: Count
    """AdamW's two moments of what is trained and, under ``deepspeed``, its weights in float32."""
    activations: Count
    """What a forward pass keeps for the backward pass."""
    logits: Count
    """Scores of the vocabulary at learnt tokens, their loss and its gradient."""
    exchanged: Count = 0
    """What several workers keep to exchange: a bucket of gradients and, under ZeRO 3, others' weights."""
    copies: Count = 0
    """Weights that ``regularization`` compares with, and, on a CPU, the best ones of ``earlyStopping``."""


class PlanStatus(ApiModel):
    """What the check stage expects of the run."""

    parameters: Count | None = None
    """Of the whole model."""
    trainable_parameters: Count | None = None
    """Of these, how many are trained."""
    trainable_percent: Figure | None = None
    """Share of the trained ones."""
    memory_bytes_per_gpu: Count | None = None
    """Estimated peak."""
    memory: MemoryStatus | None = None
    """What it is made of."""
    gpus: Count | None = None
    """Over all workers; 0 trains on the CPU."""
    gpu_memory_bytes: Count | None = None
    """Of one GPU, as ``spec.compute.gpuMemory`` says: what the estimated peak is held against."""
    gpus_needed: Annotated[int, Field(ge=1)] | None = None
    """Least GPUs of that memory on which the job fits as it is set up: its method, its ZeRO stage, its batch, which
    they share evenly. More of them hold less each where ZeRO spreads something, or where microBatchSize is left open
    and becomes smaller. Absent: on none; or unknown, as without GPUs or gpuMemory, under offload, or without a plan of
    the memory."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows in one forward pass of one worker."""
    warnings: Annotated[
        tuple[Annotated[str, Field(max_length=LONGEST_WARNING)], ...], Field(max_length=MOST_WARNINGS)
    ] = ()
    """What may not be what was meant, in sentences."""


class RowsStatus(ApiModel):
    """Rows of each split."""

    train: Count
    """Trained on."""
    validation: Count
    """Chosen on."""
    test: Count
    """Measured on."""


class PersonalDataStatus(ApiModel):
    """Rows with something in them that looks like it."""

    emails: Count = 0
    """E-mail addresses."""
    phones: Count = 0
    """Telephone numbers."""
    keys: Count = 0
    """Access keys, tokens and private keys."""


class OverlapStatus(ApiModel):
    """Questions of a test whose words stand in training rows."""

    source: Text
    """``general`` for the suite that ships with the image, the name of a benchmark or of the job's own suite, or
    ``<task>.testSource``, ``<task>.validationSource``."""
    questions: Count
    """That the test asks."""
    overlapping: Count
    """That share words in a row with a training row."""
    given_away: Count
    """Those of them that stand in one training row as a whole."""


class LabelStatus(ApiModel):
    """How often a label is learnt."""

    label: LabelText
    """As spec.data.tasks[].labels has it."""
    rows: Count
    """Training rows."""


class TaskDataStatus(ApiModel):
    """What the training rows of one task looked like."""

    name: TaskName
    """Of the task."""
    rows: Count
    """Training rows."""
    language: Annotated[str, Field(max_length=8)] = ""
    """The commonest one (ISO 639): a guess."""
    labels: Annotated[tuple[LabelStatus, ...], Field(max_length=8)] = ()
    """The commonest eight."""


class RehearsalStatus(ApiModel):
    """How the job went in small, with a tiny random model, before a GPU was asked for."""

    seconds: Count = 0
    """That training, interruption, resuming, evaluation and publication took."""
    why_not: Text = ""
    """Why it did not begin, or not come to its end."""


class DataStatus(ApiModel):
    """What the rows looked like; the report has more, and plan.warnings say what may not be what was meant."""

    rows: RowsStatus
    """Rows of each split."""
    tokens: Count | None = None
    """Tokens of the training split, prompts included."""
    longest_tokens: Count | None = None
    """Of the longest row, when it is shortened."""
    max_length: Count | None = None
    """Tokens that a row may have: spec.data.maxLength, or what the model has places for."""
    truncated_percent: Figure | None = None
    """Share of the rows that were shortened to maxLength."""
    duplicates: Count | None = None
    """Rows whose input equals or nearly equals another's."""
    exact_duplicates: Count | None = None
    """Those whose input equals another's."""
    leakage: Count | None = None
    """Validation and test rows of sources of their own that are also among the training rows."""
    overlaps: Annotated[tuple[OverlapStatus, ...], Field(max_length=16)] = ()
    """Of tests that the job is measured on, those that rows give most away of first; only where something is found."""
    personal_data: PersonalDataStatus | None = None
    """Rows with something in them that looks like it."""
    tasks: Annotated[tuple[TaskDataStatus, ...], Field(max_length=16)] = ()
    """In the order of the spec, the first sixteen."""
    layout: Text = ""
    """Packed or padded, and what the probe found: whether rows that lie beside each other stay apart."""
    rehearsal: RehearsalStatus | None = None
    """How the job went in small; absent when the model itself is tiny, or nothing is trained."""
    hash: Sha256 | None = None
    """Over the rendered rows: equal data, equal hash."""


class Attempt(ApiModel):
    """One try at a stage."""

    stage: Stage = Stage.TRAIN
    """What was tried."""
    number: Annotated[int, Field(ge=1, le=1_000_000)]
    """Counts from 1 within the stage."""
    failures: Count = 0
    """Tries of the stage up to this one that count against runPolicy.retries: neither preempted nor suspended."""
    child: ObjectName
    """Name of its Job or RayJob."""
    record_time: AwareDatetime | None = None
    """When it was entered here, just before its Job was created."""
    start_time: AwareDatetime | None = None
    """When its first pod ran."""
    end_time: AwareDatetime | None = None
    """When it ended."""
    reason: Reason | None = None
    """Why it ended; absent while its program has ended well and its RayJob has not yet."""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """Of the trainer, by sysexits.h."""
    node: ObjectName | None = None
    """Where it ran."""
    image_id: Annotated[str, Field(max_length=512)] | None = None
    """The image that it ran, by its digest, as the node's runtime says; before it runs, that of an attempt before."""
    resumed_from_step: Count | None = None
    """Step it went on from: a checkpoint's, or the last one where it found training done."""
    change: Text = ""
    """What was changed against the attempt before: ``microBatchSize 8 -> 4``."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows in one forward pass, where that is not the spec's own, or they did not fit."""
    gradient_checkpointing: bool | None = None
    """Whether activations are computed twice, where that is not the spec's own choice."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """DeepSpeed's stage, where it is not the spec's own."""
    learning_rate_scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """What the spec's learning rate is multiplied by, where it is lowered."""
    earlier_seconds: Count = 0
    """Running time before ``startTime``, over all attempts; counts against runPolicy.activeDeadlineSeconds."""


class Checkpoint(ApiModel):
    """A complete state that training can go on from."""

    step: Count
    """Optimiser steps done."""
    uri: Uri
    """Where it is."""
    validation_loss: Figure | None = None
    """At that step, in nats per completion token."""


class TaskResult(ApiModel):
    """One metric of one task or benchmark on rows that training never saw."""

    name: MetricName
    """The task."""
    metric: MetricName
    """What was measured."""
    base: Figure | None = None
    """The base model."""
    few_shot: Figure | None = None
    """The base model with examples in its prompt."""
    tuned: Figure
    """The tuned model."""
    delta: Figure | None = None
    """Tuned minus base."""
    low: Figure | None = None
    """Lower end of the confidence interval of ``delta``."""
    high: Figure | None = None
    """Upper end."""


class EvaluationStatus(ApiModel):
    """The base model against the tuned one."""

    tasks: Annotated[tuple[TaskResult, ...], Field(max_length=64)] = ()
    """On the job's own test split; the first 64, the report has all."""
    forgetting: Annotated[tuple[TaskResult, ...], Field(max_length=16)] = ()
    """On general tasks."""
    benchmarks: Annotated[tuple[TaskResult, ...], Field(max_length=16)] = ()
    """On public benchmarks."""
    gates: Annotated[tuple[GateResult, ...], Field(max_length=32)] = ()
    """What decided about publication."""


class PublishedArtifact(ApiModel):
    """One published folder."""

    kind: ArtifactKind
    """What it is."""
    uri: Uri
    """Where it is."""
    sha256: Sha256
    """Of its MANIFEST.json, which holds the sha256 of every file."""
    bytes: Count
    """Size of all its files."""


class StageStatus(ApiModel):
    """How a stage ended, for good."""

    stage: Stage
    """Which one."""
    attempt: Annotated[int, Field(ge=1, le=1_000_000)]
    """The attempt that ended it."""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """Of the trainer, by sysexits.h."""
    end_time: AwareDatetime | None = None
    """When it ended."""
    message: Annotated[str, Field(max_length=LONGEST_MESSAGE)] = ""
    """What the trainer said last."""
    report_sha256: Sha256 | None = None
    """Of report.json, once there is one."""
    published: bool | None = None
    """Whether the model was published; absent before evaluation has ended."""


class ResolvedStatus(ApiModel):
    """What was pinned when the job was accepted."""

    config_map: ObjectName | None = None
    """Immutable ConfigMap with the spec, profile and defaults filled in."""
    spec_hash: Sha256 | None = None
    """Of that spec."""
    model_revision: Annotated[str, Field(max_length=128)] | None = None
    """Commit of the base model."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """The trainer image."""
    output_path: Uri | None = None
    """Folder of this job's results: ``<uri>/<namespace>/<name>-<id>``."""


class FineTuneJobStatus(ApiModel):
    """What the operator says about the job."""

    observed_generation: Count | None = None
    """The generation of the spec that this was said about."""
    phase: Phase | None = None
    """Where the job stands, in one word; a summary of the conditions."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = ()
    """What is so, one entry a type."""
    summary: Summary | None = None
    """Text for the columns of ``kubectl get``."""
    progress: ProgressStatus | None = None
    """How far the running stage is."""
    latest_metrics: Annotated[tuple[MetricValue, ...], Field(max_length=32)] = ()
    """What the trainer reported last."""
    plan: PlanStatus | None = None
    """What the check stage expects of the run."""
    data: DataStatus | None = None
    """What the rows looked like."""
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=10)] = ()
    """The newest ten tries, all stages together, oldest first."""
    stages: Annotated[
        tuple[StageStatus, ...],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["stage"]},
        ),
    ] = ()
    """Stages that have ended."""
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(max_length=5)] = ()
    """The newest five."""
    evaluation: EvaluationStatus | None = None
    """The base model against the tuned one."""
    artifacts: Annotated[tuple[PublishedArtifact, ...], Field(max_length=8)] = ()
    """What was published."""
    resolved: ResolvedStatus | None = None
    """What was pinned when the job was accepted."""
