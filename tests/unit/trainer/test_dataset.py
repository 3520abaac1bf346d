import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from finetune_api.spec import DataSpec, ReplaySpec
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.example import Example
from finetune_trainer.split import Split

REVIEW = {"prompt": "Review: {{ text }}\nSentiment:", "completion": " {{ label }}"}


def make_rows(count: int = 60, prefix: str = "review number") -> list[dict[str, object]]:
    return [
        {"text": f"{prefix} {n}", "label": ("negative", "positive")[n % 2], "film": f"film {n % 15}"}
        for n in range(count)
    ]


def make_task(
    folder: Path, rows: list[dict[str, object]], name: str = "sentiment", **settings: object
) -> dict[str, object]:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name, "source": source.as_uri(), "templates": [REVIEW], **settings}


def make_data(*tasks: dict[str, object], **splits: object) -> DataSpec:
    return DataSpec.model_validate(
        {"tasks": list(tasks), "splits": {"validation": 0.2, "test": 0.2, "seed": 17, **splits}}
    )


def load(folder: Path, rows: list[dict[str, object]] | None = None, **settings: object) -> Dataset:
    return load_dataset(make_data(make_task(folder, make_rows() if rows is None else rows, **settings)))


def everything(dataset: Dataset) -> list[Example]:
    return [example for split in Split for example in dataset.examples(split)]


def test_every_row_is_rendered_and_in_one_split(tmp_path):
    dataset = load(tmp_path)
    examples = everything(dataset)
    assert sorted(example.row for example in examples) == list(range(60))
    assert dataset.sizes == Counter({split: len(dataset.examples(split)) for split in Split})
    example = next(example for example in examples if example.row == 7)
    assert example.prompt == "Review: review number 7\nSentiment:"
    assert example.completion == " positive"
    assert example.values == {"text": "review number 7", "label": "positive"}


def test_tasks_and_labels_are_known_by_name(tmp_path):
    dataset = load(tmp_path, labels=["negative", "positive"])
    assert dataset.tasks == ("sentiment",)
    assert dataset.labels("sentiment") == ("negative", "positive")
    assert dataset.task("sentiment").name == "sentiment"


def test_an_open_task_has_no_labels(tmp_path):
    assert load(tmp_path).labels("sentiment") == ()


def kept_bytes(dataset: Dataset) -> bytes:
    """Return all that is in the files behind the rows that can be asked for."""
    files = {dataset.examples(split)._records for split in Split if split in dataset._opened}
    return b"".join(record for file in files for record in file.records(0, len(file)))


def test_test_rows_are_not_reachable_when_the_split_was_not_opened(tmp_path):
    data = make_data(make_task(tmp_path, make_rows()))
    full, opened = load_dataset(data), load_dataset(data, splits=(Split.TRAIN, Split.VALIDATION))
    secret = full.examples(Split.TEST)[0].values["text"]
    assert secret.encode() in kept_bytes(full)
    assert secret.encode() not in kept_bytes(opened)
    with pytest.raises(LookupError, match="test split was not opened"):
        opened.examples(Split.TEST)
    assert opened.sizes == full.sizes
    assert opened.hash == full.hash
    assert opened.examples(Split.TRAIN) == full.examples(Split.TRAIN)


def test_memory_does_not_hold_what_the_rows_say(tmp_path):
    chooser = random.Random(1)
    rows = [{"text": chooser.randbytes(5_000).hex(), "label": "a"} for _ in range(400)]
    data = make_data(make_task(tmp_path, rows))
    del rows
    tracemalloc.start()
    try:
        dataset = load_dataset(data)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(dataset.sizes.values()) == 400
    assert held < 1_000_000, "the rows have 4 MB"


def test_rows_do_not_end_up_in_logs(tmp_path):
    assert "review number" not in repr(load(tmp_path))


def test_splits_do_not_depend_on_label_template_or_task(tmp_path):
    rows = make_rows()
    other = [{**row, "label": "x"} for row in rows]
    template = {"prompt": "{{ text }} in other words?", "completion": "{{ label }}"}
    left = load(tmp_path, rows)
    right = load(tmp_path, other, name="another", templates=[template])
    assert {e.row: e.key for e in left.examples(Split.TEST)} == {e.row: e.key for e in right.examples(Split.TEST)}


