"""Several tasks, chats and replayed rows through the whole chain: what the spec asks for is what the run did."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.report import ExitCode, Report, Stage
from finetune_cli.__main__ import run_command
from finetune_trainer import stages
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.stages import PodOptions

from .jobs import GOOD, THINGS, Silence, tiny_document, tiny_job, write_reviews


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.as_uri()


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "turns": [
                {"from": "human", "value": f"What about {THINGS[n % 10]} number {n * 37}?"},
                {"from": "gpt", "value": f"It is {GOOD[n % 6]}."},
                {"from": "human", "value": f"And {THINGS[(n + 3) % 10]}?"},
                {"from": "gpt", "value": GOOD[(n + 1) % 6]},
            ]
        }
        for n in range(count)
    ]


def run(model: Path, folder: Path, **changes: Any) -> Report:
    return stages.run(tiny_job(model, folder, **changes), folder / "workspace", Silence())


def test_a_temperature_mixture_with_replay_is_drawn_exactly(tiny_model_dir: Path, tmp_path: Path):
    first = tiny_document(tiny_model_dir, tmp_path)["spec"]["data"]["tasks"][0]
    second = {
        "name": "headline",
        "source": write_reviews(tmp_path / "few.jsonl", rows=40, seed=9).as_uri(),
        "templates": [{"prompt": "{{ text }} In a word?", "completion": " {{ label }}"}],
    }
    general = [{"prompt": f"Is {n * 31} a number?", "completion": " yes"} for n in range(20)]
    report = run(
        tiny_model_dir,
        tmp_path,
        data__tasks=[first, second],
        data__mixing={"strategy": "temperature", "temperature": 2.0, "maxExamplesPerTask": 60},
        data__replay={"source": write(tmp_path / "general.jsonl", general), "fraction": 0.1},
        training={"epochs": 2, "globalBatchSize": 8, "learningRate": 0.001},
    )
    rows = {part.task: part.rows for part in report.training.mixture}
    roots = {"sentiment": min(60, rows["sentiment"]) ** 0.5, "headline": rows["headline"] ** 0.5}
    length = min(60, rows["sentiment"]) + rows["headline"]
    assert sum(part.drawn for part in report.training.mixture) == 2 * (length + round(length / 9))
    for part in report.training.mixture:
        wanted = 0.1 if part.task == "replay" else 0.9 * roots[part.task] / sum(roots.values())
        assert part.share == pytest.approx(wanted)
        assert abs(part.drawn - part.expected) <= 2
    # Choices and numbers are each task's own; replayed rows are trained on and nothing else.
    assert {metric.task for metric in report.evaluation.metrics} == {"sentiment", "headline"}
    last = report.training.curve[-1]
    assert last.validation_losses.keys() == {"sentiment", "headline"}
    assert last.validation_loss == pytest.approx(sum(last.validation_losses.values()) / 2)
    page = (tmp_path / "workspace" / "report" / "report.html").read_text()
    assert "What was seen of each task" in page


def test_chats_are_tuned_on_all_answers_evaluated_and_published(tiny_chat_model_dir: Path, tmp_path: Path):
    task = {"name": "talk", "source": write(tmp_path / "chats.jsonl", chats(80)), "messages": "turns"}
    report = run(tiny_chat_model_dir, tmp_path, data__tasks=[task], data__lossOn="assistant")
    assert report.published
    assert {metric.metric for metric in report.evaluation.metrics} >= {"rougeL", "perplexity"}
    assert report.training.curve[0].loss > report.training.final_loss
    model = Path(report.artifacts[0].uri.removeprefix("file://"))
    prompt = json.loads((model / "prompt.json").read_text())
    assert prompt["tasks"] == [{"name": "talk", "templates": [], "fewShot": None, "labels": []}]
    assert 'messages = [{"role": "user"' in (model / "README.md").read_text()


def test_chats_need_a_model_that_knows_turns(tiny_model_dir: Path, tmp_path: Path):
    task = {"name": "talk", "source": write(tmp_path / "chats.jsonl", chats(40)), "messages": "turns"}
    with pytest.raises(SpecError, match=r"tasks\[0\]\.messages: .* has no chat template"):
        run(tiny_model_dir, tmp_path, data__tasks=[task])


def test_a_library_entry_is_trained_on_all_of_its_phrasings(tiny_model_dir: Path, tmp_path: Path):
    rows = [
        {"instruction": f"Say {GOOD[n % 6]} to {THINGS[n % 10]} {n * 7}.", "input": "", "output": GOOD[n % 6]}
        for n in range(80)
    ]
    task = {"name": "follow", "source": write(tmp_path / "alpaca.jsonl", rows), "library": "alpaca"}
    report = run(tiny_model_dir, tmp_path, data__tasks=[task])
    resolved: Any = report.resolved
    assert len(resolved["data"]["tasks"][0]["templates"]) == 3
    assert "library" not in resolved["data"]["tasks"][0]
    assert [one.library for one in report.data.tasks] == ["alpaca 1"]


def leaking_task(folder: Path) -> dict[str, Any]:
    rows = [{"text": f"The {THINGS[n % 10]} {n * 31} was {GOOD[n % 6]}.", "label": GOOD[n % 2]} for n in range(60)]
    passage = " ".join(f"{thing} number {place}" for place, thing in enumerate(THINGS))
    rows.append({"text": f"{passage} What was it?", "label": GOOD[0]})
    test = [
        {"text": f"And how many were there? {passage} Say it.", "label": GOOD[1]},
        *rows[:3],
        *({"text": f"A {THINGS[n % 10]} for {n * 57}?", "label": GOOD[n % 2]} for n in range(20)),
    ]
    return {
        "name": "reviews",
        "source": write(folder / "rows.jsonl", rows),
        "testSource": write(folder / "test.jsonl", test),
        "templates": [{"prompt": "{{ text }}", "completion": " {{ label }}"}],
        "labels": list(GOOD[:2]),
    }


def test_leakage_stops_a_job_unless_it_is_only_to_be_warned(tiny_model_dir: Path, tmp_path: Path):
    task = leaking_task(tmp_path)
    job = tiny_job(tiny_model_dir, tmp_path, data__tasks=[task])
    found = stages.check(job, tmp_path / "workspace", Silence())
    assert (found.leakage, found.first_leak) == (3, "row 1 (counted from 0) of reviews.testSource")
    (passage,) = found.overlaps
    assert (passage.source, passage.questions, passage.overlapping) == ("reviews.testSource", 24, 1)
    assert any("1 of 24 questions of reviews.testSource share words" in warning for warning in found.warnings)
    assert found.tasks[0].labels.keys() == set(GOOD[:2])
    assert [piece.learnt for piece in found.tasks[0].sample] == [False, True]
    for _ in range(2):
        with pytest.raises(DataError, match=r"3 rows of validationSource or testSource .*preflight: warn"):
            stages.run(job, tmp_path / "workspace", Silence())
    assert not (tmp_path / "workspace" / "training.json").exists()
    # Of a pod the operator knows no more than this: what was found is told where it matters most.
    refused = stages.run_one(Stage.CHECK, job, tmp_path / "pod", Silence(), PodOptions())
    assert refused.exit_code is ExitCode.BAD_DATA
    assert refused.data is not None and (refused.data.leakage, refused.data.rows.test) == (3, 24)
    assert refused.plan is not None and any("1 of 24 questions" in warning for warning in refused.plan.warnings)

    warned = tiny_job(
        tiny_model_dir, tmp_path, data__tasks=[task], runPolicy__preflight="warn", training={"maxSteps": 3}
    )
    report = stages.run(warned, tmp_path / "warned", Silence())
    assert report.data.leakage == 3
    assert any("flatter the model" in warning for warning in report.data.warnings)
    assert "flatter the model" in (tmp_path / "warned" / "report" / "report.html").read_text()


def test_the_command_checks_and_a_run_goes_on_from_it(tiny_model_dir: Path, tmp_path: Path, capsys):
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path)))
    assert run_command(["check", str(job), "--workspace", str(tmp_path / "workspace")]) is ExitCode.OK
    output = capsys.readouterr().out
    assert "leakage     0" in output
    assert "task sentiment:" in output
    assert ">> " in output
    assert (tmp_path / "workspace" / "data.json").exists()
    assert not (tmp_path / "workspace" / "checkpoints").exists()
