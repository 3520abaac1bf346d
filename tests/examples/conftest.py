"""Examples as tests. In: the folders under examples/, their inputs prepared once. Out: nothing is added there."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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
