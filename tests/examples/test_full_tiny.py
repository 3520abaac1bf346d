"""Example 02 from its YAML to its report, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.report import Report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the example once, elsewhere, so that nothing of an earlier run is found; return its output."""
    elsewhere = tmp_path_factory.mktemp("full-tiny")
    text = (EXAMPLES / "02-full-tiny" / "finetunejob.yaml").read_text(encoding="utf-8")
    inputs = text.replace("file://./prepared", f"file://{EXAMPLES}/02-full-tiny/prepared")
    inputs = inputs.replace("file://../01-sentiment-lora", f"file://{EXAMPLES}/01-sentiment-lora")
    manifest = elsewhere / "finetunejob.yaml"
    manifest.write_text(inputs, encoding="utf-8")
    prepare = [sys.executable, EXAMPLES / "02-full-tiny" / "prepare.py"]
    subprocess.run(prepare, check=True, stdin=subprocess.DEVNULL)
    command = [sys.executable, "-m", "finetune_cli", "run", manifest]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outputs = list((elsewhere / "output" / "default").iterdir())
    assert len(outputs) == 1
    return outputs[0]


def test_tuning_lowers_the_loss_and_the_perplexity(folder: Path) -> None:
    report = Report.model_validate_json((folder / "report" / "report.json").read_text(encoding="utf-8"))
    losses = [point.loss for point in report.training.curve if point.loss is not None]
    assert losses[-1] < losses[0] / 2
    assert report.evaluation is not None
    perplexity = next(metric for metric in report.evaluation.metrics if metric.metric == "perplexity")
    assert perplexity.base is not None
    # A random model spreads its guesses over 4096 pieces; a tuned one knows that only two words can come.
    assert perplexity.tuned < 10 < 1000 < perplexity.base
    assert report.published


def test_whole_weights_are_published_and_marked_complete(folder: Path) -> None:
    model = folder / "model"
    assert (model / "COMPLETE").is_file()
    assert (model / "model.safetensors").stat().st_size > 9_000_000
    listed = json.loads((model / "MANIFEST.json").read_text(encoding="utf-8"))
    assert listed
    assert not list(model.glob("*.bin"))


def test_the_report_is_one_page(folder: Path) -> None:
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "full-tiny" in page
