"""Turn encoded examples into one forward pass: packed where the model keeps packed examples apart, else padded.

Which of the two is decided by an experiment on the model itself, never by its name: `choose_layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_trainer import attention
from finetune_trainer.errors import SpecError
from finetune_trainer.example import Encoded
from finetune_trainer.model import ModelFiles, load_model, outline_model
from finetune_trainer.packing import pack

IGNORED = -100
"""The label of a token that is neither learnt nor scored, as torch's cross entropy has it."""

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward, and ``labels``."""


class Layout(StrEnum):
    """How several examples share one forward pass."""

    PACKED = "packed"
    PADDED = "padded"


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The layout and, for people, why."""

    layout: Layout
    reason: str

    def __str__(self) -> str:
        return f"{self.layout.value}: {self.reason}"


def build_batch(items: Sequence[Encoded], layout: Layout) -> Batch:
    """Return model inputs and labels for ``items``.

    The model returns logits where some item has a completion token to predict, ``[rows, kept, vocabulary]``.
    ``labels`` is ``[rows, 1 + kept]``: the tokens to predict, in the items' order, behind one ignored column, because
    transformers counts the labels of a causal model from the second column on.
    """
    if items[0].decoder_start is not None:
        return _with_decoder(items)
    return _packed(items) if layout is Layout.PACKED else _padded(items)


def unlearnt(item: Encoded) -> Encoded:
    """Return an item as short as can be, of the same kind of model, from which nothing is learnt."""
    return Encoded((item.ids[0], IGNORED), 1, decoder_start=item.decoder_start)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of every learnt token, in nats and float32, item after item: ``[learnt]``."""
    targets = labels[:, 1:].to(logits.device)
    learnt = targets != IGNORED
    return functional.cross_entropy(logits[learnt].float(), targets[learnt], reduction="none")


def split_by_item(items: Sequence[Encoded], values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Cut ``values``, one per learnt token, into one array per item."""
    ends = list(accumulate(len(item.learnt) for item in items))
    return np.split(values, ends[:-1])


def _packed(items: Sequence[Encoded]) -> Batch:
    row = pack([item.read_ids for item in items])
    learnt = [np.asarray(item.learnt, dtype=np.int64) for item in items]
    keep = [place[at - 1] for at, place in zip(learnt, row.places, strict=True)]
    labels = [item.ids[place] for item in items for place in item.learnt]
    return {
        "input_ids": torch.from_numpy(row.tokens)[None],
        "position_ids": torch.from_numpy(row.positions)[None],
        # Four dimensions tell transformers that the mask is made already; packed attention needs none.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "pack_gather": torch.from_numpy(row.gather()),
        "pack_scatter": torch.from_numpy(row.scatter()),
        "logits_to_keep": torch.from_numpy(np.concatenate(keep)),
        "labels": torch.tensor([[IGNORED, *labels]]),
    }


def _padded(items: Sequence[Encoded]) -> Batch:
    longest = max(len(item.read_ids) for item in items)
    kept = sorted({place - 1 for item in items for place in item.learnt})
    column = {position: number for number, position in enumerate(kept)}
    # What stands in the padding is never looked at: the mask hides it, and labels are masked by position.
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), 1 + len(kept)), IGNORED)
    for number, item in enumerate(items):
        read = item.read_ids
        ids[number, : len(read)] = torch.tensor(read)
        mask[number, : len(read)] = 1
        for place in item.learnt:
            labels[number, 1 + column[place - 1]] = item.ids[place]
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": torch.tensor(kept), "labels": labels}


def _with_decoder(items: Sequence[Encoded]) -> Batch:
    """Return prompts for the encoder, and for the decoder completions moved one place on behind the start token."""
    prompts, completions = [item.prompt_ids for item in items], [item.completion_ids for item in items]
    begun = [(item.decoder_start or 0, *item.completion_ids[:-1]) for item in items]
    return {
        "input_ids": _right_padded(prompts, 0),
        "attention_mask": _right_padded([[1] * len(prompt) for prompt in prompts], 0),
        # No mask: what stands behind a completion is seen by nothing before it.
        "decoder_input_ids": _right_padded(begun, 0),
        "labels": _right_padded([(IGNORED, *completion) for completion in completions], IGNORED),
    }


