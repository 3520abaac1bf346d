"""Choose the number format from what this machine does well, measured, not assumed."""

import time
from dataclasses import dataclass, replace
from functools import cache

import torch

from finetune_api.spec import OWN_WEIGHTS, DType, MethodType, Precision

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
    four_bit: bool = False
    """Whether frozen linear layers lie in 4 bits, see `finetune_trainer.quantization`."""


def choose_precision(method: MethodType, precision: Precision, dtype: DType) -> PrecisionChoice:
    """Return the format for ``method`` on this machine.

    The spec wins. Where it says neither how to compute nor how to keep frozen weights, bfloat16 is taken when a matrix
    product of the size that training runs is at least 1.2 times as fast in it as in float32.
    """
    if method is MethodType.QLORA:
        return decide_precision(method, Precision.BF16, dtype)
    products, why = precision, "as the spec says"
    if precision is Precision.AUTO and dtype is not DType.AUTO:
        products = Precision.BF16 if dtype is DType.BFLOAT16 else Precision.FP32
    elif precision is Precision.AUTO:
        gain = bfloat16_gain()
        products = Precision.BF16 if gain >= _WORTHWHILE else Precision.FP32
        why = f"bfloat16 ones are {gain:.1f} x as fast as float32 ones here"
    if precision is Precision.AUTO and method in OWN_WEIGHTS and not torch.cuda.is_available():
        # Casting all weights at every step costs more than the faster products give back for small models.
        products, why = Precision.FP32, "the model's own weights are trained, on a CPU"
    choice = decide_precision(method, products, dtype)
    return replace(choice, reason=f"{choice.reason}: {why}")


def decide_precision(method: MethodType, products: Precision, dtype: DType) -> PrecisionChoice:
    """Return the types for ``products`` in bf16 or fp32. Pure.

    Trained weights keep float32 masters in any case: a bfloat16 Adam step of 1e-5 moves 2 % of the weights only.
    """
    if method is MethodType.QLORA:
        # What lies beside the layers of 4 bits is float32 while training, so products have to be told.
        reason = "4-bit frozen layers (nf4, double-quantised), bfloat16 products, float32 trained weights"
        return PrecisionChoice(torch.bfloat16, autocast=True, reason=reason, four_bit=True)
    if products is Precision.FP32:
        return PrecisionChoice(torch.float32, autocast=False, reason="float32 weights and products")
    if method in OWN_WEIGHTS or dtype is DType.FLOAT32:
        return PrecisionChoice(torch.float32, autocast=True, reason="float32 weights, bfloat16 products")
    return PrecisionChoice(
        torch.bfloat16, autocast=False, reason="bfloat16 frozen weights and products, float32 trained weights"
    )


@cache
def bfloat16_gain(size: int = 768, rounds: int = 3) -> float:
    """Return how many times as fast a bfloat16 matrix product is as a float32 one, on the device training would use.

    Measured once a process: what is published is loaded as what was evaluated.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        return 0.0
    plain = _product_seconds(torch.float32, device, size, rounds)
    # Without instructions for it, one such product takes as long as fifty plain ones: once is enough to know.
    return plain / _product_seconds(torch.bfloat16, device, size, rounds, give_up_seconds=8 * plain)


def _product_seconds(
    dtype: torch.dtype, device: str, size: int, rounds: int, give_up_seconds: float = float("inf")
) -> float:
    """Return the seconds of one product, the best of some; the first one alone when it takes too long."""
    left = torch.ones(size // 2, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for products in (1, *(4 for _ in range(rounds))):  # the first warms up
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / products)
        if best > give_up_seconds:
            break
    return best
