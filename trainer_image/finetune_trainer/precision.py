"""Choose the number format from what this machine does well, measured, not assumed."""

import time
from dataclasses import dataclass

import torch

from finetune_api.spec import DType, MethodType, Precision

# A format must win clearly to be worth its rounding.
_WORTHWHILE = 1.2


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """Types to load and compute in, and why, for people."""

    weights: torch.dtype
    """Type of frozen weights; what is trained is always kept in float32."""
    autocast: bool
    """Whether matrix products of float32 weights run in bfloat16."""
    reason: str


def choose_precision(method: MethodType, precision: Precision, dtype: DType) -> PrecisionChoice:
    """Return the format for ``method`` on this machine.

    Explicit settings win. Otherwise bfloat16 is taken where a matrix product of the size that training runs is at
    least 1.2 times as fast in it as in float32. Trained weights keep float32 masters in any case: a bfloat16 Adam
    step of 1e-5 moves 2 % of the weights only.
    """
    if precision is Precision.AUTO and dtype is DType.AUTO:
        gain = bfloat16_gain()
        wanted = gain >= _WORTHWHILE
        reason = f"bfloat16 products are {gain:.1f} x as fast as float32 ones here"
    else:
        wanted = dtype is DType.BFLOAT16 or (dtype is DType.AUTO and precision is Precision.BF16)
        reason = "as the spec says"
    if not wanted:
        return PrecisionChoice(torch.float32, autocast=False, reason=f"float32: {reason}")
    if method is MethodType.FULL:
        on_gpu = torch.cuda.is_available()
        # On a CPU casting all weights at every step costs more than the faster products give back for small models.
        autocast = on_gpu or precision is Precision.BF16
        kind = "bfloat16 products, float32 weights" if autocast else "float32, because all weights are trained on a CPU"
        return PrecisionChoice(torch.float32, autocast=autocast, reason=f"{kind}: {reason}")
    return PrecisionChoice(
        torch.bfloat16, autocast=False, reason=f"bfloat16 frozen weights, float32 trained ones: {reason}"
    )


def bfloat16_gain(size: int = 768, rounds: int = 3) -> float:
    """Return how many times as fast a bfloat16 matrix product is as a float32 one, on the device training would use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        return 0.0
    return _product_seconds(torch.float32, device, size, rounds) / _product_seconds(
        torch.bfloat16, device, size, rounds
    )


def _product_seconds(dtype: torch.dtype, device: str, size: int, rounds: int) -> float:
    left = torch.ones(size // 2, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