def _right_padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), filler)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return padded


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits ``[rows, kept, vocabulary]`` for ``batch``."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # With a cache some models let packed examples see each other.
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def load_for_rows(
    files: ModelFiles, dtype: torch.dtype, padded_because: str, *, four_bit: bool = False
) -> tuple[PreTrainedModel, LayoutChoice]:
    """Load the model with the attention that its rows need: ours where they are packed, its own where they are padded.

    ``padded_because`` says why rows must not be packed; where it is empty, the model itself decides. ``four_bit`` is
    as `load_model` has it.

    A class that does its attention itself may be wrong in silence, and not only slow, under another implementation's
    name: Bloom then sees the future.
    """
    if padded_because:
        return load_model(files, dtype, None, four_bit=four_bit), LayoutChoice(Layout.PADDED, padded_because)
    outline = outline_model(files)
    if not attention.is_taken_by(outline):
        name = type(outline).__name__
        return load_model(files, dtype, None, four_bit=four_bit), LayoutChoice(
            Layout.PADDED, f"{name} does its attention by itself"
        )
    model = load_model(files, dtype, attention.register(), four_bit=four_bit)
    choice = choose_layout(model, model.config.vocab_size)
    if choice.layout is Layout.PADDED:
        attention.give_back(model)
    return model, choice


def choose_layout(model: nn.Module, vocabulary: int) -> LayoutChoice:
    """Decide by experiment whether ``model`` gives packed examples the logits it gives them alone.

    Two short sequences with a common beginning are packed with a third one; every logit must be what it is when the
    sequence runs alone. State-space layers, attention that does not go through the interface and models that ignore
    positions all fail here. Padded they have to stay apart as well.

    Raises:
        SpecError: examples influence each other however they lie.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _probe(model, vocabulary)
    finally:
        model.train(was_training)


def _probe(model: nn.Module, vocabulary: int) -> LayoutChoice:
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randint(vocabulary, (3, 12), generator=generator).tolist()
    items = [Encoded(tuple(ids), 1) for ids in (first, first[:5] + second, third)]
    try:
        alone = [_probe_logits(model, [item], Layout.PADDED)[0] for item in items]
        together = _probe_logits(model, items, Layout.PACKED)[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return LayoutChoice(Layout.PADDED, f"the model refuses packed rows ({type(error).__name__}: {error})"[:300])
    expected = torch.cat(alone)
    if expected.shape != together.shape:
        return LayoutChoice(Layout.PADDED, "the model does not return logits for chosen positions alone")
    packed = _relative_error(together, expected)
    measured = f"relative logit error {packed:.1e}"
    if packed <= _ROUNDING[together.dtype]:
        return LayoutChoice(Layout.PACKED, f"packed examples stay apart ({measured})")
    rows = _probe_logits(model, items, Layout.PADDED)
    padded = _relative_error(torch.cat([row[: len(one)] for row, one in zip(rows, alone, strict=True)]), expected)
    if padded > _ROUNDING[together.dtype]:
        raise SpecError(
            f"spec.model.source: examples of one batch influence each other, packed ({measured}) and padded as well "
            f"(relative logit error {padded:.1e}): what is learnt of a row would depend on the rows beside it. Take "
            f"another base model."
        )
    return LayoutChoice(Layout.PADDED, f"packed examples influence each other ({measured})")


def _probe_logits(model: nn.Module, items: Sequence[Encoded], layout: Layout) -> Tensor:
    # Weights of 4 bits are loaded onto the GPU, all others into main memory first.
    device = next(model.parameters()).device
    return forward(model, {name: value.to(device) for name, value in build_batch(items, layout).items()})


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((logits.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative logit error that rounding explains, by the type the model computes in; contamination gives 0.3 and
more."""
