"""Compare the tuned model with its base on the test split, with the base given its best chance.

Everything that is chosen (the base's template, how label likelihoods are compared) is chosen on the validation split,
or, where the job keeps none back, on training rows, which the base has not seen either; the test split is scored once
and decides nothing. Each model is asked for once and answers all its questions then, so
that two loads never have to be in memory together.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import BenchmarkReport, EvaluationReport, Progress
from finetune_trainer.benchmark import Answers as BenchmarkAnswers
from finetune_trainer.benchmark import Benchmarks, check_gates
from finetune_trainer.comparison import adjust_for_many
from finetune_trainer.dataset import Dataset
from finetune_trainer.examiner import Asked, Examiner, LogprobScorer, Meter, Pair, answer_bound, ask_base
from finetune_trainer.fit import LONGEST_TEXT
from finetune_trainer.forgetting import GeneralAnswers, compare_abilities, forgetting_gate
from finetune_trainer.format_probe import compare_answers
from finetune_trainer.gate import Measurement, Unmeasured, judge_gates
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.holistic_question import HolisticAnswers, HolisticQuestions
from finetune_trainer.memory import memory_errors
from finetune_trainer.model import position_limit
from finetune_trainer.paper import count_questions, set_paper
from finetune_trainer.parity import choose_probes, compare_probes, encode_probes, probe_logits
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split
from finetune_trainer.task_comparison import compare_task, confusions, describe_choice, harness_accuracies


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
    papers = [set_paper(task, dataset, job) for task in dataset.tasks]
    work = sum(count_questions(paper, renderer.format) for paper in papers)
    holistic = HolisticQuestions.of(job, papers, dataset) if job.spec.evaluation.holistic else None
    work += 2 * holistic.size if holistic else 0
    work += 2 * suite.size if suite else 0
    work += 2 * benchmarks.requests if benchmarks else 0
    meter = Meter(work, on_progress)
    max_new_tokens = job.spec.evaluation.generation.max_new_tokens or answer_bound(
        tokenizer, (example.completion for example in dataset.examples(Split.TRAIN))
    )

    def examiner(lent: nn.Module, name: str, renderer: Renderer, shows: bool = False) -> Examiner:
        lent.eval()
        return Examiner(lent, name, scorer_factory(lent), tokenizer, renderer, dataset, max_new_tokens, meter, shows)

    def beside(own: Examiner, raw: Examiner, asked: Mapping[str, Asked]) -> _Beside:
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
    few_shot: dict[str, Asked] = {}
    with model.base() as base:
        base_logits = probe_logits(base, probes)
        own = examiner(base, "base", renderer)
        raw = examiner(base, "base", renderer.raw())
        zero_shot = {paper.task: ask_base(own, raw, paper) for paper in papers}
        if job.spec.evaluation.baselines.few_shot:
            room = (position_limit(cast(PreTrainedModel, base).config) or LONGEST_TEXT) - max_new_tokens
            own_shown = examiner(base, "base", renderer.with_length(room), True)
            raw_shown = examiner(base, "base", renderer.raw(room), True)
            few_shot = {paper.task: ask_base(own_shown, raw_shown, paper) for paper in papers}
        base_beside = beside(own, raw, zero_shot)
    with model.tuned() as tuned:
        probe = compare_probes(base_logits, probe_logits(tuned, probes))
        tuned_examiner = examiner(tuned, "tuned", renderer)
        tuned_answers = {paper.task: tuned_examiner.answer(paper, None) for paper in papers}
        tuned_raw = examiner(tuned, "tuned", renderer.raw())
        tuned_beside = beside(tuned_examiner, tuned_raw, {})

    compared = [
        compare_task(paper, zero_shot[paper.task], few_shot.get(paper.task), tuned_answers[paper.task], seed)
        for paper in papers
    ]
    measured: dict[str, Measurement | Unmeasured] = {name: it for one in compared for name, it in one.measured.items()}
    holistic_report = None
    if holistic and base_beside.holistic and tuned_beside.holistic:
        sides = base_beside.holistic, tuned_beside.holistic
        holistic_report, of_axes = holistic.compare(zero_shot, tuned_answers, *sides)
        measured |= of_axes
    benchmark_reports: tuple[BenchmarkReport, ...] = ()
    if benchmarks:
        benchmark_reports, of_benchmarks = benchmarks.compare(base_beside.benchmarks, tuned_beside.benchmarks, seed)
        measured |= of_benchmarks
        check_gates(job.spec.evaluation.gates, dataset.tasks, measured)
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
        holistic=holistic_report,
        probe=probe,
        few_shot=max((len(paper.shown) for paper in papers), default=0) or None,
        confusions=tuple(
            found
            for paper in papers
            for found in confusions(paper, zero_shot[paper.task].answers, tuned_answers[paper.task])
        ),
        harness=tuple(
            found
            for paper in papers
            for found in harness_accuracies(paper, zero_shot[paper.task].answers, tuned_answers[paper.task])
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


@dataclass(frozen=True, slots=True)
class _Beside:
    """What one model says to all that is no test row of a task."""

    abilities: GeneralAnswers | None
    """Of the general suite."""
    said: list[str]
    """To its open questions."""
    holistic: HolisticAnswers | None
    benchmarks: Sequence[BenchmarkAnswers]
