"""Reading manifests: YAML as the API server reads it, hostile input, relative paths, and the hash."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_api.resolve
from finetune_api.job import InvalidJobError, content_hash, load_job, spec_hash
from finetune_api.report import ExitCode
from finetune_api.request import request_hash
from finetune_api.resolve import LearningRate, resolve
from finetune_api.spec import FineTuneJobSpec, TrainingSpec

from .builders import make_job, make_manifest
from .test_spec import EVERYTHING


def as_yaml(overrides: dict[str, Any] | None = None) -> str:
    return yaml.safe_dump(make_manifest(overrides), sort_keys=False)


def refused(text: str, source: str = "job.yaml") -> InvalidJobError:
    with pytest.raises(InvalidJobError) as caught:
        load_job(text, source)
    assert caught.value.exit_code is ExitCode.BAD_SPEC
    return caught.value


def test_yaml_and_json_are_read_alike():
    assert load_job(as_yaml(), "job.yaml") == load_job(json.dumps(make_manifest(), indent=2), "job.json")


HEAD = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\n"
BAD_TEXTS = {
    "an empty file": ("", "is empty", "finetune init"),
    "a file of comments": ("# nothing\n---\n", "is empty", "finetune init"),
    "two documents": (HEAD + "---\n" + HEAD, "job.yaml:4: .*holds 2 documents", "Keep one FineTuneJob a file"),
    "a bare word": ("hello", '"hello": is no manifest but a bare value', "kind: FineTuneJob"),
    "a list": ("- a\n- b\n", "is no manifest but a bare value", "kind: FineTuneJob"),
    "another kind": ("kind: Deployment\n", r'kind \("Deployment"\): is no FineTuneJob', "apiVersion"),
    "no kind": ("apiVersion: v1\n", "kind: is missing", "finetune init"),
    "a bracket left open": (HEAD + "spec: [a\n", "job.yaml:4: .*no valid YAML at column 1", "quote text"),
    "a tab for indentation": (HEAD + "spec:\n\tmodel: x\n", "job.yaml:4: .*column 1.*cannot start any token", "spaces"),
    "an unknown alias": (HEAD + "spec: *nothing\n", "job.yaml:3: .*undefined alias", "Correct the line"),
    "a key that stands twice": (HEAD + "spec:\n  data: 1\n  data: 2\n", "5: spec.data: stands twice,", "Keep one"),
    "a character that YAML forbids": (HEAD + "spec: \x07\n", r"character U\+0007", "Remove it"),
    "a Python object": (HEAD + "spec: !!python/object/apply:os.system [id]\n", "could not determine", "Correct"),
    "a tag of an application": (HEAD + "spec: !thing {}\n", "could not determine a constructor", "Correct"),
    "a key that is a list": (HEAD + "? [a]\n: b\n", "has a key that is not text", "quotes"),
    "a nest of lists": (HEAD + "spec: " + "[" * 5000, "nests more than 40 deep", "flatter"),
    "an alias to what holds it": (HEAD + "spec: &a [*a]\n", "alias to what contains it", "Write it out"),
    "a text of megabytes": (HEAD + "# " + "x" * 2_000_001, "more than 2000000", "files of their own"),
}  # fmt: skip


@pytest.mark.parametrize("text, problem, remedy", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_text_that_is_no_manifest_is_refused_with_its_line(text: str, problem: str, remedy: str):
    error = refused(text)
    assert len(error.errors) == 1
    with pytest.raises(InvalidJobError, match=problem):
        raise error
    assert remedy in str(error)
    assert len(str(error)) < 500


def test_a_bomb_of_aliases_is_refused_before_it_grows():
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 12))
    error = refused(HEAD + "l0: &l0 [x]\n" + levels)
    assert "once its aliases are written out" in str(error)


def test_an_alias_may_be_used_as_yaml_means_it():
    text = as_yaml().replace("method:", "checkpoint: &few\n    keep: 1\n  method:")
    assert load_job(text, "job.yaml").spec.checkpoint.keep == 1


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", ".001"])
def test_a_number_is_a_number_as_in_kubernetes(text: str):
    # To PyYAML on its own 1e-3 is text.
    manifest = as_yaml({"spec.training.learningRate": "RATE"}).replace("RATE", text)
    assert load_job(manifest, "job.yaml").spec.training.learning_rate == 0.001


def test_dates_and_times_are_text():
    manifest = (
        as_yaml({"spec.data.tasks[0].labels": ["ONE", "TWO"]}).replace("ONE", "2024-01-31").replace("TWO", "12:30:00")
    )
    assert load_job(manifest, "job.yaml").spec.data.tasks[0].labels == ("2024-01-31", "12:30:00")


def test_an_error_names_the_line_of_its_field():
    text = as_yaml({"spec.training": {"epochs": 3, "seed": -1}})
    line = text.splitlines().index("    seed: -1") + 1
    (error,) = refused(text).errors
    assert error.line == line
    assert str(refused(text)) == (f"job.yaml:{line}: spec.training.seed (-1): must be at least 0. Set it to 0 or more.")


def test_a_missing_field_is_reported_at_the_block_that_lacks_it():
    text = as_yaml({"spec.output": {"merge": False}})
    (error,) = refused(text).errors
    assert (error.path, error.line) == ("spec.output.uri", text.splitlines().index("  output:") + 1)


def test_errors_stand_in_the_order_of_the_file():
    error = refused(as_yaml({"spec.output.keep": 1, "metadata.name": "Big", "spec.model.task": "x"}))
    assert [one.path for one in error.errors] == ["metadata.name", "spec.model.task", "spec.output.keep"]


def test_a_secret_never_stands_in_an_error():
    secret = "hf_" + "x" * 30
    variable = {"name": "HF_TOKEN", "value": secret}
    text = as_yaml({"spec.compute.pod.env": [variable], "spec.model.source": f"s3://key:{secret}@bucket/a"})
    error = str(refused(text))
    assert "HF_TOKEN" in error
    assert secret not in error


# --- relative paths


def test_relative_folders_start_from_the_manifests_folder(tmp_path: Path):
    text = as_yaml(
        {
            "spec.model.source": "file://../models/tiny",
            "spec.data.tasks[0].source": "file://./my%20rows.jsonl",
            "spec.output.uri": "file://./out",
        }
    )
    spec = load_job(text, str(tmp_path / "jobs" / "job.yaml")).spec
    assert spec.model.source == (tmp_path / "models" / "tiny").as_uri()
    assert spec.data.tasks[0].source == (tmp_path / "jobs" / "my rows.jsonl").as_uri()
    assert spec.output.uri == (tmp_path / "jobs" / "out").as_uri()


def test_relative_folders_of_a_manifest_named_relatively_start_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spec = load_job(as_yaml({"spec.output.uri": "file://./out"}), "jobs/job.yaml").spec
    assert spec.output.uri == (tmp_path / "jobs" / "out").as_uri()


def test_absolute_folders_and_templates_stay_as_they_are():
    prompt = "See file://./x: {{ text }}"
    spec = load_job(as_yaml({"spec.data.tasks[0].templates[0].prompt": prompt}), "a/job.yaml").spec
    assert spec.data.tasks[0].templates[0].prompt == prompt
    assert spec.data.tasks[0].source == "file:///data/reviews.jsonl"


# --- identity


def test_the_hash_is_of_what_is_done_not_of_how_it_is_written():
    one = resolve(make_job({"spec.training.epochs": 3}))
    other = resolve(make_job({"spec.method.lora": {"rank": 16}, "metadata.labels": {"a": "b"}}))
    assert spec_hash(one.spec) == spec_hash(other.spec)
    assert len(spec_hash(one.spec)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"spec.training.seed": 1},
        {"spec.data.tasks[0].labels": ["positive", "negative"]},
        {"spec.output.uri": "file:///x"},
    ],
    ids=["the seed", "the order of labels", "the output"],
)
def test_another_spec_has_another_hash(change: dict[str, Any]):
    for hash_of in (spec_hash, request_hash):
        assert hash_of(resolve(make_job(change)).spec) != hash_of(resolve(make_job()).spec)


def test_what_may_change_while_a_job_exists_is_no_part_of_its_hash():
    changed = make_job({"spec.runPolicy": {"suspend": True, "activeDeadlineSeconds": 5, "childTtlSeconds": 1}})
    for hash_of in (spec_hash, request_hash):
        assert hash_of(resolve(changed).spec) == hash_of(resolve(make_job()).spec)


def test_how_large_a_gpu_is_makes_no_other_job():
    for compute in ({}, {"workers": 2}):
        plain = resolve(make_job({"spec.compute": compute})).spec
        told = resolve(make_job({"spec.compute": {**compute, "gpuMemory": "80Gi"}})).spec
        for hash_of in (spec_hash, request_hash):
            assert hash_of(told) == hash_of(plain)


class LaterTraining(TrainingSpec):
    """A block as a later release may have it."""

    trackers: tuple[str, ...] = ("console",)
    """A field that is new."""
    seed: int = 41
    """Another default."""


class LaterSpec(FineTuneJobSpec):
    """What a later release asks for."""

    training: LaterTraining = LaterTraining()
    """With one field more."""
    audit: bool = True
    """One more field."""


@pytest.mark.parametrize("written", [{}, {"spec.training.epochs": 2}], ids=["no block", "a block"])
def test_a_later_release_with_more_fields_takes_the_same_request_for_the_same(written: dict[str, Any]):
    job = resolve(make_job(written))
    content = make_job(written).spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    later = LaterSpec.model_validate(content)
    later = resolve(job.model_copy(update={"spec": later})).spec
    assert isinstance(later.training, LaterTraining)
    assert spec_hash(later) != spec_hash(job.spec)
    assert request_hash(later) == request_hash(job.spec)
    asked = later.training.model_copy(update={"trackers": ()})
    assert request_hash(later.model_copy(update={"training": asked})) != request_hash(job.spec)


def test_defaults_that_are_written_out_make_no_other_request():
    job = resolve(make_job())
    written_out = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert request_hash(FineTuneJobSpec.model_validate(written_out)) == request_hash(job.spec)


FILLED_IN = {
    "the rate of lora": {"spec.method": {"type": "lora"}},
    "the rate of bias terms": {"spec.method": {"type": "selective"}},
    "how many last layers": {"spec.method": {"type": "selective", "selective": {"train": "lastLayers"}}},
    "a prefix": {"spec.method": {"type": "prefixTuning"}},
    "a soft prompt": {"spec.method": {"type": "promptTuning"}},
    "IA3": {"spec.method": {"type": "ia3"}},
    "an adapter": {"spec.method": {"type": "adapter"}},
    "the temperature of mixing": {"spec.data.mixing.strategy": "temperature"},
}


@pytest.mark.parametrize("asked", FILLED_IN.values(), ids=FILLED_IN)
def test_a_later_release_that_derives_other_defaults_takes_the_same_request_for_the_same(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    job = resolve(make_job(asked))
    earlier = request_hash(job.spec)
    for method, usual in finetune_api.resolve.LEARNING_RATES.items():
        monkeypatch.setitem(finetune_api.resolve.LEARNING_RATES, method, usual._replace(rate=2 * usual.rate))
    monkeypatch.setattr(finetune_api.resolve, "BIAS_LEARNING_RATE", LearningRate(0.123, "test"))
    for name in ("LAST_LAYERS", "MIXING_TEMPERATURE"):
        monkeypatch.setattr(finetune_api.resolve, name, 2 * getattr(finetune_api.resolve, name))
    later = resolve(make_job(asked))
    assert spec_hash(later.spec) != spec_hash(job.spec)
    assert request_hash(later.spec) == earlier
    assert request_hash(resolve(make_job(asked | {"spec.training.learningRate": 0.5})).spec) != earlier


@pytest.mark.parametrize("asked", FILLED_IN.values(), ids=FILLED_IN)
def test_nothing_that_is_filled_in_is_part_of_a_request(asked: dict[str, Any]):
    spec = make_job(asked).spec
    assert request_hash(spec) == content_hash(
        spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    )


def test_a_block_that_asks_for_something_counts_though_all_in_it_is_default():
    changed = resolve(make_job({"spec.evaluation.holistic": {}}))
    assert request_hash(changed.spec) != request_hash(resolve(make_job()).spec)


# --- whatever comes

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([{}]),
    st.just([None]),
    st.just({"type": "lora"}),
    st.just({"a": {"b": [1]}}),
)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in leaves(item, (*path, key)))]


PLACES = [place for place in leaves(make_manifest(EVERYTHING)) if place]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=4))
def test_junk_anywhere_is_answered_with_errors_that_name_it(changes: list[tuple[tuple[str | int, ...], object]]):
    manifest = make_manifest(EVERYTHING)
    for place, junk in changes:
        target: Any = manifest
        try:
            for part in place[:-1]:
                target = target[part]
            target[place[-1]] = copy.deepcopy(junk)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken this place away
    try:
        load_job(json.dumps(manifest), "job.json")
    except InvalidJobError as refused:
        errors = refused.errors
    else:
        return  # What is absent is not wrong.
    for error in errors:
        assert error.problem.endswith(".")
        assert error.remedy.endswith((".", "?"))
        assert len(str(error)) < 1000


def test_a_manifest_full_of_mistakes_is_answered_within_seconds():
    template = {"prompt": "", "completion": 5}
    tasks = [{"name": "a b", "source": "x", "templates": [template] * 16, "labels": ["a", 3]} for _ in range(32)]
    start = time.monotonic()
    errors = refused(json.dumps(make_manifest({"spec.data.tasks": tasks}))).errors
    assert len(errors) == 32 * (2 * 16 + 3)
    assert time.monotonic() - start < 20
