"""A tiny model of a big one's architecture: random weights, the same kinds of layers, the same tokenizer.

What breaks with it breaks with the big one as well, within seconds and without a GPU.
"""

import copy
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from finetune_trainer.durable import disk_errors
from finetune_trainer.encoder_decoder import text_logits
from finetune_trainer.model import CONFIG, ModelFiles, build_model, is_small_file, read_config

logger = logging.getLogger(__name__)

LAYERS = 4
"""Enough for what differs from layer to layer, such as a sliding window in every second one."""
_EXPERTS = 4
_FEED_FORWARD = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")


def make_small(files: ModelFiles, folder: Path, layers: int = LAYERS) -> str:
    """Write a tiny model of the same architecture into ``folder``, with the tokenizer of ``files``.

    Args:
        files: the model to be like; its weights are not read.
        folder: is made.
        layers: at most so many are kept.

    Returns:
        Why there can be none; empty when it is written and has answered once.
    """
    whole = read_config(files)
    try:
        config = small_config(whole, layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(config, torch.float32)
            model.eval()
            with torch.inference_mode():
                text_logits(model, range(8))
    # Sizes may depend on each other in ways that only the architecture's own code knows.
    except Exception as error:
        logger.info("no tiny model of this architecture type=%s", whole.model_type, exc_info=True)
        return f"no tiny {whole.model_type} can be built ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    with disk_errors("write", folder):
        model.save_pretrained(folder)
        for path in sorted(files.path.iterdir()):
            if path.is_file() and is_small_file(path.name) and path.name != CONFIG:
                shutil.copyfile(path, folder / path.name)
    return ""


def small_config(config: PretrainedConfig, layers: int = LAYERS) -> PretrainedConfig:
    """Return the config with two heads of the same width, few layers and few experts. Pure."""
    small = copy.deepcopy(config)
    for name, value in _small_sizes(config, layers):
        setattr(small, name, value)
    return small


def _small_sizes(config: PretrainedConfig, layers: int) -> Iterator[tuple[str, Any]]:
    def of(name: str) -> Any:
        return getattr(config, name, None)

    heads, groups = of("num_attention_heads"), of("num_key_value_heads")
    head_width = of("head_dim") or of("hidden_size") // heads
    few = min(2, heads)
    width = few * head_width
    yield "num_attention_heads", few
    if groups is not None:
        yield "num_key_value_heads", few if groups == heads else 1
    yield "hidden_size", width
    if of("word_embed_proj_dim") is not None:
        yield "word_embed_proj_dim", width
    yield from ((name, 2 * width) for name in _FEED_FORWARD if of(name) is not None)
    yield from ((name, width) for name in _EXPERT_WIDTHS if of(name) is not None)
    yield from ((name, min(_EXPERTS, of(name))) for name in _EXPERT_COUNTS if of(name) is not None)
    if of("num_experts_per_tok") is not None:
        yield "num_experts_per_tok", min(2, of("num_experts_per_tok"))
    kept = min(layers, of("num_hidden_layers"))
    # Lists with an entry for every layer, such as layer_types.
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == of("num_hidden_layers") and name != "architectures":
            yield name, value[:kept]
    yield "num_hidden_layers", kept
    if config.is_encoder_decoder:
        yield "num_decoder_layers", min(layers, of("num_decoder_layers"))
