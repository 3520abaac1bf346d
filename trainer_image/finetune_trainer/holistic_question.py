"""What ``spec.evaluation.holistic`` asks of both models: disturbed rows, and openings to go on from."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from finetune_api.job import FineTuneJob
from finetune_api.report import BaseAndTuned, Efficiency, HolisticReport, SubgroupFigure
from finetune_api.spec import Perturbation
from finetune_api.spec.evaluation import SUBGROUP_GAP
from finetune_trainer.comparison import adjust_for_many
from finetune_trainer.dataset import Dataset
from finetune_trainer.disturbance import disturb
from finetune_trainer.examiner import Answers, Asked, Examiner
from finetune_trainer.figure import Figure
from finetune_trainer.gate import Measurement, Unmeasured
from finetune_trainer.holistic import Compared, axis_words, compare_robustness, compare_subgroups, compare_words
from finetune_trainer.memory import forget_peak, peak_bytes
from finetune_trainer.paper import Paper
from finetune_trainer.statistics import FEW_ROWS
from finetune_trainer.task_figure import task_figure


@dataclass(frozen=True, slots=True)
class HolisticAnswers:
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
class HolisticQuestions:
    """What ``spec.evaluation.holistic`` asks of both models."""

    papers: list[Paper]
    disturbed: dict[tuple[str, Perturbation], Paper]
    openings: tuple[str, ...]
    column: str | None
    """``spec.evaluation.holistic.subgroupColumn``."""
    seed: int

    @classmethod
    def of(cls, job: FineTuneJob, papers: list[Paper], dataset: Dataset) -> "HolisticQuestions":
        """Return what the job asks about the test rows of ``papers``."""
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

    def answers(self, own: Examiner, raw: Examiner, asked: Mapping[str, Asked]) -> HolisticAnswers:
        """Return what a model says; the base, which alone is in ``asked``, is asked as its plain test rows were."""
        figures = {}
        for key, paper in self.disturbed.items():
            decision = asked[paper.task].label_decision if paper.task in asked else None
            examiner = raw if decision and decision.format else own
            figures[key] = task_figure(paper, examiner.answer(paper, decision))
        is_measured, started = forget_peak(), time.monotonic()
        written = own.answer_questions(self.openings)
        seconds = time.monotonic() - started
        peak = peak_bytes() if is_measured else None
        tokens = sum(len(own.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written)
        return HolisticAnswers(figures, written, tokens, seconds, peak)

    def compare(
        self,
        asked: Mapping[str, Asked],
        tuned_answers: Mapping[str, Answers],
        base: HolisticAnswers,
        tuned: HolisticAnswers,
    ) -> tuple[HolisticReport, dict[str, Measurement | Unmeasured]]:
        """Return both models side by side on every axis, and what gates can name."""
        compared: list[Compared] = []
        measured: dict[str, Measurement | Unmeasured] = {}
        subgroups: list[SubgroupFigure] = []
        for paper in self.papers:
            before, after = (task_figure(paper, one) for one in (asked[paper.task].answers, tuned_answers[paper.task]))
            for (task, how), disturbed in base.disturbed.items():
                if task == paper.task:
                    pairs = (before, disturbed), (after, tuned.disturbed[task, how])
                    compared.append(compare_robustness(task, how, *pairs, self.seed, paper.groups))
            if self.column is not None:
                values = [str(row.values.get(self.column, "")) for row in paper.test]
                found, gap = compare_subgroups(paper.task, values, before, after, self.seed, paper.groups)
                subgroups += found
                compared += [gap] if gap else []
                measured[f"{paper.task}.{SUBGROUP_GAP}"] = Unmeasured(
                    f"fewer than two values of {self.column} have {FEW_ROWS} test rows"
                )
        words, of_words = compare_words(base.written, tuned.written, self.seed)
        compared += of_words
        measured |= {f"{told.task}.{told.metric}": found for told, found in compared}
        report = HolisticReport(
            metrics=adjust_for_many([told for told, _ in compared]),
            subgroups=tuple(subgroups),
            words=words,
            openings=len(self.openings),
            efficiency=_efficiency(base, tuned),
        )
        return report, measured


def _disturbed(paper: Paper, how: Perturbation, dataset: Dataset, seed: int) -> Paper:
    """Return the same questions with disturbed inputs, whose answers are scored and never generated."""
    rows = [
        dataset.with_input(row, partial(disturb, how=how, seed=f"{seed} {paper.task} {row.row}")) for row in paper.test
    ]
    return replace(paper, test=rows, metrics=("accuracy",) if paper.labels else ())


def _efficiency(base: HolisticAnswers, tuned: HolisticAnswers) -> Efficiency:
    peaks = None
    if base.peak_bytes is not None and tuned.peak_bytes is not None:
        peaks = BaseAndTuned(base=base.peak_bytes, tuned=tuned.peak_bytes)
    return Efficiency(
        tokens=BaseAndTuned(base=base.tokens, tuned=tuned.tokens),
        tokens_per_second=BaseAndTuned(base=base.tokens / base.seconds, tuned=tuned.tokens / tuned.seconds),
        peak_bytes=peaks,
    )
