"""Benchmarks through lm-evaluation-harness on the tiny model: the numbers of its own hf model, base beside tuned."""

import functools
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.report import Report
from finetune_trainer import stages
from finetune_trainer.benchmark import figure_of, pool
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import DataError, FineTuneError, SpecError, StorageError
from finetune_trainer.harness import (
    SUITES,
    HarnessModel,
    Tasks,
    ask,
    figure_names,
    load_suite,
    load_task,
    suite_manager,
)
from finetune_trainer.layout import Layout
from finetune_trainer.scoring import Scorer
from finetune_trainer.split import Split
from finetune_trainer.squad_metrics import compute_exact, compute_f1
from finetune_trainer.task_file import TaskFile, read_task_file
from finetune_trainer.workspace import Workspace

from .conftest import save_tiny_encoder_decoder
from .jobs import Silence, tiny_job
from .test_evaluation import TwoModels, models, tokenizer  # noqa: F401 - fixtures

ROUNDING = 1e-4
"""Largest difference in nats that fp32 sums in another order explain: batches and packing differ."""

CONTEXT = 512


def rows(count: int = 40) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    words = ("film", "phone", "food", "plot", "soup", "service", "great", "dull")
    return [
        {
            "text": " ".join(draw.choice(words, 6)),
            "choices": [f"{word} {number}" for number, word in enumerate(draw.choice(words, 3))],
            "gold": int(draw.integers(3)),
            "binary": int(draw.integers(2)),
        }
        for _ in range(count)
    ]


CHOICE = {
    "task": "pick",
    "output_type": "multiple_choice",
    "doc_to_text": "Review: {{ text }}\nSentiment:",
    "doc_to_choice": "{{ choices }}",
    "doc_to_target": "{{ gold }}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
BINARY = {
    "task": "yes",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ text }}. Good or bad?",
    "doc_to_choice": ["bad", "good"],
    "doc_to_target": "binary",
    "num_fewshot": 2,
    "fewshot_split": "test",
    "metric_list": [
        {"metric": "f1", "aggregation": "f1", "higher_is_better": True},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "Repeat: {{ text }}\n",
    "doc_to_target": "{{ text }}",
    "generation_kwargs": {"until": [" a", "\n"], "max_gen_toks": 12},
    "filter_list": [
        {"name": "plain", "filter": [{"function": "take_first"}]},
        {
            "name": "first-word",
            "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
        },
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
}
LAST_WORD = {
    "task": "last",
    "output_type": "loglikelihood",
    "doc_to_text": "{{ text }} and ",
    "doc_to_target": " more",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
PROSE = {
    "task": "prose",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{ text }}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}


def write_task(folder: Path, task: Mapping[str, Any], lines: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write a task file with its rows beside it."""
    whole = {
        **task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{task['task']}.jsonl"}},
        "test_split": "test",
    }
    (folder / f"{task['task']}.jsonl").write_text("\n".join(map(json.dumps, rows() if lines is None else lines)))
    path = folder / f"{task['task']}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def read_task(path: Path) -> TaskFile:
    return read_task_file(path.as_uri(), path.read_bytes(), "here", lambda uri, _: Path(uri.removeprefix("file://")))


def answers(model: Any, tasks: Tasks) -> dict[str, Any]:
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)
    return evaluator.evaluate(model, {"tasks": dict(tasks), "groups": {}}, bootstrap_iters=0, log_samples=True)


def numbers(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return all log-probabilities that a task's answers consist of."""
    return np.array([np.ravel(resp[0])[0] for sample in samples for resp in sample["resps"]], dtype=np.float64)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("task", [CHOICE, BINARY, WRITE, LAST_WORD, PROSE], ids=lambda task: task["task"])
def test_a_task_comes_out_as_with_the_hf_model_of_the_harness(
    task: dict[str, Any],
    layout: Layout,
    models: TwoModels,  # noqa: F811
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    tmp_path: Path,
):
    tasks = load_task(read_task(write_task(tmp_path, task)), None)
    theirs = answers(HFLM(models.base_model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=4), tasks)
    ours = answers(HarnessModel(models.base_model, tokenizer, Scorer(models.base_model, layout), CONTEXT), tasks)
    name = task["task"]
    found, expected = ours["samples"][name], theirs["samples"][name]
    if task is WRITE:
        assert [sample["resps"] for sample in found] == [sample["resps"] for sample in expected]
        assert any(sample["resps"] != [[""]] for sample in found)
    else:
        assert numbers(found) == pytest.approx(numbers(expected), abs=ROUNDING)
    for figure, value in theirs["results"][name].items():
        if isinstance(value, float):
            assert ours["results"][name][figure] == pytest.approx(value, rel=1e-4, nan_ok=True), figure


@pytest.mark.parametrize("task", [LAST_WORD, PROSE], ids=lambda task: task["task"])
def test_what_the_model_has_no_places_for_is_cut_as_the_hf_model_cuts_it(
    task: dict[str, Any],
    models: TwoModels,  # noqa: F811
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    tmp_path: Path,
):
    tasks = load_task(read_task(write_task(tmp_path, task)), None)
    places = 10
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows()]
    assert max(lengths) > places + 1
    theirs = answers(HFLM(models.base_model, tokenizer=tokenizer, max_length=places, batch_size=4), tasks)
    ours = answers(HarnessModel(models.base_model, tokenizer, Scorer(models.base_model, Layout.PACKED), places), tasks)
    found, expected = (numbers(one["samples"][task["task"]]) for one in (ours, theirs))
    assert found == pytest.approx(expected, abs=ROUNDING)


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = save_tiny_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder"))
    model, own_tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # It would else end many an answer before the first letter.
    wordless = [token for token in range(len(own_tokenizer)) if not own_tokenizer.decode([token]).strip().isalpha()]
    model.lm_head.weight.data[wordless] = 0.0
    return model.eval(), own_tokenizer


@pytest.mark.parametrize("places", [CONTEXT, 10], ids=["all fits", "questions are cut"])
@pytest.mark.parametrize("task", [CHOICE, BINARY, WRITE, LAST_WORD, PROSE], ids=lambda task: task["task"])
def test_an_encoder_reads_questions_as_with_the_hf_model_of_the_harness(
    task: dict[str, Any],
    places: int,
    encoder_decoder: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
):
    model, own_tokenizer = encoder_decoder
    if task is WRITE:
        task = WRITE | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 12}}
    tasks = load_task(read_task(write_task(tmp_path, task)), None)
    theirs = answers(HFLM(model, backend="seq2seq", tokenizer=own_tokenizer, max_length=places, batch_size=4), tasks)
    ours = answers(HarnessModel(model, own_tokenizer, Scorer(model, Layout.PADDED), places), tasks)
    found, expected = ours["samples"][task["task"]], theirs["samples"][task["task"]]
    if task["task"] != "write":
        assert numbers(found) == pytest.approx(numbers(expected), abs=ROUNDING)
        return
    pairs = [(one["resps"][0][0], other["resps"][0][0]) for one, other in zip(found, expected, strict=True)]
    # Theirs may have as many tokens more as the question has.
    assert all(other.startswith(one) for one, other in pairs)
    assert all(one for one, _ in pairs), pairs[:4]