def test_the_same_text_in_two_tasks_shares_a_split(tmp_path):
    first = make_task(tmp_path, make_rows(), name="first")
    second = make_task(tmp_path, [{"body": r["text"].upper(), "label": r["label"]} for r in make_rows()], name="second")
    second["templates"] = [{"prompt": "{{ body }}", "completion": "{{ label }}"}]
    dataset = load_dataset(make_data(first, second))
    for split in Split:
        examples = dataset.examples(split)
        rows = [[example.row for example in examples if example.task == task] for task in ("first", "second")]
        assert rows[0] == rows[1]
    assert dataset.duplicates.rows == 120


def test_rows_of_a_group_stay_together(tmp_path):
    data = make_data(make_task(tmp_path, make_rows(300)), groupBy="film")
    dataset = load_dataset(data)
    films = [{example.values["film"] for example in dataset.examples(split)} for split in Split]
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]


def test_without_columns_in_the_prompt_the_completion_tells_rows_apart(tmp_path):
    template = {"prompt": "Say something:", "completion": "{{ text }}"}
    assert set(load(tmp_path, templates=[template]).sizes.values()) != {0}


def test_several_templates_are_each_used_and_fixed_per_row(tmp_path):
    templates = [REVIEW, {"prompt": "{{ text }}?", "completion": "{{ label }}"}]
    dataset, again = (load(tmp_path, make_rows(200), templates=templates) for _ in range(2))
    used = Counter(example.template for example in everything(dataset))
    assert 60 < used[0] < 140
    assert everything(dataset) == everything(again)


def test_a_row_can_be_rendered_through_another_template(tmp_path):
    templates = [REVIEW, {"prompt": "{{ text }}?", "completion": "{{ label }}"}]
    dataset = load(tmp_path, templates=templates)
    example = next(example for example in everything(dataset) if example.template == 0)
    other = dataset.rendered(example, 1)
    assert (other.prompt, other.completion) == (f"{example.values['text']}?", example.completion.strip())
    assert (other.template, other.row, other.key) == (1, example.row, example.key)
    assert dataset.rendered(other, 0) == example


def test_shortening_cuts_the_longest_column_and_never_the_completion(tmp_path):
    rows = [{**row, "text": row["text"] + " x" * 50, "label": "y" * 500} for row in make_rows()]
    dataset = load(tmp_path, rows)
    example = everything(dataset)[0]
    short = dataset.shortened(example, 6)
    assert dataset.cuttable(example) == example.values["text"]
    assert short.prompt == "Review: review\nSentiment:"
    assert short.completion == example.completion
    assert short.key == example.key
    assert dataset.cuttable(dataset.shortened(example, 0)) == ""


def test_a_column_that_the_completion_repeats_is_not_cut(tmp_path):
    template = {"prompt": "Fix: {{ text }} {{ label }}", "completion": "{{ text }}"}
    dataset = load(tmp_path, templates=[template])
    example = everything(dataset)[0]
    assert dataset.shortened(example, 0).completion == example.completion
    assert dataset.cuttable(example) == example.values["label"]


def test_max_examples_keeps_the_same_rows_in_any_order(tmp_path):
    rows = make_rows(100)
    kept = everything(load(tmp_path, rows, maxExamples=40))
    kept_reversed = everything(load(tmp_path, rows[::-1], maxExamples=40))
    assert len(kept) == 40
    assert {e.prompt for e in kept} == {e.prompt for e in kept_reversed}


def test_equal_data_has_an_equal_hash_and_other_data_another(tmp_path):
    rows = make_rows()
    changed = [*rows[:-1], {**rows[-1], "label": "neutral"}]
    assert load(tmp_path, rows).hash == load(tmp_path, rows).hash != load(tmp_path, changed).hash


def test_csv_rows_load_alike(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"review {n},positive\n" for n in range(60)))
    task = {"name": "sentiment", "source": path.as_uri(), "templates": [REVIEW]}
    assert sum(load_dataset(make_data(task)).sizes.values()) == 60


def test_missing_columns_are_listed_with_those_found(tmp_path):
    template = {"prompt": "{{ txt }}", "completion": "{{ class }}"}
    with pytest.raises(DataError, match=r"tasks\[0\]\.templates: 'txt', 'class' not among .*are text, label, film"):
        load(tmp_path, templates=[template])


def test_a_missing_group_column_is_named_by_its_setting(tmp_path):
    with pytest.raises(DataError, match=r"spec\.data\.splits\.groupBy: 'director' not among .*film"):
        load_dataset(make_data(make_task(tmp_path, make_rows()), groupBy="director"))


