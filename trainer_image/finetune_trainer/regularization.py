"""A pull back towards the base model beside the loss, against forgetting.

A step feels the pull once, however its rows are batched: each micro-batch takes as much of it as it has of the step's
learnt tokens. The loss that is shown stays that of the rows; the pull moves gradients alone.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finetune_api.spec import RegularizationSpec, RegularizationType
from finetune_trainer.example import Encoded
from finetune_trainer.layout import IGNORED, Layout, build_batch, forward

LossFunction = Callable[[Any, Tensor, Tensor | int | None], Tensor]
"""Loss of a micro-batch by the model's outputs, its labels, and the count of labels behind the whole step."""

Pull = Callable[[Any, Tensor], Tensor]
"""How far from the base a micro-batch's outputs and labels show the model to be; before its strength."""

FISHER_ROWS = 64
"""Rows behind an estimate of importance: as many forward and backward passes before the first step."""


def regularize(
    loss: LossFunction,
    model: nn.Module,
    regularization: RegularizationSpec | None,
    rows: Sequence[Encoded],
    seed: int,
    autocast: bool,
) -> LossFunction:
    """Return ``loss`` with the pull that the spec asks for.

    Args:
        loss: the loss without any.
        model: the base model, before anything was learnt, with what is trained unfrozen.
        regularization: resolved ``spec.method.regularization``.
        rows: training rows, by which importance is estimated.
        seed: of the answers drawn for that.
        autocast: whether training computes in bfloat16.
    """
    if regularization is None:
        return loss
    match regularization.type:
        case RegularizationType.NONE:
            return loss
        case RegularizationType.L2SP:
            pull = _towards_weights(model, None)
        case RegularizationType.EWC:
            pull = _towards_weights(model, estimate_importance(model, rows, seed))
        case RegularizationType.KL:
            pull = _towards_outputs(model, autocast)

    strength = regularization.strength

    def pulled(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        learnt = (labels[:, 1:] != IGNORED).sum()
        share = learnt / (num_items_in_batch if num_items_in_batch is not None else learnt)
        extra = strength * share * pull(outputs, labels)
        return loss(outputs, labels, num_items_in_batch) + (extra - extra.detach())

    return pulled


def copies_bytes(regularization: RegularizationSpec | None, model: nn.Module) -> int:
    """Return what the pull keeps beside ``model`` and its optimiser, wherever the model is."""
    if regularization is None:
        return 0
    match regularization.type:
        case RegularizationType.NONE:
            return 0
        case RegularizationType.L2SP:
            return trained_bytes(model)
        case RegularizationType.EWC:
            return 2 * trained_bytes(model)
        case RegularizationType.KL:
            return _bytes(model.parameters())


def trained_bytes(model: nn.Module) -> int:
    """Return what a copy of all trained weights takes."""
    return _bytes(_trained(model))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _towards_weights(model: nn.Module, importance: Sequence[Tensor] | None) -> Pull:
    """Half the squared distance of every trained weight from its first value, times its importance where given."""
    trained = _trained(model)
    anchors = [parameter.detach().clone() for parameter in trained]
    weights = list(importance) if importance is not None else [torch.ones(()) for _ in trained]

    def pull(_outputs: Any, _labels: Tensor) -> Tensor:
        for place, parameter in enumerate(trained):
            # The trainer may have moved the model to a GPU since.
            anchors[place] = anchors[place].to(parameter.device)
            weights[place] = weights[place].to(parameter.device)
        # Computed again in the backward pass: differences that were kept would take as much as the weights.
        distances = [
            checkpoint(_distance, *each, use_reentrant=False) for each in zip(trained, anchors, weights, strict=True)
        ]
        return torch.stack(distances).sum() / 2

    return pull


def _distance(parameter: Tensor, anchor: Tensor, weight: Tensor) -> Tensor:
    return ((parameter - anchor).square() * weight).sum()


def estimate_importance(model: nn.Module, rows: Sequence[Encoded], seed: int) -> list[Tensor]:
    """Return the diagonal of the Fisher information per token, for every trained parameter: arXiv:1612.00796.

    Estimated on the texts of some training rows with continuations that the model itself finds likely, drawn token by
    token: so it says what the base's own predictions depend on. The labels' gradients would say what the new task wants
    to change, which is not to be hindered (arXiv:1905.12558).
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    trained = _trained(model)
    device = trained[0].device
    generator = torch.Generator().manual_seed(seed)
    squares = [torch.zeros_like(parameter) for parameter in trained]
    tokens = 0
    was_training = model.training
    model.eval()
    for row in rows[:: max(1, len(rows) // FISHER_ROWS)][:FISHER_ROWS]:
        text = Encoded(row.ids, 0) if row.decoder_start is None else row
        batch = {name: value.to(device) for name, value in build_batch([text], Layout.PADDED).items()}
        logits = forward(model, batch)[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        surprise = functional.cross_entropy(logits, drawn.to(device), reduction="sum")
        # Of drawn tokens, the expectation of a sum's square is the sum of the squares' expectations.
        for square, gradient in zip(squares, torch.autograd.grad(surprise, trained, allow_unused=True), strict=True):
            if gradient is not None:
                square += gradient.square()
        tokens += len(drawn)
    model.train(was_training)
    return [square / tokens for square in squares]


def _towards_outputs(model: nn.Module, autocast: bool) -> Pull:
    """Mean Kullback-Leibler divergence of the model's predictions from the base's, over the learnt tokens."""
    base = copy.deepcopy(model).eval().requires_grad_(False)
    seen: dict[str, Any] = {}

    def remember(_module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        seen.update(inputs=inputs)

    model.register_forward_pre_hook(remember, with_kwargs=True)

    def pull(outputs: Any, labels: Tensor) -> Tensor:
        learnt = labels[:, 1:] != IGNORED
        device = outputs.logits.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            expected = base.to(device)(**seen["inputs"]).logits
        return divergence(outputs.logits[learnt], expected[learnt])

    return pull


def divergence(predicted: Tensor, expected: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of ``predicted`` from ``expected``: ``[tokens, vocabulary]``."""
    apart = functional.kl_div(
        predicted.float().log_softmax(-1), expected.float().log_softmax(-1), reduction="sum", log_target=True
    )
    # A worker's last rows may be fillers, of which there is nothing to predict.
    return apart / max(1, len(predicted))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
