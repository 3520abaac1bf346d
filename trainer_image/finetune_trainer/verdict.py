"""Say in one sentence whether tuning made the model better, and how sure that is. Pure; needs the report alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune_api.report import CollapseSign, EvaluationReport, MetricComparison
from finetune_trainer.statistics import FEW_ROWS, adjusted_p_values

LEADING_METRICS = (
    "accuracy",
    "generated_accuracy",
    "rougeL",
    "exact_match",
    "token_f1",
    "chrf",
    "bleu",
    "perplexity",
)
"""A task is judged by the first of these that it has."""

_LUCK = 0.05
"""What an interval of 95 % leaves to chance."""


class Outcome(StrEnum):
    """What the interval of a difference allows to be said."""

    BETTER = "better"
    NOT_BETTER = "not better"
    WORSE = "worse"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement and the sentence that gives its reason."""

    outcome: Outcome
    sentence: str


def judge(evaluation: EvaluationReport) -> Verdict:
    """Return the verdict over all tasks: better only when it is better on each of them.

    A form of answers that is lost is told behind it: no figure of a task sees that.
    """
    verdict = _judge_tasks(evaluation)
    return Verdict(verdict.outcome, f"{verdict.sentence} {_lost_form(evaluation)}".strip())


def why_worse(evaluation: EvaluationReport) -> str:
    """Return in which figure the verdict is worse; nothing where that is not the verdict.

    Of several tasks the first is told with its numbers: a line has no room for more.
    """
    leading = leading_comparisons(evaluation.metrics)
    outcomes = _outcomes_together(leading)
    worse = [one for one, outcome in zip(leading, outcomes, strict=True) if outcome is Outcome.WORSE]
    if not worse:
        return ""
    first = worse[0]
    base, tuned = (format_value(first, value or 0.0) for value in (first.base, first.tuned))
    changed = "fell" if (first.delta or 0.0) < 0 else "rose"
    others = f"; {len(worse)} tasks are worse" if len(worse) > 1 else ""
    return f"{first.task} {first.metric} {changed} from {base} to {tuned} ({_certainty(first)}){others}"


def _lost_form(evaluation: EvaluationReport) -> str:
    form = evaluation.forgetting and evaluation.forgetting.format
    if not form:
        return ""
    lost = [
        f"{sign.tuned} of {len(form.answers)} {SIGN_WORDS[sign.sign]} (the base: {sign.base})"
        for sign in form.signs
        if sign.collapsed
    ]
    return f"It has lost the form of its answers: to general questions {', '.join(lost)}." if lost else ""


SIGN_WORDS = {
    CollapseSign.EMPTY: "are empty",
    CollapseSign.SAME: "are one and the same",
    CollapseSign.LABEL: "are labels of a task",
    CollapseSign.REPETITION: "end in repetition",
}
"""What is said of answers that show a sign."""


def _judge_tasks(evaluation: EvaluationReport) -> Verdict:
    leading = leading_comparisons(evaluation.metrics)
    outcomes = _outcomes_together(leading)
    if not leading:
        return Verdict(Outcome.CANNOT_TELL, "Nothing was measured, so nothing can be said about the tuned model.")
    if len(leading) == 1:
        return Verdict(outcomes[0], _sentence(outcomes[0], leading[0]))
    overall = _overall(outcomes)
    tasks = "; ".join(
        f"{outcome} on {', '.join(c.task for c, o in zip(leading, outcomes, strict=True) if o is outcome)}"
        for outcome in Outcome
        if outcome in outcomes
    )
    better = sum(outcome is Outcome.BETTER for outcome in outcomes)
    told = f"The tuned model is better on {better} of {len(leading)} tasks: {tasks}."
    return Verdict(overall, f"{told} {_luck(leading, outcomes)}".strip())


def _outcomes_together(leading: Sequence[MetricComparison]) -> list[Outcome]:
    """Return what each task shows beside the others: of many, some look better or worse by luck.

    A difference counts where Holm's correction for the number of tasks leaves its p-value at 5 % or less.
    """
    outcomes = [outcome_of(comparison) for comparison in leading]
    if len(leading) < 2:
        return outcomes
    known = [index for index, comparison in enumerate(leading) if comparison.p_value is not None]
    adjusted = dict(zip(known, adjusted_p_values([leading[index].p_value or 0.0 for index in known]), strict=True))
    return [
        Outcome.CANNOT_TELL
        if outcome in (Outcome.BETTER, Outcome.WORSE) and adjusted.get(index, 0.0) > _LUCK
        else outcome
        for index, outcome in enumerate(outcomes)
    ]


def _luck(comparisons: Sequence[MetricComparison], outcomes: Sequence[Outcome]) -> str:
    """Return where a difference counts alone and not among as many; empty where each counts as it would alone."""
    unsure = [one.task for one, outcome in zip(comparisons, outcomes, strict=True) if outcome is not outcome_of(one)]
    tasks = f"Among {len(comparisons)} tasks chance alone may make the difference on {', '.join(unsure)}."
    return tasks if unsure else ""