def test_the_subgroup_column_is_kept_though_no_template_names_it(tmp_path):
    data = make_data(make_task(tmp_path, make_rows()))
    assert all("film" not in row.values for row in everything(load_dataset(data)))
    assert all("film" in row.values for row in everything(load_dataset(data, subgroup_column="film")))
    with pytest.raises(DataError, match=r"spec\.evaluation\.holistic\.subgroupColumn: 'dialect' not among .*film"):
        load_dataset(data, subgroup_column="dialect")


def test_a_changed_input_leaves_the_completion_alone(tmp_path):
    dataset = load(tmp_path)
    for row in everything(dataset):
        changed = dataset.with_input(row, str.upper)
        assert changed.completion == row.completion
        assert changed.prompt != row.prompt
        assert changed.prompt.upper() == row.prompt.upper()
        assert (changed.key, changed.template) == (row.key, row.template)


def test_of_a_chat_the_last_question_is_changed(tmp_path):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "how are you"), ("assistant", "well")]
    rows = [{"turns": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in range(60)]
    dataset = load(tmp_path, rows, templates=[], labels=[], messages="turns")
    row = everything(dataset)[0]
    changed = dataset.with_input(row, str.upper)
    assert changed.prompt == row.prompt.upper() != row.prompt
    assert (changed.earlier, changed.completion) == (row.earlier, row.completion)


def test_a_row_without_its_column_is_named(tmp_path):
    rows = make_rows()
    del rows[13]["text"]
    with pytest.raises(DataError, match=r"templates\[0\]\.prompt does not render for row 13 .*no text"):
        load(tmp_path, rows)


@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_label_is_named_with_a_remedy(tmp_path, value):
    rows = make_rows()
    rows[5]["label"] = rows[9]["label"] = value
    with pytest.raises(
        DataError, match=r"tasks\[0\]\.source: column 'label',.*no value in 2 of 60 .*row 5.*Drop these"
    ):
        load(tmp_path, rows)


def test_a_column_that_the_completion_can_do_without_may_be_empty(tmp_path):
    rows = [{**row, "note": None if number % 2 else "sure"} for number, row in enumerate(make_rows())]
    template = {"prompt": "{{ text }}:", "completion": "{{ label }}{% if note %}, {{ note }}{% endif %}"}
    completions = {example.completion for example in everything(load(tmp_path, rows, templates=[template]))}
    assert completions == {"negative, sure", "positive"}


def test_a_row_without_group_is_named(tmp_path):
    rows = make_rows()
    rows[5]["film"] = None
    with pytest.raises(DataError, match=r"column 'film', used by spec\.data\.splits\.groupBy.*row 5"):
        load_dataset(make_data(make_task(tmp_path, rows), groupBy="film"))


def test_completions_outside_the_labels_are_counted_and_placed(tmp_path):
    rows = make_rows()
    rows[4]["label"] = rows[8]["label"] = "Negative"
    rows[6]["label"] = "mixed"
    with pytest.raises(
        DataError, match=r"tasks\[0\]\.labels.*'Negative' \(2, first in row 4\), 'mixed' \(1, first in row 6\)"
    ):
        load(tmp_path, rows, labels=["negative", "positive"])


def test_every_template_must_render_every_row_before_training(tmp_path):
    templates = [REVIEW, {"prompt": "{{ text }} {{ film.upper() }}", "completion": "{{ label }}"}]
    rows = [*make_rows(), {"text": "without a film", "label": "positive", "film": None}]
    with pytest.raises(DataError, match=r"templates\[1\]\.prompt does not render for row 60"):
        load(tmp_path, rows, templates=templates)


def test_labels_must_cover_the_completions_of_every_template(tmp_path):
    templates = [REVIEW, {"prompt": "{{ text }}", "completion": "{{ label | upper }}"}]
    with pytest.raises(DataError, match=r"others are 'NEGATIVE' \(30, first in row 0\), 'POSITIVE' \(30"):
        load(tmp_path, labels=["negative", "positive"], templates=templates)


def test_hundreds_of_other_labels_make_a_short_message(tmp_path):
    rows = [{**row, "label": f"label {number} " + "x" * 500} for number, row in enumerate(make_rows(300))]
    with pytest.raises(DataError, match="and 290 more") as caught:
        load(tmp_path, rows, labels=["negative", "positive"])
    assert len(str(caught.value)) < 2000


def test_errors_name_the_task_they_are_in(tmp_path):
    tasks = [make_task(tmp_path, make_rows(prefix=name), name=name) for name in ("first", "second")]
    tasks[1]["source"] = (tmp_path / "gone.jsonl").as_uri()
    with pytest.raises(DataError, match=r"spec\.data\.tasks\[1\]\.source: there is no file"):
        load_dataset(make_data(*tasks))


def test_a_bad_template_is_named_by_its_path(tmp_path):
    with pytest.raises(SpecError, match=r"spec\.data\.tasks\[0\]\.templates\[1\]\.completion, line 1"):
        load(tmp_path, templates=[REVIEW, {"prompt": "x", "completion": "{{ label"}])


def test_too_few_rows_for_every_split_are_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"spec\.data\.splits: no rows for"):
        load(tmp_path, make_rows(2))


