"""Compare the tuned model with its base on the test split, with the base given its best chance.

Everything that is chosen (the base's template, how label likelihoods are compared) is chosen on the validation split,
or, where the job keeps none back, on training rows, which the base has not seen either; the test split is scored once
and decides nothing. Each model is asked for once and answers all its questions then, so
that two loads never have to be in memory together.
"""

import operator
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import (
    BaseAndTuned,
    BenchmarkReport,
    Confusion,
    Efficiency,
    EvaluationReport,
    HarnessAccuracy,
    HolisticReport,
    MetricComparison,
    Progress,
    PromptChoice,
    SideBySide,
    Stage,
    SubgroupFigure,
    TradeOff,
)
from finetune_api.spec import Perturbation
from finetune_trainer.benchmark import Answers as BenchmarkAnswers
from finetune_trainer.benchmark import Benchmarks, check_gates
from finetune_trainer.comparison import adjust_for_many, describe, few_shot_comparison, measure
from finetune_trainer.dataset import Dataset
from finetune_trainer.disturbance import disturb
from finetune_trainer.errors import DataError, TrainingDivergedError
from finetune_trainer.example import Encoded, Example
from finetune_trainer.figure import (
    CALIBRATION_BINS,
    Figure,
    bits_per_byte_figure,
    bleu_figure,
    calibration_figure,
    chrf_figure,
    confusion_matrix,
    macro_f1_figure,
    mean_figure,
    mean_of,
    perplexity_figure,
    signatures,
    token_f1,
    token_probability_figure,
)
from finetune_trainer.fit import LONGEST_TEXT
from finetune_trainer.forgetting import GeneralAnswers, compare_abilities, forgetting_gate
from finetune_trainer.format_probe import ANSWER_TOKENS, compare_answers
from finetune_trainer.gate import Measurement, judge_gates
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.generation import generate
from finetune_trainer.holistic import axis_words, compare_robustness, compare_subgroups, compare_words
from finetune_trainer.in_context import draw_shown, with_shown
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
from finetune_trainer.memory import forget_peak, memory_errors, peak_bytes
from finetune_trainer.metrics import ROUGE_NAMES, exact_match, perplexity, rouge, rouge_reads
from finetune_trainer.model import position_limit
from finetune_trainer.parity import choose_probes, compare_probes, encode_probes, probe_logits
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split
from finetune_trainer.statistics import FEW_ROWS
from finetune_trainer.trade_off import Candidate, Findings, choose, weigh
from finetune_trainer.verdict import LEADING_METRICS

Floats = NDArray[np.float64]

CHOICE_ROWS = 200
"""Validation rows per task that the base's prompt is chosen on: enough to tell 0.60 from 0.75, cheap to score."""

_BY_LABEL = ("accuracy", "macro_f1", "ece")
"""Figures of the label that a model finds likeliest; the others are of what it writes, or of what it was to write."""

LONGEST_ANSWER_TOKENS = 64
SPARE_ANSWER_TOKENS = 8
GENERATION_BATCH_SIZE = 16

TRADE_OFF_ROWS = 500
"""Validation rows per task that a remedy is chosen on."""

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
    choice: list[Example]
    """Rows that the base's prompt is chosen on; empty when there is nothing to choose."""
    choice_split: Split
    """Where they come from: validation, or train where the job keeps no validation rows back."""
    test: list[Example]
    shown: list[Example]
    """Training rows that the base is shown answered, to see how far that brings it; empty when not asked for."""
    commonest: str
    """The label that training rows have most often; empty without labels."""
    group_by: str | None = None
    """Column whose equal values make rows alike, as ``spec.data.splits.groupBy``."""
    groups: Sequence[str] | None = None
    """Of each test row the group that it is drawn with; absent where every row stands for itself."""

    @property
    def generates(self) -> bool:
        return not {*self.metrics} <= {"accuracy", "perplexity"}


@dataclass(frozen=True, slots=True)
class _Answers:
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
        return [example.completion.strip() for example in self.examples]


