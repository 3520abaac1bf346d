"""A base of 4 bits: how it is asked for, what it takes, and who is told that it cannot be had here."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from finetune_trainer.errors import SpecError
from finetune_trainer.model import build_model
from finetune_trainer.quantization import (
    FourBitOutline,
    four_bit_bytes,
    four_bit_config,
    outline_four_bits,
    require_four_bits,
    weights_of,
)

SIZES = {"vocab_size": 64, "max_position_embeddings": 32}
LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **SIZES
)
GPT2 = GPT2Config(n_embd=64, n_layer=1, n_head=2, **SIZES)


def test_layers_lie_in_nf4_with_quantised_constants_and_compute_in_bfloat16():
    config = four_bit_config()
    assert config.quantization_method() == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert not config.load_in_8bit


def test_double_quantised_constants_take_an_eighth_of_a_bit_for_each_weight():
    # 8 / 64 + 32 / (64 x 256), as section 3 of arXiv:2305.14314 works it out.
    assert 8 * four_bit_bytes(4096 * 4096) / 4096**2 == pytest.approx(4 + 0.127, abs=1e-3)


@pytest.mark.parametrize(
    "has_gpu, has_package, gpu, message",
    [
        (False, True, True, "needs a GPU, and torch finds none on this machine.*type: lora"),
        (True, False, True, "needs the package bitsandbytes.*requirements/gpu.txt"),
        (False, False, False, "needs the package bitsandbytes"),
        (True, True, True, None),
        (False, True, False, None),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, has_package: bool, gpu: bool, message: str | None
):
    found = ModuleSpec("bitsandbytes", None) if has_package else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    if message is None:
        require_four_bits(gpu=gpu)
    else:
        with pytest.raises(SpecError, match=rf"spec\.method\.type: qlora {message}"):
            require_four_bits(gpu=gpu)


def outlined(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16)
    outline_four_bits(model)
    return model


@pytest.mark.parametrize(
    "config, names",
    [
        (LLAMA, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (GPT2, {"c_attn", "c_proj", "c_fc"}),
    ],
    ids=["llama", "gpt2"],
)
def test_all_linear_layers_but_the_output_take_four_bits(config: PretrainedConfig, names: set[str]):
    layers = {name: layer for name, layer in outlined(config).named_modules() if isinstance(layer, FourBitOutline)}
    assert {name.rpartition(".")[2] for name in layers} == names
    whole = build_model(config, torch.bfloat16)
    for name, layer in layers.items():
        weights = whole.get_submodule(name).weight.numel()
        assert layer.weight.nbytes == four_bit_bytes(weights)
        assert weights_of(layer, layer.weight) == weights


def test_an_outline_has_the_form_of_the_result_and_keeps_no_weights():
    layer = FourBitOutline(6, 4, None).to_empty(device="cpu")
    given = torch.ones(2, 3, 6, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        result = layer(given)
    assert (result.shape, result.dtype, kept) == ((2, 3, 4), torch.float32, [])
    result.sum().backward()
    assert given.grad is not None and given.grad.shape == given.shape