def test_prompts_that_name_no_column_are_told(tmp_path):
    with pytest.raises(DataError, match="let the prompts name a column"):
        load(tmp_path, make_rows(50), templates=[{"prompt": "hello", "completion": "{{ label }}"}])


def test_a_task_without_rows_in_a_split_is_named(tmp_path):
    tasks = make_task(tmp_path, make_rows(100), name="large"), make_task(tmp_path, make_rows(1, "other"), name="small")
    with pytest.raises(DataError, match=r"spec\.data\.tasks\[1\] \(small\): no rows for"):
        load_dataset(make_data(*tasks))


# --- rows with a split of their own, strata, replay, other names


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.as_uri()


def test_validation_and_test_rows_can_come_from_sources_of_their_own(tmp_path):
    own = {
        "validationSource": write_rows(tmp_path / "v.jsonl", make_rows(7, "another review")),
        "testSource": write_rows(tmp_path / "t.jsonl", make_rows(9, "a third one")),
    }
    dataset = load(tmp_path, **own)
    assert dataset.sizes == {Split.TRAIN: 60, Split.VALIDATION: 7, Split.TEST: 9}
    assert all(example.prompt.startswith("Review: a third one") for example in dataset.examples(Split.TEST))
    assert dataset.leaks == ()


def test_only_the_split_without_a_source_is_cut_from_the_rows(tmp_path):
    dataset = load(tmp_path, testSource=write_rows(tmp_path / "t.jsonl", make_rows(9, "a third one")))
    assert dataset.sizes[Split.TEST] == 9
    assert dataset.sizes[Split.VALIDATION] > 0
    plain = load(tmp_path)
    assert {e.row for e in plain.examples(Split.VALIDATION)} == {e.row for e in dataset.examples(Split.VALIDATION)}


def test_test_rows_that_are_also_trained_on_are_counted(tmp_path):
    rows = [{"text": f"{n} review {n * 7} about {n * 13} films: good {n * 3}", "label": "x"} for n in range(60)]
    leaking = [{**rows[3]}, {**rows[4], "text": str(rows[4]["text"]).upper()}, *make_rows(8, "a third one")]
    dataset = load(tmp_path, rows, testSource=write_rows(tmp_path / "t.jsonl", leaking))
    assert dataset.leaks == (("sentiment.testSource", 0), ("sentiment.testSource", 1))
    assert dataset.sizes[Split.TEST] == 10


def test_a_row_of_another_task_follows_the_test_row_that_it_is_like(tmp_path):
    test = write_rows(tmp_path / "t.jsonl", make_rows(20))
    first = make_task(tmp_path, make_rows(60, "another"), name="first", testSource=test)
    second = make_task(tmp_path, make_rows(100), name="second")
    dataset = load_dataset(make_data(first, second))
    assert {e.row for e in dataset.examples(Split.TEST) if e.task == "second"} >= set(range(20))
    assert dataset.leaks == ()


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_every_split_has_its_share_of_every_stratum(tmp_path, share):
    rows = [{"text": f"review number {n}", "label": "rare" if n % 10 == 0 else "common"} for n in range(400)]
    dataset = load_dataset(make_data(make_task(tmp_path, rows), stratifyBy="label", validation=share, test=share))
    for split in (Split.VALIDATION, Split.TEST):
        labels = Counter(example.values["label"] for example in dataset.examples(split))
        assert labels == {"rare": 40 * share, "common": 360 * share}


def test_a_row_without_its_stratum_is_named(tmp_path):
    rows = make_rows()
    rows[5]["film"] = None
    with pytest.raises(DataError, match=r"column 'film', used by spec\.data\.splits\.stratifyBy.*row 5"):
        load_dataset(make_data(make_task(tmp_path, rows), stratifyBy="film"))