@memory_errors(
    "a batch of the evaluation",
    "lower spec.data.maxLength or spec.evaluation.generation.maxNewTokens, or give it more memory",
)
def evaluate(
    model: Pair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    dataset: Dataset,
    job: FineTuneJob,
    scorer_factory: Callable[[nn.Module], LogprobScorer],
    on_progress: Callable[[Progress], None],
    suite: GeneralSuite | None = None,
    benchmarks: Benchmarks | None = None,
) -> tuple[EvaluationReport, list[dict[str, object]]]:
    """Return the comparison on the test split, and what both models said to every row of it.

    ``suite`` is what ``spec.evaluation.forgetting`` is measured on, ``benchmarks`` what ``spec.evaluation.benchmarks``
    names, where the job has them.

    Raises:
        DataError: a task has no test row, or none that the base's prompt can be chosen on.
        TrainingDivergedError: a model's log-probabilities are not numbers.
        OutOfMemoryError: a batch did not fit.
    """
    started = time.monotonic()
    seed = job.spec.training.seed
    papers = [_set_paper(task, dataset, job) for task in dataset.tasks]
    work = sum(_work(paper, renderer.format) for paper in papers)
    holistic = _HolisticQuestions.of(job, papers, dataset) if job.spec.evaluation.holistic else None
    work += 2 * holistic.size if holistic else 0
    work += 2 * suite.size if suite else 0
    work += 2 * benchmarks.requests if benchmarks else 0
    meter = _Meter(work, on_progress)
    max_new_tokens = job.spec.evaluation.generation.max_new_tokens or answer_bound(
        tokenizer, (example.completion for example in dataset.examples(Split.TRAIN))
    )

    def examiner(lent: nn.Module, name: str, renderer: Renderer, shows: bool = False) -> _Examiner:
        lent.eval()
        return _Examiner(lent, name, scorer_factory(lent), tokenizer, renderer, dataset, max_new_tokens, meter, shows)

    def beside(own: _Examiner, raw: _Examiner, asked: Mapping[str, _Asked]) -> _Beside:
        message = f"asking {own.name} model benchmarks"
        return _Beside(
            abilities=raw.answer_suite(suite) if suite else None,
            said=own.answer_questions(suite.open_questions) if suite else [],
            holistic=holistic.answers(own, raw, asked) if holistic else None,
            benchmarks=benchmarks.ask(own.model, lambda count: meter.part(count, message)) if benchmarks else (),
        )

    probes = encode_probes(
        tokenizer, choose_probes((row.prompt, row.completion) for paper in papers for row in paper.test)
    )
    few_shot: dict[str, _Asked] = {}
    with model.base() as base:
        base_logits = probe_logits(base, probes)
        own = examiner(base, "base", renderer)
        raw = examiner(base, "base", renderer.raw())
        zero_shot = {paper.task: _ask_base(own, raw, paper) for paper in papers}
        if job.spec.evaluation.baselines.few_shot:
            room = (position_limit(cast(PreTrainedModel, base).config) or LONGEST_TEXT) - max_new_tokens
            own_shown = examiner(base, "base", renderer.with_length(room), True)
            raw_shown = examiner(base, "base", renderer.raw(room), True)
            few_shot = {paper.task: _ask_base(own_shown, raw_shown, paper) for paper in papers}
        base_beside = beside(own, raw, zero_shot)
    with model.tuned() as tuned:
        probe = compare_probes(base_logits, probe_logits(tuned, probes))
        tuned_examiner = examiner(tuned, "tuned", renderer)
        tuned_answers = {paper.task: tuned_examiner.answer(paper, None) for paper in papers}
        tuned_raw = examiner(tuned, "tuned", renderer.raw())
        tuned_beside = beside(tuned_examiner, tuned_raw, {})

    compared = [
        _compare(paper, zero_shot[paper.task], few_shot.get(paper.task), tuned_answers[paper.task], seed)
        for paper in papers
    ]
    measured = {name: found for one in compared for name, found in one.measured.items()}
    benchmark_reports: tuple[BenchmarkReport, ...] = ()
    if benchmarks:
        benchmark_reports, of_benchmarks = benchmarks.compare(base_beside.benchmarks, tuned_beside.benchmarks, seed)
        check_gates(job.spec.evaluation.gates, dataset.tasks, of_benchmarks)
        measured |= of_benchmarks
    gates = judge_gates(job.spec.evaluation.gates, measured)
    budget = job.spec.evaluation.forgetting
    forgetting = None
    if budget and suite and base_beside.abilities and tuned_beside.abilities:
        forgetting = compare_abilities(suite, base_beside.abilities, tuned_beside.abilities, budget, seed)
        labels = [label for paper in papers for label in paper.labels]
        form = compare_answers(suite.open_questions, base_beside.said, tuned_beside.said, labels)
        forgetting = forgetting.model_copy(update={"format": form if suite.open_questions else None})
        gates = (*gates, forgetting_gate(forgetting))
    report = EvaluationReport(
        metrics=adjust_for_many([metric for one in compared for metric in one.metrics]),
        gates=gates,
        forgetting=forgetting,
        benchmarks=benchmark_reports,
        holistic=holistic.compare(zero_shot, tuned_answers, base_beside.holistic, tuned_beside.holistic)
        if holistic and base_beside.holistic and tuned_beside.holistic
        else None,
        probe=probe,
        few_shot=max((len(paper.shown) for paper in papers), default=0) or None,
        confusions=tuple(
            found
            for paper in papers
            for found in _confusions(paper, zero_shot[paper.task].answers, tuned_answers[paper.task])
        ),
        harness=tuple(
            found
            for paper in papers
            for found in _harness(paper, zero_shot[paper.task].answers, tuned_answers[paper.task])
        ),
        prompt_choices=tuple(
            _prompt_choice(paper.task, zero_shot[paper.task].label_decision)
            for paper in papers
            if "accuracy" in paper.metrics
        ),
        examples=tuple(example for one in compared for example in one.examples),
        seconds=time.monotonic() - started,
    )
    return report, [row for one in compared for row in one.predictions]


