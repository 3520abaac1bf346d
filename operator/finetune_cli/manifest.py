"""Read a job from a file, with a message instead of a traceback for a file that cannot be read."""

import sys
from collections.abc import Iterator
from pathlib import Path

from finetune_api.explanation import line_of
from finetune_api.job import FieldError, FineTuneJob, load_job
from finetune_api.manifest_text import Document
from finetune_api.problem import shown, written
from finetune_trainer.errors import SpecError

STANDARD_INPUT = Path("-")
"""Given instead of a file: what is piped in. Relative paths in it start from the working folder."""


def read_job(file: Path) -> FineTuneJob:
    """Return the job in ``file``; its templates are known to be Jinja.

    Raises:
        SpecError: the file cannot be read.
        InvalidJobError: what it says is no job; all errors at once.
    """
    return load_job(read_text(file), source_name(file), template_errors)


def source_name(file: Path) -> str:
    """Return what ``file`` is called in messages."""
    return "standard input" if file == STANDARD_INPUT else str(file)


def read_text(file: Path) -> str:
    """Return what is in ``file``.

    Raises:
        SpecError: the file cannot be read.
    """
    name = source_name(file)
    try:
        content = _read_standard_input() if file == STANDARD_INPUT else file.read_bytes()
        # As text files are read: a line ends the same on every system.
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"cannot read {source_name(file)}: byte {error.start} is not UTF-8. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise SpecError(f"cannot read {name}: {error.strerror}. Check the path and who may read it.") from error


def template_errors(document: Document) -> Iterator[FieldError]:
    """Yield an error for every template of a manifest that is no Jinja."""
    for path, text in _templates(document.content):
        # Imported here: Jinja takes as long to load as all the rest of a quick command.
        from finetune_trainer.template import find_fault

        fault = find_fault(text)
        if fault is not None:
            place = f", line {fault.line} of it" if fault.line is not None and "\n" in text.strip() else ""
            problem = f"is no template{place}: {fault.problem}."
            yield FieldError(written(path), shown(text), problem, fault.remedy, line_of(path, document.lines))


def _templates(content: object) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield path and text of every template; what is not where it belongs is an error of its own."""
    tasks = _at(content, "spec", "data", "tasks")
    for task, entry in enumerate(tasks if isinstance(tasks, list) else ()):
        templates = _at(entry, "templates")
        for number, template in enumerate(templates if isinstance(templates, list) else ()):
            for part in ("prompt", "completion"):
                if isinstance(text := _at(template, part), str):
                    yield ("spec", "data", "tasks", task, "templates", number, part), text


def _at(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise SpecError("cannot read standard input: it is closed. Pipe a job in, or name a file.")
    return sys.stdin.buffer.read()
