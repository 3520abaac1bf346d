"""Bottleneck adapters (arXiv:1902.00751, arXiv:2005.00247), which PEFT does not have: small networks behind blocks.

What a block gives goes through ``h + up(activation(down(h)))`` before anything else sees it. ``up`` begins as zero, so
a model with new adapters is its base. It stays a transformers model, whose state is that of its adapters alone.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finetune_api.spec import Activation, AdapterPlacement, AdapterSpec
from finetune_trainer.durable import write_file
from finetune_trainer.errors import SpecError
from finetune_trainer.selection import find_layers

CONFIG = "bottleneck_config.json"
"""Name of the file that says where the adapters are, and of what form."""
WEIGHTS = "bottleneck.safetensors"
"""Name of the file with what was learnt: by place, ``down`` and ``up``, each with ``weight`` and ``bias``."""

_NAME = "bottleneck_adapter"
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
}
_ATTENTION: tuple[str, ...] = ("attention",)
_FEED_FORWARD: tuple[str, ...] = ("mlp", "moe", "feedforward", "ffn")
"""What names of classes contain, in small letters."""


class BottleneckAdapter(nn.Module):
    """The network behind one block; float32 whatever the block computes in."""

    def __init__(self, width: int, bottleneck: int, activation: Activation, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = activation
        self.is_on = True

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the block gives, ``[..., width]``, changed."""
        inner = _ACTIVATIONS[self.activation](self.down(hidden.float()))
        change: Tensor = self.up(inner)
        return hidden + change.to(hidden.dtype)


def find_places(model: PreTrainedModel, placement: AdapterPlacement) -> list[str]:
    """Return the names of the blocks behind which adapters come; ``model`` may be without weights.

    Raises:
        SpecError: a layer has no such block, or more than one.
    """
    kinds = {"feed-forward": _FEED_FORWARD}
    if placement is AdapterPlacement.HOULSBY:
        kinds = {"attention": _ATTENTION} | kinds
    path, depth = find_layers(model)
    return [
        _only_block(model, f"{path}.{number}", kind, names) for number in range(depth) for kind, names in kinds.items()
    ]


def _only_block(model: PreTrainedModel, layer: str, kind: str, names: tuple[str, ...]) -> str:
    found = [
        f"{layer}.{name}"
        for name, block in model.get_submodule(layer).named_children()
        if any(part in type(block).__name__.lower() for part in names)
    ]
    if len(found) != 1:
        raise SpecError(
            f"spec.method.type: adapters come behind the {kind} block of every layer, and {layer} of "
            f"{type(model).__name__} has {len(found) or 'none'} that can be told by its class. "
            "Set spec.method.type: lora."
        )
    return found[0]


def add_adapters(model: PreTrainedModel, adapter: AdapterSpec) -> PreTrainedModel:
    """Return ``model`` itself, frozen, with adapters that are to be trained and change nothing yet."""
    width = int(model.config.get_text_config().hidden_size)
    places = find_places(model, adapter.placement)
    _install(model, places, width, adapter.bottleneck, adapter.activation)
    return model


def _install(model: PreTrainedModel, places: list[str], width: int, bottleneck: int, activation: Activation) -> None:
    model.requires_grad_(False)
    for place in places:
        block = model.get_submodule(place)
        adapter = BottleneckAdapter(width, bottleneck, activation, next(block.parameters()).device)
        block.add_module(_NAME, adapter)
        block.register_forward_hook(_adapt)
    # Checkpoints hold what is learnt, and not the base with it.
    model.register_state_dict_post_hook(_leave_base_out)
    model.register_load_state_dict_post_hook(_miss_no_base)


def _adapt(block: nn.Module, inputs: Any, output: Any) -> Any:
    adapter = cast(BottleneckAdapter, block.get_submodule(_NAME))
    if not adapter.is_on:
        return output
    # Attention gives its weights besides, some mixtures of experts their choice.
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _leave_base_out(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if f".{_NAME}." not in name]:
        del state[name]


def _miss_no_base(model: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if f".{_NAME}." in name]


def has_adapters(model: nn.Module) -> bool:
    """Return whether ``model`` comes from here."""
    return any(True for _ in _adapters(model))


def _adapters(model: nn.Module) -> Iterator[tuple[str, BottleneckAdapter]]:
    for name, module in model.named_modules():
        if isinstance(module, BottleneckAdapter):
            yield name.removesuffix(f".{_NAME}"), module


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let ``model`` be its base for a while."""
    adapters = [adapter for _, adapter in _adapters(model)]
    try:
        for adapter in adapters:
            adapter.is_on = False
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


def save_adapters(
    model: PreTrainedModel,
    folder: Path,
    about: Mapping[str, str | None] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters of ``model`` to ``folder``.

    Args:
        model: with adapters.
        folder: is made where it is not there.
        about: goes into the config, such as which base they need.
        state: the model's, where its own parameters are spread over several processes.
    """
    adapters = dict(_adapters(model))
    one = next(iter(adapters.values()))
    config = {
        "activation": one.activation.value,
        "bottleneck": one.down.out_features,
        "places": list(adapters),
        **(about or {}),
    }
    state = state or model.state_dict()
    learnt = {
        name.replace(f".{_NAME}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if f".{_NAME}." in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    save_file(learnt, folder / WEIGHTS)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put what was learnt, as it lies in ``folder``, into the adapters of ``model``."""
    weights = load_file(folder / WEIGHTS)
    for place, adapter in _adapters(model):
        adapter.load_state_dict({name: weights[f"{place}.{name}"] for name in adapter.state_dict()})


def load_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return ``base`` itself with the adapters in ``folder``, for inference."""
    config = json.loads((folder / CONFIG).read_bytes())
    weights = load_file(folder / WEIGHTS)
    places = config["places"]
    width = weights[f"{places[0]}.up.bias"].numel()
    _install(base, places, width, config["bottleneck"], Activation(config["activation"]))
    load_weights(base, folder)
    base.requires_grad_(False)
    base.eval()
    return base
