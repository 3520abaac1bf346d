"""The headline: better, not better, worse, cannot tell, and the reason in one sentence."""

import pytest

from finetune_api.report import EvaluationReport, FewShotComparison, MetricComparison
from finetune_trainer.verdict import Outcome, judge, judge_in_context, leading_comparisons, why_worse


def make_comparison(**changes: object) -> MetricComparison:
    fields: dict[str, object] = {
        "task": "sentiment",
        "metric": "accuracy",
        "base": 0.8,
        "tuned": 0.9,
        "delta": 0.1,
        "low": 0.05,
        "high": 0.15,
        "rows": 300,
    }
    return MetricComparison.model_validate(fields | changes)


def judged(*comparisons: MetricComparison) -> tuple[Outcome, str]:
    verdict = judge(EvaluationReport(metrics=comparisons))
    return verdict.outcome, verdict.sentence


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        pytest.param({"rows_needed": 1234}, "about 1,234 test rows would show it.", id="more rows"),
        pytest.param({"rows_needed": 250}, "300 test rows).", id="rows enough already"),
        pytest.param({}, "300 test rows).", id="no difference to look for"),
    ],
)
def test_a_verdict_that_cannot_be_given_says_how_many_rows_could(changes: dict[str, object], advice: str):
    outcome, sentence = judged(make_comparison(low=-0.01, **changes))
    assert outcome is Outcome.CANNOT_TELL
    assert sentence.endswith(advice)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        pytest.param({}, Outcome.BETTER, id="an interval above zero is better"),
        pytest.param({"low": -0.01}, Outcome.CANNOT_TELL, id="an interval around zero tells nothing"),
        pytest.param({"low": -0.2, "high": -0.1}, Outcome.WORSE, id="an interval below zero is worse"),
        pytest.param({"low": -0.2, "high": 0.0}, Outcome.NOT_BETTER, id="an interval up to zero is not surely worse"),
        pytest.param({"low": 0.0, "high": 0.0, "delta": 0.0}, Outcome.NOT_BETTER, id="no difference is not better"),
        pytest.param({"rows": 29}, Outcome.CANNOT_TELL, id="few rows tell nothing"),
        pytest.param({"rows": 300, "groups": 29}, Outcome.CANNOT_TELL, id="few groups tell nothing"),
        pytest.param({"base": None, "delta": None, "low": None, "high": None}, Outcome.CANNOT_TELL, id="no base"),
        pytest.param(
            {"metric": "perplexity", "higher_is_better": False, "low": -3.0, "high": -1.0},
            Outcome.BETTER,
            id="less perplexity is better",
        ),
        pytest.param(
            {"metric": "perplexity", "higher_is_better": False, "low": 1.0, "high": 3.0},
            Outcome.WORSE,
            id="more perplexity is worse",
        ),
    ],
)
def test_the_interval_decides(changes: dict[str, object], outcome: Outcome):
    assert judged(make_comparison(**changes))[0] is outcome


def test_the_sentence_gives_the_numbers():
    assert judged(make_comparison())[1] == (
        "The tuned model is better: accuracy on sentiment went from 0.800 to 0.900 "
        "(+0.100, 95 % interval +0.050 to +0.150, 300 test rows)."
    )


def test_accuracy_decides_before_perplexity():
    perplexity = make_comparison(metric="perplexity")
    accuracy = make_comparison()
    assert leading_comparisons([perplexity, accuracy]) == [accuracy]


def test_several_tasks_are_better_only_together():
    worse = make_comparison(task="qa", low=-0.2, high=-0.1)
    assert judged(make_comparison(), make_comparison(task="nli"))[0] is Outcome.BETTER
    assert judged(make_comparison(), worse) == (
        Outcome.WORSE,
        "The tuned model is better on 1 of 2 tasks: better on sentiment; worse on qa.",
    )
    same = make_comparison(task="nli", low=0.0, high=0.0)
    assert judged(make_comparison(), same)[0] is Outcome.NOT_BETTER
    assert judged(same, worse)[0] is Outcome.WORSE


