"""Compare the tuned model with its base on the test split, with the base given its best chance.

Everything that is chosen (the base's template, how label likelihoods are compared) is chosen on the validation split,
or, where the job keeps none back, on training rows, which the base has not seen either; the test split is scored once
and decides nothing. Each model is asked for once and answers all its questions then, so
that two loads never have to be in memory together.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from finetune_api.report import BenchmarkReport, EvaluationReport, ForgettingReport, HolisticReport, ProbeReport
from finetune_trainer.benchmark import Answers as BenchmarkAnswers
from finetune_trainer.benchmark import Benchmarks, check_gates
from finetune_trainer.comparison import adjust_for_many
from finetune_trainer.examiner import Answers, Asked, Examiner, Meter, Trial, answer_bound, ask_base
from finetune_trainer.fit import LONGEST_TEXT
from finetune_trainer.forgetting import GeneralAnswers, compare_abilities, forgetting_gate
from finetune_trainer.format_probe import compare_answers
from finetune_trainer.gate import Measurement, Unmeasured, judge_gates
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.holistic_question import HolisticAnswers, HolisticQuestions
from finetune_trainer.memory import memory_errors
from finetune_trainer.model import position_limit
from finetune_trainer.paper import Paper, count_questions, set_paper
from finetune_trainer.parity import choose_probes, compare_probes, encode_probes, probe_logits
from finetune_trainer.split import Split
from finetune_trainer.task_comparison import compare_task, confusions, describe_choice, harness_accuracies


@memory_errors(
    "a batch of the evaluation",
    "lower spec.data.maxLength or spec.evaluation.generation.maxNewTokens, or give it more memory",
)
def evaluate(
    trial: Trial, suite: GeneralSuite | None = None, benchmarks: Benchmarks | None = None
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
    questions = _set_questions(trial, suite, benchmarks)
    heard = _ask_both(trial, questions)
    return _compare(trial, questions, heard, started)


# --- what is asked


@dataclass(frozen=True, slots=True)
class _Questions:
    """All that both models are asked."""

    papers: Sequence[Paper]
    holistic: HolisticQuestions | None
    suite: GeneralSuite | None
    benchmarks: Benchmarks | None


def _set_questions(trial: Trial, suite: GeneralSuite | None, benchmarks: Benchmarks | None) -> _Questions:
    job, dataset = trial.job, trial.dataset
    papers = [set_paper(task, dataset, job) for task in dataset.tasks]
    holistic = HolisticQuestions.of(job, papers, dataset) if job.spec.evaluation.holistic else None
    return _Questions(papers, holistic, suite, benchmarks)


def _work(questions: _Questions, format: str) -> int:
    """Return how many answers both models owe."""
    beside = [
        questions.holistic.size if questions.holistic else 0,
        questions.suite.size if questions.suite else 0,
        questions.benchmarks.requests if questions.benchmarks else 0,
    ]
    return sum(count_questions(paper, format) for paper in questions.papers) + 2 * sum(beside)


# --- what is answered


@dataclass(frozen=True, slots=True)
class _Beside:
    """What one model says to all that is no test row of a task."""

    abilities: GeneralAnswers | None
    """Of the general suite."""
    said: list[str]
    """To its open questions."""
    holistic: HolisticAnswers | None
    benchmarks: Sequence[BenchmarkAnswers]


@dataclass(frozen=True, slots=True)
class _Heard:
    """What both models say; by task, what they say to its test rows."""

    zero_shot: Mapping[str, Asked]
    """Of the base."""
    few_shot: Mapping[str, Asked]
    """Of the base that is shown training rows; empty unless the job asks for it."""
    tuned: Mapping[str, Answers]
    base_beside: _Beside
    tuned_beside: _Beside
    probe: ProbeReport


def _ask_both(trial: Trial, questions: _Questions) -> _Heard:
    evaluation, renderer, papers = trial.job.spec.evaluation, trial.renderer, questions.papers
    meter = Meter(_work(questions, renderer.format), trial.on_progress)
    max_new_tokens = evaluation.generation.max_new_tokens or answer_bound(
        trial.tokenizer, (example.completion for example in trial.dataset.examples(Split.TRAIN))
    )
    probes = encode_probes(
        trial.tokenizer, choose_probes((row.prompt, row.completion) for paper in papers for row in paper.test)
    )
    few_shot: dict[str, Asked] = {}
    with trial.models.base() as model:
        base_logits = probe_logits(model, probes)
        base = trial.examiner(model, "base", meter, max_new_tokens)
        zero_shot = {paper.task: ask_base(base, base.in_format(renderer.raw()), paper) for paper in papers}
        if evaluation.baselines.few_shot:
            room = (position_limit(cast(PreTrainedModel, model).config) or LONGEST_TEXT) - max_new_tokens
            own, raw = (base.showing(asked) for asked in (renderer.with_length(room), renderer.raw(room)))
            few_shot = {paper.task: ask_base(own, raw, paper) for paper in papers}
        base_beside = _ask_beside(base, questions, zero_shot)
    with trial.models.tuned() as model:
        probe = compare_probes(base_logits, probe_logits(model, probes))
        tuned = trial.examiner(model, "tuned", meter, max_new_tokens)
        answers = {paper.task: tuned.answer(paper, None) for paper in papers}
        tuned_beside = _ask_beside(tuned, questions, {})
    return _Heard(zero_shot, few_shot, answers, base_beside, tuned_beside, probe)


def _ask_beside(own: Examiner, questions: _Questions, asked: Mapping[str, Asked]) -> _Beside:
    raw, suite, benchmarks = own.in_format(own.renderer.raw()), questions.suite, questions.benchmarks
    message = f"asking {own.name} model benchmarks"
    return _Beside(
        abilities=raw.answer_suite(suite) if suite else None,
        said=own.answer_questions(suite.open_questions) if suite else [],
        holistic=questions.holistic.answers(own, raw, asked) if questions.holistic else None,
        benchmarks=benchmarks.ask(own.model, lambda count: own.meter.part(count, message)) if benchmarks else (),
    )


# --- what comes of it


_Measured = dict[str, Measurement | Unmeasured]


def _compare(
    trial: Trial, questions: _Questions, heard: _Heard, started: float
) -> tuple[EvaluationReport, list[dict[str, object]]]:
    spec, seed, papers = trial.job.spec.evaluation, trial.job.spec.training.seed, questions.papers
    zero_shot, tuned = heard.zero_shot, heard.tuned
    compared = [
        compare_task(paper, zero_shot[paper.task], heard.few_shot.get(paper.task), tuned[paper.task], seed)
        for paper in papers
    ]
    holistic, of_axes = _compare_axes(questions, heard)
    benchmarks, of_benchmarks = _compare_benchmarks(questions, heard, seed)
    measured: _Measured = {name: it for one in compared for name, it in one.measured.items()}
    measured |= of_axes | of_benchmarks
    if questions.benchmarks:
        check_gates(spec.gates, trial.dataset.tasks, measured)
    forgetting = _compare_abilities(trial, questions, heard)
    report = EvaluationReport(
        metrics=adjust_for_many([metric for one in compared for metric in one.metrics]),
        gates=(*judge_gates(spec.gates, measured), *([forgetting_gate(forgetting)] if forgetting else [])),
        forgetting=forgetting,
        benchmarks=benchmarks,
        holistic=holistic,
        probe=heard.probe,
        few_shot=max((len(paper.shown) for paper in papers), default=0) or None,
        confusions=tuple(
            found for paper in papers for found in confusions(paper, zero_shot[paper.task].answers, tuned[paper.task])
        ),
        harness=tuple(
            found
            for paper in papers
            for found in harness_accuracies(paper, zero_shot[paper.task].answers, tuned[paper.task])
        ),
        prompt_choices=tuple(
            describe_choice(paper.task, zero_shot[paper.task].label_decision)
            for paper in papers
            if "accuracy" in paper.metrics
        ),
        examples=tuple(example for one in compared for example in one.examples),
        seconds=time.monotonic() - started,
    )
    return report, [row for one in compared for row in one.predictions]


def _compare_axes(questions: _Questions, heard: _Heard) -> tuple[HolisticReport | None, _Measured]:
    base, tuned = heard.base_beside.holistic, heard.tuned_beside.holistic
    if questions.holistic is None or base is None or tuned is None:
        return None, {}
    return questions.holistic.compare(heard.zero_shot, heard.tuned, base, tuned)


def _compare_benchmarks(
    questions: _Questions, heard: _Heard, seed: int
) -> tuple[tuple[BenchmarkReport, ...], _Measured]:
    if questions.benchmarks is None:
        return (), {}
    reports, measured = questions.benchmarks.compare(heard.base_beside.benchmarks, heard.tuned_beside.benchmarks, seed)
    return reports, {**measured}


def _compare_abilities(trial: Trial, questions: _Questions, heard: _Heard) -> ForgettingReport | None:
    suite, budget = questions.suite, trial.job.spec.evaluation.forgetting
    base, tuned = heard.base_beside, heard.tuned_beside
    if budget is None or suite is None or base.abilities is None or tuned.abilities is None:
        return None
    forgetting = compare_abilities(suite, base.abilities, tuned.abilities, budget, trial.job.spec.training.seed)
    labels = [label for paper in questions.papers for label in paper.labels]
    form = compare_answers(suite.open_questions, base.said, tuned.said, labels)
    return forgetting.model_copy(update={"format": form if suite.open_questions else None})
