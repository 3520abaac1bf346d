"""Examples as tests. In: the folders under examples/, their inputs prepared once. Out: nothing is added there."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from finetune_api.report import ExitCode, Report
from finetune_cli.__main__ import run_command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_script(example: str) -> ModuleType:
    """Import an example's prepare.py, whose folder is no package."""
    file = EXAMPLES / example / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{example[:2]}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sentiment() -> ModuleType:
    """prepare.py of example 01, freshly imported."""
    return load_script("01-sentiment-lora")


@pytest.fixture
def tiny() -> ModuleType:
    """prepare.py of example 02, freshly imported."""
    return load_script("02-full-tiny")


@pytest.fixture(scope="session")
def prepared() -> Path:
    """The folder of example 01's prepared inputs; fetched and converted when they are not there yet."""
    script = load_script("01-sentiment-lora")
    assert script.main([]) == 0
    return EXAMPLES / "01-sentiment-lora" / "prepared"


@pytest.fixture(scope="session")
def tiny_base(prepared: Path) -> Path:
    """The folder of the model that most examples tune; made when it is not there yet."""
    assert load_script("02-full-tiny").main() == 0
    return EXAMPLES / "02-full-tiny" / "prepared" / "model"


def run_example(
    example: str, folder: Path, name: str = "finetunejob.yaml", steps: int | None = None, model: Path | None = None
) -> Path:
    """Run a job of ``example`` in ``folder``, so that nothing of an earlier run is found; return its output.

    Args:
        example: folder below examples/.
        folder: for this example alone; what the example's reader copies into its folder is there already.
        name: of the job.
        steps: to train, instead of as many as the job says.
        model: to tune, instead of the job's.
    """
    file = copy_example(example, folder, name)
    text = file.read_text(encoding="utf-8")
    if steps is not None:
        text, count = re.subn(r"maxSteps: \d+", f"maxSteps: {steps}", text)
        assert count == 1
    if model is not None:
        text, count = re.subn(r"(model:\n +source: )\S+", lambda found: found[1] + model.as_uri(), text)
        assert count == 1
    file.write_text(text, encoding="utf-8")
    before = set(folder.glob("output/default/*"))
    assert run_command(["run", str(file), "--output", "json"]) is ExitCode.OK
    (output,) = set(folder.glob("output/default/*")) - before
    return output


def copy_example(example: str, folder: Path, name: str = "finetunejob.yaml") -> Path:
    """Copy an example without what runs of it have made, and return its job's file, which reads what lies beside it."""
    made = shutil.ignore_patterns("output", "general", "prepared", ".finetune", "__pycache__")
    shutil.copytree(EXAMPLES / example, folder, ignore=made, dirs_exist_ok=True)
    file = folder / name
    text = file.read_text(encoding="utf-8").replace("file://../", f"file://{EXAMPLES}/")
    if not (folder / "prepared").exists():
        text = text.replace("file://./prepared", f"file://{EXAMPLES / example}/prepared")
    file.write_text(text, encoding="utf-8")
    return file


def report_of(output: Path) -> Report:
    """Return the report in what a job has put out."""
    return Report.model_validate_json((output / "report" / "report.json").read_bytes())
