"""The questions of one task: which rows, by which templates, scored by what."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.spec import Metric
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.in_context import as_asked, draw_shown
from finetune_trainer.split import Split

CHOICE_ROWS = 200
"""Validation rows per task that the base's prompt is chosen on, and the step that early stopping keeps: enough to tell
0.60 from 0.75, cheap to score."""


TRADE_OFF_ROWS = 500
"""Validation rows per task that a remedy is chosen on."""


@dataclass(frozen=True, slots=True)
class Paper:
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
        """Whether a figure is of what the model writes."""
        return not {*self.metrics} <= {"accuracy", "perplexity"}


def set_paper(task: str, dataset: Dataset, job: FineTuneJob) -> Paper:
    """Return a task's test rows as questions, with rows that the base's prompt is chosen on."""
    seed = job.spec.training.seed
    labels = dataset.labels(task)
    is_kept_back = job.spec.data.splits.validation or dataset.task(task).validation_source is not None
    choice_split = Split.VALIDATION if is_kept_back else Split.TRAIN
    choice, test = (as_asked(dataset, split, task) for split in (choice_split, Split.TEST))
    count = job.spec.evaluation.baselines.few_shot
    shown = draw_shown(dataset, task, count, seed) if count else []
    if shown and choice_split is Split.TRAIN:
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
    return Paper(
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


def validation_paper(task: str, dataset: Dataset, seed: int) -> Paper:
    """Return a task's validation rows as questions whose answers are scored, never generated."""
    rows = as_asked(dataset, Split.VALIDATION, task)
    if not rows:
        raise DataError(
            f"task {task!r} has no validation rows, on which spec.evaluation.forgetting.remedy chooses. Raise "
            "spec.data.splits.validation, or give the task more rows."
        )
    return Paper(
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


def choose_rows(examples: Sequence[Example], at_most: int | None, seed: int) -> list[Example]:
    """Return ``at_most`` of the examples in their order; which ones depends on their number and the seed alone."""
    if at_most is None or len(examples) <= at_most:
        return list(examples)
    kept = sorted(random.Random(seed).sample(range(len(examples)), at_most))
    return [examples[index] for index in kept]


def _commonest_label(dataset: Dataset, task: str) -> str:
    """Return the label that most training rows of a task have, of equally common ones the first declared."""
    if not dataset.labels(task):
        return ""
    seen = Counter(example.completion.strip() for example in dataset.examples(Split.TRAIN, task))
    return max(dataset.labels(task), key=lambda label: seen[label])


def _metrics_of(labels: Sequence[str], job: FineTuneJob) -> tuple[str, ...]:
    """Return the metrics of one task: those asked for that it can have, or the usual ones; perplexity always."""
    asked = tuple(str(metric) for metric in job.spec.evaluation.metrics or ())
    usual = ("accuracy",) if labels else ("rouge", "exact_match")
    possible = [metric for metric in asked or usual if labels or not Metric(metric).needs_labels]
    return tuple(dict.fromkeys([*possible, "perplexity"]))


def count_questions(paper: Paper, job_format: str) -> int:
    """Return how many questions both models are asked, at most."""
    formats = 2 if paper.labels and job_format == "chat" else 1
    test = len(paper.test) * (2 if paper.generates else 1)
    # At most: the second format may not be worth it behind the choice.
    of_base = formats * len(paper.choice) * paper.templates + test + (formats - 1) * len(paper.test)
    return of_base * (2 if paper.shown else 1) + test
