"""For all levels. Inputs: golden files, which hold what was looked at and found right. Outputs: none, unless asked.

``pytest --update-golden`` writes them anew; the diff is the review.
"""

import gc
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes tells of the machine.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")

Golden = Callable[[str, str], None]
"""Compares a text with the golden file of that name, beside the test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@contextmanager
def new_libraries_set_aside() -> Iterator[None]:
    """Keep what is imported inside out of all later collections of garbage.

    The trainer collects garbage whenever a model has to go, and would look through the objects of torch and its like
    every time: more than half of what tests of training took.
    """
    before = len(sys.modules)
    yield
    if "torch" in sys.modules and len(sys.modules) > before:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, object, object]:
    with new_libraries_set_aside():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with new_libraries_set_aside():
        return (yield)


def pytest_sessionfinish() -> None:
    # Libraries that count what is left at the end would complain.
    gc.unfreeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = Path(request.path).parent / "golden"

    def compare(name: str, text: str) -> None:
        file = folder / name
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"{file} is missing; pytest --update-golden writes it"
        assert text == file.read_text(encoding="utf-8"), "look at the difference; pytest --update-golden accepts it"

    return compare
