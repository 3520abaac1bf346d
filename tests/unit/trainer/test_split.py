import random
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer import split, text_order
from finetune_trainer.errors import DataError
from finetune_trainer.record_file import RecordFile
from finetune_trainer.split import (
    ANYWHERE,
    SHORTEST_COMPARED,
    SIMILARITY,
    SPLITS,
    Split,
    assign_splits,
    draw,
    input_key,
    jaccard,
    normalise,
    shingles_of,
)

WORDS = [f"{start}{end}" for start in ("ka", "lo", "mi", "ne", "pu", "ri", "so", "tu") for end in "bdfgklmnprstvz"]


def make_texts(count: int, seed: int = 0, words: int = 12) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=words)) for _ in range(count)]


def split_of(texts, validation=0.1, test=0.1, seed=17, groups=None):
    return placed(texts, validation, test, seed, groups)[0]


def placed(*arguments, **settings):
    codes, _, stats = assign_splits(*arguments, **settings)
    return [SPLITS[code] for code in codes], stats


SAME = {
    "case": ("Great Phone", "great phone"),
    "spacing": ("great  phone\n", " great\tphone"),
    "punctuation at the edges": ("Great phone!!!", '"great phone."'),
    "full width letters": ("\uff47\uff52\uff45\uff41\uff54 phone", "great phone"),
    "ligatures and sharp s": ("ﬁne Straße", "fine strasse"),
    "composed and decomposed accents": ("caf\u00e9", "cafe\u0301"),
    "typographic quotation marks": ("“great”", "great"),
}


@pytest.mark.parametrize("left, right", SAME.values(), ids=SAME.keys())
def test_what_does_not_make_another_example_is_normalised_away(left, right):
    assert normalise(left) == normalise(right)
    assert input_key(left) == input_key(right)


@pytest.mark.parametrize(
    "left, right", [("great phone", "great phones"), ("!!!", "???"), ("don't", "dont"), ("", "."), ("C++", "C")]
)
def test_what_makes_another_example_is_kept(left, right):
    assert normalise(left) != normalise(right)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_shares_are_met_on_average():
    sizes = Counter(split_of(make_texts(5000), validation=0.1, test=0.2))
    assert sizes[Split.VALIDATION] == pytest.approx(500, abs=80)
    assert sizes[Split.TEST] == pytest.approx(1000, abs=110)


def test_the_order_of_rows_does_not_matter():
    texts = make_texts(300) + [text + " again" for text in make_texts(60)]
    places = dict(zip(texts, split_of(texts), strict=True))
    shuffled = random.Random(1).sample(texts, len(texts))
    assert dict(zip(shuffled, split_of(shuffled), strict=True)) == places


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 200))
def test_a_row_does_not_move_when_others_are_added(seed, added):
    texts = make_texts(200)
    more = make_texts(added, seed=1000 + seed)
    assert split_of(texts + more, seed=5)[:200] == split_of(texts, seed=5)


def test_the_test_split_does_not_depend_on_the_share_of_validation():
    texts = make_texts(500)
    small, large = split_of(texts, validation=0.05), split_of(texts, validation=0.3)
    assert [place is Split.TEST for place in small] == [place is Split.TEST for place in large]


def test_another_seed_gives_another_split():
    texts = make_texts(500)
    assert split_of(texts, seed=1) != split_of(texts, seed=2)


def test_equal_texts_share_a_split():
    texts = make_texts(300)
    upper = [f"  {text.upper()}! " for text in texts]
    places, stats = placed(texts + upper, 0.2, 0.2, 17, None)
    assert places[:300] == places[300:]
    assert (stats.rows, stats.clusters, stats.largest) == (600, 300, 2)


def test_nearly_equal_texts_share_a_split():
    texts = make_texts(300, words=30)
    changed = [text + " indeed" for text in texts]
    places, stats = placed(texts + changed, 0.2, 0.2, 17, None)
    assert places[:300] == places[300:]
    assert stats.rows == 600


def test_adding_an_equal_text_moves_nobody():
    texts = make_texts(200)
    assert split_of(texts + texts[:50])[:200] == split_of(texts)


def test_short_texts_are_duplicates_only_when_equal():
    texts = [f"what is {a} + {b}" for a in range(10, 50) for b in range(10, 40)]
    assert all(len(text) < SHORTEST_COMPARED for text in texts)
    places, stats = placed(texts, 0.1, 0.1, 17, None)
    assert stats.rows == 0
    assert set(places) == set(Split)


def test_the_pairs_found_are_those_that_a_comparison_of_all_finds():
    chooser = random.Random(3)
    texts = []
    for text in make_texts(60, words=25):
        words = text.split()
        texts += [" ".join(words[: len(words) - cut]) for cut in (0, chooser.randrange(1, 12))]
    close = {
        (i, j)
        for i, left in enumerate(texts)
        for j, right in enumerate(texts)
        if i < j and jaccard(shingles_of(left), shingles_of(right)) >= SIMILARITY
    }
    _, _, stats = assign_splits(texts, 0.2, 0.2, 17, None)
    assert 10 < len(close) < 60
    assert stats.rows == len({row for pair in close for row in pair})


