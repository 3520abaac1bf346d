"""The base with training rows in its prompt: what it reads, where the rows come from, what is made of it."""

from pathlib import Path

import numpy as np
import pytest

from finetune_api.report import Stage
from finetune_trainer import stages
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.in_context import draw_shown, with_shown
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split

from .jobs import Silence, tiny_job
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
