"""A weaker low-rank adapter without training again: its update times a scale from 0 (the base) to 1 (as trained)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

SCALES = (0.25, 0.5, 0.75, 1.0)
"""Weakest first. Quarters: between them the curve is smooth (arXiv:2109.01903)."""


@contextmanager
def scaled(tuned: AbstractContextManager[nn.Module], scale: float) -> Iterator[nn.Module]:
    """Lend what ``tuned`` lends, its adapter weakened meanwhile."""
    with tuned as model, rescale_adapter_scale(model, scale):
        yield model


def weaken(model: nn.Module, scale: float) -> None:
    """Multiply the adapter's weights by ``scale``, for good: saved, they need no setting that a loader could miss."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for factor in (*(layer.weight for layer in module.lora_B.values()), *module.lora_embedding_B.values()):
                    factor.mul_(scale)
