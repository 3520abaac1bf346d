"""The rows of a job: read, rendered, checked and split, ready for the renderer. Deterministic; knows no tokens.

Training loads it without the test split, whose rows are then not reachable from the object.
"""

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.spec import DataSpec, TaskSpec
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.source import Fetch, Row, fetch_local, read_rows
from finetune_trainer.split import DuplicateStats, Split, assign_splits, draw, input_key
from finetune_trainer.template import Template

_SHOWN_VALUES = 10
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Dataset:
    """The examples of the splits that were opened, and what is known of all."""

    tasks: tuple[str, ...]
    """Names, in the order of the spec."""
    specs: Mapping[str, TaskSpec]
    sizes: Mapping[Split, int]
    """Examples per split, also of splits that were not opened."""
    duplicates: DuplicateStats
    hash: str
    """sha256 over every example's task, prompt and completion in order, opened or not: equal data, equal hash."""
    _examples: Mapping[Split, tuple[Example, ...]] = dataclasses.field(repr=False)
    _templates: Mapping[str, tuple[Template, ...]] = dataclasses.field(repr=False)

    def examples(self, split: Split) -> list[Example]:
        """Return the examples of ``split``, task after task, each in its source's order.

        Raises:
            LookupError: the data set was loaded without this split.
        """
        if split not in self._examples:
            raise LookupError(f"the {split} split was not opened; it is no business of this stage")
        return list(self._examples[split])

    def task(self, name: str) -> TaskSpec:
        """Return the task called ``name``."""
        return self.specs[name]

    def labels(self, task: str) -> tuple[str, ...]:
        """Return the closed set of completions of ``task``, empty when it is open."""
        return self.task(task).labels

    def rendered(self, example: Example, template_index: int) -> Example:
        """Return the same row through another template of its task."""
        return self._render(example, template_index, example.values)

    def cuttable(self, example: Example) -> str:
        """Return the text that `shortened` would cut, empty when there is none."""
        column = self._longest_column(example)
        return str(example.values[column]) if column is not None else ""

    def shortened(self, example: Example, keep_characters: int) -> Example:
        """Return ``example`` with the end of its longest text column cut; columns of the completion stay whole."""
        column = self._longest_column(example)
        if column is None:
            return example
        cut = {**example.values, column: str(example.values[column])[: max(0, keep_characters)]}
        return self._render(example, example.template, cut)

    def _longest_column(self, example: Example) -> str | None:
        template = self._templates[example.task][example.template]
        lengths = {
            column: len(value)
            for column in sorted(template.prompt_columns - template.completion_columns)
            if isinstance(value := example.values.get(column), str) and value
        }
        return max(lengths, key=lengths.__getitem__, default=None)

    def _render(self, example: Example, template_index: int, values: Mapping[str, object]) -> Example:
        prompt, completion = self._templates[example.task][template_index].render(values, example.row)
        return dataclasses.replace(
            example, prompt=prompt, completion=completion, template=template_index, values=values
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A row before it is rendered: what decides its place."""

    number: int
    values: Row
    text: str
    key: str


def load_dataset(data: DataSpec, splits: Collection[Split] = tuple(Split), fetch: Fetch = fetch_local) -> Dataset:
    """Read, render, check and split the rows of every task; keep those of ``splits``.

    Args:
        data: what the job says of its rows.
        splits: whose rows can be asked for afterwards.
        fetch: finds each task's file of rows. Default: on this machine only.

    Raises:
        SpecError: a template is no valid Jinja, or a source cannot be read by this program.
        DataError: the rows are not what the job says they are.
    """
    seed = data.splits.seed
    templates: dict[str, tuple[Template, ...]] = {}
    candidates: list[_Candidate] = []
    examples: list[Example] = []
    for index, task in enumerate(data.tasks):
        field = f"spec.data.tasks[{index}]"
        templates[task.name] = tuple(
            Template(template.prompt, template.completion, f"{field}.templates[{number}]")
            for number, template in enumerate(task.templates)
        )
        file = fetch(task.source, f"{field}.source", task.secret_ref)
        rows = _candidates(task, file, templates[task.name], data.splits.group_by, seed, field)
        renderings = _render_all(rows, task, templates[task.name], field)
        _refuse_other_labels(task, renderings, field)
        candidates += rows
        examples += [
            each[int(draw(seed, "template", row.key) * len(each))] for row, each in zip(rows, renderings, strict=True)
        ]

    groups = None if data.splits.group_by is None else [str(row.values[data.splits.group_by]) for row in candidates]
    places, duplicates = assign_splits(
        [row.text for row in candidates], data.splits.validation, data.splits.test, seed, groups
    )
    _refuse_tasks_without_rows(data, examples, places)
    return Dataset(
        tasks=tuple(task.name for task in data.tasks),
        specs={task.name: task for task in data.tasks},
        sizes={split: places.count(split) for split in Split},
        duplicates=duplicates,
        hash=_hash(examples),
        _examples={
            split: tuple(example for example, place in zip(examples, places, strict=True) if place is split)
            for split in splits
        },
        _templates=templates,
    )


def _candidates(
    task: TaskSpec, file: Path, templates: Sequence[Template], group_by: str | None, seed: int, field: str
) -> list[_Candidate]:
    inputs = sorted(frozenset[str]().union(*(template.prompt_columns for template in templates)))
    completions = sorted(frozenset[str]().union(*(template.completion_columns for template in templates)))
    needed = dict.fromkeys([*inputs, *completions, *([group_by] if group_by is not None else [])])
    found: dict[str, None] = {}
    candidates = []
    for number, row in enumerate(read_rows(file, f"{field}.source")):
        found.update(dict.fromkeys(row))
        values = {column: row[column] for column in needed if column in row}
        # Without columns in the prompt (plain text to continue) the completion is what tells the rows apart.
        text = "\n".join(str(values.get(column, "")) for column in inputs or completions)
        candidates.append(_Candidate(number, values, text, input_key(text)))
    _refuse_missing_columns(task, list(needed), list(found), group_by, field)
    if group_by is not None and any(_is_missing(row.values.get(group_by)) for row in candidates):
        raise _missing_value(task, candidates, group_by, "spec.data.splits.groupBy", field)
    return _sample(candidates, task.max_examples, seed)


def _sample(candidates: list[_Candidate], limit: int | None, seed: int) -> list[_Candidate]:
    """Keep ``limit`` rows, drawn by their text: the same ones in whatever order the rows come."""
    if limit is None or len(candidates) <= limit:
        return candidates
    drawn = sorted(candidates, key=lambda row: (draw(seed, "sample", row.key), row.number))[:limit]
    return sorted(drawn, key=lambda row: row.number)


def _render_all(
    rows: Sequence[_Candidate], task: TaskSpec, templates: Sequence[Template], field: str
) -> list[list[Example]]:
    """Return every row through every template: what fails must fail before training, not in evaluation."""
    renderings = []
    for row in rows:
        try:
            renderings.append([_render(row, task, template, index) for index, template in enumerate(templates)])
        except DataError as error:
            columns = sorted(frozenset[str]().union(*(template.completion_columns for template in templates)))
            missing = next((column for column in columns if _is_missing(row.values.get(column))), None)
            if missing is None:
                raise
            # Rows without an answer are rarely alone: count them, so that they are dropped at once.
            raise _missing_value(task, rows, missing, "the completion", field) from error
    return renderings


def _render(row: _Candidate, task: TaskSpec, template: Template, index: int) -> Example:
    prompt, completion = template.render(row.values, row.number)
    return Example(
        task=task.name,
        row=row.number,
        prompt=prompt,
        completion=completion,
        template=index,
        key=row.key,
        values=row.values,
    )


def _refuse_missing_columns(
    task: TaskSpec, needed: Sequence[str], found: Sequence[str], group_by: str | None, field: str
) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        where = "spec.data.splits.groupBy" if missing == [group_by] else f"{field}.templates"
        raise DataError(
            f"{where}: {', '.join(map(repr, missing))} not among the columns of {task.source}, which are "
            f"{_listed(found)}. Correct the name (a CSV file's first line must hold the column names)."
        )


def _missing_value(task: TaskSpec, rows: Sequence[_Candidate], column: str, use: str, field: str) -> DataError:
    without = [row for row in rows if _is_missing(row.values.get(column))]
    return DataError(
        f"{field}.source: column {column!r}, used by {use}, has no value in {len(without)} of {len(rows)} rows of "
        f"{task.source}, first in row {without[0].number} (counted from 0; {_clipped(repr(without[0].values))}). Drop "
        f"these rows or fill the value in."
    )


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _refuse_other_labels(task: TaskSpec, renderings: Sequence[Sequence[Example]], field: str) -> None:
    if not task.labels:
        return
    rows: dict[str, dict[int, None]] = {}
    for example in itertools.chain.from_iterable(renderings):
        if (answer := example.completion.strip()) not in task.labels:
            rows.setdefault(answer, {})[example.row] = None
    if rows:
        others = [
            f"{_clipped(repr(answer))} ({len(numbers)}, first in row {next(iter(numbers))})"
            for answer, numbers in sorted(rows.items(), key=lambda item: -len(item[1]))
        ]
        raise DataError(
            f"{field}.labels: {list(task.labels)} do not cover every completion of {task.source}; others are "
            f"{_listed(others)}. Rows count from 0. Add the labels, correct the completion template or drop the rows."
        )


def _refuse_tasks_without_rows(data: DataSpec, examples: Sequence[Example], places: Sequence[Split]) -> None:
    shares = {
        Split.TRAIN: 1.0 - data.splits.validation - data.splits.test,
        Split.VALIDATION: data.splits.validation,
        Split.TEST: data.splits.test,
    }
    rows = Counter((example.task, place) for example, place in zip(examples, places, strict=True))
    for index, task in enumerate(data.tasks):
        empty = [split.value for split, share in shares.items() if share > 0 and not rows[task.name, split]]
        if empty:
            sizes = ", ".join(f"{split.value} {rows[task.name, split]}" for split in Split)
            raise DataError(
                f"spec.data.tasks[{index}] ({task.name}): no rows for {' and '.join(empty)} ({sizes}). Add rows, raise "
                f"the share in spec.data.splits or take another spec.data.splits.seed."
            )


def _hash(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.task, example.prompt, example.completion):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN_VALUES} more" if len(values) > _SHOWN_VALUES else ""
    return ", ".join(values[:_SHOWN_VALUES]) + more


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
