"""Read a prompt once for all completions behind it: each goes on from its keys and values.

For padded rows of decoder-only models; packed rows share what they have in common in one pass.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finetune_trainer.example import Encoded
from finetune_trainer.layout import IGNORED


def keeps_prompts(model: nn.Module) -> bool:
    """Return, having asked ``model``, whether keys and values are all that it keeps of what it has read.

    A model with a state beside them (Mamba, and what has some of its layers) returns another cache, or none.
    """
    layers = getattr(getattr(_read(model, [(0,)]), "past_key_values", None), "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def find_shared_prompts(items: Sequence[Encoded]) -> set[int]:
    """Return the numbers of those items whose prompt is another one's as well."""
    times = Counter(item.prompt_ids for item in items)
    # Of a chat with earlier answers the prompt is scored, too.
    return {
        number
        for number, item in enumerate(items)
        if item.prompt_length and not item.answers and times[item.prompt_ids] > 1
    }


def batches_by_prompt(items: Sequence[Encoded], chosen: Iterable[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield ``chosen`` numbers of items for `continued_logits`, whose different prompts fit the budget together."""
    ordered = sorted(chosen, key=lambda number: (items[number].prompt_length, items[number].prompt_ids))
    for length, equally_long in groupby(ordered, key=lambda number: items[number].prompt_length):
        prompts = [list(same) for _, same in groupby(equally_long, key=lambda number: items[number].prompt_ids)]
        at_once = max(1, batch_tokens // length)
        for start in range(0, len(prompts), at_once):
            yield list(chain.from_iterable(prompts[start : start + at_once]))


def continued_logits(model: nn.Module, items: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for some of ``items`` after the others, logits ``[rows, longest, vocabulary]`` and what they predict.

    Args:
        model: one that `keeps_prompts`, in eval mode.
        items: their prompts are equally long. Padding between a prompt and its completion would move the completion
            away from the prompt for models that count places by themselves, and out of a sliding window.
        batch_tokens: that completions are read behind at a time, prompts counted.
    """
    prompts = list(dict.fromkeys(item.prompt_ids for item in items))
    read = _read(model, prompts)
    behind_prompt: Tensor = read.logits
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    at_once = max(1, batch_tokens // max(len(item.ids) for item in items))
    for start in range(0, len(items), at_once):
        chosen = items[start : start + at_once]
        rows = torch.tensor([row_of[item.prompt_ids] for item in chosen], device=behind_prompt.device)
        # Completions of one token are predicted by the prompt alone.
        longest = max(len(item.completion_ids) for item in chosen)
        targets = torch.full((len(chosen), longest), IGNORED)
        for number, item in enumerate(chosen):
            targets[number, : len(item.completion_ids)] = torch.tensor(item.completion_ids)
        logits = behind_prompt[rows]
        if longest > 1:
            logits = torch.cat([logits, _go_on(model, read.past_key_values, rows, targets[:, :-1].clamp(min=0))], dim=1)
        yield logits, targets.to(logits.device)


def _read(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> Any:
    """Return what the model makes of prompts of one length, its logits behind the last token alone."""
    ids = torch.tensor(prompts, device=next(model.parameters()).device)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    return model(input_ids=ids, logits_to_keep=last, use_cache=True)


def _go_on(model: nn.Module, cache: DynamicCache, rows: Tensor, ids: Tensor) -> Tensor:
    """Return the logits ``[rows, tokens, vocabulary]`` of ``ids``, each behind its row of ``cache``."""
    # Reading writes into it.
    own = copy.deepcopy(cache)
    own.batch_select_indices(rows)
    # PEFT would put a soft prompt before the completion once more; it is in the cache.
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    logits: Tensor = root(input_ids=ids.to(rows.device), past_key_values=own, use_cache=True).logits
    return logits