def test_both_models_are_shown_the_same_examples(
    models: TwoModels,  # noqa: F811
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    tmp_path: Path,
):
    tasks = load_task(read_task(write_task(tmp_path, LAST_WORD | {"num_fewshot": 3, "fewshot_split": "test"})), None)
    told: list[float] = []
    model = HarnessModel(models.base_model, tokenizer, Scorer(models.base_model, Layout.PACKED), CONTEXT, told.append)
    first, second = (ask(tasks, model, None)["last"] for _ in range(2))
    assert first == second
    assert told == sorted(told)
    assert told[-1] == 80


def run_job(model: Path, folder: Path, **changes: Any) -> Report:
    job = tiny_job(model, folder, training__maxSteps=4, **changes)
    return stages.run(job, folder / "workspace", Silence())


def test_a_job_puts_base_and_tuned_side_by_side_and_gates_on_it(tiny_model_dir: Path, tmp_path: Path):
    suites = [{"suite": write_task(tmp_path, task).as_uri()} for task in (CHOICE, BINARY, WRITE)]
    suites[0]["limit"] = 35
    gates = [{"metric": "pick.acc", "min": 0.0}, {"metric": "yes.f1", "min": 1.1}]
    report = run_job(
        tiny_model_dir, tmp_path, evaluation={"benchmarks": suites, "gates": gates}, output__publishOn="gates"
    )
    assert report.evaluation is not None
    found = report.evaluation.benchmarks
    assert [one.name for one in found] == ["pick", "yes", "write"]
    assert [[metric.metric for metric in one.metrics] for one in found] == [
        ["acc", "acc_norm"],
        ["f1", "mcc"],
        ["exact_match", "exact_match_first_word"],
    ]
    acc = found[0].metrics[0]
    assert acc.rows == 35
    assert acc.base is not None and acc.low is not None and acc.high is not None and acc.p_value is not None
    assert acc.low <= acc.tuned - acc.base <= acc.high
    assert [gate.passed for gate in report.evaluation.gates] == [True, False]
    assert "yes.f1" in report.why_not_published
    assert report.versions["lm-eval"]
    page = (Workspace(tmp_path / "workspace").report / "report.html").read_text()
    assert "Benchmarks" in page and "acc_norm" in page and ">pick<" in page


