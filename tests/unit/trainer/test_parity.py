"""What counts as the same model, and what as a tuned one."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from finetune_api.report import ArtifactKind
from finetune_trainer.errors import ParityError, SpecError
from finetune_trainer.parity import (
    PROBES,
    Evaluated,
    check_parity,
    choose_probes,
    compare_probes,
    encode_probes,
    require_effect,
)

TEXTS = ("It is cold", "outside")


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Echo(nn.Module):
    """Its logits are an embedding of the token itself, moved by ``shift``."""

    config = PretrainedConfig()

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Parameter(torch.randn(256, 4))
        self.shift = shift

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Output:
        return Output(self.table[input_ids] + self.shift)


class Letters:
    """A tokenizer of one token a letter."""

    def __init__(self, first: int = 0) -> None:
        self._first = first

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self._first + ord(letter) % 128 for letter in text]}


def evaluated(effect: float = 5.0, dtype: torch.dtype = torch.float32) -> Evaluated:
    ids = encode_probes(Letters(), TEXTS)  # type: ignore[arg-type]
    table = Echo().table.detach()
    return Evaluated(TEXTS, ids, tuple(table[list(one)][-8:] for one in ids), dtype, effect)


def check(shift: float, kind: ArtifactKind, expected: Evaluated, tokenizer: Letters | None = None) -> float:
    return check_parity(expected, Echo(shift), tokenizer or Letters(), kind).difference  # type: ignore[arg-type]


def test_the_same_files_give_the_same_logits() -> None:
    assert check(0.0, ArtifactKind.ADAPTER, evaluated()) == 0


def test_files_that_answer_otherwise_are_not_published() -> None:
    with pytest.raises(ParityError, match=r"published weights, loaded afresh, .* up to 0\.1, "):
        check(0.1, ArtifactKind.WEIGHTS, evaluated())


def test_merged_weights_may_differ_by_what_rounding_does() -> None:
    expected = evaluated(dtype=torch.bfloat16)
    assert check(0.1, ArtifactKind.MERGED, expected) == pytest.approx(0.1)
    with pytest.raises(ParityError, match="published merged"):
        check(1.0, ArtifactKind.MERGED, expected)


def test_an_adapter_is_not_excused_by_rounding_for_having_no_effect() -> None:
    with pytest.raises(ParityError, match=r"rounding explains 0\.0005"):
        check(0.001, ArtifactKind.ADAPTER, evaluated(effect=0.001, dtype=torch.bfloat16))


def test_numbers_that_are_none_are_not_the_same() -> None:
    with pytest.raises(ParityError, match="nan"):
        check(float("nan"), ArtifactKind.ADAPTER, evaluated())


def test_a_tokenizer_that_reads_otherwise_is_found() -> None:
    with pytest.raises(ParityError, match=r"tokenizer makes \[74, .* of 'It is cold'"):
        check(0.0, ArtifactKind.ADAPTER, evaluated(), Letters(first=1))


def test_a_tuned_model_that_is_the_base_is_refused() -> None:
    logits = evaluated().logits
    same, moved = compare_probes(logits, logits), compare_probes(logits, [one + 0.25 for one in logits])
    assert moved.effect == pytest.approx(0.25)
    require_effect(moved)
    with pytest.raises(SpecError, match=r"same logits for all of 2 test rows.*learningRate"):
        require_effect(same)


def test_probes_are_the_first_rows_and_never_empty() -> None:
    assert choose_probes([("", " x ")] + [(f"{number}", "y") for number in range(20)]) == (
        " x",
        *(f"{number} y" for number in range(PROBES - 1)),
    )