def test_portions_change_nothing(tmp_path, monkeypatch):
    texts = make_texts(150, words=25)
    texts += [f"{text} indeed" for text in texts[:50]]
    strata = ["odd", "even"] * 100
    allowed = [*[ANYWHERE] * 190, *[frozenset({Split.TEST})] * 10]
    given = dict(inputs=texts, validation=0.2, test=0.2, seed=17, strata=strata, allowed=allowed)
    whole = placed(**given)
    for name in ("_NUMBERS_AT_ONCE", "_HASHES_AT_ONCE", "_TEXTS_AT_ONCE"):
        monkeypatch.setattr(split, name, 7)
    assert placed(**given, kind=RecordFile(tmp_path)) == whole


def test_memory_does_not_grow_with_the_number_of_texts(tmp_path, monkeypatch):
    # Portions that 1,000 texts are many of, so that what grows beyond is what is held of every text.
    for name, most in {"_NUMBERS_AT_ONCE": 256, "_HASHES_AT_ONCE": 256, "_TEXTS_AT_ONCE": 64}.items():
        monkeypatch.setattr(split, name, most)
    monkeypatch.setattr(text_order, "_PIECE_BYTES", 1 << 16)

    def peak_bytes(count):
        # Ten texts begin alike, so that many are compared and few are joined.
        starts, ends = make_texts(count // 10) * 10, make_texts(count, seed=1, words=10)
        texts = [f"{start} {end}" for start, end in zip(starts, ends, strict=True)]
        tracemalloc.start()
        try:
            assign_splits(texts, 0.2, 0.2, 17, kind=RecordFile(tmp_path))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(4000) - peak_bytes(1000) < 100_000, "33 bytes a text"


def test_a_chain_of_similar_texts_stays_together():
    words = make_texts(1, words=60)[0].split()
    chain = [" ".join(words[start : start + 30]) for start in range(30)]
    texts = [*chain, *make_texts(200, seed=9)]
    assert len(set(split_of(texts)[:30])) == 1


def test_rows_of_a_group_stay_together():
    texts = make_texts(600)
    groups = [f"film {number % 40}" for number in range(600)]
    places = split_of(texts, groups=groups)
    assert len({*zip(groups, places, strict=True)}) == 40
    assert set(places) == set(Split)


def test_a_group_does_not_move_when_it_grows():
    texts = make_texts(600)
    groups = [f"film {number % 40}" for number in range(600)]
    assert split_of(texts[:300], groups=groups[:300]) == split_of(texts, groups=groups)[:300]


def test_groups_that_share_a_text_stay_together():
    texts = [*make_texts(200), "the same sentence about two different films, word by word"]
    texts.append(texts[-1])
    groups = [f"film {number % 20}" for number in range(200)] + ["film 3", "film 4"]
    places = split_of(texts, groups=groups)
    assert len({place for place, group in zip(places, groups, strict=True) if group in ("film 3", "film 4")}) == 1


def test_groups_are_no_duplicates():
    _, _, stats = assign_splits(make_texts(100), 0.2, 0.2, 17, [f"film {number % 20}" for number in range(100)])
    assert stats.rows == 0


def test_large_clusters_are_not_drawn_to_a_split():
    texts = make_texts(4000)
    copies = [text for text in texts[:1000] for _ in range(4)]
    tested = [place is Split.TEST for place in split_of(texts + copies, test=0.2)[:1000]]
    assert sum(tested) / len(tested) == pytest.approx(0.2, abs=0.04)


def test_an_empty_split_is_a_data_error_with_sizes():
    with pytest.raises(DataError, match=r"no rows for validation and test \(of 2 rows: train 2, validation 0, test 0"):
        assign_splits(["one text", "another"], 0.01, 0.01, 1, None)


def test_rows_that_must_stay_together_are_named_when_a_split_is_empty():
    with pytest.raises(DataError, match="must stay together has 50"):
        assign_splits(["the same"] * 50, 0.1, 0.1, 17, None)


def test_a_split_with_share_zero_may_be_empty():
    assert set(split_of(make_texts(100), validation=0.0)) == {Split.TRAIN, Split.TEST}


def test_no_rows_at_all_are_a_data_error():
    with pytest.raises(DataError, match="of 0 rows"):
        assign_splits([], 0.1, 0.1, 17, None)


@pytest.mark.parametrize("text", ["", "\U0001f600" * 50, "a" * 50_000, "\n" * 40, "日本語のとても長い文章です。" * 10])
def test_unusual_texts_are_split(text):
    assert len(split_of([text, *make_texts(200)])) == 201


def test_places_are_the_same_on_every_machine_and_in_every_version():
    assert draw(17, "split", "x") == 0.8684364676469083
    assert input_key("Great phone!") == "28357eb1cca913e3ea10f4d5a2aede5a602d335ccd7af49abea7ef4a2270873a"


def test_draws_are_even_and_repeatable():
    draws = [draw(17, "split", str(number)) for number in range(2000)]
    assert draws == [draw(17, "split", str(number)) for number in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.03)
    assert all(0 <= value < 1 for value in draws)
    assert draw(17, "split", "x") != draw(17, "template", "x") != draw(18, "template", "x")


def test_three_thousand_rows_are_split_within_three_seconds():
    texts = make_texts(3000, words=15)
    started = time.process_time()
    split_of(texts)
    assert time.process_time() - started < 3
