"""Both models side by side on one task: figures, how they came about, rows that moved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_api.report import Confusion, HarnessAccuracy, MetricComparison, PromptChoice, SideBySide
from finetune_trainer.comparison import describe, few_shot_comparison, measure
from finetune_trainer.examiner import Answers, Asked
from finetune_trainer.figure import CALIBRATION_BINS, confusion_matrix, signatures
from finetune_trainer.gate import Measurement
from finetune_trainer.labels import PromptDecision
from finetune_trainer.metrics import ROUGE_NAMES, rouge_reads
from finetune_trainer.paper import Paper
from finetune_trainer.side_by_side import pick_examples, prediction_rows
from finetune_trainer.split import Split
from finetune_trainer.statistics import FEW_ROWS
from finetune_trainer.task_figure import commonest_figures, figures_of, rouge_parts

_BY_LABEL = ("accuracy", "macro_f1", "ece")
"""Figures of the label that a model finds likeliest; the others are of what it writes, or of what it was to write."""


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """Base and tuned model on one task."""

    metrics: list[MetricComparison]
    measured: dict[str, Measurement]
    """By ``<task>.<figure>``, as gates name them."""
    examples: list[SideBySide]
    predictions: list[dict[str, object]]


def compare_task(paper: Paper, asked: Asked, shown: Asked | None, tuned: Answers, seed: int) -> TaskComparison:
    """Put every figure of a task side by side, of the base asked with examples as well where it was."""
    metrics: list[MetricComparison] = []
    measured: dict[str, Measurement] = {}
    answers = asked.answers, tuned
    figures = {
        base.name: (base, other) for base, other in zip(*(figures_of(paper, one) for one in answers), strict=True)
    }
    parts = rouge_parts(paper, *answers)
    with_examples = {} if shown is None else {figure.name: figure for figure in figures_of(paper, shown.answers)}
    commonest = commonest_figures(paper)
    for name, (base_figure, tuned_figure) in figures.items():
        found = measured[f"{paper.task}.{name}"] = measure(base_figure, tuned_figure, seed, paper.groups)
        decision = asked.label_decision if name in _BY_LABEL else asked.decision
        comparison = describe(paper.task, name, found, _notes(paper, name, tuned, decision))
        if name in with_examples:
            against = measure(with_examples[name], tuned_figure, seed, paper.groups)
            comparison = comparison.model_copy(update={"few_shot": few_shot_comparison(against)})
        metrics.append(comparison.model_copy(update={"majority": commonest.get(name), **parts.get(name, {})}))
    return TaskComparison(
        metrics,
        measured,
        list(pick_examples(paper, *answers, figures)),
        prediction_rows(paper, *answers, None if shown is None else shown.answers),
    )


def _notes(paper: Paper, metric: str, tuned: Answers, decision: PromptDecision) -> str:
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
    if metric in ("generated_accuracy", "generated_macro_f1"):
        notes.append("by the label written, white space around it aside; any other text is wrong")
    if metric in ("macro_f1", "generated_macro_f1"):
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


def _chosen_on(paper: Paper) -> str:
    return f"{len(paper.choice)} {'training' if paper.choice_split is Split.TRAIN else 'validation'} rows"


def confusions(paper: Paper, base: Answers, tuned: Answers) -> Iterator[Confusion]:
    """Yield which labels both models took for which, of a task that has labels."""
    if "accuracy" in paper.metrics:
        of_base, of_tuned = (
            tuple(map(tuple, confusion_matrix(one.labels or [], one.references, paper.labels).tolist()))
            for one in (base, tuned)
        )
        yield Confusion(task=paper.task, labels=paper.labels, base=of_base, tuned=of_tuned)
    if "generated_accuracy" in paper.metrics:
        other = "other" if "other" not in paper.labels else f"none of these {len(paper.labels)}"
        labels = (*paper.labels, other)
        of_base, of_tuned = (
            tuple(map(tuple, confusion_matrix(_labels_written(one, labels), one.references, labels).tolist()))
            for one in (base, tuned)
        )
        yield Confusion(task=paper.task, generated=True, labels=labels, base=of_base, tuned=of_tuned)


def _labels_written(answers: Answers, labels: Sequence[str]) -> list[str]:
    """Return the label that each text is, or the last of ``labels`` where it is none of the others."""
    texts = [text.strip() for text in answers.texts or []]
    return [text if text in labels[:-1] else labels[-1] for text in texts]


def harness_accuracies(paper: Paper, base: Answers, tuned: Answers) -> Iterator[HarnessAccuracy]:
    """Yield both models' accuracies as lm-evaluation-harness computes them, of a task that has labels."""
    if base.harness is not None and tuned.harness is not None:
        (base_acc, base_norm), (tuned_acc, tuned_norm) = base.harness, tuned.harness
        yield HarnessAccuracy(
            task=paper.task, base_acc=base_acc, base_acc_norm=base_norm, tuned_acc=tuned_acc, tuned_acc_norm=tuned_norm
        )


def describe_choice(task: str, decision: PromptDecision) -> PromptChoice:
    """Return how the base was asked for labels, and what else was tried."""
    return PromptChoice(
        task=task,
        template=decision.template,
        format=decision.format,
        normaliser=decision.normaliser,
        validation_accuracy=decision.accuracy,
        candidates=decision.candidates,
    )
