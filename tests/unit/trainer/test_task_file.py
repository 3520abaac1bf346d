"""A benchmark's task file: what it may hold, and that nothing in it is code."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_trainer.errors import DataError, FineTuneError, SpecError
from finetune_trainer.task_file import read_task_file

TASK: dict[str, Any] = {
    "task": "pick",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl", "shots": ["rows.jsonl", "rows.jsonl"]}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": 0,
}
FIELD = "spec.evaluation.benchmarks[0].suite"


def read(folder: Path, content: str | bytes) -> Any:
    (folder / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "y"}))
    raw = content.encode() if isinstance(content, str) else content
    asked: list[str] = []

    def fetch(uri: str, field: str) -> Path:
        assert field == FIELD
        asked.append(uri)
        return folder / uri.removeprefix("s3://bucket/tasks/")

    found = read_task_file("s3://bucket/tasks/pick.yaml", raw, FIELD, fetch)
    assert set(asked) == {"s3://bucket/tasks/rows.jsonl"}
    return found


def test_a_task_file_is_read_with_the_rows_beside_it(tmp_path: Path):
    found = read(tmp_path, yaml.safe_dump(TASK))
    assert found.name == "pick"
    assert [row["text"] for row in found.rows["test"]] == ["x", "y"]
    assert len(found.rows["shots"]) == 4
    assert "dataset_path" not in found.config and found.config["doc_to_text"] == "{{ text }}"


def test_files_without_a_split_are_training_rows(tmp_path: Path):
    found = read(
        tmp_path, yaml.safe_dump({**TASK, "dataset_kwargs": {"data_files": "rows.jsonl"}, "test_split": "train"})
    )
    assert list(found.rows) == ["train"]


def test_the_hash_is_of_the_file_and_of_its_rows(tmp_path: Path):
    first = read(tmp_path, yaml.safe_dump(TASK)).sha256
    assert read(tmp_path, yaml.safe_dump(TASK)).sha256 == first
    assert read(tmp_path, yaml.safe_dump({**TASK, "doc_to_text": "{{ text }}!"})).sha256 != first


REFUSED = {
    "a function": (yaml.safe_dump(TASK) + "process_docs: !function code.prepare\n", SpecError, "!function"),
    "an object": (yaml.safe_dump(TASK) + "metadata: !!python/object/apply:os.getcwd []\n", SpecError, "python/object"),
    "another file": ({"include": "other.yaml"}, SpecError, "include is not read here"),
    "a class": ({"class": "code.Task"}, SpecError, "class is not read here"),
    "unsafe code": ({"unsafe_code": True}, SpecError, "unsafe_code is not read here"),
    "remote code": ({"dataset_kwargs": {"trust_remote_code": True}}, SpecError, "dataset_kwargs.trust_remote_code"),
    "a data set's script": ({"dataset_path": "script.py"}, SpecError, "dataset_path is 'script.py'"),
    "a data set elsewhere": ({"dataset_path": "acme/rows"}, SpecError, "dataset_path is 'acme/rows'"),
    "rows elsewhere": ({"dataset_kwargs": {"data_files": {"test": "../rows.jsonl"}}}, SpecError, "does not lie beside"),
    "rows of a machine": (
        {"dataset_kwargs": {"data_files": {"test": "/etc/x.jsonl"}}},
        SpecError,
        "does not lie beside",
    ),
    "rows of a bucket": (
        {"dataset_kwargs": {"data_files": {"test": "s3://b/x.jsonl"}}},
        SpecError,
        "does not lie beside",
    ),
    "no rows": ({"dataset_kwargs": None}, DataError, "names no file for train: None"),
    "a fetched metric": ({"metric_list": [{"metric": "glue"}]}, SpecError, "metric_list[].metric is 'glue'"),
    "a metric of the hub": (
        {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
        SpecError,
        "metric_list[].hf_evaluate",
    ),
    "an unknown sum": ({"metric_list": [{"metric": "acc", "aggregation": "code"}]}, SpecError, "aggregation is 'code'"),
    "a filter that calls": (
        {"filter_list": [{"name": "x", "filter": [{"function": "custom"}]}]},
        SpecError,
        "function is 'custom'",
    ),
    "sampling": ({"generation_kwargs": {"temperature": 0.7}}, SpecError, "generation_kwargs.temperature is 0.7"),
    "a sampler": ({"fewshot_config": {"sampler": "code"}}, SpecError, "fewshot_config.sampler is 'code'"),
    "a split without rows": ({"test_split": "dev"}, DataError, "test_split is 'dev'"),
    "no split to ask": ({"test_split": None}, DataError, "neither test_split nor validation_split"),
    "no name": ({"task": None}, DataError, "task is None"),
    "a name with a dot": ({"task": "a.b"}, DataError, "task is 'a.b'"),
    "no YAML": ("task: [", DataError, "is no YAML"),
    "no text": (b"\xff\xfe\xfa", DataError, "is no YAML"),
    "no settings": ("just words", DataError, "holds no settings"),
    "settings that are none": ({"generation_kwargs": "greedy"}, DataError, "generation_kwargs is 'greedy'"),
    "a list that is none": ({"metric_list": "acc"}, DataError, "metric_list is 'acc'"),
}


@pytest.mark.parametrize("given, kind, message", REFUSED.values(), ids=REFUSED)
def test_a_task_file_that_names_code_or_nonsense_is_refused(
    given: dict[str, Any] | str | bytes, kind: type[FineTuneError], message: str, tmp_path: Path
):
    content = yaml.safe_dump({**TASK, **given}) if isinstance(given, dict) else given
    with pytest.raises(kind) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert str(caught.value).startswith(FIELD)
