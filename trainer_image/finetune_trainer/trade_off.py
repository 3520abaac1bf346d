"""What tasks gain and general ability loses, by the strength or the length of one tuning; which of them to take. Pure.

Measured on validation rows and on the development half of the general suite: the test split and the half that the
verdict rests on decide nothing here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from finetune_api.report import EvaluationReport, Retention, TradeOff, TradeOffPoint
from finetune_api.spec import ForgettingRemedy, ForgettingSpec
from finetune_trainer.forgetting import GeneralAnswers, measure_source
from finetune_trainer.general_suite import GeneralRow


@dataclass(frozen=True, slots=True)
class Candidate:
    """One strength or length of tuning that can be had without training again."""

    scale: float
    lend: Callable[[], AbstractContextManager[nn.Module]]
    """Lends the model as it is then."""
    step: int | None = None
    """Of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What one model reaches."""

    tasks: Mapping[str, float]
    """By task, 0 to 1, higher is better; see `finetune_api.report.TradeOffPoint.gains`."""
    general: GeneralAnswers


def weigh(
    candidate: Candidate,
    base: Findings,
    tuned: Findings,
    rows: Sequence[GeneralRow],
    budget: ForgettingSpec,
    seed: int,
) -> TradeOffPoint:
    """Return one point of the curve; general ability is that of the source of rows that lost most for sure."""
    sources = [
        measure_source(source, rows, base.general, tuned.general, budget, seed)
        for source in dict.fromkeys(row.source for row in rows)
    ]
    gains = {task: reached - base.tasks[task] for task, reached in tuned.tasks.items()}
    worst = min(sources, key=lambda source: source.low)
    return TradeOffPoint(
        scale=candidate.scale,
        step=candidate.step,
        gain=fmean(gains.values()),
        gains=gains,
        change=worst.change,
        low=worst.low,
        within_budget=all(source.verdict is Retention.PASSED for source in sources),
    )


def choose(
    points: Sequence[TradeOffPoint], budget: ForgettingSpec, validation_rows: int, general_rows: int
) -> TradeOff:
    """Return the curve with its choice: the best gain within the budget, the weakest or earliest of equally good ones.

    Where none is within the budget the model stays as trained: what it is worth is then for the verdict to say, and a
    choice among failures would only look like a remedy.

    Args:
        points: weakest or earliest first; the last one is the model as trained.
        budget: what general ability may drop by, and the remedy.
        validation_rows: that gains were measured on.
        general_rows: that the loss was measured on.
    """
    within = [point for point in points if point.within_budget]
    chosen = max(within, key=lambda point: point.gain) if within else points[-1]
    allowed = f"a drop of {budget.max_drop:g} with {budget.confidence:.0%} confidence"
    if budget.remedy is ForgettingRemedy.EARLIER_CHECKPOINT:
        kind, kept = "checkpoint", "model"
        name = "the end of training" if chosen.step is None else f"the checkpoint of step {chosen.step:,}"
    else:
        kind, kept, name = "scale", "adapter", f"scale {chosen.scale:g}"
    why = (
        f"{name} has the best gain ({chosen.gain:+.3f}) of the {len(within)} of {len(points)} {kind}s "
        f"that are within {allowed}"
        if within
        else f"no {kind} is within {allowed}, so the {kept} stays as trained"
    )
    return TradeOff(
        remedy=budget.remedy.value,
        points=tuple(points),
        scale=chosen.scale,
        step=chosen.step,
        why=why,
        max_drop=budget.max_drop,
        validation_rows=validation_rows,
        general_rows=general_rows,
    )


def with_trade_off(evaluation: EvaluationReport, found: TradeOff | None) -> EvaluationReport:
    """Return ``evaluation`` with the choice that went before it."""
    if found is None or evaluation.forgetting is None:
        return evaluation
    forgetting = evaluation.forgetting.model_copy(update={"trade_off": found})
    return evaluation.model_copy(update={"forgetting": forgetting})
