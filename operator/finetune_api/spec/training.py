"""``spec.training``: how long, how fast, how precisely."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.spec.field import COLUMN, WANDB_NAME, Endpoint, Flag, Int, Number, SecretRef, Seed


class Schedule(StrEnum):
    """How the learning rate falls after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Precision(StrEnum):
    """Number format of the computation."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class GradientCheckpointing(StrEnum):
    """Whether activations are computed twice instead of kept. Not on and off: to YAML 1.1 these are booleans."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class MlflowSpec(Block):
    """An MLflow server. Needs the package mlflow in the trainer's image, see docs/trackers.md.

    The run is found again by its tag finetune.job, so that attempts of one job go on in one run.
    """

    tracking_uri: Endpoint
    """Address of the server: https://mlflow.example."""
    experiment: Annotated[str, Field(min_length=1, max_length=250, pattern=COLUMN)] = "Default"
    """Made where it is not there."""
    secret_ref: SecretRef | None = None
    """Secret with MLFLOW_TRACKING_TOKEN, or with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""


class WandbSpec(Block):
    """Weights & Biases. Needs the package wandb in the trainer's image, see docs/trackers.md.

    The run's id is made of the job's name and uid, so that attempts of one job go on in one run.
    """

    base_url: Endpoint = "https://api.forge.coreweave.com"
    """Address of the API of a server of your own: https://wandb.example. Absent: the public service."""
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=WANDB_NAME)]
    """Made where it is not there."""
    entity: Annotated[str, Field(min_length=1, max_length=128, pattern=WANDB_NAME)] | None = None
    """The team or user that the project is of. Absent: the default of the key's owner."""
    secret_ref: SecretRef | None = None
    """Secret with WANDB_API_KEY."""


def _some_tracker_is_named(tensorboard: bool, mlflow: MlflowSpec | None, wandb: WandbSpec | None) -> Iterator[Problem]:
    if not tensorboard and mlflow is None and wandb is None:
        yield Problem((), None, "names no tracker", "Set tensorboard: true, or leave reportTo out.")


class ReportToSpec(Block):
    """Experiment trackers that hear of losses and learning rates while the model learns; the report has them anyway.

    One that is away neither fails nor holds up training: the report says what it missed.
    """

    rules = (_some_tracker_is_named,)

    tensorboard: Flag = False
    """Event files for ``tensorboard --logdir``: while training in ``tensorboard/`` of the workspace, then published as
    ``report/tensorboard/``. A resumed run writes the steps before its checkpoint again."""
    mlflow: MlflowSpec | None = None
    """An MLflow server."""
    wandb: WandbSpec | None = None
    """Weights & Biases."""


def largest_micro_batch(share: int, most: int) -> int:
    """Return the largest number of rows up to ``most`` by which a process's ``share`` of a step divides evenly."""
    return next(size for size in range(most, 0, -1) if share % size == 0)


VALIDATION_LOSS = "validation_loss"
"""What early stopping watches by default; lower is better."""
WATCHED_FIGURES = ("accuracy", "macro_f1")
"""Of a task with labels; higher is better."""


class EarlyStoppingSpec(Block):
    """Stop when validation gets no better, and keep the weights of its best point instead of the last ones.

    The best weights are held in memory and in every checkpoint: a copy of what is trained, 4 bytes a parameter.
    """

    metric: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")] = VALIDATION_LOSS
    """validation_loss, or accuracy or macro_f1 of a task with labels: sentiment.accuracy.

    These are measured on 200 of its validation rows, each scored with every label at each evaluation.
    """
    patience: Annotated[Int, Field(ge=1, le=1000)] = 3
    """Evaluations without an improvement before training stops."""


def _global_batch_is_divided(global_batch_size: int, micro_batch_size: int | None) -> Iterator[Problem]:
    if micro_batch_size is not None and global_batch_size % micro_batch_size:
        yield Problem(
            ("microBatchSize",),
            micro_batch_size,
            f"does not divide globalBatchSize {global_batch_size}",
            f"Take a divisor of {global_batch_size}, or leave it out.",
        )


