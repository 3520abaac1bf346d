"""How strong, or how long trained, the tuned model is left, so that it forgets no more than it may.

Chosen on validation rows and on general rows that the verdict is not measured on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from finetune_api.report import TradeOff
from finetune_api.spec import ForgettingRemedy
from finetune_trainer.adapter_scale import SCALES, scaled
from finetune_trainer.checkpoint import kept_weights
from finetune_trainer.examiner import Meter, Trial
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.pair import ModelPair
from finetune_trainer.paper import validation_paper
from finetune_trainer.progress import Reporter
from finetune_trainer.task_figure import task_figure
from finetune_trainer.trade_off import Candidate, Findings, choose, weigh


def choose_remedy(
    trial: Trial, pair: ModelPair, suite: GeneralSuite | None, trained: Path, reporter: Reporter
) -> TradeOff | None:
    """Return how strong or how long trained the model is to be left; absent where the job asks for no remedy."""
    budget = trial.job.spec.evaluation.forgetting
    if suite is None or budget is None or budget.remedy is ForgettingRemedy.NONE:
        return None

    def strength(scale: float) -> Candidate:
        return Candidate(scale, lambda: scaled(pair.tuned(), scale))

    def checkpoint(step: int, weights: Path) -> Candidate:
        return Candidate(1.0, lambda: pair.earlier(weights), step)

    if budget.remedy is ForgettingRemedy.LORA_SCALE:
        reporter.say("trying how strong the adapter may be")
        candidates = [strength(scale) for scale in SCALES]
    else:
        reporter.say("trying the checkpoints")
        kept = kept_weights(trained)
        candidates = [*(checkpoint(*one) for one in kept.items()), Candidate(1.0, pair.tuned)]
    # How far the whole stage is cannot be said yet.
    quiet = replace(trial, on_progress=lambda progress: reporter.tell(progress.model_copy(update={"percent": None})))
    trade_off = weigh_candidates(quiet, candidates, suite.development())
    reporter.say(trade_off.why)
    return trade_off


def weigh_candidates(trial: Trial, candidates: Sequence[Candidate], suite: GeneralSuite) -> TradeOff:
    """Return what each candidate gains on validation rows and loses on ``suite``, and which one to take.

    Args:
        trial: its base is what candidates are held against; neither its tuned model nor its test split is looked at.
            The job has a budget in ``spec.evaluation.forgetting``.
        candidates: weakest first, the last one as trained.
        suite: general rows that the verdict is not measured on.

    Raises:
        DataError: a task has no validation row.
        TrainingDivergedError: a model's log-probabilities are not numbers.
    """
    job, dataset = trial.job, trial.dataset
    seed, budget = job.spec.training.seed, job.spec.evaluation.forgetting
    assert budget is not None
    papers = [validation_paper(task, dataset, seed) for task in dataset.tasks]
    rows = sum(len(paper.test) for paper in papers)
    meter = Meter((rows + len(suite.rows)) * (1 + len(candidates)), trial.on_progress)

    def find(lent: nn.Module, name: str) -> Findings:
        own = trial.examiner(lent, name, meter)
        reached = {paper.task: task_figure(paper, own.answer(paper, None)).value for paper in papers}
        return Findings(reached, own.in_format(trial.renderer.raw()).answer_suite(suite))

    with trial.models.base() as base:
        before = find(base, "base")
    points = []
    for candidate in candidates:
        with candidate.lend() as tuned:
            after = find(tuned, "tuned")
        points.append(weigh(candidate, before, after, suite.rows, budget, seed))
    return choose(points, budget, rows, len(suite.rows))


def apply_remedy(pair: ModelPair, chosen: TradeOff, tuned: Path) -> None:
    """Leave the tuned model as it was chosen to be."""
    if chosen.step is not None:
        pair.go_back(kept_weights(tuned)[chosen.step])
    elif chosen.scale != 1:
        pair.weaken(chosen.scale)
