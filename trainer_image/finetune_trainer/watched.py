"""The figure of a task that early stopping watches, on validation rows; never on the test split."""

import operator
from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.spec import VALIDATION_LOSS
from finetune_trainer.dataset import Dataset
from finetune_trainer.examiner import LogprobScorer, encode_labels
from finetune_trainer.example import Encoded
from finetune_trainer.figure import macro_f1_figure, mean_of
from finetune_trainer.in_context import as_asked
from finetune_trainer.labels import Normaliser, collect_scores, label_prior, predict
from finetune_trainer.paper import CHOICE_ROWS, choose_rows
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split


@dataclass(frozen=True, slots=True)
class Watched:
    """A figure of the label that a model finds likeliest, and the rows that it is of."""

    metric: str
    """``<task>.<figure>``."""
    labels: tuple[str, ...]
    expected: list[str]
    """Label of each row."""
    items: list[Encoded]
    """Label by label within row by row."""

    def measure(self, scorer: LogprobScorer) -> float:
        """Return what the scorer's model reaches, 0 to 1, as evaluation measures the tuned model."""
        scores = collect_scores(scorer.token_logprobs(self.items), len(self.labels))
        said = [self.labels[number] for number in predict(scores, Normaliser.SUM, label_prior(scores))]
        if self.metric.endswith(".accuracy"):
            return mean_of(operator.eq, "accuracy", said, self.expected).value
        return macro_f1_figure(said, self.expected, self.labels).value


def find_watched(job: FineTuneJob, dataset: Dataset, renderer: Renderer) -> Watched | None:
    """Return what early stopping watches; absent where it is nothing, or the loss that is known anyway."""
    stopping = job.spec.training.early_stopping
    if stopping is None or stopping.metric == VALIDATION_LOSS:
        return None
    task = stopping.metric.rpartition(".")[0]
    rows = choose_rows(as_asked(dataset, Split.VALIDATION, task), CHOICE_ROWS, job.spec.training.seed)
    labels = dataset.labels(task)
    return Watched(
        stopping.metric,
        labels,
        [row.completion.strip() for row in rows],
        [item for row in encode_labels(renderer, dataset, rows, labels) for item in row],
    )
