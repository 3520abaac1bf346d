"""A base of 4 bits on a CPU, where users are refused.

`make test` puts bitsandbytes on the path for these tests alone.
"""

import importlib.util

import pytest

from finetune_trainer import check_stage, model


@pytest.fixture(autouse=True)
def past_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU do what only a GPU is let otherwise, and as every processor does it.

    On one that multiplies bfloat16, bitsandbytes 0.50 packs its layers anew when they are first used for evaluation,
    and from then on hands no gradient through them, in silence: one reason for the refusal.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not on the path: make build/four-bits/.installed, then PYTHONPATH=build/four-bits")
    for module in (check_stage, model):
        monkeypatch.setattr(module, "require_four_bits", lambda *, gpu: None)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