def test_a_job_asks_an_encoder_decoder_model_benchmarks_too(tmp_path: Path):
    model = save_tiny_encoder_decoder(tmp_path / "model")
    suites = [{"suite": write_task(tmp_path, task, rows(12)).as_uri()} for task in (CHOICE, WRITE)]
    report = run_job(model, tmp_path, model__task="seq2seq-lm", evaluation={"benchmarks": suites})
    assert report.evaluation is not None
    acc, _ = report.evaluation.benchmarks[0].metrics
    assert acc.rows == 12 and acc.base is not None and acc.low is not None
    assert report.evaluation.benchmarks[1].name == "write"


def check_error(model: Path, folder: Path, suite: str, **evaluation: Any) -> FineTuneError:
    job = tiny_job(model, folder, evaluation={"benchmarks": [{"suite": suite}], **evaluation})
    with pytest.raises(FineTuneError) as caught:
        stages.check(job, folder / "workspace", Silence())
    return caught.value


def test_a_suite_whose_rows_cannot_be_reached_is_found_by_the_check(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    error = check_error(tiny_model_dir, tmp_path, "superglue")
    assert isinstance(error, StorageError)
    assert str(error).startswith("spec.evaluation.benchmarks[0].suite: the rows of superglue cannot be had")


BAD_METRIC = {
    **WRITE,
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "regexes_to_ignore": ["("]}],
}


@pytest.mark.parametrize(
    "task, kind, message",
    [
        ({**CHOICE, "doc_to_text": "{{ nothing }}"}, DataError, "do not go with its rows"),
        ({**CHOICE, "doc_to_target": "sideways"}, DataError, "row 1 of pick expects 'sideways', and its choices are ["),
        (
            BAD_METRIC,
            DataError,
            "metric_list, filter_list and doc_to_target of the task do not go with its rows (error:",
        ),
        ({**CHOICE, "doc_to_text": "{{ ''.__class__.__mro__ }}"}, DataError, "unsafe"),
        (
            {**CHOICE, "doc_to_text": "{% for i in range(25000) %}{{ [i, i] | string }}{% endfor %}"},
            DataError,
            "take more",
        ),
        ({**CHOICE, "doc_to_text": "{{ 'x' * 10 ** 9 }}"}, DataError, "not on text"),
        ({**WRITE, "generation_kwargs": {"until": ["x"], "max_gen_toks": 512}}, SpecError, "answers may have 512"),
        ({**CHOICE, "task": "sentiment"}, SpecError, "'sentiment' is a task of this job as well"),
    ],
    ids=[
        "unknown column",
        "an answer not offered",
        "a metric that cannot judge",
        "a template that reaches for Python",
        "a template without an end",
        "a template that multiplies",
        "answers too long",
        "a name twice",
    ],
)
def test_a_task_that_cannot_be_asked_is_found_by_the_check(
    task: dict[str, Any], kind: type, message: str, tiny_model_dir: Path, tmp_path: Path
):
    error = check_error(tiny_model_dir, tmp_path, write_task(tmp_path, task).as_uri())
    assert isinstance(error, kind)
    assert message in str(error)
    assert "spec.evaluation.benchmarks[0].suite" in str(error)


ANY_ROW = {
    **{name: f"some {name}" for name in ("sentence", "sentence1", "sentence2", "premise", "hypothesis", "question1")},
    **{name: f"some {name}" for name in ("question2", "choice1", "choice2", "paragraph", "input", "word")},
    "question": "cause",
    "passage": "some passage\n@highlight\nsome highlight",
    "query": "@placeholder came",
    "entities": ["Ada", "Bert"],
    "answers": ["Ada"],
    "answer": 1,
    "choices": ["one", "two", "three", "four"],
    "text": "Ada met Bert because he came",
    "span1_index": 2,
    "span1_text": "Bert",
    "span2_index": 4,
    "span2_text": "he",
    "target": "yes",
    **{"start1": 0, "end1": 4, "start2": 0, "end2": 4},
}
"""Columns of every dataset of the named suites."""

TASKS_OF = {"glue": 9, "superglue": 8, "mmlu": 57, "bigbench-hard": 27}


