"""What the check says of the rows: counts that can be counted by hand, and sentences where something is odd."""

import dataclasses
import re
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest

from finetune_api.report import (
    ColumnData,
    DataReport,
    LengthCount,
    Overlap,
    PersonalData,
    SplitRows,
    TaskData,
    TextPiece,
)
from finetune_trainer.data_profile import (
    describe_columns,
    describe_task,
    find_personal_data,
    find_warnings,
    guess_languages,
    mask_pieces,
)
from finetune_trainer.example import Encoded, Example
from finetune_trainer.split import Split


def row(prompt: str, completion: str = "x", **more: Any) -> Example:
    return Example(task="t", row=0, prompt=prompt, completion=completion, template=0, key="", values={}, **more)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(id) for id in ids)


def encode(prompt: str, completion: str, **more: Any) -> Encoded:
    return Encoded(tuple(map(ord, prompt + completion)), len(prompt), **more)


def test_a_task_is_counted():
    examples = {Split.TRAIN: [row("a", " yes"), row("b", " no"), row("c", " yes")], Split.TEST: [row("d")]}
    examples[Split.VALIDATION] = []
    lengths = {Split.TRAIN: [10, 16, 17], Split.VALIDATION: [], Split.TEST: [100]}
    encoded = {
        split: [encode("p" * (length - 1), "c", truncated=length > 50) for length in found]
        for split, found in lengths.items()
    }
    found = describe_task("t", ["yes", "no", "maybe"], examples, encoded, decode, (), "id, url")
    assert found.rows == SplitRows(train=3, validation=0, test=1)
    assert [(bar.up_to, bar.rows) for bar in found.lengths] == [(16, 2), (32, 1), (64, 0), (128, 1)]
    assert found.truncated == 1
    assert found.unused == "id, url"
    assert found.labels == {"yes": 2, "no": 1, "maybe": 0}
    assert found.sample == (TextPiece(text="p" * 9, learnt=False), TextPiece(text="c", learnt=True))


def test_columns_are_described_by_what_is_in_them():
    rows = [
        {"text": "a", "stars": 1, "ok": True, "tags": ["x"], "who": {"name": "y"}},
        {"text": " ", "stars": 2.5, "ok": False, "tags": [], "who": None},
        {"text": "a", "stars": "3", "more": "m"},
    ]
    assert list(describe_columns(rows)) == [
        ColumnData(name="text", kinds={"text": 2, "nothing": 1}, distinct=1),
        ColumnData(name="stars", kinds={"number": 2, "text": 1}, distinct=3),
        ColumnData(name="ok", kinds={"truth": 2, "nothing": 1}, distinct=2),
        ColumnData(name="tags", kinds={"list": 2, "nothing": 1}),
        ColumnData(name="who", kinds={"nothing": 2, "object": 1}),
        ColumnData(name="more", kinds={"nothing": 2, "text": 1}, distinct=1),
    ]


def test_a_column_of_ids_has_no_count_of_values():
    (column,) = describe_columns([{"id": number} for number in range(1001)])
    assert column.distinct is None


def test_memory_does_not_grow_with_what_the_rows_say():
    tracemalloc.start()
    try:
        (column,) = describe_columns({"text": f"{number} " * 20_000} for number in range(900))
        assert column.distinct == 900
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_languages_are_guessed_from_the_longest_text_of_a_row():
    german = {"label": "positive", "text": "Der Film war wirklich wunderbar und viel zu schnell vorbei."}
    english = {"label": "positive", "text": "There is no way for me to plug it in unless I go by a converter."}
    rows = [dataclasses.replace(row("Is this good?"), values=values) for values in [german, english, english, english]]
    assert guess_languages(rows) == {"en": 0.75, "de": 0.25}
    assert guess_languages([row("   ")]) == {}


def test_languages_are_guessed_from_the_beginning_of_a_long_text():
    german, english = "Der Film war wirklich wunderbar. " * 100, "There is no way to plug it in. " * 10_000
    assert guess_languages([row(german + english)]) == {"de": 1.0}


def test_the_mask_shows_every_answer_of_a_chat():
    item = Encoded(tuple(map(ord, "Hi?Yes.And?No.")), 11, answers=((3, 7),))
    pieces = [(piece.text, piece.learnt) for piece in mask_pieces(item, decode)]
    assert pieces == [("Hi?", False), ("Yes.", True), ("And?", False), ("No.", True)]


