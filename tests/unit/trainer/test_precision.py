"""In which types a model is kept and computed: what the spec says, and what follows where it says nothing."""

import pytest
import torch

from finetune_api.spec import DType, MethodType, Precision
from finetune_trainer.precision import choose_precision, multiplies_bfloat16

FULL, LORA = MethodType.FULL, MethodType.LORA
SAID = {
    "bf16 products, frozen weights with them": (LORA, Precision.BF16, DType.AUTO, torch.bfloat16, False),
    "fp32 products, frozen weights with them": (LORA, Precision.FP32, DType.AUTO, torch.float32, False),
    "bfloat16 weights, products with them": (LORA, Precision.AUTO, DType.BFLOAT16, torch.bfloat16, False),
    "float32 weights, products with them": (LORA, Precision.AUTO, DType.FLOAT32, torch.float32, False),
    "both said and different": (LORA, Precision.BF16, DType.FLOAT32, torch.float32, True),
    "both said and equal": (LORA, Precision.BF16, DType.BFLOAT16, torch.bfloat16, False),
    "full: trained weights stay float32": (FULL, Precision.BF16, DType.AUTO, torch.float32, True),
    "full: the products as said, whatever the weights": (FULL, Precision.BF16, DType.FLOAT32, torch.float32, True),
    "full: fp32": (FULL, Precision.FP32, DType.AUTO, torch.float32, False),
}


@pytest.mark.parametrize("method, precision, dtype, weights, autocast", SAID.values(), ids=SAID.keys())
def test_what_the_spec_says_is_done(
    method: MethodType, precision: Precision, dtype: DType, weights: torch.dtype, autocast: bool
):
    choice = choose_precision(method, precision, dtype)
    assert (choice.weights, choice.autocast) == (weights, autocast)
    assert choice.reason.endswith("as the spec says")


@pytest.mark.parametrize(
    "has_bfloat16, weights, why",
    [(True, torch.bfloat16, "has instructions"), (False, torch.float32, "has no instructions")],
    ids=["with", "without"],
)
def test_what_the_spec_leaves_open_is_what_the_processor_can_do(
    has_bfloat16: bool, weights: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("finetune_trainer.precision.multiplies_bfloat16", lambda: has_bfloat16)
    choice = choose_precision(LORA, Precision.AUTO, DType.AUTO)
    assert choice.weights == weights
    assert why in choice.reason


@pytest.mark.parametrize(
    "capabilities, has_bfloat16",
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True}, False),
    ],
    ids=["AVX-512 alone", "AVX-512 with bfloat16", "ARM with bfloat16", "ARM without"],
)
def test_a_processor_is_asked_what_it_can_do(
    capabilities: dict[str, object], has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert multiplies_bfloat16() is has_bfloat16


def test_the_names_of_instructions_are_torchs_own():
    known = torch.cpu.get_capabilities()
    if known["architecture"] != "x86_64":
        pytest.skip(f"names of x86 are looked for, and this is {known['architecture']}")
    assert {"amx_bf16", "avx512_bf16"} <= set(known)


def test_all_weights_trained_on_a_cpu_are_not_cast_at_every_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune_trainer.precision.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    choice = choose_precision(FULL, Precision.AUTO, DType.AUTO)
    assert (choice.weights, choice.autocast) == (torch.float32, False)
    assert "on a CPU" in choice.reason


def test_a_base_of_four_bits_has_products_in_bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune_trainer.precision.multiplies_bfloat16", lambda: False)
    choice = choose_precision(MethodType.QLORA, Precision.AUTO, DType.AUTO)
    assert choice.four_bit
    assert (choice.weights, choice.autocast) == (torch.bfloat16, True)
    assert "nf4" in choice.reason and "bfloat16 products" in choice.reason
    assert not choose_precision(LORA, Precision.BF16, DType.AUTO).four_bit