class Guesser(LM):  # type: ignore[misc]
    """Finds the second of two answers likelier, and writes yes."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(request.idx), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["yes" for _ in requests]


def test_a_named_suite_is_what_the_harness_means_by_it():
    everything = TaskManager().task_index
    for suite, (name, _) in SUITES.items():
        index = suite_manager(suite).task_index
        assert name in index
        assert index == {key: everything[key] for key in index}
        assert [key for key, entry in everything.items() if name in entry.tags and key not in index] == []


@pytest.mark.parametrize("suite", SUITES)
def test_a_named_suite_is_asked_and_pooled(suite: str, monkeypatch: pytest.MonkeyPatch):
    split = Dataset.from_list([{**ANY_ROW, "label": number % 2, "idx": number} for number in range(4)])
    names = ("train", "dev", "validation", "validation_matched", "validation_mismatched", "test")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(dict.fromkeys(names, split)))
    tasks = load_suite(suite, "spec.evaluation.benchmarks[0].suite", limit=2)
    assert len(tasks) == TASKS_OF[suite]
    answers = ask(tasks, Guesser(), 2)
    assert all(len(one.values) == 2 for scores in answers.values() for one in scores)
    measured = {f"{name}.{one.figure}" for name, scores in answers.items() for one in scores if figure_of(one)}
    measured |= {f"{suite}.{one.figure}" for one, _ in pool(answers)}
    assert measured == set(figure_names(suite, tasks)), "gates may be about what is measured, and nothing else"


@pytest.mark.parametrize("settings", [{}, {"trust_remote_code": True}], ids=["", "though it is asked for"])
def test_a_script_beside_the_rows_of_a_suite_is_not_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran = tmp_path / "ran"
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "glue.py").write_text(f"open({str(ran)!r}, 'w')")
    load = functools.partial(datasets.load_dataset, str(tmp_path / "glue"), **settings)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: load())
    with pytest.raises(StorageError, match=r"benchmarks\[0\]\.suite: the rows of glue cannot be had .*scripts are no"):
        load_suite("glue", "spec.evaluation.benchmarks[0].suite", limit=2)
    assert not ran.exists()


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:The Pandas builder is deprecated:FutureWarning")
def test_no_pickle_is_read_for_the_rows_of_a_suite(tmp_path: Path):
    ran = tmp_path / "ran"
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Runs(ran)))
    for load in (
        lambda: datasets.load_dataset("pandas", data_files=str(tmp_path / "rows.pkl"), cache_dir=str(tmp_path)),
        lambda: datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache")),
    ):
        with pytest.raises((ValueError, OSError)):
            load()
    assert not ran.exists()


def test_answers_are_compared_as_squad_has_it():
    assert compute_exact("The red house.", "red  House") == 1
    assert compute_exact("red house", "house red") == 0
    assert compute_f1("the red house", "a red car") == pytest.approx(0.5)
    assert compute_f1("red red house", "red") == pytest.approx(0.5)
    assert (compute_f1("the", "a"), compute_f1("the", "house")) == (1.0, 0.0)


def test_a_gate_on_what_has_no_interval_is_found_by_the_check(tiny_model_dir: Path, tmp_path: Path):
    correlation = [{"metric": "acc"}, {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]
    suite = write_task(tmp_path, {**CHOICE, "metric_list": correlation}).as_uri()
    error = check_error(tiny_model_dir, tmp_path, suite, gates=[{"metric": "pick.mcc"}])
    assert isinstance(error, SpecError)
    assert "spec.evaluation.gates[0].metric: pick.mcc is not measured" in str(error)


def test_f1_of_more_than_two_answers_is_refused(tiny_model_dir: Path, tmp_path: Path):
    of_two = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    error = check_error(tiny_model_dir, tmp_path, write_task(tmp_path, {**CHOICE, "metric_list": of_two}).as_uri())
    assert isinstance(error, SpecError)
    assert "benchmarks[0].suite: pick lets choose among 3 answers, and the harness's f1 is of two" in str(error)


def test_a_gate_on_what_no_benchmark_measures_is_found_by_the_check(tiny_model_dir: Path, tmp_path: Path):
    suite = write_task(tmp_path, CHOICE).as_uri()
    error = check_error(tiny_model_dir, tmp_path, suite, gates=[{"metric": "pick.bleu"}])
    assert isinstance(error, SpecError)
    assert "spec.evaluation.gates[0].metric: pick.bleu is not measured" in str(error)
    assert "pick.acc, pick.acc_norm" in str(error)


def test_training_rows_that_give_a_benchmark_away_are_told(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path)
    known = load_dataset(job.spec.data).examples(Split.TRAIN)[0].prompt
    lines = [{"text": text} for text in (known, "a text that no training row holds, not even a part of it")]
    task = {**PROSE, "output_type": "loglikelihood", "doc_to_text": "{{ text }}", "doc_to_target": " yes"}
    task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    path = write_task(tmp_path, task, lines)
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"benchmarks": [{"suite": path.as_uri()}]})
    report = stages.check(job, tmp_path / "workspace", Silence())
    (found,) = report.overlaps
    assert (found.source, found.questions, found.overlapping, found.given_away) == ("prose", 2, 1, 1)
