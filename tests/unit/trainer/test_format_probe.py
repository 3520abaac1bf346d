"""Signs of a lost form: what counts as one, and that the base's own habits are not held against the tuned model."""

import pytest

from finetune_api.report import CollapseSign, EvaluationReport, ForgettingReport, FormatReport, Retention
from finetune_trainer.format_probe import compare_answers, ends_in_repetition
from finetune_trainer.verdict import judge

LABELS = ("positive", "very negative")
QUESTIONS = tuple(f"Question {number}?" for number in range(8))
FINE = [f"Answer number {number}." for number in range(8)]


def collapsed(base: list[str], tuned: list[str]) -> set[CollapseSign]:
    return {count.sign for count in compare_answers(QUESTIONS, base, tuned, LABELS).signs if count.collapsed}


@pytest.mark.parametrize(
    ("tuned", "signs"),
    [
        pytest.param(FINE, set(), id="answers"),
        pytest.param(["", " \n"] * 4, {CollapseSign.EMPTY}, id="nothing"),
        pytest.param(["I do not know."] * 8, {CollapseSign.SAME}, id="one answer"),
        pytest.param(
            ["Positive.", "very negative", "negative", "positive positive"] * 2, {CollapseSign.LABEL}, id="labels"
        ),
        pytest.param([f"{one} " + "and so on " * 6 for one in FINE], {CollapseSign.REPETITION}, id="circles"),
        pytest.param([*FINE[:5], "", "", ""], set(), id="less than half"),
        pytest.param(["positive answer", *FINE[1:]], set(), id="a label among other words"),
    ],
)
def test_signs_of_collapse(tuned: list[str], signs: set[CollapseSign]) -> None:
    assert collapsed(FINE, tuned) == signs


def test_what_the_base_does_too_is_no_collapse() -> None:
    circles = ["round and " * 9] * 8
    assert collapsed(circles, circles) == set()


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("no no no no no no", True),
        ("The sea is blue. The sea is blue. The sea is blue. The sea is blue. The se", True),
        ("よいよいよいよいよいよいよいよい", True),
        ("The sea is blue. The sea is wide.", False),
        ("Well...", False),
        ("", False),
    ],
)
def test_an_end_that_goes_round_in_circles(text: str, repeats: bool) -> None:
    assert ends_in_repetition(text) is repeats


def told(form: FormatReport) -> str:
    forgetting = ForgettingReport(verdict=Retention.PASSED, results=(), tasks=(), format=form)
    return judge(EvaluationReport(forgetting=forgetting)).sentence


def test_the_verdict_tells_a_lost_form_and_only_that() -> None:
    lost = told(compare_answers(QUESTIONS, FINE, ["Positive"] * 8, LABELS))
    assert "8 of 8 are labels of a task (the base: 0)" in lost
    assert "8 of 8 are one and the same (the base: 0)" in lost
    assert "form" not in told(compare_answers(QUESTIONS, FINE, FINE, LABELS))
