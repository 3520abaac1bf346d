"""What is different about models whose encoder reads the prompt and whose decoder writes the completion (T5).

Their rows need no packing to save work: an encoder's states of one prompt serve every completion behind it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from finetune_trainer.errors import DataError

FAMILY = ("t5", "mt5", "umt5")
"""Values of model_type in config.json. Others want more than a start token in front of a completion."""

_READ_BY_DECODER = 8
"""Last tokens of a text: enough to see every weight of the decoder."""


def decoder_start(config: PretrainedConfig) -> int | None:
    """Return the token that the decoder begins with; None for a model without an encoder.

    Raises:
        DataError: config.json does not say.
    """
    if not config.is_encoder_decoder:
        return None
    start = getattr(config, "decoder_start_token_id", None)
    # T5's own convention, where a config says nothing.
    start = config.pad_token_id if start is None else start
    if start is None:
        raise DataError(
            "config.json of the model names no decoder_start_token_id, so its decoder cannot begin. Copy the file "
            "again from where the model came from."
        )
    return int(start)


def text_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return ``[1, positions, vocabulary]`` behind the tokens of a text; a decoder behind an encoder reads its end."""
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.tensor([list(ids)], device=device)}
    start = decoder_start(cast(PreTrainedModel, model).config)
    if start is not None:
        inputs["decoder_input_ids"] = torch.tensor([[start, *ids[-_READ_BY_DECODER:]]], device=device)
    return cast(Tensor, model(**inputs, use_cache=False).logits)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder of ``model``, adapters inside; None where it has none."""
    root = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    return cast(nn.Module, root.get_encoder()) if root.config.is_encoder_decoder else None


@contextmanager
def encoding_once(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let rows with the same prompt share one pass through the encoder, in forward passes inside.

    Args:
        model: nothing changes for one without an encoder.
        prompts: of every row of the batch.
    """
    encoder = encoder_of(model)
    first: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        first.setdefault(tuple(prompt), len(first))
    if encoder is None or len(first) == len(prompts):
        yield
        return
    row_of = torch.tensor([first[tuple(prompt)] for prompt in prompts])
    kept = torch.tensor([row_of.tolist().index(number) for number in range(len(first))])

    def narrow(_encoder: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {
            name: value.index_select(0, kept.to(value.device)) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def widen(_encoder: nn.Module, _args: Any, outputs: Any) -> Any:
        states = outputs.last_hidden_state
        outputs.last_hidden_state = states.index_select(0, row_of.to(states.device))
        return outputs

    hooks = (encoder.register_forward_pre_hook(narrow, with_kwargs=True), encoder.register_forward_hook(widen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
