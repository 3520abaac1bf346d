"""Rows of a task with fewShot: which training rows are shown before each of them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune_api.spec import DataSpec
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.drawer import Drawer
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.in_context import as_asked, check_shown
from finetune_trainer.split import Split

LABELS = ["a", "b", "c"]
PROMPTS = [{"prompt": f"{start}{{{{ text }}}} is", "completion": " {{ label }}"} for start in ("", "What of: ")]


def load(folder: Path, splits: dict[str, object] | None = None, count: int = 90, **task: object) -> Dataset:
    source = folder / "rows.jsonl"
    rows = [{"text": f"text number {n}", "label": LABELS[n % 3], "film": f"film {n % 15}"} for n in range(count)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "t", "source": source.as_uri(), "templates": PROMPTS, "fewShot": 4} | task
    other = {"name": "other", "source": source.as_uri(), "templates": PROMPTS[:1]}
    return load_dataset(DataSpec.model_validate({"tasks": [task, other], "splits": {"seed": 17} | (splits or {})}))


def everything(dataset: Dataset, task: str | None = None) -> list[Example]:
    return [row for split in Split for row in as_asked(dataset, split, task)]


def test_every_row_is_shown_training_rows_of_its_task_and_never_itself(tmp_path):
    dataset = load(tmp_path)
    trained = {row.row for row in dataset.examples(Split.TRAIN, "t")}
    asked = everything(dataset, "t")
    assert len(asked) == 90
    for row in asked:
        shown = [one.row for one in row.shown]
        assert len(set(shown)) == 4 and set(shown) <= trained - {row.row}
        assert {one.task for one in row.shown} == {"t"}
    assert len({tuple(one.row for one in row.shown) for row in asked}) > 80, "drawn for each row anew"


def test_a_row_is_shown_in_the_words_of_the_question(tmp_path):
    for row in everything(load(tmp_path), "t"):
        assert {one.prompt.startswith("What of") for one in row.shown} == {row.prompt.startswith("What of")}
        assert all(one.completion == f" {one.values['label']}" for one in row.shown)


def test_rows_of_one_group_are_not_shown_to_each_other(tmp_path):
    for row in everything(load(tmp_path, {"groupBy": "film"}), "t"):
        assert row.values["film"] not in [one.values["film"] for one in row.shown]


def test_a_test_row_from_elsewhere_is_not_shown_the_training_row_that_it_is_like(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"Text number {n}!", "label": "a"}) + "\n" for n in range(30)))
    dataset = load(tmp_path, testSource=own.as_uri(), fewShot=40)
    assert dataset.leaks
    for row in as_asked(dataset, Split.TEST, "t"):
        assert row.values["text"].casefold().strip("!") not in [one.values["text"] for one in row.shown]


def test_labels_are_shown_as_often_as_can_be(tmp_path):
    rows = everything(load(tmp_path, labels=LABELS), "t")
    counts = [Counter(one.completion for one in row.shown) for row in rows]
    assert all(sorted(count.values()) == [1, 1, 2] for count in counts)
    assert len({max(count, key=count.__getitem__) for count in counts}) == 3


def test_the_same_rows_are_shown_in_every_life_and_others_with_another_seed(tmp_path):
    def shown(dataset: Dataset) -> dict[int, list[int]]:
        return {row.row: [one.row for one in row.shown] for row in as_asked(dataset, Split.TRAIN, "t")}

    first = shown(load(tmp_path))
    assert first == shown(load(tmp_path))
    other = shown(load(tmp_path, {"seed": 18}))
    assert all(first[row] != other[row] for row in first.keys() & other.keys())


def test_a_row_is_shown_the_same_however_it_is_reached(tmp_path):
    rows = as_asked(load(tmp_path), Split.TRAIN)
    assert list(rows) == [rows[place] for place in range(len(rows))]
    assert list(rows[3:9]) == list(rows)[3:9]


def test_training_rows_are_gone_through_once_and_not_before_one_is_shown(tmp_path, monkeypatch):
    begin, begun = Drawer.__init__, []
    monkeypatch.setattr(Drawer, "__init__", lambda drawer, *given: begun.append(drawer) or begin(drawer, *given))
    dataset = load(tmp_path)
    asked = [as_asked(dataset, split) for split in Split]
    assert not begun
    assert [list(rows) for rows in asked] == [list(as_asked(dataset, split)) for split in Split]
    check_shown(dataset)
    assert len(begun) == 1


def test_tasks_without_few_shot_are_asked_as_they_are(tmp_path):
    dataset = load(tmp_path)
    assert all(row.shown == () for row in everything(dataset) if row.task == "other")
    without = load(tmp_path, fewShot=None)
    assert as_asked(without, Split.TRAIN) == without.examples(Split.TRAIN)


def test_all_there_are_is_shown_where_they_are_fewer(tmp_path):
    dataset = load(tmp_path, fewShot=64, count=30)
    trained = len(dataset.examples(Split.TRAIN, "t"))
    assert {len(row.shown) for row in as_asked(dataset, Split.TRAIN, "t")} == {trained - 1}
    with pytest.raises(
        DataError, match=rf"tasks\[0\].fewShot \(64\): task 't' has {trained} training rows, of which 1"
    ):
        check_shown(dataset)
    check_shown(load(tmp_path, fewShot=trained - 1, count=30))
