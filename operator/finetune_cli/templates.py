"""``finetune templates``: the template library, and what becomes of the user's own rows. Imports no torch."""

import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.library import LibraryEntry, library_entry
from finetune_api.plain_text import printable
from finetune_api.prompt_library import library_names, suggest
from finetune_api.report import ExitCode
from finetune_api.spec import TaskSpec, TemplateSpec
from finetune_cli.manifest import read_job
from finetune_trainer.errors import SpecError

_SHOWN_ROWS = 2
_SHOWN_CHARACTERS = 2000


def show_templates(name: str | None, file: Path | None) -> ExitCode:
    """Print the library's entries, one entry's phrasings, or what the rows of a job look like through them.

    Args:
        name: of an entry. Absent: all, or with ``file`` what each task says itself.
        file: a job, on whose rows phrasings are shown.

    Raises:
        SpecError: there is no such entry, or the job's rows cannot be reached from here.
        InvalidJobError: ``file`` holds no job.
        DataError: the rows lack what the phrasings name.
    """
    if name is not None and name not in library_names():
        raise SpecError(f"{name!r} is not in the template library. {suggest(name)}")
    entry = None if name is None else library_entry(name)
    if file is not None:
        lines = _on_rows(read_job(file), entry)
    elif entry is not None:
        lines = _on_example(entry)
    else:
        lines = _list()
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")
    return ExitCode.OK


def _list() -> Iterator[str]:
    entries = [library_entry(name) for name in library_names()]
    rows = [("NAME", "COLUMNS", "FOR")]
    rows += [(entry.name, ", ".join(entry.columns), entry.purpose) for entry in entries]
    names, columns = (max(len(row[index]) for row in rows) for index in (0, 1))
    yield from (f"{name:{names}}  {column:{columns}}  {purpose}" for name, column, purpose in rows)


def _on_example(entry: LibraryEntry) -> Iterator[str]:
    yield f"{entry.name}, version {entry.version}: {entry.purpose}"
    for column, meaning in entry.columns.items():
        yield f"  {column}: {meaning}"
    if entry.labels:
        yield f"  usual labels: {', '.join(entry.labels)}"
    yield from _phrasings(entry.templates, f"library {entry.name}", entry.example, 0)


def _on_rows(job: FineTuneJob, entry: LibraryEntry | None) -> Iterator[str]:
    # Imported here: pyarrow and the stores' clients take a second to load.
    from finetune_trainer.location import Mounts
    from finetune_trainer.source import read_rows
    from finetune_trainer.storage import Storage

    storage = Storage(job.spec.output, Mounts.from_environment())
    for index, task in enumerate(job.spec.data.tasks):
        templates = _templates_of(task, entry)
        field = f"spec.data.tasks[{index}]"
        if not templates:
            yield f"task {task.name}: chats in column {task.messages}, through the model's own chat template"
            continue
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            path = storage.fetch_rows(task.source, f"{field}.source", task.secret_ref, Path(folder), task.revision)
            for number, row in enumerate(islice(read_rows(path, f"{field}.source"), _SHOWN_ROWS)):
                yield f"task {task.name}, row {number} (counted from 0)"
                named = {name: row[column] for name, column in task.columns.items() if column in row}
                yield from _phrasings(templates, f"{field}.templates", row | named, number)


def _templates_of(task: TaskSpec, entry: LibraryEntry | None) -> tuple[TemplateSpec, ...]:
    if entry is not None:
        return entry.templates
    return library_entry(task.library).templates if task.library is not None else task.templates


def _phrasings(
    templates: tuple[TemplateSpec, ...], field: str, row: dict[str, str] | dict[str, object], number: int
) -> Iterator[str]:
    from finetune_trainer.template import Template

    for index, spec in enumerate(templates):
        prompt, completion = Template(spec.prompt, spec.completion, f"{field}[{index}]").render(row, number)
        yield ""
        yield f"template {index} of {len(templates)}"
        yield from (f"  | {line}" for line in prompt[:_SHOWN_CHARACTERS].splitlines())
        yield from (f"  > {line}" for line in completion.strip()[:_SHOWN_CHARACTERS].splitlines())
    yield ""