def weigh_candidates(
    model: Pair,
    candidates: Sequence[Candidate],
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    dataset: Dataset,
    job: FineTuneJob,
    scorer_factory: Callable[[nn.Module], LogprobScorer],
    on_progress: Callable[[Progress], None],
    suite: GeneralSuite,
) -> TradeOff:
    """Return what each candidate gains on validation rows and loses on ``suite``, and which one to take.

    Args:
        model: its base is what candidates are held against.
        candidates: weakest first, the last one as trained.
        tokenizer: of both.
        renderer: as for `evaluate`.
        dataset: its test split is not read.
        job: has a budget in ``spec.evaluation.forgetting``.
        scorer_factory: as for `evaluate`.
        on_progress: hears how far it is.
        suite: general rows that the verdict is not measured on.

    Raises:
        DataError: a task has no validation row.
        TrainingDivergedError: a model's log-probabilities are not numbers.
    """
    seed, budget = job.spec.training.seed, job.spec.evaluation.forgetting
    assert budget is not None
    papers = [_validation_paper(task, dataset, seed) for task in dataset.tasks]
    rows = sum(len(paper.test) for paper in papers)
    meter = _Meter((rows + len(suite.rows)) * (1 + len(candidates)), on_progress)

    def find(lent: nn.Module, name: str) -> Findings:
        lent.eval()
        own, raw = (
            _Examiner(lent, name, scorer_factory(lent), tokenizer, asked, dataset, 0, meter)
            for asked in (renderer, renderer.raw())
        )
        reached = {paper.task: _task_figure(paper, own.answer(paper, None)).value for paper in papers}
        return Findings(reached, raw.answer_suite(suite))

    with model.base() as base:
        before = find(base, "base")
    points = []
    for candidate in candidates:
        with candidate.lend() as tuned:
            after = find(tuned, "tuned")
        points.append(weigh(candidate, before, after, suite.rows, budget, seed))
    return choose(points, budget, rows, len(suite.rows))


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
            percent = 100 * (before + rows * share) / self.total
            self.on_progress(Progress(stage=Stage.EVALUATE, message=message, percent=percent))

        return advance

    def skip(self, rows: int) -> None:
        """Count ``rows`` rows that turned out not to be needed."""
        self.done += rows


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
    shows: bool = False
    """Whether every question comes behind the paper's shown rows."""

    def choose(self, paper: _Paper) -> PromptDecision:
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

    def answer(self, paper: _Paper, decision: PromptDecision | None) -> _Answers:
        """Put the test rows: by the decision, or (the tuned model) by each row's own template and plain sums."""
        examples = self._rendered(paper, paper.test, decision.template) if decision else paper.test
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
        harness = harness_accuracy(logprobs, paper.labels, right, self.renderer.end_length)
        sure = confidences(scores, normaliser, prior)
        return _Answers(examples, expected, [paper.labels[label] for label in chosen], texts, sure, harness)

    def answer_suite(self, suite: GeneralSuite) -> GeneralAnswers:
        """Choose among the continuations of every general row by plain sums, the end token not counted."""
        encoded = iter(self.renderer.encode_continuations(suite.pairs))
        asked = [[next(encoded) for _ in row.choices] for row in suite.rows]
        logprobs = iter(self._scored([*asked, *([item] for item in encoded)]))
        likeliest = [int(np.argmax([next(logprobs).sum() for _ in row.choices])) for row in suite.rows]
        right = np.array([choice == row.right for choice, row in zip(likeliest, suite.rows, strict=True)])
        return GeneralAnswers(right, list(logprobs))

    def _rendered(self, paper: _Paper, examples: Sequence[Example], template: int) -> list[Example]:
        return with_shown(self.dataset, examples, template, paper.shown if self.shows else ())

    def _label_logprobs(self, labels: Sequence[str], examples: Sequence[Example]) -> list[Floats]:
        """Return the log-probabilities of every label's completion, label by label within row by row."""
        encoded = self.renderer.encode_many(examples, self.dataset)
        return self._scored(
            [
                [
                    self.renderer.with_completion(item, example, with_label(example.completion, label))
                    for label in labels
                ]
                for example, item in zip(examples, encoded, strict=True)
            ]
        )

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
        return self._written([self.renderer.encode_question(question) for question in questions], ANSWER_TOKENS)

    def _generated(self, examples: Sequence[Example]) -> list[str]:
        prompts = [item.prompt_ids for item in self.renderer.encode_many(examples, self.dataset)]
        return self._written(prompts, self.max_new_tokens)

    def _written(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> list[str]:
        report = self.meter.part(len(prompts), f"generating with {self.name} model")
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens,
            self.renderer.end_token_ids,
            GENERATION_BATCH_SIZE,
            lambda done, total: report(done / total),
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """How the base was asked, and what it said."""

    decision: PromptDecision
    label_decision: PromptDecision
    """For naming a label, where the base of a chat job may do better without its chat template."""
    answers: _Answers


def _ask_base(own: _Examiner, raw: _Examiner, paper: _Paper) -> _Asked:
    """Return the base's answers to a paper, asked the way that serves it best on the rows to choose on.

    Args:
        own: asks in the job's own format.
        raw: asks without the chat template.
        paper: the questions.
    """
    decision = own.choose(paper)
    answers = own.answer(paper, decision)
    if not paper.labels or own.renderer.format != "chat":
        return _Asked(decision, decision, answers)
    # Small chat models often know the answer but not the chat: the base may name it without its template.
    # Likelihoods are compared in the job's own format all the same: they differ between formats.
    label_decision = _better(decision, raw.choose(paper))
    if label_decision.format:
        named = raw.answer(replace(paper, metrics=("accuracy",)), label_decision)
        answers = replace(answers, labels=named.labels, confidences=named.confidences)
    else:
        raw.meter.skip(len(paper.test))
    return _Asked(decision, label_decision, answers)


def _set_paper(task: str, dataset: Dataset, job: FineTuneJob) -> _Paper:
    seed = job.spec.training.seed
    labels = dataset.labels(task)
    is_kept_back = job.spec.data.splits.validation or dataset.task(task).validation_source is not None
    choice_split = Split.VALIDATION if is_kept_back else Split.TRAIN
    choice, test = (dataset.examples(split, task) for split in (choice_split, Split.TEST))
    count = job.spec.evaluation.baselines.few_shot
    shown = draw_shown(dataset, task, count, seed) if count else []
    if choice_split is Split.TRAIN:
        choice = [example for example in choice if example not in shown]
    templates = dataset.phrasings(task)
    has_choice = bool(labels) or templates > 1
    if not test or (has_choice and not choice):
        raise DataError(
            f"task {task!r} has {len(test)} test rows and {len(choice)} {choice_split} rows; evaluation measures on "
            "the first and chooses the base model's prompt on the second. Raise spec.data.splits.test and "
            "spec.data.splits.validation, or give the task more rows."
        )
    asked, column = choose_rows(test, job.spec.evaluation.max_examples, seed), job.spec.data.splits.group_by
    return _Paper(
        task=task,
        labels=labels,
        metrics=_metrics_of(labels, job),
        templates=templates,
        choice=choose_rows(choice, CHOICE_ROWS, seed) if has_choice else [],
        choice_split=choice_split,
        test=asked,
        shown=shown,
        commonest=_commonest_label(dataset, task),
        group_by=column,
        groups=None if column is None else [str(row.values.get(column, "")) for row in asked],
    )


def _validation_paper(task: str, dataset: Dataset, seed: int) -> _Paper:
    """Return a task's validation rows as questions whose answers are scored, never generated."""
    rows = dataset.examples(Split.VALIDATION, task)
    if not rows:
        raise DataError(
            f"task {task!r} has no validation rows, on which spec.evaluation.forgetting.remedy chooses. Raise "
            "spec.data.splits.validation, or give the task more rows."
        )
    return _Paper(
        task=task,
        labels=dataset.labels(task),
        metrics=(),
        templates=dataset.phrasings(task),
        choice=[],
        choice_split=Split.VALIDATION,
        test=choose_rows(rows, TRADE_OFF_ROWS, seed),
        shown=[],
        commonest="",
    )


def _task_figure(paper: _Paper, answers: _Answers) -> Figure:
    """Return what a task gains by without generation, 0 to 1: accuracy, or how likely the expected tokens are."""
    if answers.labels is not None:
        return mean_of(operator.eq, "accuracy", answers.labels, answers.references)
    return token_probability_figure(answers.logprobs)


def _commonest_label(dataset: Dataset, task: str) -> str:
    """Return the label that most training rows of a task have, of equally common ones the first declared."""
    if not dataset.labels(task):
        return ""
    seen = Counter(example.completion.strip() for example in dataset.examples(Split.TRAIN, task))
    return max(dataset.labels(task), key=lambda label: seen[label])


def _commonest_figures(paper: _Paper) -> dict[str, float]:
    """Return what saying the commonest label always would reach."""
    if not paper.labels:
        return {}
    expected = [example.completion.strip() for example in paper.test]
    said = [paper.commonest] * len(expected)
    figures = (mean_of(operator.eq, "accuracy", said, expected), macro_f1_figure(said, expected, paper.labels))
    return {figure.name: figure.value for figure in figures}


def _metrics_of(labels: Sequence[str], job: FineTuneJob) -> tuple[str, ...]:
    """Return the metrics of one task: those asked for that it can have, or the usual ones; perplexity always."""
    asked = tuple(str(metric) for metric in job.spec.evaluation.metrics or ())
    usual = ("accuracy",) if labels else ("rouge", "exact_match")
    possible = [metric for metric in asked or usual if metric != "accuracy" or labels]
    return tuple(dict.fromkeys([*possible, "perplexity"]))


def _work(paper: _Paper, job_format: str) -> int:
    formats = 2 if paper.labels and job_format == "chat" else 1
    test = len(paper.test) * (2 if paper.generates else 1)
    # At most: the second format may not be worth it behind the choice.
    of_base = formats * len(paper.choice) * paper.templates + test + (formats - 1) * len(paper.test)
    return of_base * (2 if paper.shown else 1) + test


def _label_indices(labels: Sequence[str], examples: Sequence[Example]) -> NDArray[np.int64]:
    index = {label: position for position, label in enumerate(labels)}
    return np.array([index[example.completion.strip()] for example in examples], dtype=np.int64)


def _figures(paper: _Paper, answers: _Answers) -> list[Figure]:
    """Return what one model's answers amount to, the most telling first."""
    figures: list[Figure] = []
    expected = answers.references
    if "accuracy" in paper.metrics:
        said = answers.labels or []
        figures.append(mean_of(operator.eq, "accuracy", said, expected))
        figures.append(macro_f1_figure(said, expected, paper.labels))
        right = [one == reference for one, reference in zip(said, expected, strict=True)]
        figures.append(calibration_figure([] if answers.confidences is None else answers.confidences, right))
    texts = answers.texts or []
    if "rouge" in paper.metrics:
        scores = [rouge(text, reference) for text, reference in zip(texts, expected, strict=True)]
        figures += [mean_figure(name, [score[name].f1 for score in scores]) for name in ROUGE_NAMES]
    if "exact_match" in paper.metrics:
        figures.append(mean_of(exact_match, "exact_match", texts, expected))
    if "token_f1" in paper.metrics:
        figures.append(mean_of(token_f1, "token_f1", texts, expected))
    if "bleu" in paper.metrics:
        figures.append(bleu_figure(texts, expected))
    if "chrf" in paper.metrics:
        figures.append(chrf_figure(texts, expected))
    return [*figures, perplexity_figure(answers.logprobs), bits_per_byte_figure(answers.logprobs, expected)]


@dataclass(frozen=True, slots=True)
class _HolisticAnswers:
    """What one model says beside its tasks' test rows."""

    disturbed: dict[tuple[str, Perturbation], Figure]
    """Of each task's disturbed rows, the task's figure."""
    written: list[str]
    """Behind each opening."""
    tokens: int
    seconds: float
    peak_bytes: int | None
    """While writing."""


@dataclass(frozen=True, slots=True)
class _HolisticQuestions:
    """What ``spec.evaluation.holistic`` asks of both models."""

    papers: list[_Paper]
    disturbed: dict[tuple[str, Perturbation], _Paper]
    openings: tuple[str, ...]
    column: str | None
    """``spec.evaluation.holistic.subgroupColumn``."""
    seed: int

    @classmethod
    def of(cls, job: FineTuneJob, papers: list[_Paper], dataset: Dataset) -> "_HolisticQuestions":
        spec, seed = job.spec.evaluation.holistic, job.spec.training.seed
        assert spec is not None
        disturbed = {
            (paper.task, how): _disturbed(paper, how, dataset, seed) for paper in papers for how in spec.perturbations
        }
        return cls(papers, disturbed, axis_words().openings, spec.subgroup_column, seed)

    @property
    def size(self) -> int:
        """Questions to each model."""
        return sum(len(paper.test) for paper in self.disturbed.values()) + len(self.openings)

    def answers(self, own: _Examiner, raw: _Examiner, asked: Mapping[str, _Asked]) -> _HolisticAnswers:
        """Return what a model says; the base, which alone is in ``asked``, is asked as its plain test rows were."""
        figures = {}
        for key, paper in self.disturbed.items():
            decision = asked[paper.task].label_decision if paper.task in asked else None
            examiner = raw if decision and decision.format else own
            figures[key] = _task_figure(paper, examiner.answer(paper, decision))
        is_measured, started = forget_peak(), time.monotonic()
        written = own.answer_questions(self.openings)
        seconds = time.monotonic() - started
        peak = peak_bytes() if is_measured else None
        tokens = sum(len(own.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written)
        return _HolisticAnswers(figures, written, tokens, seconds, peak)

    def compare(
        self,
        asked: Mapping[str, _Asked],
        tuned_answers: Mapping[str, _Answers],
        base: _HolisticAnswers,
        tuned: _HolisticAnswers,
    ) -> HolisticReport:
        """Return both models side by side on every axis."""
        metrics: list[MetricComparison] = []
        subgroups: list[SubgroupFigure] = []
        for paper in self.papers:
            before, after = (_task_figure(paper, one) for one in (asked[paper.task].answers, tuned_answers[paper.task]))
            for (task, how), disturbed in base.disturbed.items():
                if task == paper.task:
                    pairs = (before, disturbed), (after, tuned.disturbed[task, how])
                    metrics.append(compare_robustness(task, how, *pairs, self.seed, paper.groups))
            if self.column is not None:
                values = [str(row.values.get(self.column, "")) for row in paper.test]
                found, gap = compare_subgroups(paper.task, values, before, after, self.seed, paper.groups)
                subgroups += found
                metrics += [gap] if gap else []
        words, of_words = compare_words(base.written, tuned.written, self.seed)
        return HolisticReport(
            metrics=adjust_for_many([*metrics, *of_words]),
            subgroups=tuple(subgroups),
            words=words,
            openings=len(self.openings),
            efficiency=_efficiency(base, tuned),
        )


@dataclass(frozen=True, slots=True)
class _Beside:
    """What one model says to all that is no test row of a task."""

    abilities: GeneralAnswers | None
    """Of the general suite."""
    said: list[str]
    """To its open questions."""
    holistic: _HolisticAnswers | None
    benchmarks: Sequence[BenchmarkAnswers]


def _disturbed(paper: _Paper, how: Perturbation, dataset: Dataset, seed: int) -> _Paper:
    """Return the same questions with disturbed inputs, whose answers are scored and never generated."""
    rows = [
        dataset.with_input(row, partial(disturb, how=how, seed=f"{seed} {paper.task} {row.row}")) for row in paper.test
    ]
    return replace(paper, test=rows, metrics=("accuracy",) if paper.labels else ())


def _efficiency(base: _HolisticAnswers, tuned: _HolisticAnswers) -> Efficiency:
    peaks = None
    if base.peak_bytes is not None and tuned.peak_bytes is not None:
        peaks = BaseAndTuned(base=base.peak_bytes, tuned=tuned.peak_bytes)
    return Efficiency(
        tokens=BaseAndTuned(base=base.tokens, tuned=tuned.tokens),
        tokens_per_second=BaseAndTuned(base=base.tokens / base.seconds, tuned=tuned.tokens / tuned.seconds),
        peak_bytes=peaks,
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """Base and tuned model on one task."""

    metrics: list[MetricComparison]
    measured: dict[str, Measurement]
    """By ``<task>.<figure>``, as gates name them."""
    examples: list[SideBySide]
    predictions: list[dict[str, object]]


def _compare(paper: _Paper, asked: _Asked, shown: _Asked | None, tuned: _Answers, seed: int) -> _Compared:
    """Put every figure of a task side by side, of the base asked with examples as well where it was."""
    metrics: list[MetricComparison] = []
    measured: dict[str, Measurement] = {}
    answers = asked.answers, tuned
    figures = {base.name: (base, other) for base, other in zip(*(_figures(paper, one) for one in answers), strict=True)}
    parts = _rouge_parts(paper, *answers)
    with_examples = {} if shown is None else {figure.name: figure for figure in _figures(paper, shown.answers)}
    commonest = _commonest_figures(paper)
    for name, (base_figure, tuned_figure) in figures.items():
        found = measured[f"{paper.task}.{name}"] = measure(base_figure, tuned_figure, seed, paper.groups)
        decision = asked.label_decision if name in _BY_LABEL else asked.decision
        comparison = describe(paper.task, name, found, _notes(paper, name, tuned, decision))
        if name in with_examples:
            against = measure(with_examples[name], tuned_figure, seed, paper.groups)
            comparison = comparison.model_copy(update={"few_shot": few_shot_comparison(against)})
        metrics.append(comparison.model_copy(update={"majority": commonest.get(name), **parts.get(name, {})}))
    return _Compared(
        metrics,
        measured,
        list(_pick_examples(paper, *answers, figures)),
        _prediction_rows(paper, *answers, None if shown is None else shown.answers),
    )


def _rouge_parts(paper: _Paper, base: _Answers, tuned: _Answers) -> dict[str, dict[str, BaseAndTuned]]:
    """Return the mean precision and recall behind each ROUGE figure."""
    if "rouge" not in paper.metrics:
        return {}
    scores = [
        [rouge(text, reference) for text, reference in zip(one.texts or [], one.references, strict=True)]
        for one in (base, tuned)
    ]

    def means(name: str, part: str) -> BaseAndTuned:
        of_base, of_tuned = (float(np.mean([getattr(score[name], part) for score in one])) for one in scores)
        return BaseAndTuned(base=of_base, tuned=of_tuned)

    return {name: {part: means(name, part) for part in ("precision", "recall")} for name in ROUGE_NAMES}


def _confusions(paper: _Paper, base: _Answers, tuned: _Answers) -> Iterator[Confusion]:
    if "accuracy" in paper.metrics:
        of_base, of_tuned = (
            tuple(map(tuple, confusion_matrix(one.labels or [], one.references, paper.labels).tolist()))
            for one in (base, tuned)
        )
        yield Confusion(task=paper.task, labels=paper.labels, base=of_base, tuned=of_tuned)


def _notes(paper: _Paper, metric: str, tuned: _Answers, decision: PromptDecision) -> str:
    notes = []
    if metric in _BY_LABEL:
        notes.append(
            f"by label likelihood; base asked by {f'{decision.format} template'.lstrip()} {decision.template}, "
            f"likelihoods compared by {decision.normaliser}, both chosen on {_chosen_on(paper)}"
        )
    elif paper.templates > 1:
        notes.append(f"base asked by template {decision.template} of {paper.templates}, chosen on {_chosen_on(paper)}")
    if metric in ROUGE_NAMES:
        notes.append("F1, no stemming")
        if not all(rouge_reads(reference) for reference in tuned.references):
            notes.append("some references hold letters outside a-z, which ROUGE does not see")
    if metric == "macro_f1":
        notes.append(f"mean of the F1 of {len(paper.labels)} labels")
    if metric == "ece":
        notes.append(f"mean gap between probability of the label named and accuracy, {CALIBRATION_BINS} bins")
    if metric == "bits_per_byte":
        notes.append("over bytes of the expected answers; tokens as for perplexity")
    if metric == "token_f1":
        notes.append("shared words as SQuAD counts them: articles, case and punctuation aside")
    if metric in ("bleu", "chrf"):
        notes.append(f"sacrebleu {signatures()[metric]}, from 0 to 1")
    if metric == "perplexity":
        notes.append("over completion tokens, end token included")
    if paper.groups is not None:
        notes.append(f"rows of one {paper.group_by} are drawn together: {len({*paper.groups}):,} groups")
    if len({*paper.groups} if paper.groups else paper.test) < FEW_ROWS:
        what = "rows" if paper.groups is None else "groups"
        notes.append(f"fewer than {FEW_ROWS} {what}: the interval is too narrow to rely on")
    return "; ".join(notes)


def _chosen_on(paper: _Paper) -> str:
    return f"{len(paper.choice)} {'training' if paper.choice_split is Split.TRAIN else 'validation'} rows"


def _better(own: PromptDecision, raw: PromptDecision) -> PromptDecision:
    """Return the decision with the higher validation accuracy, ``own`` when equal, with all that was tried."""
    candidates = own.candidates | {f"raw {name}": accuracy for name, accuracy in raw.candidates.items()}
    chosen = replace(raw, format="raw") if raw.accuracy > own.accuracy else own
    return replace(chosen, candidates=candidates)


def _harness(paper: _Paper, base: _Answers, tuned: _Answers) -> Iterator[HarnessAccuracy]:
    if base.harness is not None and tuned.harness is not None:
        (base_acc, base_norm), (tuned_acc, tuned_norm) = base.harness, tuned.harness
        yield HarnessAccuracy(
            task=paper.task, base_acc=base_acc, base_acc_norm=base_norm, tuned_acc=tuned_acc, tuned_acc_norm=tuned_norm
        )


def _prompt_choice(task: str, decision: PromptDecision) -> PromptChoice:
    return PromptChoice(
        task=task,
        template=decision.template,
        format=decision.format,
        normaliser=decision.normaliser,
        validation_accuracy=decision.accuracy,
        candidates=decision.candidates,
    )


def _pick_examples(
    paper: _Paper, base: _Answers, tuned: _Answers, figures: Mapping[str, tuple[Figure, Figure]]
) -> list[SideBySide]:
    """Return the rows that moved most either way and some that stay wrong, best first; none by perplexity alone."""
    metric = next(name for name in LEADING_METRICS if name in figures)
    if metric == "perplexity":
        return []
    base_scores, tuned_scores = (figure.of_each_row for figure in figures[metric])
    change = tuned_scores - base_scores
    # Rows that moved equally far are ordered by how much likelier the expected answer became.
    likelihood = np.array(
        [float(t.mean() - b.mean()) for b, t in zip(base.logprobs, tuned.logprobs, strict=True)], dtype=np.float64
    )
    order = sorted(range(len(change)), key=lambda row: (-change[row], -likelihood[row]))
    improved = [row for row in order if change[row] > 0][:EXAMPLES_EACH]
    worsened = [row for row in order if change[row] < 0][-EXAMPLES_EACH:]
    still_wrong = [row for row in order if change[row] == 0 and tuned_scores[row] < 1][: EXAMPLES_EACH // 2]
    said = (base.labels, tuned.labels) if metric == "accuracy" else (base.texts, tuned.texts)
    return [
        SideBySide(
            task=paper.task,
            row=tuned.examples[row].row,
            prompt=_shortened(tuned.examples[row].prompt),
            reference=_shortened(tuned.references[row]),
            base=_shortened((said[0] or [])[row]),
            tuned=_shortened((said[1] or [])[row]),
            metric=metric,
            base_score=float(base_scores[row]),
            tuned_score=float(tuned_scores[row]),
        )
        for row in [*improved, *still_wrong, *worsened]
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"


def _prediction_rows(
    paper: _Paper, base: _Answers, tuned: _Answers, few_shot: _Answers | None
) -> list[dict[str, object]]:
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
            "base_confidence": _confidence(base, index),
            "tuned_confidence": _confidence(tuned, index),
            "base_logprob": float(base.logprobs[index].sum()),
            "tuned_logprob": float(tuned.logprobs[index].sum()),
            "base_tokens": len(base.logprobs[index]),
            "tuned_tokens": len(tuned.logprobs[index]),
        }
        | _few_shot_columns(few_shot, index)
        | ({} if paper.groups is None else {"group": paper.groups[index]})
        for index, example in enumerate(tuned.examples)
    ]


def _confidence(answers: _Answers, index: int) -> float | None:
    return None if answers.confidences is None else float(answers.confidences[index])


def _few_shot_columns(few_shot: _Answers | None, index: int) -> dict[str, object]:
    if few_shot is None:
        return {}
    return {
        "few_shot": few_shot.texts[index] if few_shot.texts else None,
        "few_shot_label": few_shot.labels[index] if few_shot.labels else None,
    }
