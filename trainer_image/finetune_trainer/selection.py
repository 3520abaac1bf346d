"""Which of a model's own parameters selective tuning changes. Pure: looks at names and structure, not at weights."""

import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from transformers import PreTrainedModel

from finetune_api.spec import SelectiveSpec, SelectiveTrain
from finetune_trainer.errors import SpecError

_SHOWN = 6


def selected_parameters(model: PreTrainedModel, selective: SelectiveSpec) -> frozenset[str]:
    """Return the names of the parameters that are trained.

    Raises:
        SpecError: there is none, or fewer layers than asked for.
    """
    names = [name for name, _ in model.named_parameters()]
    match selective.train:
        case SelectiveTrain.BIAS:
            return _biases(model, names)
        case SelectiveTrain.LAST_LAYERS:
            # Its default is filled in when the job is resolved.
            return _in_last_layers(model, names, selective.last_layers or 1)
        case SelectiveTrain.PATTERNS:
            return _matching(model, names, selective.patterns)


def _biases(model: PreTrainedModel, names: list[str]) -> frozenset[str]:
    found = frozenset(name for name in names if name.rpartition(".")[2] == "bias")
    if not found:
        raise SpecError(
            f"spec.method.selective.train: {type(model).__name__} has no bias terms, as most models since Llama. "
            "Set train: lastLayers or patterns, or take lora."
        )
    return found


def _in_last_layers(model: PreTrainedModel, names: list[str], count: int) -> frozenset[str]:
    path, depth = find_layers(model)
    if count > depth:
        raise SpecError(
            f"spec.method.selective.lastLayers ({count}): the model has {depth} layers. Set it to {depth} or less."
        )
    beginnings = tuple(f"{path}.{number}." for number in range(depth - count, depth))
    return frozenset(name for name in names if name.startswith(beginnings))


def find_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Return path and length of the list of layers: the outermost one; lists of experts and the like lie inside.

    Raises:
        SpecError: there is none.
    """
    # Of an encoder and a decoder, the last layers are the decoder's.
    outer = "decoder" if model.config.is_encoder_decoder else ""
    lists = [
        (name, len(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(outer)
    ]
    if not lists:
        raise SpecError(
            f"spec.method.type: no list of layers found in {type(model).__name__}. Take lora, or selective with train: "
            "patterns."
        )
    return min(lists, key=lambda found: (found[0].count("."), -found[1]))


def _matching(model: PreTrainedModel, names: list[str], patterns: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        field = f"spec.method.selective.patterns[{index}] ({pattern!r})"
        try:
            # Arrow's is RE2: its time grows with the text alone, whatever the pattern.
            matches = pc.match_substring_regex(pa.array(names), pattern).to_pylist()
        except pa.ArrowInvalid as error:
            raise SpecError(f"{field} is no RE2 pattern: {str(error).splitlines()[0]}. Correct it.") from error
        chosen = {name for name, matched in zip(names, matches, strict=True) if matched}
        if not chosen:
            some = ", ".join([*names[:_SHOWN], f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else names)
            raise SpecError(f"{field} is in no parameter's name of {type(model).__name__}; it has {some}.")
        found |= chosen
    return frozenset(found)
