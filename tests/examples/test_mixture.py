"""Example 08 from its YAML to its report, through the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.report import Report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run the example once, elsewhere, so that nothing of an earlier run is found; return its report."""
    elsewhere = tmp_path_factory.mktemp("mixture")
    text = (EXAMPLES / "08-mixture" / "finetunejob.yaml").read_text(encoding="utf-8")
    for relative, absolute in (("./requests", "08-mixture/requests"), ("../0", "0")):
        text = text.replace(f"file://{relative}", f"file://{EXAMPLES}/{absolute}")
    manifest = elsewhere / "finetunejob.yaml"
    manifest.write_text(text.replace("maxSteps: 60", "maxSteps: 10"), encoding="utf-8")
    prepare = [sys.executable, EXAMPLES / "02-full-tiny" / "prepare.py"]
    subprocess.run(prepare, check=True, stdin=subprocess.DEVNULL)
    command = [sys.executable, "-m", "finetune_cli", "run", manifest]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (elsewhere / "output" / "default").glob("*/report/report.json")
    return Report.model_validate_json(found.read_text(encoding="utf-8"))


def test_the_small_task_is_seen_as_often_as_the_square_root_of_its_size_says(report: Report) -> None:
    sentiment, request = report.training.mixture
    assert (sentiment.task, request.task) == ("sentiment", "request")
    roots = sentiment.rows**0.5, request.rows**0.5
    assert request.share == pytest.approx(roots[1] / sum(roots))
    assert sentiment.drawn + request.drawn == 10 * 16
    assert request.drawn > 3 * 160 * request.rows / (sentiment.rows + request.rows) / 2


def test_every_task_has_its_own_figures(report: Report) -> None:
    assert report.evaluation is not None
    assert {metric.task for metric in report.evaluation.metrics if metric.metric == "accuracy"} == {
        "sentiment",
        "request",
    }
    assert {question.task for question in report.training.samples} == {"sentiment", "request"}
    losses = next(point.validation_losses for point in reversed(report.training.curve) if point.validation_losses)
    assert losses.keys() == {"sentiment", "request"}
