"""Compare the tuned model with its base on the test split, with the base given its best chance.

Everything that is chosen (the base's template, how label likelihoods are compared) is chosen on the validation split;
the test split is scored once and decides nothing. Each model is asked for once and answers all its questions then, so
that two loads never have to be in memory together.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import EvaluationReport, MetricComparison, Progress, PromptChoice, SideBySide, Stage
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError, TrainingDivergedError
from finetune_trainer.example import Encoded, Example
from finetune_trainer.generation import generate
from finetune_trainer.labels import (
    Normaliser,
    PromptDecision,
    choose_prompt,
    collect_scores,
    label_prior,
    predict,
    with_label,
)
from finetune_trainer.metrics import ROUGE_NAMES, exact_match, perplexity, rouge, rouge_reads
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split
from finetune_trainer.statistics import FEW_ROWS, Interval, paired_bootstrap, paired_bootstrap_perplexity

Floats = NDArray[np.float64]

CHOICE_ROWS = 200
"""Validation rows per task that the base's prompt is chosen on: enough to tell 0.60 from 0.75, cheap to score."""

LONGEST_ANSWER_TOKENS = 64
SPARE_ANSWER_TOKENS = 8
GENERATION_BATCH_SIZE = 16

EXAMPLES_EACH = 6
"""Most improved, most worsened and still wrong rows of each task that the report shows."""
EXAMPLE_CHARACTERS = 4000


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
class _Paper:
    """The questions of one task."""

    task: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    templates: int
    validation: list[Example]
    test: list[Example]

    @property
    def generates(self) -> bool:
        return "exact_match" in self.metrics or "rouge" in self.metrics


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one model said to one task's test rows; every list is in the order of the rows."""

    examples: list[Example]
    """The rows as this model was asked: the base by its chosen template, the tuned by each row's own."""
    logprobs: list[Floats]
    """Of the tokens of the expected completions, end token included."""
    labels: list[str] | None
    texts: list[str] | None

    @property
    def references(self) -> list[str]:
        return [example.completion.strip() for example in self.examples]


@dataclass(frozen=True, slots=True)
class _RowScores:
    """One metric, row by row, of both models."""

    metric: str
    base: Floats
    tuned: Floats


def evaluate(
    model: Pair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    dataset: Dataset,
    job: FineTuneJob,
    scorer_factory: Callable[[nn.Module], LogprobScorer],
    on_progress: Callable[[Progress], None],
) -> tuple[EvaluationReport, list[dict[str, object]]]:
    """Return the comparison on the test split, and what both models said to every row of it.

    Raises:
        DataError: a task has no validation or no test row.
        TrainingDivergedError: a model's log-probabilities are not numbers.
    """
    started = time.monotonic()
    seed = job.spec.training.seed
    papers = [_set_paper(task, dataset, job) for task in dataset.tasks]
    meter = _Meter(sum(_work(paper, renderer.format) for paper in papers), on_progress)
    max_new_tokens = job.spec.evaluation.generation.max_new_tokens or answer_bound(
        tokenizer, (example.completion for example in dataset.examples(Split.TRAIN))
    )

    def examiner(lent: nn.Module, name: str, renderer: Renderer) -> _Examiner:
        lent.eval()
        return _Examiner(lent, name, scorer_factory(lent), tokenizer, renderer, dataset, max_new_tokens, meter)

    decisions: dict[str, PromptDecision] = {}
    label_decisions: dict[str, PromptDecision] = {}
    base_answers: dict[str, _Answers] = {}
    with model.base() as base:
        own = examiner(base, "base", renderer)
        raw = examiner(base, "base", Renderer(tokenizer, "raw", None, renderer.max_length))
        for paper in papers:
            task = paper.task
            decisions[task] = label_decisions[task] = own.choose(paper)
            base_answers[task] = own.answer(paper, decisions[task])
            if paper.labels and renderer.format == "chat":
                # Small chat models often know the answer but not the chat: the base may name it without its template.
                # Likelihoods are compared in the job's own format all the same: they differ between formats.
                label_decisions[task] = _better(decisions[task], raw.choose(paper))
                if label_decisions[task].format:
                    labels = raw.answer(paper, label_decisions[task]).labels
                    base_answers[task] = replace(base_answers[task], labels=labels)
    with model.tuned() as tuned:
        tuned_examiner = examiner(tuned, "tuned", renderer)
        tuned_answers = {paper.task: tuned_examiner.answer(paper, None) for paper in papers}

    metrics: list[MetricComparison] = []
    examples: list[SideBySide] = []
    predictions: list[dict[str, object]] = []
    for paper in papers:
        answers = base_answers[paper.task], tuned_answers[paper.task]
        scores = _score_rows(paper, *answers)
        metrics += _compare(paper, *answers, scores, decisions[paper.task], label_decisions[paper.task], seed)
        examples += _pick_examples(paper, *answers, scores)
        predictions += _prediction_rows(paper, *answers)
    report = EvaluationReport(
        metrics=tuple(metrics),
        prompt_choices=tuple(
            _prompt_choice(paper.task, label_decisions[paper.task]) for paper in papers if "accuracy" in paper.metrics
        ),
        examples=tuple(examples),
        seconds=time.monotonic() - started,
    )
    return report, predictions