def test_replayed_rows_are_apart_and_none_is_like_a_kept_back_one(tmp_path):
    task = make_task(tmp_path, make_rows())
    general = [{"prompt": f"Question {n}: why?", "completion": f"Because of {n}."} for n in range(30)]
    alike = [{"prompt": row["text"], "completion": "leak"} for row in make_rows()]
    source = write_rows(tmp_path / "general.jsonl", general + alike)
    data = make_data(task).model_copy(update={"replay": ReplaySpec(source=source, fraction=0.2)})
    dataset, plain = load_dataset(data), load_dataset(make_data(task))
    assert dataset.tasks == ("sentiment",)
    assert dataset.sizes == plain.sizes
    assert [e.prompt for e in everything(dataset)] == [e.prompt for e in everything(plain)]
    replayed = dataset.replay()
    assert {example.task for example in replayed} == {"replay"}
    kept_back = {e.key for split in (Split.VALIDATION, Split.TEST) for e in dataset.examples(split)}
    assert not kept_back & {example.key for example in replayed}
    assert 0 < sum(example.completion == "leak" for example in replayed) < 60
    assert dataset.hash != plain.hash


def test_replayed_rows_may_be_chats(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = write_rows(tmp_path / "general.jsonl", [{"messages": turns}])
    data = make_data(make_task(tmp_path, make_rows()), seed=3).model_copy(update={"replay": ReplaySpec(source=source)})
    (example,) = load_dataset(data).replay()
    assert (example.prompt, example.completion) == ("Hi", "Hello")


def test_replayed_rows_that_are_all_kept_back_are_none(tmp_path):
    task = make_task(tmp_path, make_rows())
    kept_back = load_dataset(make_data(task)).examples(Split.TEST)[0].values["text"]
    source = write_rows(tmp_path / "general.jsonl", [{"prompt": kept_back, "completion": "x"}])
    data = make_data(task).model_copy(update={"replay": ReplaySpec(source=source)})
    with pytest.raises(DataError, match=r"spec\.data\.replay\.source: all 1 rows .* are like rows"):
        load_dataset(data)


def test_replayed_rows_lack_what_they_need(tmp_path):
    source = write_rows(tmp_path / "general.jsonl", [{"question": "Hi"}])
    data = make_data(make_task(tmp_path, make_rows())).model_copy(update={"replay": ReplaySpec(source=source)})
    with pytest.raises(DataError, match=r"spec\.data\.replay\.templates: 'prompt', 'completion' not among the columns"):
        load_dataset(data)


def test_columns_say_what_the_rows_call_them(tmp_path):
    rows = [{"Review Body": row["text"], "class": row["label"], "text": "something else"} for row in make_rows()]
    dataset = load(tmp_path, rows, columns={"text": "Review Body", "label": "class"})
    assert everything(dataset)[0].prompt.startswith("Review: review number")
    with pytest.raises(DataError, match=r"'Body' not among the columns .*Review Body.*say in columns what"):
        load(tmp_path, rows, columns={"text": "Body", "label": "class"})


def test_a_column_that_the_template_asks_for_first_may_be_missing(tmp_path):
    template = {
        "prompt": "{{ text }}{% if note is defined and note %} ({{ note }}){% endif %}",
        "completion": "{{ label }}",
    }
    assert everything(load(tmp_path, templates=[template]))[0].prompt.startswith("review number")
    rows = [{**row, "note": "sic"} for row in make_rows()]
    assert everything(load(tmp_path, rows, templates=[template]))[0].prompt.endswith(" (sic)")


def test_chats_are_split_by_what_was_asked(tmp_path):
    def turns(number: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]

    def places(answer: str) -> dict[int, Split]:
        source = write_rows(tmp_path / "chats.jsonl", [{"turns": turns(n, answer)} for n in range(60)])
        dataset = load_dataset(make_data({"name": "chat", "source": source, "messages": "turns"}))
        assert dataset.phrasings("chat") == 1
        return {example.row: split for split in Split for example in dataset.examples(split)}

    assert places("yes") == places("no")


def test_a_missing_column_of_chats_is_told_by_its_setting(tmp_path):
    source = write_rows(tmp_path / "chats.jsonl", make_rows())
    with pytest.raises(DataError, match=r"tasks\[0\]\.messages: 'turns' not among the columns"):
        load_dataset(make_data({"name": "chat", "source": source, "messages": "turns"}))


def test_columns_that_no_template_uses_are_named(tmp_path):
    rows = [{**row, "url": "x", f"key {number}": 1} for number, row in enumerate(make_rows())]
    unused = load(tmp_path, rows).unused["sentiment"]
    assert unused.startswith("film, url, key 0, key 1,")
    assert unused.endswith("key 7 and 52 more")
