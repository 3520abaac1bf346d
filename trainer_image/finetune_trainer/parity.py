"""Proof that what was evaluated is a tuned model, and that the published files are that model.

Both models and the published files, loaded afresh, answer the same probes; their logits are compared. An adapter that
is switched off, weights that training left as they were, a file that lost something on its way: all show here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finetune_api.report import ArtifactKind, ParityReport, ProbeReport
from finetune_trainer.encoder_decoder import text_logits
from finetune_trainer.errors import ParityError, SpecError

PROBES = 8
"""Test rows that are asked: a difference in weights shows in any of them."""

_PROBE_TOKENS = 128
_LAST_POSITIONS = 8
"""Of each probe: all that went before is in them, and a vocabulary of logits at every position would take memory."""

SAME_FILES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest logit difference between a model and itself loaded again, as a share of the largest logit: kernels may sum in
another order."""
MERGED_FILES = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""The same between merged and unmerged. Merging rounds each weight to the base's type once more: 2^-24 (float32), 2^-11
(float16), 2^-8 (bfloat16), summed over all layers; 0.023 was measured on a model of 30 layers in bfloat16."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the evaluated model makes of the probes: what published files are held against."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    dtype: torch.dtype
    """Of the weights."""
    effect: float | None
    """How far tuning moved the logits, where that was measured."""


def choose_probes(rows: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return probes out of (prompt, completion) of the test rows, in their order."""
    return tuple(islice((f"{prompt} {completion.strip()}" for prompt, completion in rows), PROBES))


def encode_probes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the last tokens of every probe."""
    return tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"][-_PROBE_TOKENS:]) for text in texts)


def probe_logits(model: nn.Module, probes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Return for each probe the logits ``[positions, vocabulary]`` at its last positions, float32 on the CPU."""
    model.eval()
    with torch.no_grad():
        return tuple(text_logits(model, ids)[0, -_LAST_POSITIONS:].float().cpu() for ids in probes)


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return how far apart the farthest two logits are."""
    return max(float((left - right).abs().max()) for left, right in zip(one, other, strict=True))


def compare_probes(base: Sequence[Tensor], tuned: Sequence[Tensor]) -> ProbeReport:
    """Return how far tuning moved the logits."""
    largest = max(float(logits.abs().max()) for logits in tuned)
    return ProbeReport(rows=len(tuned), effect=largest_difference(base, tuned), largest=largest)


def require_effect(probe: ProbeReport) -> None:
    """Refuse a tuned model that is the base.

    Raises:
        SpecError: not one logit moved.
    """
    if not probe.effect > 0:
        raise SpecError(
            f"tuning had no effect: base and tuned model give the same logits for all of {probe.rows} test rows, so "
            "the tuned weights are switched off or were never changed. Raise spec.training.learningRate or "
            "spec.training.maxSteps."
        )


def check_parity(
    expected: Evaluated, model: nn.Module, tokenizer: PreTrainedTokenizerBase, kind: ArtifactKind
) -> ParityReport:
    """Hold published files, loaded afresh as ``model`` and ``tokenizer``, against the model that was evaluated.

    Raises:
        ParityError: they read the probes as other tokens, or answer them differently.
    """
    ids = encode_probes(tokenizer, expected.texts)
    if ids != expected.ids:
        number = next(number for number, pair in enumerate(zip(ids, expected.ids, strict=True)) if pair[0] != pair[1])
        now, before = list(ids[number])[:8], list(expected.ids[number])[:8]
        raise ParityError(
            f"the published {kind.value} does not read as the evaluated model does: its tokenizer makes {now}… of "
            f"{expected.texts[number][:80]!r}, which was {before}…. "
            "Nothing was published; run the job again."
        )
    found = probe_logits(model, ids)
    difference = largest_difference(expected.logits, found)
    largest = max(float(logits.abs().max()) for logits in expected.logits)
    allowed = (MERGED_FILES if kind is ArtifactKind.MERGED else SAME_FILES)[expected.dtype] * largest
    if kind is not ArtifactKind.MERGED and expected.effect is not None:
        # Merging into weights of few bits may undo the adapter, which publication warns about; other files may not.
        allowed = min(allowed, expected.effect / 2)
    if not difference <= allowed:
        raise ParityError(
            f"the published {kind.value}, loaded afresh, does not answer as the evaluated model does: logits differ by "
            f"up to {difference:.3g}, and rounding explains {allowed:.3g}. "
            "Nothing was published; run the job again."
        )
    return ParityReport(kind=kind, difference=difference, allowed=allowed)