def answer_bound(
    tokenizer: PreTrainedTokenizerBase, completions: Iterable[str], at_most: int = LONGEST_ANSWER_TOKENS
) -> int:
    """Return how many tokens an answer may have: the longest completion and some to spare, ``at_most`` in all."""
    distinct = sorted({completion.strip() for completion in completions})
    if not distinct:
        return at_most
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    return min(at_most, max(len(ids) for ids in encoded) + SPARE_ANSWER_TOKENS)


def choose_rows(examples: Sequence[Example], at_most: int | None, seed: int) -> list[Example]:
    """Return ``at_most`` of the examples in their order; which ones depends on their number and the seed alone."""
    if at_most is None or len(examples) <= at_most:
        return list(examples)
    kept = sorted(random.Random(seed).sample(range(len(examples)), at_most))
    return [examples[index] for index in kept]


@dataclass(slots=True)
class _Meter:
    """Turns finished rows into progress reports."""

    total: int
    on_progress: Callable[[Progress], None]
    done: int = 0

    def part(self, rows: int, message: str) -> Callable[[float], None]:
        """Return what is to be told the finished share, 0 to 1, of the next ``rows`` rows."""
        before = self.done
        self.done += rows

        def advance(share: float) -> None:
            # A second way to ask the base, found worth it on the way, was not counted in advance.
            percent = min(100.0, 100 * (before + rows * share) / self.total)
            self.on_progress(Progress(stage=Stage.EVALUATE, message=message, percent=percent))

        return advance


