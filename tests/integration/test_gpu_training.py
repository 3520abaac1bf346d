"""`benchmarks/gpu_training.py` as far as it goes without a GPU: its arithmetic, and one of its settings on a CPU."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from .jobs import write_reviews

ROWS, TOKENS, LEARNT = 2, 128, 32


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # As when it is started.
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("gpu_training")


def make_model(adapter: bool, tied: bool) -> tuple[torch.nn.Module, LlamaConfig]:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        head_dim=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    return (get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if adapter else model), config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_tokens_operations_are_those_that_torch_counts(benchmark: ModuleType, adapter: bool, tied: bool):
    model, config = make_model(adapter, tied)
    ids = torch.randint(512, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        # As in training, where the vocabulary's logits are computed for what is learnt alone.
        model(input_ids=ids, logits_to_keep=LEARNT).logits.square().mean().backward()
    parameters = list(model.parameters())
    expected = benchmark.Arithmetic.of(
        config,
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    ).flops(TOKENS, LEARNT / TOKENS)
    # Of a first layer that nothing below is trained, torch leaves out the gradient of what it read.
    assert counter.get_total_flops() / (ROWS * TOKENS) == pytest.approx(expected, rel=0.05)


def test_mfu_is_the_share_of_what_all_gpus_could_do(benchmark: ModuleType):
    assert benchmark.mfu(tokens_per_second=1e5, flops_per_token=8e9, gpus=2, peak_tflops=1000) == pytest.approx(0.4)


def test_a_setting_is_measured_through_the_products_own_stages(
    benchmark: ModuleType, tiny_model_dir: Path, tmp_path: Path
):
    options = argparse.Namespace(
        model=tiny_model_dir,
        rows=write_reviews(tmp_path / "reviews.jsonl"),
        prompt="{{ text }}",
        completion=" {{ label }}",
        steps=2,
        batch=4,
        peak_tflops=1.0,
    )
    figures = benchmark.measure(options, "lora")
    assert figures["gpus"] == 1
    assert figures["tokens_per_second"] > 0
    assert 0 < figures["mfu"] < 1
    assert figures["planned_gb"] > 0
