"""Example 07: two jobs, of which the second begins where the first ended."""

import shutil
from pathlib import Path

import pytest

from finetune_api.report import ExitCode, Report
from finetune_cli.__main__ import run_command

from .conftest import EXAMPLES, load_script


def run(name: str, folder: Path) -> Path:
    """Run one of the jobs in ``folder`` and return what it has published."""
    text = (EXAMPLES / "07-chaining" / name).read_text(encoding="utf-8")
    (folder / name).write_text(text.replace("file://../", f"file://{EXAMPLES}/"), encoding="utf-8")
    before = set(folder.glob("output/default/*"))
    assert run_command(["run", str(folder / name), "--output", "json"]) is ExitCode.OK
    (published,) = set(folder.glob("output/default/*")) - before
    return published


def test_the_second_job_begins_where_the_first_one_ended(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_script("02-full-tiny").main() == 0
    first = run("general.yaml", tmp_path)
    shutil.copytree(first, tmp_path / "general")
    second = run("finetunejob.yaml", tmp_path)
    reports = [Report.model_validate_json((one / "report" / "report.json").read_bytes()) for one in (first, second)]
    (ancestor,) = reports[1].lineage
    assert ancestor.spec_hash == reports[0].spec_hash
    # From random weights, whose guesses are spread over 4096 pieces, the first loss would be above 8.
    first_loss = next(point.loss for point in reports[1].training.curve if point.loss is not None)
    assert first_loss < 7.5