@dataclass(frozen=True, slots=True)
class _Examiner:
    """Puts questions to one model."""

    model: nn.Module
    name: str
    scorer: LogprobScorer
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    dataset: Dataset
    max_new_tokens: int
    meter: _Meter

    def choose(self, paper: _Paper) -> PromptDecision:
        """Choose template and normaliser on validation rows: by accuracy, or by perplexity where there are no labels.

        With a single template and no labels there is nothing to choose, and nothing is scored.
        """
        if paper.labels:
            scores = {
                template: collect_scores(
                    self._label_logprobs(paper.labels, self._rendered(paper.validation, template)), len(paper.labels)
                )
                for template in range(paper.templates)
            }
            return choose_prompt(scores, _label_indices(paper.labels, paper.validation), tuple(Normaliser))
        if paper.templates == 1:
            return PromptDecision(0, Normaliser.SUM, np.zeros(0), 0.0, {})
        perplexities = {
            template: perplexity(self._completion_logprobs(self._rendered(paper.validation, template)))
            for template in range(paper.templates)
        }
        best = min(perplexities, key=lambda template: perplexities[template])
        candidates = {f"template {template}": value for template, value in perplexities.items()}
        return PromptDecision(best, Normaliser.SUM, np.zeros(0), 0.0, candidates)

    def answer(self, paper: _Paper, decision: PromptDecision | None) -> _Answers:
        """Put the test rows: by the decision, or (the tuned model) by each row's own template and plain sums."""
        examples = self._rendered(paper.test, decision.template) if decision else paper.test
        texts = self._generated(examples) if paper.generates else None
        if not paper.labels:
            return _Answers(examples, self._completion_logprobs(examples), None, texts)
        logprobs = self._label_logprobs(paper.labels, examples)
        scores = collect_scores(logprobs, len(paper.labels))
        normaliser = decision.normaliser if decision else Normaliser.SUM
        prior = decision.prior if decision else label_prior(scores)
        chosen = predict(scores, normaliser, prior)
        right = _label_indices(paper.labels, examples)
        expected = [logprobs[row * len(paper.labels) + label] for row, label in enumerate(right)]
        return _Answers(examples, expected, [paper.labels[label] for label in chosen], texts)

    def _rendered(self, examples: Sequence[Example], template: int) -> list[Example]:
        return [self.dataset.rendered(example, template) for example in examples]

    def _label_logprobs(self, labels: Sequence[str], examples: Sequence[Example]) -> list[Floats]:
        """Return the log-probabilities of every label's completion, label by label within row by row."""
        encoded = self.renderer.encode_many(examples, self.dataset)
        prompts = [item.ids[: item.prompt_length] for item in encoded]
        return self._scored(
            [
                [self._with_label(example, prompt, label) for label in labels]
                for example, prompt in zip(examples, prompts, strict=True)
            ]
        )

    def _completion_logprobs(self, examples: Sequence[Example]) -> list[Floats]:
        return self._scored([[encoded] for encoded in self.renderer.encode_many(examples, self.dataset)])

    def _with_label(self, example: Example, prompt: tuple[int, ...], label: str) -> Encoded:
        completion = self.renderer.encode_completion(prompt, example, with_label(example.completion, label))
        return Encoded(prompt + completion, len(prompt))

    def _scored(self, rows: Sequence[Sequence[Encoded]]) -> list[Floats]:
        logprobs = self.scorer.token_logprobs(
            [item for row in rows for item in row],
            self.meter.part(len(rows), f"scoring {self.name} model"),
        )
        if not all(np.isfinite(row).all() for row in logprobs):
            raise TrainingDivergedError(
                f"the {self.name} model's log-probabilities are not finite: its weights hold NaN or overflow. "
                "Lower spec.training.learningRate or set spec.training.precision: fp32."
            )
        return logprobs

    def _generated(self, examples: Sequence[Example]) -> list[str]:
        report = self.meter.part(len(examples), f"generating with {self.name} model")
        return generate(
            self.model,
            self.tokenizer,
            [item.ids[: item.prompt_length] for item in self.renderer.encode_many(examples, self.dataset)],
            self.max_new_tokens,
            self.renderer.end_token_ids,
            GENERATION_BATCH_SIZE,
            lambda done, total: report(done / total),
        )


def _set_paper(task: str, dataset: Dataset, job: FineTuneJob) -> _Paper:
    seed = job.spec.training.seed
    labels = dataset.labels(task)
    validation, test = (
        [example for example in dataset.examples(split) if example.task == task]
        for split in (Split.VALIDATION, Split.TEST)
    )
    templates = len(dataset.task(task).templates)
    has_choice = bool(labels) or templates > 1
    if not test or (has_choice and not validation):
        raise DataError(
            f"task {task!r} has {len(test)} test rows and {len(validation)} validation rows; evaluation measures on "
            "the first and chooses the base model's prompt on the second. Raise spec.data.splits.test and "
            "spec.data.splits.validation, or give the task more rows."
        )
    return _Paper(
        task=task,
        labels=labels,
        metrics=_metrics_of(labels, job),
        templates=templates,
        validation=choose_rows(validation, CHOICE_ROWS, seed) if has_choice else [],
        test=choose_rows(test, job.spec.evaluation.max_examples, seed),
    )


