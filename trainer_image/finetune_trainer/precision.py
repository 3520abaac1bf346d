"""Choose the number format from what the spec says and what this machine can do."""

from dataclasses import dataclass, replace

import torch

from finetune_api.spec import OWN_WEIGHTS, DType, MethodType, Precision


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

    The spec wins. Where it says neither how to compute nor how to keep frozen weights, bfloat16 is taken where the
    device has instructions for it.
    """
    if method is MethodType.QLORA:
        return decide_precision(method, Precision.BF16, dtype)
    products, why = precision, "as the spec says"
    if precision is Precision.AUTO and dtype is not DType.AUTO:
        products = Precision.BF16 if dtype is DType.BFLOAT16 else Precision.FP32
    elif precision is Precision.AUTO:
        has_bfloat16 = multiplies_bfloat16()
        products = Precision.BF16 if has_bfloat16 else Precision.FP32
        why = f"the processor has {'' if has_bfloat16 else 'no '}instructions for bfloat16"
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


_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""As torch names them, of x86 and of ARM."""


def multiplies_bfloat16() -> bool:
    """Return whether the device that training would use has instructions for products in bfloat16.

    Asked of the device, not of a clock: a busy machine would choose otherwise than an idle one, and evaluation
    otherwise than training.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    there = torch.cpu.get_capabilities()
    # Without oneDNN the instructions are there and nobody uses them.
    uses_them = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return uses_them and any(there.get(name) for name in _BFLOAT16_INSTRUCTIONS)
