"""Puts the questions of a paper to one model, the base by the template that serves it best."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import Progress, Stage
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import TrainingDivergedError
from finetune_trainer.example import Encoded, Example
from finetune_trainer.forgetting import GeneralAnswers
from finetune_trainer.format_probe import ANSWER_TOKENS
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.generation import generate
from finetune_trainer.in_context import with_shown
from finetune_trainer.labels import (
    Normaliser,
    PromptDecision,
    choose_prompt,
    collect_scores,
    confidences,
    harness_accuracy,
    label_prior,
    predict,
    with_label,
)
from finetune_trainer.metrics import perplexity
from finetune_trainer.paper import Paper
from finetune_trainer.renderer import Renderer

Floats = NDArray[np.float64]

LONGEST_ANSWER_TOKENS = 64
SPARE_ANSWER_TOKENS = 8
GENERATION_BATCH_SIZE = 16


class Pair(Protocol):
    """Base and tuned model, one at a time: an adapter switched off and on, or two loads."""

    def base(self) -> AbstractContextManager[nn.Module]:
        """Lend the model as it was before tuning."""

    def tuned(self) -> AbstractContextManager[nn.Module]:
        """Lend the model as it is after tuning."""


class LogprobScorer(Protocol):
    """What `finetune_trainer.scoring.Scorer` does."""

    def token_logprobs(self, items: Sequence[Encoded], on_progress: Callable[[float], None] = ...) -> list[Floats]:
        """Return the log-probability of every completion token of every item, in the order given."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model said to one task's test rows; every list is in the order of the rows."""

    examples: list[Example]
    """The rows as this model was asked: the base by its chosen template, the tuned by each row's own."""
    logprobs: list[Floats]
    """Of the tokens of the expected completions, end token included."""
    labels: list[str] | None
    texts: list[str] | None
    confidences: Floats | None = None
    """Probability of each of ``labels`` among all labels."""
    harness: tuple[float, float] | None = None
    """acc and acc_norm as lm-evaluation-harness computes them, of a task with labels."""

    @property
    def references(self) -> list[str]:
        """What was to be said."""
        return [example.completion.strip() for example in self.examples]


@dataclass(slots=True)
class Meter:
    """Turns finished rows into progress reports."""

    total: int
    on_progress: Callable[[Progress], None]
    done: int = 0

    def part(self, rows: int, message: str) -> Callable[[float], None]:
        """Return what is to be told the finished share, 0 to 1, of the next ``rows`` rows."""
        before = self.done
        self.done += rows

        def advance(share: float) -> None:
            percent = 100 * (before + rows * share) / self.total
            self.on_progress(Progress(stage=Stage.EVALUATE, message=message, percent=percent))

        return advance

    def skip(self, rows: int) -> None:
        """Count ``rows`` rows that turned out not to be needed."""
        self.done += rows


@dataclass(frozen=True, slots=True)
class Trial:
    """Base and tuned model, and how both are asked."""

    models: Pair
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    """In the job's own format."""
    dataset: Dataset
    job: FineTuneJob
    scorer: Callable[[nn.Module], LogprobScorer]
    """Of a model that is lent."""
    on_progress: Callable[[Progress], None]

    def examiner(self, lent: nn.Module, name: str, meter: Meter, max_new_tokens: int = 0) -> "Examiner":
        """Return who asks the model ``lent``; without ``max_new_tokens`` it is not to write."""
        lent.eval()
        scorer, beams = self.scorer(lent), self.job.spec.evaluation.generation.num_beams
        return Examiner(lent, name, scorer, self.tokenizer, self.renderer, self.dataset, max_new_tokens, meter, beams)