def _evaluations_fit_into_steps(max_steps: int | None, eval_every_steps: int | None) -> Iterator[Problem]:
    if max_steps is not None and eval_every_steps is not None and eval_every_steps > max_steps:
        yield Problem(
            ("evalEverySteps",),
            eval_every_steps,
            f"is more than maxSteps {max_steps}, so validation would never run",
            f"Lower it to {max_steps} or less, or leave it out.",
        )


def _nothing_takes_no_steps(epochs: float, max_steps: int | None) -> Iterator[Problem]:
    if epochs == 0 and max_steps is not None:
        yield Problem(
            ("maxSteps",),
            max_steps,
            "contradicts epochs: 0, by which nothing is trained",
            "Leave one of them out.",
        )


def _something_is_tracked(epochs: float, report_to: ReportToSpec | None) -> Iterator[Problem]:
    if epochs == 0 and report_to is not None:
        asked = report_to.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        yield Problem(("reportTo",), asked, "has nothing to tell with epochs: 0", "Leave it out.")


class TrainingSpec(Block):
    """The training loop."""

    rules = (_global_batch_is_divided, _evaluations_fit_into_steps, _nothing_takes_no_steps, _something_is_tracked)

    epochs: Annotated[Number, Field(ge=0, le=1000)] = 3.0
    """Passes over the training rows; 1-5 is usual, more overfits. Time grows linearly with it. 0: nothing is trained;
    what spec.model.startFrom names is checked, evaluated as it is against the base model, and, where gates and
    spec.output.publishOn let it, published once more under this job's name. In a cluster there is no training pod."""
    max_steps: Annotated[Int, Field(ge=1, le=10_000_000)] | None = None
    """Optimiser steps; overrides ``epochs``. Absent: as many as the epochs take."""
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Absent: by method, see spec.method.type and docs/spec.md."""
    global_batch_size: Annotated[Int, Field(ge=1, le=65536)] = 16
    """Rows behind one optimiser step, over all workers, whatever the hardware."""
    micro_batch_size: Annotated[Int, Field(ge=1, le=4096)] | None = None
    """Rows in one forward pass of one worker: decides memory, not the result. Absent: as many as hold 2,048 tokens when
    all are as long as the longest, 8,192 where spec.compute.deepspeed.stage is 2 or 3 and all gradients travel behind
    every pass; in a cluster half of it after an attempt that ran out of memory."""
    schedule: Schedule = Schedule.COSINE
    """How the learning rate falls after warm-up: cosine or linear to 0, or constant."""
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Pull of trained weights towards 0 (AdamW); 0-0.1 is usual."""
    max_grad_norm: Annotated[Number, Field(gt=0, le=1000)] = 1.0
    """Gradients longer than this are shortened to it."""
    precision: Precision = Precision.AUTO
    """Number format of matrix products: bf16 is faster on recent hardware, fp32 exact. auto: as spec.model.dtype where
    that is written, else bf16 where the processor has instructions for it; the report says what it was."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.AUTO
    """Compute activations twice instead of keeping them (arXiv:1604.06174): about a third slower, much less memory.
    auto: under ``deepspeed`` stage 3; else where, by what a short row is measured to need, those of one forward pass
    would not fit into the memory that is free once the model is loaded."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop when validation gets no better, and keep the best weights. Absent: train to the end, keep the last."""
    eval_every_steps: Annotated[Int, Field(ge=1, le=10_000_000)] | None = None
    """Steps between validations. Absent: five in a run."""
    report_to: ReportToSpec | None = None
    """Experiment trackers. Absent: none."""
    seed: Seed = 17
    """Order of the rows, first values of new weights, dropout."""


def evaluates_only(training: TrainingSpec) -> bool:
    """Whether the job measures a published model as it is and trains none."""
    return training.epochs == 0