def _metrics_of(labels: Sequence[str], job: FineTuneJob) -> tuple[str, ...]:
    """Return the metrics of one task: those asked for that it can have, or the usual ones; perplexity always."""
    asked = tuple(str(metric) for metric in job.spec.evaluation.metrics or ())
    usual = ("accuracy",) if labels else ("rouge", "exact_match")
    possible = [metric for metric in asked or usual if metric != "accuracy" or labels]
    return tuple(dict.fromkeys([*possible, "perplexity"]))


def _work(paper: _Paper, job_format: str) -> int:
    formats = 2 if paper.labels and job_format == "chat" else 1
    return formats * len(paper.validation) * paper.templates + 2 * len(paper.test) * (2 if paper.generates else 1)


def _label_indices(labels: Sequence[str], examples: Sequence[Example]) -> NDArray[np.int64]:
    index = {label: position for position, label in enumerate(labels)}
    return np.array([index[example.completion.strip()] for example in examples], dtype=np.int64)


def _score_rows(paper: _Paper, base: _Answers, tuned: _Answers) -> list[_RowScores]:
    """Return the metrics that every row has of its own, the most telling first."""
    scores: list[_RowScores] = []
    if "accuracy" in paper.metrics:
        scores.append(_RowScores("accuracy", _right_labels(base), _right_labels(tuned)))
    if "rouge" in paper.metrics:
        of_base, of_tuned = _rouge_rows(base), _rouge_rows(tuned)
        scores += [_RowScores(name, of_base[name], of_tuned[name]) for name in ROUGE_NAMES]
    if "exact_match" in paper.metrics:
        scores.append(_RowScores("exact_match", _matches(base), _matches(tuned)))
    return scores


def _right_labels(answers: _Answers) -> Floats:
    pairs = zip(answers.labels or (), answers.references, strict=True)
    return np.array([label == reference for label, reference in pairs], dtype=np.float64)


def _matches(answers: _Answers) -> Floats:
    pairs = zip(answers.texts or (), answers.references, strict=True)
    return np.array([exact_match(text, reference) for text, reference in pairs], dtype=np.float64)


def _rouge_rows(answers: _Answers) -> dict[str, Floats]:
    pairs = zip(answers.texts or (), answers.references, strict=True)
    scores = [rouge(text, reference) for text, reference in pairs]
    return {name: np.array([score[name].f1 for score in scores], dtype=np.float64) for name in ROUGE_NAMES}


def _compare(
    paper: _Paper,
    base: _Answers,
    tuned: _Answers,
    scores: Sequence[_RowScores],
    decision: PromptDecision,
    label_decision: PromptDecision,
    seed: int,
) -> list[MetricComparison]:
    comparisons = [
        _comparison(
            paper,
            row_scores.metric,
            (float(row_scores.base.mean()), float(row_scores.tuned.mean())),
            paired_bootstrap(row_scores.base, row_scores.tuned, seed),
            _notes(paper, row_scores.metric, tuned, label_decision if row_scores.metric == "accuracy" else decision),
        )
        for row_scores in scores
    ]
    both = perplexity(base.logprobs), perplexity(tuned.logprobs)
    interval = paired_bootstrap_perplexity(_likelihood_columns(base), _likelihood_columns(tuned), seed)
    return [
        *comparisons,
        _comparison(paper, "perplexity", both, interval, _notes(paper, "perplexity", tuned, decision)),
    ]


def _comparison(
    paper: _Paper, metric: str, both: tuple[float, float], interval: Interval, note: str
) -> MetricComparison:
    base, tuned = both
    return MetricComparison(
        task=paper.task,
        metric=metric,
        base=base,
        tuned=tuned,
        delta=tuned - base,
        low=interval.low,
        high=interval.high,
        rows=len(paper.test),
        higher_is_better=metric != "perplexity",
        note=note,
    )


def _likelihood_columns(answers: _Answers) -> tuple[list[float], list[int]]:
    return [-float(row.sum()) for row in answers.logprobs], [len(row) for row in answers.logprobs]