def judge_in_context(evaluation: EvaluationReport) -> Verdict | None:
    """Return whether examples in the prompt would have done instead; nothing where that was not measured.

    Better is the tuned model than the base with examples: then in-context learning is not enough.
    """
    against = [one for one in map(_against_few_shot, leading_comparisons(evaluation.metrics)) if one is not None]
    if not against:
        return None
    outcomes = _outcomes_together(against)
    # Enough only where it is enough on every task: a single one that tuning serves better needs tuning.
    overall = next(one for one in _IN_CONTEXT if one in outcomes)
    reasons = "; ".join(_few_shot_reason(comparison) for comparison in against)
    told = f"{_IN_CONTEXT[overall]}: with {evaluation.few_shot} examples in its prompt the base reaches {reasons}."
    return Verdict(overall, f"{told} {_luck(against, outcomes)}".strip())


_IN_CONTEXT = {
    Outcome.BETTER: "In-context learning is not enough",
    Outcome.CANNOT_TELL: "Whether in-context learning is enough cannot be told",
    Outcome.NOT_BETTER: "In-context learning is enough",
    Outcome.WORSE: "In-context learning is enough",
}
"""By what the tuned model is, against the base with examples; of several tasks the first decides."""


def _against_few_shot(comparison: MetricComparison) -> MetricComparison | None:
    shown = comparison.few_shot
    if shown is None:
        return None
    return comparison.model_copy(
        update={
            "base": shown.value,
            "delta": shown.delta,
            "low": shown.low,
            "high": shown.high,
            "p_value": shown.p_value,
        }
    )


def _few_shot_reason(comparison: MetricComparison) -> str:
    base, tuned = (format_value(comparison, value or 0.0) for value in (comparison.base, comparison.tuned))
    return (
        f"{comparison.metric} {base} on {comparison.task}, the tuned model without any {tuned} "
        f"({_certainty(comparison)})"
    )


def _certainty(comparison: MetricComparison) -> str:
    return f"{comparison.delta:+.3f}, 95 % interval {comparison.low:+.3f} to {comparison.high:+.3f}"


def leading_comparisons(metrics: Iterable[MetricComparison]) -> list[MetricComparison]:
    """Return each task's most telling metric, tasks in the order given."""
    best: dict[str, MetricComparison] = {}
    for comparison in metrics:
        rival = best.get(comparison.task)
        if comparison.metric in LEADING_METRICS and (rival is None or _rank(comparison) < _rank(rival)):
            best[comparison.task] = comparison
    return list(best.values())


def outcome_of(comparison: MetricComparison) -> Outcome:
    """Return what one comparison shows; few rows, few groups and an interval on both sides of zero show nothing."""
    if comparison.low is None or comparison.high is None or _are_few(comparison):
        return Outcome.CANNOT_TELL
    worst, best = (
        (comparison.low, comparison.high) if comparison.higher_is_better else (-comparison.high, -comparison.low)
    )
    if worst > 0:
        return Outcome.BETTER
    if best < 0:
        return Outcome.WORSE
    return Outcome.NOT_BETTER if best == 0 else Outcome.CANNOT_TELL


def format_value(comparison: MetricComparison, value: float) -> str:
    """Return a metric's value as people read it: shares with three digits, perplexity with as many as tell."""
    if comparison.metric != "perplexity" or abs(value) < 1:
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _are_few(comparison: MetricComparison) -> bool:
    return (comparison.groups or comparison.rows) < FEW_ROWS


def _rank(comparison: MetricComparison) -> int:
    return LEADING_METRICS.index(comparison.metric)


def _overall(outcomes: list[Outcome]) -> Outcome:
    if all(outcome is Outcome.BETTER for outcome in outcomes):
        return Outcome.BETTER
    decisive = (Outcome.WORSE, Outcome.NOT_BETTER, Outcome.CANNOT_TELL)
    return next(one for one in decisive if one in outcomes)


def _sentence(outcome: Outcome, comparison: MetricComparison) -> str:
    what = f"{comparison.metric} on {comparison.task}"
    tuned = format_value(comparison, comparison.tuned)
    if comparison.base is None or comparison.delta is None or comparison.low is None or comparison.high is None:
        return f"Whether the tuned model is better cannot be told: its {what} is {tuned}, the base was not measured."
    base = format_value(comparison, comparison.base)
    change = f"stayed at {tuned}" if comparison.delta == 0 else f"went from {base} to {tuned}"
    reason = f"{what} {change} ({_certainty(comparison)}, {comparison.rows:,} test rows)."
    match outcome:
        case Outcome.BETTER:
            return f"The tuned model is better: {reason}"
        case Outcome.NOT_BETTER:
            return f"The tuned model is not better: {reason}"
        case Outcome.WORSE:
            return f"The tuned model is worse: {reason}"
        case Outcome.CANNOT_TELL:
            what = "rows" if comparison.groups is None else "groups of rows"
            few = f" Fewer than {FEW_ROWS} {what} decide nothing." if _are_few(comparison) else ""
            return f"Whether the tuned model is better cannot be told: {reason}{few}{_advice(comparison)}"


def _advice(comparison: MetricComparison) -> str:
    needed = comparison.rows_needed
    if needed is None or needed <= comparison.rows:
        return ""
    return f" If the difference is real, about {needed:,} test rows would show it."
