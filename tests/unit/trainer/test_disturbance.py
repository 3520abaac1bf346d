"""Disturbed texts stay readable, are the same for the same seed, and others for others."""

import difflib

import pytest

from finetune_api.spec import Perturbation
from finetune_trainer.disturbance import TYPO_SHARE, disturb

TEXT = " ".join(f"The battery of phone {number} lasted hardly longer than yesterday." for number in range(200))


@pytest.mark.parametrize("how", Perturbation)
def test_equal_seeds_disturb_alike_and_others_do_not(how: Perturbation):
    versions = {disturb(TEXT, how, f"{seed}") for seed in range(8)}
    assert disturb(TEXT, how, "3") == disturb(TEXT, how, "3")
    assert len(versions) > 1


def test_about_one_long_word_in_ten_has_one_slip():
    before, after = TEXT.split(), disturb(TEXT, Perturbation.TYPOS, "1").split()
    assert len(before) == len(after)
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    long_words = sum(len(word.strip(".")) >= 4 for word in before)
    assert 0.7 * TYPO_SHARE < len(changed) / long_words < 1.3 * TYPO_SHARE
    for old, new in changed:
        assert old[0] == new[0]
        assert abs(len(old) - len(new)) <= 1
        assert difflib.SequenceMatcher(None, old, new).ratio() > 0.6


def test_short_words_numbers_and_spaces_are_left_alone():
    text = "It is 123456  by\nnow"
    assert {disturb(text, Perturbation.TYPOS, f"{seed}") for seed in range(50)} == {text}


def test_case_changes_nothing_but_case():
    found = {disturb("Good Film", Perturbation.CASE, f"{seed}") for seed in range(20)}
    assert found == {"good film", "GOOD FILM"}
