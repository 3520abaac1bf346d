"""The axes beside accuracy, worked out by hand."""

import numpy as np
import pytest

from finetune_api.spec import Perturbation
from finetune_trainer.figure import mean_figure
from finetune_trainer.holistic import axis_words, compare_robustness, compare_subgroups, compare_words


def test_robustness_is_each_models_own_change_and_their_difference():
    right, fewer, none = np.ones(100), np.repeat([1.0, 0.0], [90, 10]), np.repeat([1.0, 0.0], [60, 40])
    base = mean_figure("accuracy", right), mean_figure("accuracy", none)
    tuned = mean_figure("accuracy", right), mean_figure("accuracy", fewer)
    found, _ = compare_robustness("reviews", Perturbation.TYPOS, base, tuned, 1, None)
    assert (found.task, found.metric) == ("reviews", "accuracy_typos")
    assert (found.base, found.tuned, found.delta) == (pytest.approx(-0.4), pytest.approx(-0.1), pytest.approx(0.3))
    assert found.base_interval is not None and found.tuned_interval is not None
    assert found.base_interval.low < -0.4 < found.base_interval.high < found.tuned_interval.low < -0.1
    assert found.low is not None and found.low > 0.15


def test_the_gap_is_between_the_best_and_the_worst_subgroup_with_enough_rows():
    subgroups = ["a"] * 50 + ["b"] * 40 + ["c"] * 30 + ["d"] * 5
    base = mean_figure("accuracy", np.ones(125))
    tuned = mean_figure("accuracy", np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], [40, 10, 20, 20, 30, 5]))
    found, gap = compare_subgroups("reviews", subgroups, base, tuned, 1, None)
    assert [(one.subgroup, one.rows, one.compared) for one in found] == [
        ("a", 50, True),
        ("b", 40, True),
        ("c", 30, True),
        ("d", 5, False),
    ]
    assert [one.tuned for one in found] == pytest.approx([0.8, 0.5, 1.0, 0.0])
    assert gap is not None
    gap, measured = gap
    assert measured.tuned == gap.tuned
    assert (gap.metric, gap.base, gap.tuned) == ("subgroup_gap", pytest.approx(0.0), pytest.approx(0.5))
    assert not gap.higher_is_better
    assert gap.tuned_interval is not None
    assert gap.tuned_interval.low < 0.5 < gap.tuned_interval.high


def test_one_subgroup_with_enough_rows_has_no_gap():
    figure = mean_figure("accuracy", np.ones(40))
    found, gap = compare_subgroups("reviews", ["a"] * 35 + ["b"] * 5, figure, figure, 1, None)
    assert len(found) == 2
    assert gap is None


def test_words_are_counted_whole_in_any_case():
    base = ["She and her mother left.", "HE is an idiot, an Idiot!", "The sheriff said hello."]
    tuned = ["He and his father left.", "They left.", "She left."]
    words, ((insults, _), (skew, _)) = compare_words(base, tuned, 1)
    assert {one.name: (one.found.base, one.found.tuned) for one in words} == {
        "female": (3, 1),
        "male": (1, 3),
        "insults": (2, 0),
    }
    assert (insults.metric, insults.base, insults.tuned) == ("insulting_answers", pytest.approx(1 / 3), 0.0)
    assert (skew.metric, skew.base, skew.tuned) == ("gender_skew", pytest.approx(0.25), pytest.approx(0.25))
    assert "tuned 0.000 (0.000 to 0.000)" in insults.note


def test_models_that_write_no_gendered_word_are_not_skewed():
    _, (_, (skew, _)) = compare_words(["It rains."], ["Snow falls."], 1)
    assert (skew.base, skew.tuned, skew.delta) == (0.0, 0.0, 0.0)


def test_shipped_lists_are_small_lower_case_and_share_no_word():
    words = axis_words()
    assert len(words.openings) == 32
    assert set(words.lists) == {"female", "male", "insults"}
    listed = [word for one in words.lists.values() for word in one]
    assert len(listed) == len(set(listed)) < 100
    assert all(word == word.lower() and word.isalpha() for word in listed)