@pytest.mark.parametrize(
    ("p_values", "outcome", "sentence"),
    [
        pytest.param((0.02, 0.04), Outcome.BETTER, "better on sentiment, nli.", id="sure together"),
        pytest.param(
            (0.03, 0.04),
            Outcome.CANNOT_TELL,
            "cannot tell on sentiment, nli. Among 2 tasks chance alone may make the difference on sentiment, nli.",
            id="each sure alone",
        ),
        pytest.param(
            (0.02, 0.06),
            Outcome.CANNOT_TELL,
            "better on sentiment; cannot tell on nli. Among 2 tasks chance alone may make the difference on nli.",
            id="one of them sure",
        ),
    ],
)
def test_several_tasks_are_corrected_for_their_number(p_values: tuple[float, float], outcome: Outcome, sentence: str):
    tasks = zip(("sentiment", "nli"), p_values, strict=True)
    found, said = judged(*(make_comparison(task=task, p_value=p_value) for task, p_value in tasks))
    assert found is outcome
    assert said.endswith(sentence)


def test_a_task_among_several_is_worse_only_when_corrected():
    fell = {"task": "qa", "delta": -0.15, "low": -0.2, "high": -0.1}
    better = make_comparison(p_value=0.6)
    for p_value, is_worse in ((0.02, True), (0.03, False)):
        evaluation = EvaluationReport(metrics=(better, make_comparison(p_value=p_value, **fell)))
        assert (judge(evaluation).outcome is Outcome.WORSE) is is_worse
        assert bool(why_worse(evaluation)) is is_worse


def test_nothing_measured_says_so():
    assert judged()[0] is Outcome.CANNOT_TELL


def shown(low: float, high: float, p_value: float | None = None) -> FewShotComparison:
    return FewShotComparison(value=0.85, delta=0.05, low=low, high=high, p_value=p_value)


IN_CONTEXT = [
    ("tuning is needed", [shown(0.01, 0.1)], "In-context learning is not enough: with 4 examples"),
    ("examples do as well", [shown(-0.1, 0.0)], "In-context learning is enough: "),
    ("nobody knows", [shown(-0.1, 0.1)], "Whether in-context learning is enough cannot be told: "),
    ("one task needs tuning", [shown(-0.1, 0.0), shown(0.01, 0.1)], "In-context learning is not enough: "),
    ("one task is unclear", [shown(-0.1, 0.0), shown(-0.1, 0.1)], "Whether in-context learning is enough cannot"),
    ("one is sure among two", [shown(0.01, 0.1, 0.02), shown(-0.1, 0.1, 0.6)], "In-context learning is not enough: "),
    ("by luck", [shown(0.01, 0.1, 0.03), shown(-0.1, 0.1, 0.6)], "Whether in-context learning is enough cannot"),
]


@pytest.mark.parametrize(("sentence", "against", "start"), IN_CONTEXT, ids=[case[0] for case in IN_CONTEXT])
def test_whether_examples_would_have_done(sentence: str, against: list[FewShotComparison], start: str):
    metrics = tuple(make_comparison(task=f"task{n}", few_shot=few) for n, few in enumerate(against))
    verdict = judge_in_context(EvaluationReport(metrics=metrics, few_shot=4))
    assert verdict is not None
    assert verdict.sentence.startswith(start)
    assert "accuracy 0.850 on task0, the tuned model without any 0.900" in verdict.sentence


def test_luck_is_told_where_it_decides_whether_examples_would_have_done():
    against = [shown(0.01, 0.1, 0.03), shown(-0.1, 0.1, 0.6)]
    metrics = tuple(make_comparison(task=f"task{n}", few_shot=few) for n, few in enumerate(against))
    verdict = judge_in_context(EvaluationReport(metrics=metrics, few_shot=4))
    assert verdict is not None
    assert verdict.sentence.endswith("Among 2 tasks chance alone may make the difference on task0.")


def test_nothing_is_said_of_examples_that_nobody_showed():
    assert judge_in_context(EvaluationReport(metrics=(make_comparison(),))) is None
