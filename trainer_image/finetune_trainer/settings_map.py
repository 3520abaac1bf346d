"""Translate the spec into the keyword arguments of the libraries that do the work. Pure; one row a setting."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.spec import DeepspeedSpec, GradientCheckpointing, Offload, Schedule, TrainingSpec
from finetune_api.spec.training import largest_micro_batch
from finetune_trainer.errors import SpecError

# Tokens that one forward pass may hold when the spec leaves the micro-batch open: enough to keep a processor busy,
# little enough that activations of a 1 B model stay under a few GB.
MICRO_BATCH_TOKENS = 2048

# Where gradients are spread, all of them travel behind every forward and backward pass, and where weights are, these
# too: fewer and larger passes.
_SPREAD_MICRO_BATCH_TOKENS = 8192

# Share of the free memory that activations may fill: kernels need room to work, allocators lose some to fragments.
_USABLE = 0.7

_SPREADS_GRADIENTS, _SPREADS_WEIGHTS = 2, 3
"""ZeRO's stages from which on no process has all gradients, or the whole model."""

_CPU_PIECE, _GPU_PIECE = 4_000_000, 50_000_000
"""Numbers that DeepSpeed exchanges at once. For gradients it keeps a buffer of that size, half a billion if it is told
nothing. Between CPUs 16 MB, which malloc gives again without asking the kernel for pages; between GPUs 100 or 200."""

LIVE_PARAMETERS = 1_000_000_000
"""Of a model that is spread, how many a process may have gathered at a time; DeepSpeed's own number."""