@dataclass(frozen=True, slots=True)
class Examiner:
    """Puts questions to one model."""

    model: nn.Module
    name: str
    scorer: LogprobScorer
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    dataset: Dataset
    max_new_tokens: int
    meter: Meter
    num_beams: int
    """Of answers to a task's questions."""
    shows: bool = False
    """Whether every question comes behind the paper's shown rows."""

    def in_format(self, renderer: Renderer) -> Self:
        """Return one that asks the same model in another format."""
        return replace(self, renderer=renderer)

    def showing(self, renderer: Renderer) -> Self:
        """Return one that also shows it the paper's answered rows, for which ``renderer`` has the room."""
        return replace(self, renderer=renderer, shows=True)

    def choose(self, paper: Paper) -> PromptDecision:
        """Choose template and normaliser: by accuracy, or by perplexity where there are no labels.

        With a single template and no labels there is nothing to choose, and nothing is scored.
        """
        if paper.labels:
            scores = {
                template: collect_scores(
                    self._label_logprobs(paper.labels, self._rendered(paper, paper.choice, template)), len(paper.labels)
                )
                for template in range(paper.templates)
            }
            return choose_prompt(scores, _label_indices(paper.labels, paper.choice), tuple(Normaliser))
        if paper.templates == 1:
            return PromptDecision(0, Normaliser.SUM, np.zeros(0), 0.0, {})
        perplexities = {
            template: perplexity(self._completion_logprobs(self._rendered(paper, paper.choice, template)))
            for template in range(paper.templates)
        }
        best = min(perplexities, key=lambda template: perplexities[template])
        candidates = {f"template {template}": value for template, value in perplexities.items()}
        return PromptDecision(best, Normaliser.SUM, np.zeros(0), 0.0, candidates)

    def answer(self, paper: Paper, decision: PromptDecision | None) -> Answers:
        """Put the test rows: by the decision, or (the tuned model) by each row's own template and plain sums."""
        examples = self._rendered(paper, paper.test, decision.template) if decision else paper.test
        texts = self._generated(examples) if paper.generates else None
        if not paper.labels:
            return Answers(examples, self._completion_logprobs(examples), None, texts)
        logprobs = self._label_logprobs(paper.labels, examples)
        scores = collect_scores(logprobs, len(paper.labels))
        normaliser = decision.normaliser if decision else Normaliser.SUM
        prior = decision.prior if decision else label_prior(scores)
        chosen = predict(scores, normaliser, prior)
        right = _label_indices(paper.labels, examples)
        expected = [logprobs[row * len(paper.labels) + label] for row, label in enumerate(right)]
        harness = harness_accuracy(logprobs, paper.labels, right, self.renderer.end_length)
        sure = confidences(scores, normaliser, prior)
        return Answers(examples, expected, [paper.labels[label] for label in chosen], texts, sure, harness)

    def answer_suite(self, suite: GeneralSuite) -> GeneralAnswers:
        """Choose among the continuations of every general row by plain sums, the end token not counted."""
        encoded = iter(self.renderer.encode_continuations(suite.pairs))
        asked = [[next(encoded) for _ in row.choices] for row in suite.rows]
        logprobs = iter(self._scored([*asked, *([item] for item in encoded)]))
        likeliest = [int(np.argmax([next(logprobs).sum() for _ in row.choices])) for row in suite.rows]
        right = np.array([choice == row.right for choice, row in zip(likeliest, suite.rows, strict=True)])
        return GeneralAnswers(right, list(logprobs))

    def _rendered(self, paper: Paper, examples: Sequence[Example], template: int) -> list[Example]:
        return with_shown(self.dataset, examples, template, paper.shown if self.shows else ())

    def _label_logprobs(self, labels: Sequence[str], examples: Sequence[Example]) -> list[Floats]:
        """Return the log-probabilities of every label's completion, label by label within row by row."""
        return self._scored(encode_labels(self.renderer, self.dataset, examples, labels))

    def _completion_logprobs(self, examples: Sequence[Example]) -> list[Floats]:
        return self._scored([[encoded] for encoded in self.renderer.encode_many(examples, self.dataset)])

    def _scored(self, rows: Sequence[Sequence[Encoded]]) -> list[Floats]:
        logprobs = self.scorer.token_logprobs(
            [item for row in rows for item in row],
            self.meter.part(len(rows), f"scoring {self.name} model"),
        )
        if not all(np.isfinite(row).all() for row in logprobs):
            remedy = (
                "Set spec.model.dtype: float32, or choose another model in spec.model.source."
                if self.name == "base"
                else "Lower spec.training.learningRate or set spec.training.precision: fp32."
            )
            raise TrainingDivergedError(
                f"the {self.name} model's log-probabilities are not finite: its weights hold NaN or overflow. {remedy}"
            )
        return logprobs

    def answer_questions(self, questions: Sequence[str]) -> list[str]:
        """Write answers to questions of no task, in the format that tasks are asked in."""
        return self._written([self.renderer.encode_question(question) for question in questions], ANSWER_TOKENS, 1)

    def _generated(self, examples: Sequence[Example]) -> list[str]:
        prompts = [item.prompt_ids for item in self.renderer.encode_many(examples, self.dataset)]
        return self._written(prompts, self.max_new_tokens, self.num_beams)

    def _written(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, num_beams: int) -> list[str]:
        report = self.meter.part(len(prompts), f"generating with {self.name} model")
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens,
            self.renderer.end_token_ids,
            GENERATION_BATCH_SIZE,
            lambda done, total: report(done / total),
            num_beams,
        )


