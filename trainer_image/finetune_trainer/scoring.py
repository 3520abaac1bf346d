"""Log-probabilities of completions under a model, the one number that loss, accuracy and perplexity come from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from finetune_trainer.encoder_decoder import encoding_once
from finetune_trainer.example import Encoded
from finetune_trainer.layout import IGNORED, Batch, Layout, build_batch, forward, split_by_item
from finetune_trainer.prompt_cache import batches_by_prompt, continued_logits, find_shared_prompts, keeps_prompts

LogProbs = npt.NDArray[np.float64]


class Scorer:
    """Scores completions with one model; switch an adapter on or off between calls as you like, nothing is cached."""

    def __init__(self, model: nn.Module, layout: Layout, batch_tokens: int = 2048) -> None:
        self._model = model
        self._layout = layout
        self._batch_tokens = batch_tokens

    def token_logprobs(
        self, items: Sequence[Encoded], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[LogProbs]:
        """Return for every item the log-probabilities, in nats, of its completion tokens, the end token included."""
        return [scores[:, 0] for scores in self._scored(items, on_progress, with_ranks=False)]

    def continuations(
        self, items: Sequence[Encoded], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[tuple[float, bool]]:
        """Return for every item the log-probability of its completion, and whether each token was the likeliest one."""
        scored = self._scored(items, on_progress, with_ranks=True)
        return [(float(scores[:, 0].sum()), bool(scores[:, 1].all())) for scores in scored]

    # No inference mode: weights that are spread over workers are gathered here and learnt from later.
    @torch.no_grad()
    def _scored(
        self, items: Sequence[Encoded], on_progress: Callable[[float], None], with_ranks: bool
    ) -> list[LogProbs]:
        """Return ``[tokens, 1 or 2]`` for every item: log-probabilities and, if asked for, 1 for the likeliest."""
        scores: list[LogProbs] = [np.empty((0, 2))] * len(items)
        was_training = self._model.training
        self._model.eval()
        done = 0
        try:
            continued = self._continued(items)
            whole = self._batches(items, [number for number in range(len(items)) if number not in continued])
            by_prompt = batches_by_prompt(items, continued, self._batch_tokens)
            for numbers in chain(whole, by_prompt):
                chosen = [items[number] for number in numbers]
                score = self._score_continued if numbers[0] in continued else self._score
                found = score(chosen, with_ranks)
                for number, values in zip(numbers, split_by_item(chosen, found), strict=True):
                    scores[number] = values
                done += len(numbers)
                on_progress(done / len(items))
        finally:
            self._model.train(was_training)
        return scores

    def mean_loss(self, items: Sequence[Encoded]) -> float:
        """Return the negative log-likelihood per completion token, in nats; it does not depend on the batching."""
        values = np.concatenate(self.token_logprobs(items))
        return float(-values.mean())

    def _continued(self, items: Sequence[Encoded]) -> set[int]:
        """Return which items are read behind a prompt that has been read for all of its completions."""
        if self._layout is Layout.PACKED or any(item.decoder_start is not None for item in items):
            return set()
        shared = find_shared_prompts(items)
        return shared if shared and keeps_prompts(self._model) else set()

    def _score(self, items: Sequence[Encoded], with_ranks: bool) -> LogProbs:
        device = next(self._model.parameters()).device
        batch = {name: value.to(device) for name, value in build_batch(items, self._layout).items()}
        with encoding_once(self._model, [item.prompt_ids for item in items]):
            logits, column = self._distinct_logits(batch)
        return _grade(logits, column, batch["labels"][:, 1:].to(logits.device), with_ranks)

    def _score_continued(self, items: Sequence[Encoded], with_ranks: bool) -> LogProbs:
        parts = continued_logits(self._model, items, self._batch_tokens)
        return np.concatenate(
            [
                _grade(logits, torch.arange(logits.shape[1], device=logits.device), targets, with_ranks)
                for logits, targets in parts
            ]
        )

    def _distinct_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits, those that several items ask for once, and ``[kept]``: the column of each of the labels."""
        if "logits_to_keep" not in batch:
            logits = forward(self._model, batch)
            return logits, torch.arange(logits.shape[1], device=logits.device)
        kept, column = batch["logits_to_keep"].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        logits = forward(self._model, {**batch, "logits_to_keep": kept})
        return logits, column.to(logits.device)

    def _batches(self, items: Sequence[Encoded], chosen: Sequence[int]) -> Iterator[list[int]]:
        """Yield those numbers of items whose tokens fit the budget together; sorted, so that common beginnings meet."""
        numbers: list[int] = []
        tokens = 0
        for number in sorted(chosen, key=lambda number: self._neighbourhood(items[number])):
            item = items[number]
            shared = self._shared(items[numbers[-1]], item) if numbers else 0
            if numbers and not shared and tokens + _length(item) > self._batch_tokens:
                yield numbers
                numbers, tokens = [], 0
            numbers.append(number)
            tokens += _length(item) - shared
        if numbers:
            yield numbers

    def _neighbourhood(self, item: Encoded) -> tuple[int, ...]:
        """Return by what items are sorted, so that those come together which share work or length."""
        if item.decoder_start is not None:
            return (item.prompt_length, *item.prompt_ids)
        return item.read_ids if self._layout is Layout.PACKED else (len(item.ids),)

    def _shared(self, item: Encoded, following: Encoded) -> int:
        """Return how many tokens of ``following`` are read with ``item``, so that both belong in one pass."""
        if following.decoder_start is not None:
            return item.prompt_length if following.prompt_ids == item.prompt_ids else 0
        is_continued = self._layout is Layout.PACKED and following.read_ids[: len(item.read_ids)] == item.read_ids
        return _length(item) if is_continued else 0


def _grade(logits: Tensor, column: Tensor, targets: Tensor, with_ranks: bool) -> LogProbs:
    """Return ``[tokens, 1 or 2]``: every target's log-probability and, if asked for, 1 for the likeliest.

    Args:
        logits: ``[rows, distinct, vocabulary]``.
        column: ``[kept]``: which of them are each target's.
        targets: ``[rows, kept]``.
        with_ranks: whether to tell which are the likeliest.
    """
    row, place = (targets != IGNORED).nonzero(as_tuple=True)
    target = targets[row, place]
    needed, at = (row * logits.shape[1] + column[place]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    logprobs = logits.flatten(0, 1)[needed].float().log_softmax(dim=-1)
    found = [logprobs[at, target].double()]
    if with_ranks:
        found.append((logprobs.argmax(dim=-1)[at] == target).double())
    return torch.stack(found, dim=1).cpu().numpy()


def _length(item: Encoded) -> int:
    """Return the tokens that a model reads of ``item``: a decoder of its own begins with one more than it is given."""
    return len(item.read_ids if item.decoder_start is None else item.ids)
