"""Pulls back to the base, against sums by hand on a model of two words at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_api.spec import RegularizationSpec
from finetune_trainer.example import Encoded
from finetune_trainer.layout import Batch, Layout, build_batch, token_losses
from finetune_trainer.regularization import FISHER_ROWS, estimate_importance, regularize

WORDS = 5
STRENGTH = 0.5
# float32 sums of a dozen terms in another order.
ROUNDING = 1e-6


class Bigrams(nn.Module):
    """Logits of the next word, a row of the table for each word before it; a second table that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(WORDS, WORDS, generator=generator))
        self.idle = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids][:, logits_to_keep])


ROWS = [Encoded((0, 1, 2, 3), 2), Encoded((4, 0, 0), 1), Encoded((2, 2), 1)]
LEARNT = 5


def rows_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    losses = token_losses(outputs.logits, labels)
    return losses.sum() / (num_items_in_batch if num_items_in_batch is not None else losses.numel())


def moved_gradient(kind: str, batches: list[list[Encoded]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the pull adds to the table's gradient after it has moved, where it was and how far it moved."""
    model = Bigrams()
    spec = RegularizationSpec.model_validate({"type": kind, "strength": STRENGTH})
    pulled = regularize(rows_loss, model, spec, ROWS, seed=1, autocast=False)
    before, move = model.table.detach().clone(), torch.linspace(-1, 1, WORDS * WORDS).view(WORDS, WORDS)
    with torch.no_grad():
        model.table += move
    gradients = []
    for loss in (pulled, rows_loss):
        model.zero_grad()
        for items in batches:
            batch: Batch = build_batch(items, Layout.PADDED)
            outputs = model(**batch)
            value = loss(outputs, batch["labels"], LEARNT)
            assert value == rows_loss(outputs, batch["labels"], LEARNT)
            value.backward()
        gradients.append(model.table.grad.clone())
    return gradients[0] - gradients[1], before, move


BATCHINGS = [[ROWS], [[row] for row in ROWS]]


@pytest.mark.parametrize("batches", BATCHINGS, ids=["at once", "row by row"])
def test_l2sp_pulls_every_weight_by_its_distance(batches: list[list[Encoded]]):
    added, _, move = moved_gradient("l2sp", batches)
    torch.testing.assert_close(added, STRENGTH * move, atol=ROUNDING, rtol=1e-5)


@pytest.mark.parametrize("batches", BATCHINGS, ids=["at once", "row by row"])
def test_ewc_pulls_every_weight_by_its_distance_times_its_importance(batches: list[list[Encoded]]):
    added, _, move = moved_gradient("ewc", batches)
    importance, idle = estimate_importance(Bigrams(), ROWS, seed=1)
    torch.testing.assert_close(added, STRENGTH * importance * move, atol=ROUNDING, rtol=1e-5)
    # Behind 3 no word comes, nothing is predicted from it.
    assert importance[3].abs().max() == 0 < importance[0].min()
    assert idle.abs().max() == 0


@pytest.mark.parametrize("batches", BATCHINGS, ids=["at once", "row by row"])
def test_kl_pulls_predictions_to_the_bases(batches: list[list[Encoded]]):
    added, before, move = moved_gradient("kl", batches)
    expected = torch.zeros(WORDS, WORDS)
    for word in (1, 2, 4, 0, 2):  # those before the words that are learnt
        # The derivative of KL(p || q) by the logits of q.
        expected[word] += ((before + move)[word].softmax(-1) - before[word].softmax(-1)) / LEARNT
    torch.testing.assert_close(added, STRENGTH * expected, atol=ROUNDING, rtol=1e-5)


def test_importance_is_the_fisher_information():
    model = Bigrams()
    rows = [Encoded((0, 1, 2, 0, 1, 2, 0, 1) * 40, 1)] * FISHER_ROWS
    importance, _ = estimate_importance(model, rows, seed=1)
    likely = model.table.detach().softmax(-1)
    # Of one draw it is p (1 - p), and of n independent ones n times that; words come 120, 120 and 79 times of 319.
    share = torch.tensor([120 / 319, 120 / 319, 79 / 319, 0, 0])
    expected = share[:, None] * likely * (1 - likely)
    # A mean over 64 rows of a square of a nearly normal sum: its standard deviation is sqrt(2 / 64) of itself.
    torch.testing.assert_close(importance, expected, atol=1e-6, rtol=4 * (2 / FISHER_ROWS) ** 0.5)
    assert float(importance.sum() / expected.sum()) == pytest.approx(1, abs=0.15)


def test_importance_leaves_the_model_as_it_was():
    model = Bigrams().train()
    estimate_importance(model, ROWS, seed=1)
    assert model.training
    assert model.table.grad is None


def test_without_a_pull_the_loss_is_the_rows():
    model = Bigrams()
    none = RegularizationSpec.model_validate({"type": "none"})
    assert regularize(rows_loss, model, None, ROWS, 1, False) is rows_loss
    assert regularize(rows_loss, model, none, ROWS, 1, False) is rows_loss
