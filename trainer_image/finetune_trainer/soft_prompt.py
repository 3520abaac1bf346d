"""What a soft prompt seems to say: the tokens of the vocabulary nearest to each of its vectors.

A hint, not a translation: vectors often lie far from every token, and then the nearest ones mean little. So distances
stand beside them.
"""

from collections.abc import Callable
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.report import NearToken, VirtualToken

SHOWN = 5
"""Nearest tokens of each vector."""

# Rows of the embedding that are looked at together, in float32: 128 MB at a width of 2048.
_CHUNK = 16_384


def describe_soft_prompt(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[VirtualToken, ...]:
    """Return the nearest tokens of every virtual token of ``model``, in their order."""
    table = cast(Tensor, cast(PreTrainedModel, model.get_base_model()).get_input_embeddings().weight).detach()
    # Behind the last token there may be rows that make the table a round size and stand for nothing.
    return nearest_tokens(
        model.get_prompt(batch_size=1)[0].detach(),
        table[: len(tokenizer)],
        lambda token: cast(str, tokenizer.decode([token])),
    )


def nearest_tokens(prompt: Tensor, table: Tensor, name: Callable[[int], str]) -> tuple[VirtualToken, ...]:
    """Return the nearest rows of ``table``, ``[tokens, width]``, to every row of ``prompt``, ``[virtual, width]``."""
    prompt = prompt.float().to(table.device)
    l2, cosine = (
        torch.cat([distances(prompt, chunk.float()) for chunk in torch.split(table, _CHUNK)], dim=1)
        for distances in (_l2_distances, _cosine_distances)
    )

    def nearest(distances: Tensor) -> tuple[NearToken, ...]:
        values, numbers = distances.topk(min(SHOWN, len(distances)), largest=False)
        return tuple(
            NearToken(id=number, token=name(number), distance=max(0.0, value))
            for number, value in zip(numbers.tolist(), values.tolist(), strict=True)
        )

    return tuple(VirtualToken(cosine=nearest(c), l2=nearest(d)) for c, d in zip(cosine, l2, strict=True))


def _l2_distances(prompt: Tensor, rows: Tensor) -> Tensor:
    # By differences: the usual expansion into products loses small distances to rounding.
    return torch.cdist(prompt, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _cosine_distances(prompt: Tensor, rows: Tensor) -> Tensor:
    return 1 - functional.normalize(prompt, dim=1) @ functional.normalize(rows, dim=1).T