PERSONAL = {
    "an address": ("write to jane.doe+x@mail.example.org.", PersonalData(emails=1)),
    "no address": ("a@b, @home, 5 @ 3.20 and user@localhost", PersonalData()),
    "a number of the world": ("call +49 30 1234 5678 now", PersonalData(phones=1)),
    "a number of the states": ("call (555) 123-4567 now", PersonalData(phones=1)),
    "no number": ("from 1914-1918, 3.14159 and 1,000,000 or 2024-01-15", PersonalData()),
    "an access key": ("AKIAIOSFODNN7EXAMPLE", PersonalData(keys=1)),
    "a token": ("token=hf_abcdefghijklmnopqrstuvwxyz", PersonalData(keys=1)),
    "a private key": ("-----BEGIN RSA PRIVATE KEY-----", PersonalData(keys=1)),
    "no key": ("sk-short, hf_datasets, ghp_ and AKIA", PersonalData()),
}


@pytest.mark.parametrize("text, found", PERSONAL.values(), ids=PERSONAL.keys())
def test_what_looks_personal_is_counted(text: str, found: PersonalData):
    assert find_personal_data([row(text)]) == find_personal_data([row("x", text)]) == found
    assert find_personal_data([row("x", earlier=(("user", text),))]) == found


@pytest.mark.parametrize("letter", ["a", "1", "+1", "a.", "(1", "-", "a@", "1 ", "hf_"])
def test_a_long_text_is_searched_in_no_time(letter: str):
    started = time.monotonic()
    find_personal_data([row(letter * 500_000)])
    assert time.monotonic() - started < 5


def report(**changes: Any) -> DataReport:
    fields: dict[str, Any] = {"rows": SplitRows(train=80, validation=10, test=10), "hash": "", "format": "raw"}
    return DataReport.model_validate(fields | changes)


WARNINGS = {
    "leakage": ({"leakage": 3, "first_leak": "row 5"}, "3 rows of validationSource or testSource .* first row 5"),
    "cut rows": ({"truncated_percent": 12.5, "max_length": 64}, r"12\.5 % of the rows are shortened to 64"),
    "copies": ({"duplicates": 40, "exact_duplicates": 7}, r"40 of 100 rows nearly equal another one \(7 exactly\)"),
    "keys": ({"personal_data": PersonalData(keys=2)}, "2 rows hold what looks like a secret key"),
    "addresses": ({"personal_data": PersonalData(emails=4)}, "4 rows hold an e-mail address and 0 a telephone"),
    "questions that share words": (
        {"overlaps": [Overlap(source="general", questions=90, overlapping=2, first="a b c")]},
        "2 of 90 questions of general share words in a row with training rows, first 'a b c'",
    ),
    "questions given away": (
        {"overlaps": [Overlap(source="general", questions=90, overlapping=2, given_away=2, first="a b c")]},
        "2 of 90 questions of general stand in a training row as a whole, first 'a b c'",
    ),
    "one label": (
        {"tasks": [TaskData(task="t", rows=SplitRows(train=1, validation=1, test=1), labels={"a": 95, "b": 10})]},
        "90% of the training rows of task t are labelled 'a'",
    ),
    "a rare label": (
        {"tasks": [TaskData(task="t", rows=SplitRows(train=1, validation=1, test=1), labels={"a": 50, "b": 0})]},
        r"few training rows are labelled 'b' \(0\)",
    ),
}


@pytest.mark.parametrize("changes, words", WARNINGS.values(), ids=WARNINGS.keys())
def test_what_is_odd_is_said_in_a_sentence(changes: dict[str, Any], words: str):
    warnings = list(find_warnings(report(**changes)))
    assert any(re.search(words, warning) for warning in warnings), warnings


def test_nothing_is_said_of_rows_that_are_as_they_should_be():
    tasks = [TaskData(task="t", rows=SplitRows(train=80, validation=10, test=10), labels={"a": 40, "b": 40})]
    lengths = (LengthCount(up_to=16, rows=100),)
    clean = [Overlap(source="general", questions=90, overlapping=0)]
    assert not list(
        find_warnings(report(duplicates=5, overlaps=clean, tasks=[tasks[0].model_copy(update={"lengths": lengths})]))
    )
