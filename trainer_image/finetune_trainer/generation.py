"""Let a model answer prompts: the likeliest tokens, in batches of similar length, the same answers every time.

Knows nothing of tasks or metrics; prompts come as tokens, answers leave as text.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.encoder_decoder import decoder_start, encoder_of
from finetune_trainer.model import position_limit


class _Generates(Protocol):
    """What a transformers model and a PEFT model have in common beyond being modules."""

    def generate(self, **arguments: object) -> Tensor: ...


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    batch_size: int,
    on_progress: Callable[[int, int], None],
    num_beams: int = 1,
) -> list[str]:
    """Return what the model says after each prompt, in the order given, without special tokens.

    An answer ends before the first of ``end_token_ids``, after ``max_new_tokens``, or where the model has no more
    places for tokens.

    Args:
        model: any language model with or without PEFT methods, soft prompts included; put into eval mode.
        tokenizer: decodes the answers; its padding settings are neither used nor changed.
        prompts: token ids with every special token already in place.
        max_new_tokens: upper bound of an answer's length.
        end_token_ids: what ends an answer; the first one also fills up shorter rows of a batch.
        batch_size: prompts per batch.
        on_progress: called after every batch with the answers done and the answers to do.
        num_beams: beginnings of an answer that are kept and gone on with at every token; 1 is greedy. Of those that
            have ended the one with the highest mean log-probability is taken.
    """
    model.eval()
    answers: dict[int, str] = {}
    # In front of an encoder, padding behind the text keeps nothing apart.
    virtual = 0 if encoder_of(model) is not None else _virtual_tokens(model)
    limit = position_limit(cast(PreTrainedModel, model).config)
    room = None if limit is None else limit - virtual
    for batch in _batches([len(prompt) for prompt in prompts], batch_size, virtual > 0, max_new_tokens, room):
        chosen = [prompts[index] for index in batch.numbers]
        generated = _generate_batch(model, chosen, batch.new, end_token_ids, num_beams)
        for index, ids in zip(batch.numbers, generated, strict=True):
            answers[index] = cast(str, tokenizer.decode(ids, skip_special_tokens=True))
        on_progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class _Batch:
    numbers: list[int]
    """Of the prompts that are answered together."""
    new: int
    """Tokens that each answer may have."""


def _batches(
    lengths: Sequence[int], batch_size: int, equal_lengths: bool, max_new_tokens: int, room: int | None
) -> Iterator[_Batch]:
    """Yield prompt numbers, longest first; with ``equal_lengths`` no batch holds prompts of two lengths.

    Prompts whose answers get cut short by the ``room`` that prompt and answer have together are not put beside others:
    an answer must not depend on its neighbours.
    """
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])

    def kind(number: int) -> tuple[int, int]:
        new = max_new_tokens if room is None else min(max_new_tokens, room - lengths[number])
        return new, lengths[number] if equal_lengths else 0

    for (new, _), group in groupby(longest_first, key=kind):
        numbers = list(group)
        yield from (_Batch(numbers[start : start + batch_size], new) for start in range(0, len(numbers), batch_size))


def _virtual_tokens(model: nn.Module) -> int:
    """Return how many learnt vectors PEFT puts before the text: none where it lends the base model alone.

    The base then answers in the batches of any other method's job, since in bfloat16 an answer may change with them.
    Where there are vectors, PEFT puts them before the padding, too, and drops the position ids that would make up for
    it: a padded prompt would be read at another distance from its soft prompt than in training.
    """
    if not isinstance(model, PeftModel) or not model.has_active_enabled_adapter:
        return 0
    config = model.active_peft_config
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


def _generate_batch(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    num_beams: int,
) -> list[list[int]]:
    start = decoder_start(cast(PreTrainedModel, model).config)
    input_ids, attention_mask = _pad(prompts, end_token_ids[0], on_the_left=start is None)
    decoder = {} if start is None else {"decoder_start_token_id": start}
    device = next(model.parameters()).device
    # No inference mode: what a model keeps of a forward pass may be learnt from later.
    with torch.no_grad(), warnings.catch_warnings():
        # Without padding, which `_virtual_tokens` is asked for, position ids say nothing that PEFT could lose.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        output = cast(_Generates, model).generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_token_ids),
            pad_token_id=end_token_ids[0],
            use_cache=True,
            # Said in full: whatever is left open comes from the model's generation_config.json.
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=1,
            length_penalty=1.0,
            early_stopping=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=0,
            **decoder,
        )
    answers = output[:, 1 if decoder else input_ids.shape[1] :].tolist()
    return [_before_end(answer, end_token_ids) for answer in answers]


def _pad(prompts: Sequence[tuple[int, ...]], filler: int, on_the_left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both ``[batch, longest]``; the mask goes by position, as a prompt may contain the filler."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), filler)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if on_the_left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def _before_end(ids: list[int], end_token_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in end_token_ids]
    return ids[: ends[0]] if ends else ids
