"""Attention over a packed row: unpack to one row per branch, attend causally, pack again.

Only attention looks across positions, and it is a small part of the work, so computing it for the shared tokens of
every sequence costs little, while all matrix products with weights run once per token of the prefix tree. No mask is
built, memory grows with the sequences' own lengths, and the kernel sees plain causal rows.

Registered with transformers' AttentionInterface, so any model that routes its attention through it can be packed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finetune_packed"
"""The attention implementation a model must be loaded with to be packed; without a pack it behaves as ``sdpa``."""

# On a CPU the fused kernel's backward is slower than three matrix products while a row's score matrix fits the cache:
# measured on 2 cores with AVX-512 at 62 tokens, 9 heads of 64, bfloat16: 7.2 ms fused, 3.0 ms plain.
_PLAIN_LENGTH_ON_CPU = 256


def register() -> str:
    """Make `NAME` known to transformers and return it; doing it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def is_taken_by(model: PreTrainedModel) -> bool:
    """Return whether the model's class asks the AttentionInterface, so that `NAME` can be its attention."""
    return bool(type(model)._supports_attention_backend)


def give_back(model: PreTrainedModel) -> None:
    """Let ``model`` attend by the implementation that transformers would have chosen for it."""
    model.set_attn_implementation(None)  # type: ignore[arg-type] # None is what from_pretrained has by default, too


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    pack_gather: Tensor | None = None,
    pack_scatter: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output ``[1, length, heads, head_dim]`` of one packed row.

    Args:
        module: the attention layer that asks.
        query: ``[1, heads, length, head_dim]``.
        key: ``[1, kv_heads, length, head_dim]``.
        value: as ``key``.
        attention_mask: used without a pack only.
        scaling: factor of the scores; ``head_dim ** -0.5`` when absent.
        pack_gather: ``[branches, longest]``, see `finetune_trainer.packing.Pack.gather`; absent = not packed.
        pack_scatter: ``[length]``, see `finetune_trainer.packing.Pack.scatter`.
        kwargs: what else the model passes on.

    Raises:
        ValueError: the model asks for something packed rows cannot do (a soft cap, attention sinks).
    """
    if pack_gather is None or pack_scatter is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"packed attention cannot do {', '.join(unsupported)}")
    output = _attend(
        _unpack(query, pack_gather),
        _unpack(key, pack_gather),
        _unpack(value, pack_gather),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        kwargs.get("sliding_window"),
    )
    flat = output.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, pack_scatter)[None], None


def _unpack(states: Tensor, gather: Tensor) -> Tensor:
    """``[1, heads, length, dim]`` to ``[branches, heads, longest, dim]``."""
    rows = states[0].transpose(0, 1).index_select(0, gather.flatten())
    return rows.view(*gather.shape, *rows.shape[1:]).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Causal attention of right-padded rows: padding stands behind every token, so none ever looks at it."""
    longest = query.shape[2]
    if window is not None and window < longest:
        order = torch.arange(longest, device=query.device)
        distance = order[:, None] - order[None, :]
        mask = (distance >= 0) & (distance < window)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    if query.device.type == "cpu" and longest <= _PLAIN_LENGTH_ON_CPU:
        return _attend_plainly(query, key, value, scaling)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    rows, heads, longest, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows * groups, heads // groups * longest, size)
    future = torch.full((longest, longest), float("-inf"), dtype=query.dtype).triu(1).repeat(heads // groups, 1)
    scores = torch.baddbmm(future[None], grouped, key.flatten(0, 1).transpose(1, 2), alpha=scaling)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, longest, size)