def encode_labels(
    renderer: Renderer, dataset: Dataset, examples: Sequence[Example], labels: Sequence[str]
) -> list[list[Encoded]]:
    """Return every example with each of ``labels`` as what it says."""
    return [
        [renderer.with_completion(item, example, with_label(example.completion, label)) for label in labels]
        for example, item in zip(examples, renderer.encode_many(examples, dataset), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Asked:
    """How the base was asked, and what it said."""

    decision: PromptDecision
    label_decision: PromptDecision
    """For naming a label, where the base of a chat job may do better without its chat template."""
    answers: Answers


def ask_base(own: Examiner, raw: Examiner, paper: Paper) -> Asked:
    """Return the base's answers to a paper, asked the way that serves it best on the rows to choose on.

    Args:
        own: asks in the job's own format.
        raw: asks without the chat template.
        paper: the questions.
    """
    decision = own.choose(paper)
    answers = own.answer(paper, decision)
    if not paper.labels or own.renderer.format != "chat":
        return Asked(decision, decision, answers)
    # Small chat models often know the answer but not the chat: the base may name it without its template.
    # Likelihoods are compared in the job's own format all the same: they differ between formats.
    label_decision = _better(decision, raw.choose(paper))
    if label_decision.format:
        named = raw.answer(replace(paper, metrics=("accuracy",)), label_decision)
        answers = replace(answers, labels=named.labels, confidences=named.confidences)
    else:
        raw.meter.skip(len(paper.test))
    return Asked(decision, label_decision, answers)


def _better(own: PromptDecision, raw: PromptDecision) -> PromptDecision:
    """Return the decision with the higher validation accuracy, ``own`` when equal, with all that was tried."""
    candidates = own.candidates | {f"raw {name}": accuracy for name, accuracy in raw.candidates.items()}
    chosen = replace(raw, format="raw") if raw.accuracy > own.accuracy else own
    return replace(chosen, candidates=candidates)


def answer_bound(
    tokenizer: PreTrainedTokenizerBase, completions: Iterable[str], at_most: int = LONGEST_ANSWER_TOKENS
) -> int:
    """Return how many tokens an answer may have: the longest completion and some to spare, ``at_most`` in all."""
    distinct = sorted({completion.strip() for completion in completions})
    if not distinct:
        return at_most
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    return min(at_most, max(len(ids) for ids in encoded) + SPARE_ANSWER_TOKENS)


def _label_indices(labels: Sequence[str], examples: Sequence[Example]) -> NDArray[np.int64]:
    index = {label: position for position, label in enumerate(labels)}
    return np.array([index[example.completion.strip()] for example in examples], dtype=np.int64)