def _notes(paper: _Paper, metric: str, tuned: _Answers, decision: PromptDecision) -> str:
    notes = []
    if metric == "accuracy":
        notes.append(
            f"by label likelihood; base asked by {f'{decision.format} template'.lstrip()} {decision.template}, "
            f"likelihoods compared by {decision.normaliser}, both chosen on {len(paper.validation)} validation rows"
        )
    elif paper.templates > 1:
        notes.append(
            f"base asked by template {decision.template} of {paper.templates}, chosen on "
            f"{len(paper.validation)} validation rows"
        )
    if metric in ROUGE_NAMES:
        notes.append("F1, no stemming")
        if not all(rouge_reads(reference) for reference in tuned.references):
            notes.append("some references hold letters outside a-z, which ROUGE does not see")
    if metric == "perplexity":
        notes.append("over completion tokens, end token included")
    if len(paper.test) < FEW_ROWS:
        notes.append(f"fewer than {FEW_ROWS} rows: the interval is too narrow to rely on")
    return "; ".join(notes)


def _better(own: PromptDecision, raw: PromptDecision) -> PromptDecision:
    """Return the decision with the higher validation accuracy, ``own`` when equal, with all that was tried."""
    candidates = own.candidates | {f"raw {name}": accuracy for name, accuracy in raw.candidates.items()}
    chosen = replace(raw, format="raw") if raw.accuracy > own.accuracy else own
    return replace(chosen, candidates=candidates)


def _prompt_choice(task: str, decision: PromptDecision) -> PromptChoice:
    return PromptChoice(
        task=task,
        template=decision.template,
        format=decision.format,
        normaliser=decision.normaliser,
        validation_accuracy=decision.accuracy,
        candidates=decision.candidates,
    )


def _pick_examples(paper: _Paper, base: _Answers, tuned: _Answers, scores: Sequence[_RowScores]) -> list[SideBySide]:
    """Return the rows that moved most either way and some that stay wrong, best first; none without row scores."""
    if not scores:
        return []
    leading = scores[0] if scores[0].metric not in ROUGE_NAMES else next(s for s in scores if s.metric == "rougeL")
    change = leading.tuned - leading.base
    # Rows that moved equally far are ordered by how much likelier the expected answer became.
    likelihood = np.array(
        [float(t.mean() - b.mean()) for b, t in zip(base.logprobs, tuned.logprobs, strict=True)], dtype=np.float64
    )
    order = sorted(range(len(change)), key=lambda row: (-change[row], -likelihood[row]))
    improved = [row for row in order if change[row] > 0][:EXAMPLES_EACH]
    worsened = [row for row in order if change[row] < 0][-EXAMPLES_EACH:]
    still_wrong = [row for row in order if change[row] == 0 and leading.tuned[row] < 1][: EXAMPLES_EACH // 2]
    said = (base.labels, tuned.labels) if leading.metric == "accuracy" else (base.texts, tuned.texts)
    return [
        SideBySide(
            task=paper.task,
            row=tuned.examples[row].row,
            prompt=_shortened(tuned.examples[row].prompt),
            reference=_shortened(tuned.references[row]),
            base=_shortened((said[0] or [])[row]),
            tuned=_shortened((said[1] or [])[row]),
            metric=leading.metric,
            base_score=float(leading.base[row]),
            tuned_score=float(leading.tuned[row]),
        )
        for row in [*improved, *still_wrong, *worsened]
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"


def _prediction_rows(paper: _Paper, base: _Answers, tuned: _Answers) -> list[dict[str, object]]:
    """Return one flat row per test row; the columns are the same for every task."""
    return [
        {
            "task": paper.task,
            "row": example.row,
            "prompt": example.prompt,
            "reference": example.completion.strip(),
            "base_template": base.examples[index].template,
            "tuned_template": example.template,
            "base": base.texts[index] if base.texts else None,
            "tuned": tuned.texts[index] if tuned.texts else None,
            "base_label": base.labels[index] if base.labels else None,
            "tuned_label": tuned.labels[index] if tuned.labels else None,
            "base_logprob": float(base.logprobs[index].sum()),
            "tuned_logprob": float(tuned.logprobs[index].sum()),
            "base_tokens": len(base.logprobs[index]),
            "tuned_tokens": len(tuned.logprobs[index]),
        }
        for index, example in enumerate(tuned.examples)
    ]
