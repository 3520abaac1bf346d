"""The base model of qlora: linear layers in 4 bits, by bitsandbytes, on a GPU.

The layers lie in nf4 with constants that are quantised themselves (arXiv:2305.14314), and are unpacked to bfloat16 for
each product. Without the package or a GPU, `FourBitOutline` has their form: for plans, which compute nothing.
"""

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune_trainer.errors import SpecError

PACKAGE = "bitsandbytes"
PRODUCTS = torch.bfloat16
"""What the layers are unpacked to and computed in."""

_BLOCK = 64
"""Weights with a constant in common, which takes a byte."""
_BLOCK_OF_CONSTANTS = 256
"""Constants with a float32 in common."""


def four_bit_config() -> BitsAndBytesConfig:
    """Return how transformers is to load the base."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=PRODUCTS,
    )


def require_four_bits(*, gpu: bool) -> None:
    """Find out whether a base of 4 bits can be had here; nothing is imported.

    Args:
        gpu: whether this is where it would be loaded, and not only asked about.

    Raises:
        SpecError: there is no GPU, or the package is not installed.
    """
    if gpu and not torch.cuda.is_available():
        raise SpecError(
            "spec.method.type: qlora needs a GPU, and torch finds none on this machine. Run the job where there is "
            "one, or set spec.method.type: lora."
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise SpecError(
            f"spec.method.type: qlora needs the package {PACKAGE}, which is not installed here. Install "
            "requirements/gpu.txt, of which docs/install.md says how, or set spec.method.type: lora."
        )


def four_bit_bytes(weights: int) -> int:
    """Return what so many weights of one layer take, their constants included."""
    constants = -(-weights // _BLOCK)
    return -(-weights // 2) + constants + 4 * -(-constants // _BLOCK_OF_CONSTANTS)


class FourBitOutline(nn.Linear):
    """A linear layer of as many bytes, which keeps for its backward pass what bitsandbytes keeps: nothing."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        packed = torch.empty(four_bit_bytes(inputs * outputs), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the result's form; its contents mean nothing."""
        product = _UnpackedProduct.apply(input.to(PRODUCTS), self.out_features)
        return cast(Tensor, product if self.bias is None else product + self.bias.to(PRODUCTS)).to(input.dtype)


class _UnpackedProduct(torch.autograd.Function):
    """A product with weights that are there as long as it takes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, outputs: int) -> Tensor:
        ctx.form = (outputs, input.shape[-1])
        return functional.linear(input, input.new_empty(ctx.form))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.form), None


def outline_four_bits(model: PreTrainedModel) -> None:
    """Put outlines in the place of the layers of ``model``, without weights, that transformers would quantise."""
    # T5 asks for the last layer of its feed-forward blocks.
    kept = HfQuantizer.get_modules_to_not_convert(model, keep_in_fp32_modules=list(model._keep_in_fp32_modules or ()))
    for name, module in list(model.named_modules()):
        if not should_convert_module(name, kept):
            continue
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            model.set_submodule(name, FourBitOutline(inputs, outputs, module.bias))
        elif type(module) is nn.Linear:
            model.set_submodule(name, FourBitOutline(module.in_features, module.out_features, module.bias))


def weights_of(module: nn.Module, parameter: nn.Parameter) -> int:
    """Return how many numbers ``parameter`` of ``module`` stands for: of 4 bits, two or so lie in a byte."""
    if isinstance(module, nn.Linear) and parameter is module.weight and parameter.dtype == torch.uint8:
        return module.in_features * module.out_features
    return parameter.numel()
