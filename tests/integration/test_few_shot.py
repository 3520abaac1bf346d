"""Training rows in the prompt: of the base alone, for comparison; of a task with fewShot, trained and asked so."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune_api.job import FineTuneJob, load_job
from finetune_api.report import DataReport, ExitCode, Progress, Stage
from finetune_api.resolve import resolve
from finetune_api.stage_result import StageResult
from finetune_trainer import stages
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.in_context import as_asked, draw_shown, with_shown
from finetune_trainer.paper import set_paper
from finetune_trainer.progress import Sink
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_document, tiny_job
from .test_evaluation import (
    LABEL_TEMPLATES,
    LABELS,
    OPEN_TEMPLATES,
    TwoModels,
    likelihood,
    make_job,
    models,  # noqa: F401 - a fixture
    run_evaluation,
    tokenizer,  # noqa: F401 - a fixture
)


def load(folder: Path, task: dict[str, object], **spec: object) -> Dataset:
    return load_dataset(make_job(folder, task, **spec).spec.data)


def test_shown_rows_are_training_rows_and_every_label_as_often(tmp_path: Path):
    dataset = load(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    shown = draw_shown(dataset, "sentiment", 6, seed=1)
    assert {row.row for row in shown} <= {row.row for row in dataset.examples(Split.TRAIN)}
    answers = [row.completion.strip() for row in shown]
    assert {answer: answers.count(answer) for answer in answers} == {label: 3 for label in LABELS}
    assert shown == draw_shown(dataset, "sentiment", 6, seed=1) != draw_shown(dataset, "sentiment", 6, seed=2)
    train = sum(row.task == "sentiment" for row in dataset.examples(Split.TRAIN))
    assert len(draw_shown(dataset, "sentiment", 1000, seed=1)) == train


def test_raw_examples_stand_above_the_question(tokenizer, tmp_path: Path):  # noqa: F811
    dataset = load(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    shown, question = dataset.examples(Split.TRAIN)[:2], dataset.examples(Split.TEST)[0]
    (asked,) = with_shown(dataset, [question], 1, shown)
    encoded = Renderer(tokenizer, "raw", None, 500).encode(asked, dataset)
    texts = [f"Is it good? {row.values['text']} Answer:" for row in (*shown, question)]
    answers = [row.values["label"] for row in shown]
    expected = f"{texts[0]} {answers[0]}\n\n{texts[1]} {answers[1]}\n\n{texts[2]}"
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]) == expected


def test_chat_examples_are_earlier_turns(tokenizer, tmp_path: Path):  # noqa: F811
    dataset = load(tmp_path, {"templates": OPEN_TEMPLATES})
    shown, question = dataset.examples(Split.TRAIN)[:1], dataset.examples(Split.TEST)[0]
    (asked,) = with_shown(dataset, [question], 0, shown)
    encoded = Renderer(tokenizer, "chat", None, 500).encode(asked, dataset)
    messages = [
        {"role": "user", "content": f"Repeat: {shown[0].values['text']}"},
        {"role": "assistant", "content": shown[0].values["answer"]},
        {"role": "user", "content": f"Repeat: {question.values['text']}"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]) == expected


def test_the_base_with_examples_scores_as_a_direct_computation(models: TwoModels, tokenizer, tmp_path: Path):  # noqa: F811
    job = make_job(tmp_path, {"templates": OPEN_TEMPLATES}, evaluation={"baselines": {"fewShot": 2}})
    run = run_evaluation(models, tokenizer, job)
    shown = draw_shown(run.dataset, "sentiment", 2, job.spec.training.seed)
    before = "".join(f"Repeat: {row.values['text']}\n{row.values['answer']}\n\n" for row in shown)
    rows = [
        likelihood(models.base_model, tokenizer, f"{before}Repeat: {e.values['text']}", f"\n{e.values['answer']}")
        for e in run.dataset.examples(Split.TEST)
    ]
    found = run.metric("perplexity")
    assert found.few_shot.value == pytest.approx(np.exp(-np.concatenate(rows).mean()))
    assert found.few_shot.delta == pytest.approx(found.tuned - found.few_shot.value)
    assert found.few_shot.low <= found.few_shot.delta <= found.few_shot.high
    assert run.report.few_shot == 2
    assert all(isinstance(row["few_shot"], str) for row in run.predictions)


def test_nothing_else_changes_when_examples_are_asked_for(models: TwoModels, tokenizer, tmp_path: Path):  # noqa: F811
    task = {"labels": LABELS, "templates": LABEL_TEMPLATES}
    without = run_evaluation(models, tokenizer, make_job(tmp_path, task), "chat")
    with_them = run_evaluation(
        models, tokenizer, make_job(tmp_path, task, evaluation={"baselines": {"fewShot": 2}}), "chat"
    )
    assert [one.model_copy(update={"few_shot": None}) for one in with_them.report.metrics] == list(
        without.report.metrics
    )
    assert all(one.few_shot is None for one in without.report.metrics)
    assert with_them.report.prompt_choices == without.report.prompt_choices
    percents = [progress.percent for progress in with_them.progress]
    assert percents == sorted(percents) and percents[-1] == pytest.approx(100)


def test_the_commonest_label_is_that_of_the_training_rows(models: TwoModels, tokenizer, tmp_path: Path):  # noqa: F811
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES}))
    train = [example.completion.strip() for example in run.dataset.examples(Split.TRAIN)]
    test = [example.completion.strip() for example in run.dataset.examples(Split.TEST)]
    commonest = max(LABELS, key=train.count)
    assert run.metric("accuracy").majority == pytest.approx(test.count(commonest) / len(test))
    assert run.metric("perplexity").majority is None


def test_examples_that_leave_no_room_are_found_in_check(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"baselines": {"fewShot": 40}})
    result = stages.run_one(Stage.CHECK, job, tmp_path / "workspace", Silence())
    assert "spec.evaluation.baselines.fewShot (40): with 40 rows shown before them" in result.message
    fewer = tiny_job(tiny_model_dir, tmp_path, evaluation={"baselines": {"fewShot": 2}})
    assert stages.run_one(Stage.CHECK, fewer, tmp_path / "other", Silence()).message == ""


def few_shot_job(model: Path, folder: Path, count: int = 2, **changes: object) -> FineTuneJob:
    document = tiny_document(model, folder, **changes)
    document["spec"]["data"]["tasks"][0]["fewShot"] = count
    return resolve(load_job(json.dumps(document), "test"))


def test_a_task_is_checked_with_its_shown_rows_and_learns_the_completion_alone(tiny_model_dir: Path, tmp_path: Path):
    job = few_shot_job(tiny_model_dir, tmp_path)
    assert stages.run_one(Stage.CHECK, job, tmp_path / "workspace", Silence()).message == ""
    found = Workspace(tmp_path / "workspace").recall("data", DataReport)
    (task,) = found.tasks
    before, learnt = task.sample
    assert not before.learnt and learnt.learnt
    assert before.text.count("Review: ") == before.text.count("Sentiment:") == 3
    assert before.text == found.sample_prompt and before.text.endswith("Sentiment:")
    assert before.text.count("Sentiment: positive") == before.text.count("Sentiment: negative") == 1
    assert learnt.text in (" positive<|endoftext|>", " negative<|endoftext|>")
    plain = tiny_job(tiny_model_dir, tmp_path)
    assert stages.run_one(Stage.CHECK, plain, tmp_path / "plain", Silence()).message == ""
    assert found.tokens > 2 * Workspace(tmp_path / "plain").recall("data", DataReport).tokens


def test_base_and_tuned_model_are_asked_behind_shown_rows(models: TwoModels, tokenizer, tmp_path: Path):  # noqa: F811
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES, "fewShot": 2}))
    found = run.metric("perplexity")
    for model, value in ((models.base_model, found.base), (models.tuned_model, found.tuned)):
        rows = [
            likelihood(
                model,
                tokenizer,
                "".join(f"Repeat: {one.values['text']}\n{one.values['answer']}\n\n" for one in row.shown)
                + f"Repeat: {row.values['text']}",
                f"\n{row.values['answer']}",
            )
            for row in as_asked(run.dataset, Split.TEST)
        ]
        assert value == pytest.approx(np.exp(-np.concatenate(rows).mean()))


def test_the_base_is_shown_rows_in_the_template_that_is_chosen_for_it(tmp_path: Path):
    task = {"labels": LABELS, "templates": LABEL_TEMPLATES, "fewShot": 2}
    dataset = load(tmp_path, task)
    paper = set_paper("sentiment", dataset, make_job(tmp_path, task))
    for template, start in enumerate(("", "Is it good? ")):
        for row in with_shown(dataset, paper.test, template, ()):
            assert [one.prompt.startswith(start or one.values["text"]) for one in (row, *row.shown)] == [True] * 3


def test_shown_rows_of_a_task_that_leave_no_room_are_found_in_check(tiny_model_dir: Path, tmp_path: Path):
    crowded = few_shot_job(tiny_model_dir, tmp_path, count=30)
    message = stages.run_one(Stage.CHECK, crowded, tmp_path / "workspace", Silence()).message
    assert "spec.data.tasks[0].fewShot (30): behind so many shown rows" in message
    assert "raise spec.data.maxLength" in message


class StopsAt:
    """Asks the process to stop when training has made some steps."""

    def __init__(self, step: int) -> None:
        self._step = step

    def report(self, progress: Progress) -> None:
        if progress.stage is Stage.TRAIN and (progress.step or 0) >= self._step:
            signal.raise_signal(signal.SIGTERM)


def test_a_resumed_run_is_shown_the_same_rows(tiny_model_dir: Path, tmp_path: Path):
    def train(folder: str, sink: Sink) -> StageResult:
        return stages.run_one(Stage.TRAIN, few_shot_job(tiny_model_dir, tmp_path), tmp_path / folder, sink)

    assert train("straight", Silence()).exit_code is ExitCode.OK
    assert train("interrupted", StopsAt(3)).exit_code is ExitCode.PREEMPTED
    # The next life finds no tokens of the one before it.
    shutil.rmtree(Workspace(tmp_path / "interrupted").tokens)
    assert train("interrupted", Silence()).exit_code is ExitCode.OK
    weights = [
        load_file(next((tmp_path / folder / "tuned").glob("*.safetensors"))) for folder in ("straight", "interrupted")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=0, rtol=0)
