"""What ZeRO leaves on each process of what one would hold by itself, and what they exchange. Pure.

As DeepSpeed 0.19 does it (arXiv:1910.02054, section 5): `runtime/zero/stage_1_and_2.py` and `stage3.py`.
"""

from dataclasses import dataclass

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.compute import is_offloaded, spreads_weights, zero_stage
from finetune_api.status import MemoryStatus, PlanStatus
from finetune_trainer.settings_map import LIVE_PARAMETERS, exchanged_piece, gradient_bucket

_MOMENTS = 8
"""Bytes of AdamW's two for every trained parameter."""
_FLOAT32, _BFLOAT16 = 4, 2
_SUB_GROUP = 1_000_000_000
"""Trained parameters that ZeRO 3 steps at once; DeepSpeed's own number."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Over how many processes DeepSpeed spreads what every one of them would hold (arXiv:1910.02054, section 5)."""

    optimiser: int
    gradients: int
    weights: int


def shares(stage: int, processes: int) -> Shares:
    """Return what ``processes`` share at a ZeRO stage; 0 is none."""
    return Shares(*(processes if stage >= least else 1 for least in (1, 2, 3)))


@dataclass(frozen=True, slots=True)
class Alone:
    """What a process holds that has nobody to spread it over, without the optimiser."""

    plan: PlanStatus
    largest: int
    """Numbers in the largest parameter."""
    largest_trained: int
    all_bfloat16: bool
    """Whether trained weights and gradients are bfloat16, as DeepSpeed has them where others compute under autocast."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient."""
        return _BFLOAT16 if self.all_bfloat16 else _FLOAT32


def spread(alone: Alone, spec: FineTuneJobSpec, workers: int) -> PlanStatus:
    """Return what is left of ``alone`` on each of ``workers``, with the optimiser and what they exchange."""
    plan, memory = alone.plan, alone.plan.memory
    if memory is None:
        return plan
    share = shares(zero_stage(spec.compute), workers)
    gathered = _gathered(alone, memory, spec, workers)
    # A step begins when what rows took is gone, and gathered weights too.
    of_step = _copied_by_a_step(alone, spec, workers) - memory.activations - memory.logits - gathered
    left = {
        "weights": memory.weights // share.weights,
        "gradients": memory.gradients // share.gradients + max(0, of_step),
        "optimiser": _optimiser(alone, spec) // share.optimiser,
        "exchanged": memory.exchanged + _bucket(alone, spec) + gathered,
    }
    memory = memory.model_copy(update=left)
    return plan.model_copy(update={"memory": memory, "memory_bytes_per_gpu": sum(memory.model_dump().values())})


def _optimiser(alone: Alone, spec: FineTuneJobSpec) -> int:
    if alone.plan.gpus and is_offloaded(spec.compute):
        return 0
    # ZeRO's optimiser has weights of its own.
    has_weights = zero_stage(spec.compute) > 0 or alone.all_bfloat16
    return (_MOMENTS + (_FLOAT32 if has_weights else 0)) * (alone.plan.trainable_parameters or 0)


def _bucket(alone: Alone, spec: FineTuneJobSpec) -> int:
    """Return the bytes in which gradients travel, with one that has no room there."""
    if zero_stage(spec.compute) == 0:
        return 0
    bucket = gradient_bucket(alone.plan.trainable_parameters or 0, without_gpu=not alone.plan.gpus)
    # On GPUs it is laid out anew, each one's share behind the other.
    copies = 2 if alone.plan.gpus else 1
    return alone.gradient_bytes * (copies * bucket + _beyond(bucket, alone.largest_trained))


def _gathered(alone: Alone, memory: MemoryStatus, spec: FineTuneJobSpec, workers: int) -> int:
    """Return the bytes of others' weights: those in use, and once more what is on its way."""
    parameters = alone.plan.parameters
    if not parameters or workers == 1 or not spreads_weights(spec.compute):
        return 0
    piece = exchanged_piece(without_gpu=not alone.plan.gpus)
    in_use = min(parameters, LIVE_PARAMETERS + alone.largest)
    on_their_way = min(parameters, piece + _beyond(piece, alone.largest))
    return memory.weights * (in_use + on_their_way) // parameters


def _beyond(piece: int, largest: int) -> int:
    """Return the numbers of a parameter that comes whole, beside a piece that it is larger than."""
    return largest if largest > piece else 0


def _copied_by_a_step(alone: Alone, spec: FineTuneJobSpec, workers: int) -> int:
    """Return the bytes of gradients that a step lays out anew and makes float32."""
    stage = zero_stage(spec.compute)
    # Without GPUs they lie as stage 2 needs them, see `zero_without_gpu`; under 1 those of others have gone before.
    if stage < 2 or (stage == 2 and not alone.plan.gpus):
        return 0
    share = -(-(alone.plan.trainable_parameters or 0) // workers)
    at_once = min(share, _SUB_GROUP) if spreads_weights(spec.compute) else share
    return at_once * (alone.gradient_bytes + (_FLOAT32 if alone.all_bfloat16 else 0))
