"""In which types a model is kept and computed: what the spec says, and what follows where it says nothing."""

import pytest
import torch

from finetune_api.spec import DType, MethodType, Precision
from finetune_trainer.precision import choose_precision

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


@pytest.mark.parametrize("gain, weights", [(3.0, torch.bfloat16), (0.9, torch.float32)], ids=["fast", "slow"])
def test_what_the_spec_leaves_open_is_measured(gain: float, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune_trainer.precision.bfloat16_gain", lambda: gain)
    choice = choose_precision(LORA, Precision.AUTO, DType.AUTO)
    assert choice.weights == weights
    assert f"{gain:.1f} x as fast" in choice.reason


def test_all_weights_trained_on_a_cpu_are_not_cast_at_every_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune_trainer.precision.bfloat16_gain", lambda: 3.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    choice = choose_precision(FULL, Precision.AUTO, DType.AUTO)
    assert (choice.weights, choice.autocast) == (torch.float32, False)
    assert "on a CPU" in choice.reason


def test_a_base_of_four_bits_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune_trainer.precision.bfloat16_gain", lambda: pytest.fail("measured"))
    choice = choose_precision(MethodType.QLORA, Precision.AUTO, DType.AUTO)
    assert choice.four_bit
    assert (choice.weights, choice.autocast) == (torch.bfloat16, True)
    assert "nf4" in choice.reason and "bfloat16 products" in choice.reason
    assert not choose_precision(LORA, Precision.BF16, DType.AUTO).four_bit