_SCHEDULES = {Schedule.COSINE: "cosine", Schedule.LINEAR: "linear", Schedule.CONSTANT: "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Steps:
    """How rows become optimiser steps."""

    micro_batch: int
    """Rows in one forward pass of one worker."""
    accumulation: int
    """Forward passes behind one optimiser step."""
    total: int
    """Optimiser steps of the whole run."""
    per_epoch: int
    workers: int = 1
    """Processes that each do so with rows of their own."""

    @property
    def rows(self) -> int:
        """Rows behind one optimiser step, over all workers."""
        return self.micro_batch * self.accumulation * self.workers


def plan_steps(training: TrainingSpec, rows: int, longest_tokens: int, workers: int = 1, zero_stage: int = 0) -> Steps:
    """Derive micro-batch, accumulation and steps so that ``globalBatchSize`` holds whatever the hardware.

    An absent ``microBatchSize`` becomes the largest divisor of a worker's share of the global batch whose rows, were
    they all as long as the longest, hold at most `MICRO_BATCH_TOKENS` tokens, or four times as many under ZeRO 2 and 3.
    """
    # Of fewer rows than a step has: what is missing to an even share is filled with rows that nothing is learnt from.
    share = math.ceil(min(training.global_batch_size, rows) / workers)
    tokens = MICRO_BATCH_TOKENS if zero_stage < _SPREADS_GRADIENTS else _SPREAD_MICRO_BATCH_TOKENS
    most = training.micro_batch_size or max(1, tokens // max(1, longest_tokens))
    if rows >= training.global_batch_size:
        micro = largest_micro_batch(share, most)
    else:
        # All rows in one step, whatever is taken at a time; the last forward pass is filled up as well.
        micro = math.ceil(share / math.ceil(share / most))
    accumulation = math.ceil(share / micro)
    per_epoch = math.ceil(rows / (micro * accumulation * workers))
    total = training.max_steps or math.ceil(per_epoch * training.epochs)
    return Steps(micro_batch=micro, accumulation=accumulation, total=total, per_epoch=per_epoch, workers=workers)


def deepspeed_config(
    deepspeed: DeepspeedSpec,
    training: TrainingSpec,
    steps: Steps,
    autocast: bool,
    without_gpu: bool,
    trainable_parameters: int,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration; the optimiser and its schedule stay those of `training_arguments`.

    With ``autocast`` DeepSpeed itself keeps float32 masters of weights in bfloat16. An optimiser that is kept off the
    GPU is PyTorch's as well: DeepSpeed's own is faster, but is compiled where it runs, and the image has no compiler.

    Raises:
        SpecError: ``autocast`` without a GPU, which transformers does not take beside DeepSpeed.
    """
    if autocast and without_gpu:
        raise SpecError(
            "spec.training.precision: bf16 products under spec.compute.deepspeed need GPUs, and there is none here. "
            "Take fp32, or leave spec.compute.deepspeed out."
        )
    bucket = gradient_bucket(trainable_parameters, without_gpu)
    spread: dict[str, Any] = {"stage": deepspeed.stage, "reduce_bucket_size": bucket}
    if without_gpu:
        spread["reduce_scatter"] = False
    if deepspeed.offload is not Offload.NONE:
        spread["offload_optimizer"] = {"device": deepspeed.offload.value}
        if deepspeed.stage == _SPREADS_WEIGHTS:
            spread["offload_param"] = {"device": deepspeed.offload.value}
    if deepspeed.stage == _SPREADS_WEIGHTS:
        # Also for float32: it is how whole weights are written.
        spread["stage3_gather_16bit_weights_on_model_save"] = True
        spread["stage3_max_live_parameters"] = LIVE_PARAMETERS
        spread["stage3_prefetch_bucket_size"] = exchanged_piece(without_gpu)
    return {
        "train_batch_size": steps.rows,
        "train_micro_batch_size_per_gpu": steps.micro_batch,
        "gradient_accumulation_steps": steps.accumulation,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": autocast},
        "zero_optimization": spread,
        "zero_force_ds_cpu_optimizer": False,
        # Progress is told by the trainer.
        "steps_per_print": steps.total + 1,
    }


def exchanged_piece(without_gpu: bool) -> int:
    """Return how many gradients, or weights, DeepSpeed exchanges at once."""
    return _CPU_PIECE if without_gpu else _GPU_PIECE


def gradient_bucket(trainable_parameters: int, without_gpu: bool) -> int:
    """Return how many gradients DeepSpeed keeps room for to exchange them."""
    return min(trainable_parameters, exchanged_piece(without_gpu))


def checkpoints_activations(
    wanted: GradientCheckpointing, activation_bytes: int, trainable_parameters: int, available_bytes: int
) -> bool:
    """Decide whether activations are computed twice instead of kept.

    Args:
        wanted: what the spec says; auto decides by the other three.
        activation_bytes: what the largest forward pass keeps for the backward pass.
        trainable_parameters: each takes 4 bytes for its gradient and 8 for AdamW's two moments.
        available_bytes: memory that is free once the model is loaded.
    """
    match wanted:
        case GradientCheckpointing.ALWAYS:
            return True
        case GradientCheckpointing.NEVER:
            return False
        case GradientCheckpointing.AUTO:
            return activation_bytes > _USABLE * available_bytes - 12 * trainable_parameters


def warm_up_steps(training: TrainingSpec, steps: Steps) -> int:
    """Return the steps in which the rate rises; transformers 5 has no ``warmup_ratio``."""
    # The first step of a warm-up learns nothing: a single one needs none.
    return min(math.ceil(training.warmup_ratio * steps.total), steps.total - 1)


def estimating_step(first: int, total: int) -> int | None:
    """Return the step behind which to say how long ``total`` steps will take that begin behind ``first``; None of few.

    The first steps are slower than the others: libraries choose kernels and set up memory.
    """
    left = total - first
    return first + max(5, math.ceil(left / 10)) if left >= 10 else None


def training_arguments(
    training: TrainingSpec,
    steps: Steps,
    folder: Path,
    checkpoint_every: int,
    checkpoint_activations: bool,
    autocast: bool,
    use_cpu: bool,
    deepspeed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of ``transformers.TrainingArguments``.

    Args:
        training: the resolved ``spec.training``.
        steps: from `plan_steps`.
        folder: for checkpoints.
        checkpoint_every: steps between two of them.
        checkpoint_activations: from `checkpoints_activations`.
        autocast: whether matrix products of float32 weights run in bfloat16.
        use_cpu: whether there is no GPU.
        deepspeed: from `deepspeed_config`.
    """
    return {
        "deepspeed": deepspeed,
        "output_dir": str(folder),
        "max_steps": steps.total,
        "per_device_train_batch_size": steps.micro_batch,
        "gradient_accumulation_steps": steps.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": _SCHEDULES[training.schedule],
        "warmup_steps": warm_up_steps(training, steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": training.seed,
        # Rows come in the mixture's own order, which is shuffled.
        "train_sampling_strategy": "sequential",
        "bf16": autocast,
        # Told so, Accelerate would take plain data parallelism instead of DeepSpeed; see `zero.join_without_gpu`.
        "use_cpu": use_cpu and deepspeed is None,
        "accelerator_config": {"use_configured_state": use_cpu and deepspeed is not None},
        # Otherwise every worker would divide by its own tokens, and those of short rows would count more.
        "average_tokens_across_devices": True,
        "activation_checkpointing": checkpoint_activations,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        # A loss that is no number before anything was learnt is the base model's fault.
        "logging_first_step": True,
        "logging_steps": max(1, steps.total // 200),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": checkpoint_every,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "prediction_loss_only": True,
    }
