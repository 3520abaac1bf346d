"""The forgetting test: each source judged for itself, alike rows together, the worst verdict for the gate."""

import json
from pathlib import Path

import numpy as np
import pytest

from finetune_api.report import Retention
from finetune_api.spec import ForgettingSpec
from finetune_trainer.errors import DataError
from finetune_trainer.forgetting import GeneralAnswers, compare_abilities, forgetting_gate, judge_retention
from finetune_trainer.general_source import name_sources, read_general_rows
from finetune_trainer.general_suite import GeneralRow, GeneralSuite
from finetune_trainer.statistics import Difference, adjusted_p_values

TEXTS = ("One two three.", "Four five six.")


def make_suite(rows: int = 200, groups: int = 200) -> GeneralSuite:
    """Return as many rows of the shipped suite as of a file of the job's own."""
    shipped, own = (
        [GeneralRow(source, f"{n % groups}", f"{source} {n}", (" a", " b"), 0, source) for n in range(rows)]
        for source in ("general", "mine")
    )
    return GeneralSuite((*shipped, *own), TEXTS)


def answers(suite: GeneralSuite, *wrong_first: int) -> GeneralAnswers:
    """Return answers that are wrong on the first rows of each source, so many as given."""
    right = np.ones(len(suite.rows), dtype=bool)
    half = len(suite.rows) // 2
    for start, wrong in zip((0, half), wrong_first, strict=True):
        right[start : start + wrong] = False
    return GeneralAnswers(right, [np.full(3, -1.0) for _ in suite.texts])


@pytest.mark.parametrize(
    ("base", "tuned", "expected", "verdicts"),
    [
        pytest.param((20, 20), (20, 20), Retention.PASSED, ("passed", "passed"), id="nothing lost"),
        pytest.param((20, 20), (0, 0), Retention.PASSED, ("passed", "passed"), id="something gained"),
        pytest.param((20, 20), (20, 80), Retention.FAILED, ("passed", "failed"), id="an own file lost"),
        pytest.param((20, 20), (80, 22), Retention.FAILED, ("failed", "inconclusive"), id="failed is worst"),
        pytest.param((20, 20), (20, 24), Retention.INCONCLUSIVE, ("passed", "inconclusive"), id="cannot tell"),
    ],
)
def test_each_source_has_a_verdict_and_the_worst_one_is_the_gates(base, tuned, expected, verdicts):
    suite = make_suite()
    found = compare_abilities(suite, answers(suite, *base), answers(suite, *tuned), ForgettingSpec(), seed=3)
    assert found.verdict is expected
    assert tuple(result.verdict for result in found.results) == verdicts
    assert [result.source for result in found.results] == ["general", "mine"]
    assert all(f"changed by {result.change:+.3f}" in result.why for result in found.results)
    gate = forgetting_gate(found)
    assert (gate.metric, gate.passed) == ("forgetting", expected is Retention.PASSED)
    worst = next(result for result in found.results if result.verdict is expected)
    assert f"{worst.source}: {worst.why}".removesuffix(".") in gate.why


def test_a_larger_budget_forgives_more():
    suite = make_suite()
    base, tuned = answers(suite, 20, 20), answers(suite, 24, 24)
    strict = compare_abilities(suite, base, tuned, ForgettingSpec(max_drop=0.02), seed=3)
    lenient = compare_abilities(suite, base, tuned, ForgettingSpec(max_drop=0.1), seed=3)
    assert (strict.verdict, lenient.verdict) == (Retention.INCONCLUSIVE, Retention.PASSED)


def test_rows_that_are_alike_count_as_one():
    """4 rows lost of 200 may be one group of 4, or four groups of which each stands for itself."""
    alone, together = make_suite(), make_suite(groups=50)
    lost = {}
    for name, suite in (("alone", alone), ("together", together)):
        right = np.ones(400, dtype=bool)
        right[[0, 50, 100, 150]] = False
        base = answers(suite, 0, 0)
        found = compare_abilities(suite, base, GeneralAnswers(right, base.text_logprobs), ForgettingSpec(), seed=3)
        lost[name] = found.tasks[0]
    assert lost["alone"].delta == lost["together"].delta == pytest.approx(-0.02)
    assert lost["together"].low < lost["alone"].low


def test_prose_is_measured_in_bits_per_byte():
    suite = make_suite()
    base = answers(suite, 0, 0)
    tuned = GeneralAnswers(base.right, [row * 2 for row in base.text_logprobs])
    prose = compare_abilities(suite, base, tuned, ForgettingSpec(), seed=3).tasks[-1]
    nats, read = 3 * len(TEXTS), sum(len(text.encode()) - len(text.split()[0]) for text in TEXTS)
    assert prose.base == pytest.approx(nats / np.log(2) / read)
    assert prose.tuned == pytest.approx(2 * prose.base)
    assert not prose.higher_is_better


def test_p_values_are_corrected_for_the_number_of_figures():
    suite = make_suite()
    tasks = compare_abilities(suite, answers(suite, 20, 20), answers(suite, 24, 40), ForgettingSpec(), seed=3).tasks
    p_values = [one.p_value for one in tasks]
    assert len({*p_values}) == 3, "two general tasks and prose, not alike"
    assert [one.adjusted_p_value for one in tasks] == pytest.approx(adjusted_p_values(p_values))
    assert tasks[1].adjusted_p_value == pytest.approx(3 * tasks[1].p_value), "the least of three"


def test_few_rows_decide_nothing():
    verdict, why = judge_retention(Difference(0.0, np.zeros(100)), 0.02, 0.95, rows=20, groups=20)
    assert verdict is Retention.INCONCLUSIVE
    assert "20 rows in 20 groups decide nothing; at least 30" in why


def test_many_rows_of_few_groups_decide_nothing():
    for groups, expected in ((9, Retention.INCONCLUSIVE), (10, Retention.PASSED)):
        found = compare_abilities(
            suite := make_suite(groups=groups), answers(suite, 0, 0), answers(suite, 0, 0), ForgettingSpec(), seed=3
        )
        assert found.verdict is expected
        assert f"200 rows in {groups} groups" in found.results[0].why


def test_sources_are_named_by_their_files_and_never_alike():
    uris = ["s3://b/x/facts.jsonl", "file:///y/facts.parquet", "pvc://claim/general.jsonl", "configMap://c/rows.jsonl"]
    assert name_sources(uris) == ["facts", "facts-2", "general-2", "rows"]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_own_rows_keep_the_blank_before_the_answer(tmp_path: Path):
    row = {"prompt": "2 + 2 =", "completion": " 4", "labels": ["3", "4"], "group": 7}
    (found,) = read_general_rows(write(tmp_path / "sums.jsonl", row), "sums", "spec.x")
    assert found == GeneralRow("sums", "group 7", "2 + 2 =", (" 3", " 4"), 1, "sums")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "labels": ["a", "b"]},
            r"spec\.x, row 0 .*no value in completion; its columns are prompt, lab",
        ),
        ({"prompt": "a", "completion": "c", "labels": ["a", "b"]}, r"completion 'c' one of them"),
        ({"prompt": "a", "completion": "a", "labels": ["a"]}, "two or more different"),
        ({"prompt": "a", "completion": "a", "labels": ["a", " a"]}, "two or more different"),
        ({"prompt": "a", "completion": "a", "labels": "a,b"}, "not a list of texts.* jsonl or parquet"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(tmp_path: Path, row: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        read_general_rows(write(tmp_path / "rows.jsonl", row), "rows", "spec.x")
