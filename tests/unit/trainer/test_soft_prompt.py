"""Nearest tokens, against a search by hand."""

import numpy as np
import pytest
import torch

from finetune_trainer import soft_prompt
from finetune_trainer.soft_prompt import SHOWN, nearest_tokens


def test_the_nearest_tokens_are_those_of_a_search_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soft_prompt, "_CHUNK", 7)
    generator = torch.Generator().manual_seed(1)
    prompt, table = torch.randn(3, 4, generator=generator), torch.randn(40, 4, generator=generator)
    found = nearest_tokens(prompt, table, lambda token: f"<{token}>")
    for virtual, vector in zip(found, prompt.double().numpy(), strict=True):
        rows = table.double().numpy()
        l2 = np.sqrt(((rows - vector) ** 2).sum(axis=1))
        cosine = 1 - rows @ vector / np.linalg.norm(rows, axis=1) / np.linalg.norm(vector)
        for near, distances in ((virtual.l2, l2), (virtual.cosine, cosine)):
            order = np.argsort(distances)[:SHOWN]
            assert [one.id for one in near] == order.tolist()
            assert [one.token for one in near] == [f"<{number}>" for number in order]
            assert [one.distance for one in near] == pytest.approx(distances[order], abs=1e-6)


def test_a_small_vocabulary_is_named_whole():
    (virtual,) = nearest_tokens(torch.ones(1, 2), torch.eye(2), str)
    assert len(virtual.l2) == len(virtual.cosine) == 2
