"""Where bottleneck adapters come, in models whose layers differ; no weights are made."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from finetune_api.spec import AdapterPlacement, AdapterSpec
from finetune_trainer.bottleneck import add_adapters, find_places, has_adapters
from finetune_trainer.errors import SpecError
from finetune_trainer.methods import count_parameters
from finetune_trainer.model import build_model

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
NARROW = SIZES | {"intermediate_size": 48}
HEADS = {"num_key_value_heads": 2}
PLACES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**NARROW, **HEADS), ["model.layers.0.self_attn", "model.layers.0.mlp"]),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
        ["transformer.h.0.attn", "transformer.h.0.mlp"],
    ),
    "gpt-neox": (GPTNeoXConfig(**NARROW), ["gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"]),
    "a mixture of experts": (
        MixtralConfig(**NARROW, **HEADS, num_local_experts=2),
        ["model.layers.0.self_attn", "model.layers.0.mlp"],
    ),
}


def outline(config: PretrainedConfig):
    with torch.device("meta"):
        return build_model(config, torch.bfloat16)


@pytest.mark.parametrize("config, first", PLACES.values(), ids=PLACES)
def test_adapters_come_behind_the_blocks_of_every_layer(config: PretrainedConfig, first: list[str]):
    model = outline(config)
    both, one = (find_places(model, placement) for placement in AdapterPlacement)
    assert both[:2] == first and len(both) == 4
    assert one == both[1::2]


def test_what_is_added_to_a_model_without_weights_is_counted_and_has_none_either():
    model = outline(PLACES["llama"][0])
    before, _ = count_parameters(model)
    add_adapters(model, AdapterSpec(bottleneck=4))
    adapters = 2 * 2 * (2 * 32 * 4 + 32 + 4)
    assert count_parameters(model) == (before + adapters, adapters)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert has_adapters(model) and not has_adapters(outline(PLACES["llama"][0]))


def test_layers_without_a_block_of_their_own_are_refused():
    model = outline(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(SpecError, match=r"feed-forward block .* model\.decoder\.layers\.0 .*has none.*type: lora"):
        find_places(model, AdapterPlacement.PFEIFFER)
