"""Examples 09 to 17 and 19: each capability from its YAML to what its README tells to look at, a few steps long."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_api.report import ExitCode, MetricComparison, Report
from finetune_cli.__main__ import run_command

from .conftest import EXAMPLES, copy_example, load_script, report_of, run_example

STEPS = 4


def figure(report: Report, name: str) -> MetricComparison:
    assert report.evaluation is not None
    return next(metric for metric in report.evaluation.metrics if metric.metric == name)


def perplexity_fell(report: Report) -> bool:
    found = figure(report, "perplexity")
    return found.base is not None and found.tuned < found.base


def test_an_encoder_decoder_is_measured_by_the_headlines_it_writes(tmp_path: Path, tiny_base: Path) -> None:
    assert load_script("09-encoder-decoder").main() == 0
    report = report_of(run_example("09-encoder-decoder", tmp_path, steps=STEPS))
    assert perplexity_fell(report)
    assert figure(report, "rougeL").rows >= 8


def test_a_base_of_four_bits_is_planned_smaller(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "10-qlora" / "finetunejob.yaml").read_text(encoding="utf-8")
    qlora, lora = tmp_path / "qlora.yaml", tmp_path / "lora.yaml"
    # The demo's model takes seconds to plan; of a model this small the embeddings are a larger part.
    qlora.write_text(text.replace("file://../01-sentiment-lora/prepared/model", tiny_base.as_uri()), encoding="utf-8")
    lora.write_text(qlora.read_text(encoding="utf-8").replace("type: qlora", "type: lora"), encoding="utf-8")
    weights = {}
    for file in (qlora, lora):
        assert run_command(["plan", str(file), "--output", "json"]) is ExitCode.OK
        weights[file] = json.loads(capsys.readouterr().out)["memory"]["weights"]
    assert weights[qlora] < weights[lora]


@pytest.mark.parametrize("name", ["adapter", "ia3", "prefix"])
def test_a_method_trains_as_many_numbers_as_the_readme_says(tmp_path: Path, tiny_base: Path, name: str) -> None:
    report = report_of(run_example("11-other-methods", tmp_path, f"{name}.yaml", STEPS))
    assert perplexity_fell(report)
    readme = (EXAMPLES / "11-other-methods" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}.yaml`")]
    assert f"| {report.training.trainable_parameters:,} |" in row


def test_old_rows_are_replayed_and_the_budget_of_forgetting_decides(tmp_path: Path, tiny_base: Path) -> None:
    report = report_of(run_example("12-forgetting", tmp_path, steps=STEPS))
    assert {share.task: share.drawn > 0 for share in report.training.mixture} == {"request": True, "replay": True}
    assert report.evaluation is not None
    assert report.evaluation.forgetting is not None
    assert report.published is (report.evaluation.forgetting.verdict == "passed")


@pytest.fixture(scope="module")
def weakened(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """What example 12 makes of an adapter."""
    return run_example("12-forgetting", tmp_path_factory.mktemp("weakened"), "lora.yaml", STEPS)


def test_an_adapter_is_tried_at_four_strengths(weakened: Path) -> None:
    evaluation = report_of(weakened).evaluation
    assert evaluation is not None
    assert evaluation.forgetting is not None
    assert evaluation.forgetting.trade_off is not None
    assert [point.scale for point in evaluation.forgetting.trade_off.points] == [0.25, 0.5, 0.75, 1.0]


def test_an_adapter_is_measured_as_it_is(weakened: Path, tmp_path: Path) -> None:
    shutil.copytree(weakened, tmp_path / "prepared")
    output = run_example("13-evaluation-only", tmp_path)
    report = report_of(output)
    (ancestor,) = report.lineage
    assert ancestor.spec_hash == report_of(weakened).spec_hash
    assert (report.training.steps, figure(report, "accuracy").rows) == (0, 30)
    assert not (output / "model").exists()


def test_gates_name_a_benchmark_of_ones_own(tmp_path: Path, tiny_base: Path) -> None:
    report = report_of(run_example("14-benchmark", tmp_path, steps=STEPS))
    assert report.evaluation is not None
    (benchmark,) = report.evaluation.benchmarks
    assert {metric.rows for metric in benchmark.metrics} == {30}
    assert [gate.metric for gate in report.evaluation.gates] == ["unseen-requests.acc"] * 2
    assert report.published


def test_every_answer_of_a_chat_is_learnt(tmp_path: Path, tiny_base: Path) -> None:
    assert load_script("15-chat").main() == 0
    report = report_of(run_example("15-chat", tmp_path, steps=STEPS))
    assert perplexity_fell(report)
    (task,) = report.data.tasks
    assert [part.learnt for part in task.sample] == [False, True, False, True]


def test_a_tuned_model_is_held_against_examples_in_the_prompt_and_looked_at_beside_accuracy(
    tmp_path: Path, tiny_base: Path
) -> None:
    report = report_of(run_example("16-is-tuning-needed", tmp_path, steps=STEPS))
    assert report.training.best_step is not None
    assert report.evaluation is not None
    assert report.evaluation.few_shot == 3
    assert figure(report, "accuracy").few_shot is not None
    assert report.evaluation.holistic is not None
    assert {axis.metric for axis in report.evaluation.holistic.metrics} >= {"accuracy_typos", "subgroup_gap"}
    assert {group.subgroup for group in report.evaluation.holistic.subgroups if group.compared} == {"chat", "letter"}


def test_messages_of_two_months_are_sorted_with_phrasings_of_the_library(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = EXAMPLES / "17-template-library" / "finetunejob.yaml"
    assert run_command(["templates", "topic", "--file", str(job)]) is ExitCode.OK
    assert "the coffee cups" in capsys.readouterr().out
    output = run_example("17-template-library", tmp_path, steps=STEPS)
    report = report_of(output)
    (task,) = report.data.tasks
    assert task.library.startswith("topic ")
    shown = "".join(part.text for part in task.sample)
    assert sum(shown.count(f" {label}") for label in ("delivery", "payment", "product")) >= 3
    assert (task.rows.train, task.rows.validation, task.rows.test) == (41, 7, 32)
    assert perplexity_fell(report)
    assert list((output / "report" / "tensorboard").glob("events.out.tfevents.*"))


def test_rows_of_the_test_that_are_trained_on_stop_the_job(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(copy_example("19-leak", tmp_path))
    assert run_command(["check", job]) is ExitCode.BAD_DATA
    told = capsys.readouterr()
    assert "leakage     3" in told.out
    leak = "3 rows of validationSource or testSource are nearly equal to a training row, first row 4"
    assert leak in told.err
    assert run_command(["run", job]) is ExitCode.BAD_DATA
    assert leak in capsys.readouterr().err
    assert not list(tmp_path.glob("output/*"))
