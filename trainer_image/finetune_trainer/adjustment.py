"""What an attempt does otherwise than the spec says, because the one before failed at it. Pure.

Global batch and seed stay as they are: the same model comes out, only with less memory or smaller steps.
"""

from enum import Enum

from pydantic import Field

from finetune_api.model import ApiModel
from finetune_api.spec import DeepspeedSpec, FineTuneJobSpec, GradientCheckpointing
from finetune_api.spec.compute import is_distributed, processes
from finetune_api.spec.training import largest_micro_batch
from finetune_trainer.errors import SpecError


class Adjustment(ApiModel):
    """Changes of one attempt; nothing is changed by default."""

    micro_batch_size: int | None = Field(default=None, ge=1)
    """Takes the place of ``spec.training.microBatchSize``, or what of it divides a process's share of the batch."""
    gradient_checkpointing: bool = False
    """Compute activations twice, whatever ``spec.training.gradientCheckpointing`` says."""
    zero_stage: int | None = Field(default=None, ge=0, le=3)
    """Takes the place of ``spec.compute.deepspeed.stage``."""
    learning_rate_scale: float = Field(default=1.0, gt=0, le=1)
    """Multiplies ``spec.training.learningRate``."""


class Useless(Enum):
    """Checkpoints of earlier attempts that must not be gone on from."""

    NONE = "none"
    NEWEST = "newest"
    ALL = "all"


def adjusted(spec: FineTuneJobSpec, adjustment: Adjustment) -> FineTuneJobSpec:
    """Return the resolved ``spec`` as the attempt follows it.

    Raises:
        SpecError: a ZeRO stage for a single process.
    """
    training = spec.training
    if adjustment.micro_batch_size is not None:
        share = training.global_batch_size // processes(spec.compute)
        micro = largest_micro_batch(share, adjustment.micro_batch_size)
        training = training.model_copy(update={"micro_batch_size": micro})
    if adjustment.gradient_checkpointing:
        training = training.model_copy(update={"gradient_checkpointing": GradientCheckpointing.ALWAYS})
    if training.learning_rate is not None:
        rate = training.learning_rate * adjustment.learning_rate_scale
        training = training.model_copy(update={"learning_rate": rate})
    compute = spec.compute
    if adjustment.zero_stage is not None:
        if not is_distributed(compute):
            raise SpecError(
                f"--zero-stage {adjustment.zero_stage}: one process has nobody to spread its state over. Leave it out, "
                "or set spec.compute.workers: 2 or more."
            )
        deepspeed = (compute.deepspeed or DeepspeedSpec()).model_copy(update={"stage": adjustment.zero_stage})
        compute = compute.model_copy(update={"deepspeed": deepspeed})
    return spec.model_copy(update={"training": training, "compute": compute})


def useless_checkpoints(before: Adjustment, now: Adjustment) -> Useless:
    """Return which checkpoints of attempts made with ``before`` an attempt made with ``now`` must do without.

    Every ZeRO stage spreads the optimiser's state in its own way. A loss that is no number has often begun to go wrong
    before the last checkpoint, so that with smaller steps training goes back by one.
    """
    if before.zero_stage != now.zero_stage:
        return Useless.ALL
    if now.learning_rate_scale < before.learning_rate_scale:
        return Useless.NEWEST
    return Useless.NONE
