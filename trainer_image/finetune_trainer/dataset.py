"""The rows of a job: read, rendered, checked and split, ready for the renderer. Deterministic; knows no tokens.

Training loads it without the test split, whose rows are then not reachable from the object.
"""

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.spec import REPLAY_TASK, DataSpec, ReplaySpec, SplitsSpec, TaskSpec, TemplateSpec
from finetune_trainer.chat import ChatColumn
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.source import Fetch, Row, fetch_local, read_rows
from finetune_trainer.split import ANYWHERE, DuplicateStats, Split, assign_splits, draw, input_key
from finetune_trainer.template import Template

_SHOWN_VALUES = 10
_SHOWN_CHARACTERS = 60


Phrasing = Template | ChatColumn
"""One way from a row to a prompt and a completion."""

_REPLAY_TEMPLATE = TemplateSpec(prompt="{{ prompt }}", completion="{{ completion }}")


@dataclass(frozen=True)
class Dataset:
    """The examples of the splits that were opened, and what is known of all."""

    tasks: tuple[str, ...]
    """Names, in the order of the spec; replayed rows belong to none of them."""
    specs: Mapping[str, TaskSpec]
    sizes: Mapping[Split, int]
    """Examples per split, also of splits that were not opened; replayed rows are not counted."""
    duplicates: DuplicateStats
    leaks: tuple[tuple[str, int], ...]
    """Task and number of the rows of validation and test sources that are nearly equal to a training row."""
    hash: str
    """sha256 over every example's task, prompt and completion in order, opened or not: equal data, equal hash."""
    _examples: Mapping[Split, tuple[Example, ...]] = dataclasses.field(repr=False)
    _replay: tuple[Example, ...] = dataclasses.field(repr=False)
    _phrasings: Mapping[str, tuple[Phrasing, ...]] = dataclasses.field(repr=False)

    def examples(self, split: Split) -> list[Example]:
        """Return the examples of ``split``, task after task, each in its source's order.

        Raises:
            LookupError: the data set was loaded without this split.
        """
        if split not in self._examples:
            raise LookupError(f"the {split} split was not opened; it is no business of this stage")
        return list(self._examples[split])

    def replay(self) -> list[Example]:
        """Return the general rows that are mixed into training: none that is like a row of validation or test."""
        return list(self._replay)

    def with_examples(self, examples: Mapping[Split, Sequence[Example]], replay: Sequence[Example]) -> "Dataset":
        """Return the same tasks with other rows in the splits, and other rows to be mixed into training."""
        return dataclasses.replace(
            self,
            sizes={split: len(examples.get(split, ())) for split in Split},
            _examples={split: tuple(rows) for split, rows in examples.items()},
            _replay=tuple(replay),
        )

    def task(self, name: str) -> TaskSpec:
        """Return the task called ``name``."""
        return self.specs[name]

    def labels(self, task: str) -> tuple[str, ...]:
        """Return the closed set of completions of ``task``, empty when it is open."""
        return self.task(task).labels

    def phrasings(self, task: str) -> int:
        """Return in how many ways a row of ``task`` can be rendered; chats in one."""
        return len(self._phrasings[task])

    def rendered(self, example: Example, template_index: int) -> Example:
        """Return the same row through another template of its task."""
        return self._render(example, template_index, example.values)

    def with_input(self, example: Example, change: Callable[[str], str]) -> Example:
        """Return the same row with every text changed that the prompt alone is made of; of a chat its last question."""
        phrasings = self._phrasings[example.task]
        if isinstance(column := phrasings[0], ChatColumn):
            asked_again = column.read(example.values, example.row).with_question(change)
            return self._render(example, example.template, {**example.values, column.name: asked_again})
        completed = frozenset[str]().union(*(phrasing.completion_columns for phrasing in phrasings))
        asked = frozenset[str]().union(*(phrasing.prompt_columns for phrasing in phrasings)) - completed
        values = {
            name: change(value) if name in asked and isinstance(value, str) else value
            for name, value in example.values.items()
        }
        return self._render(example, example.template, values)

    def cuttable(self, example: Example) -> str:
        """Return the text that `shortened` would cut, empty when there is none."""
        if isinstance(self._phrasings[example.task][example.template], ChatColumn):
            return "\n".join(text for _, text in _first_turns(example))
        column = self._longest_column(example)
        return str(example.values[column]) if column is not None else ""

    def shortened(self, example: Example, keep_characters: int) -> Example:
        """Return ``example`` with the end of its longest text column cut; columns of the completion stay whole.

        Of a chat the oldest turns go, a question and its answer together.
        """
        if gone := _first_turns(example):
            return dataclasses.replace(example, earlier=tuple(turn for turn in example.earlier if turn not in gone))
        column = self._longest_column(example)
        if column is None:
            return example
        cut = {**example.values, column: str(example.values[column])[: max(0, keep_characters)]}
        return self._render(example, example.template, cut)

    def _longest_column(self, example: Example) -> str | None:
        phrasing = self._phrasings[example.task][example.template]
        if isinstance(phrasing, ChatColumn):
            return None
        lengths = {
            column: len(value)
            for column in sorted(phrasing.prompt_columns - phrasing.completion_columns)
            if isinstance(value := example.values.get(column), str) and value
        }
        return max(lengths, key=lengths.__getitem__, default=None)

    def _render(self, example: Example, template_index: int, values: Mapping[str, object]) -> Example:
        phrasing = self._phrasings[example.task][template_index]
        return dataclasses.replace(
            example, template=template_index, values=values, **_texts(phrasing, values, example.row)
        )


def _first_turns(example: Example) -> tuple[tuple[str, str], ...]:
    """Return the oldest question and answer before the prompt of a chat."""
    talk = tuple(turn for turn in example.earlier if turn[0] != "system")
    return talk[:2]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A row before it is rendered: what decides its place."""

    number: int
    values: Row
    text: str
    key: str
    places: Collection[Split]
    """Where it may be; one place when its source fixes it."""
    group: str = ""
    stratum: str = ""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One task's rows, every one rendered."""

    rows: list[_Candidate]
    examples: list[Example]
    phrasings: tuple[Phrasing, ...]


def load_dataset(
    data: DataSpec,
    splits: Collection[Split] = tuple(Split),
    fetch: Fetch = fetch_local,
    subgroup_column: str | None = None,
) -> Dataset:
    """Read, render, check and split the rows of every task; keep those of ``splits``.

    Args:
        data: what the job says of its rows.
        splits: whose rows can be asked for afterwards.
        fetch: finds each task's file of rows. Default: on this machine only.
        subgroup_column: ``spec.evaluation.holistic.subgroupColumn``; kept among the values of every row.

    Raises:
        SpecError: a template is no valid Jinja, or a source cannot be read by this program.
        DataError: the rows are not what the job says they are.
    """
    loaded = {
        task.name: _load_task(task, data.splits, fetch, f"spec.data.tasks[{index}]", subgroup_column)
        for index, task in enumerate(data.tasks)
    }
    if data.replay is not None:
        loaded[REPLAY_TASK] = _load_replay(data.replay, data.splits.seed, fetch)
    rows = [row for task in loaded.values() for row in task.rows]
    examples = [example for task in loaded.values() for example in task.examples]
    places, duplicates = assign_splits(
        [row.text for row in rows],
        data.splits.validation,
        data.splits.test,
        data.splits.seed,
        groups=None if data.splits.group_by is None else [row.group for row in rows],
        strata=None if data.splits.stratify_by is None else [row.stratum for row in rows],
        allowed=[row.places for row in rows],
    )
    if data.replay is not None:
        _refuse_empty_replay(data.replay, examples, places)
    placed = [(e, place) for e, place in zip(examples, places, strict=True) if e.task != REPLAY_TASK]
    _refuse_tasks_without_rows(data, placed)
    return Dataset(
        tasks=tuple(task.name for task in data.tasks),
        specs={task.name: task for task in data.tasks} | {REPLAY_TASK: _REPLAY_SPEC},
        sizes={split: sum(place is split for _, place in placed) for split in Split},
        duplicates=duplicates,
        leaks=tuple(
            (examples[number].task, examples[number].row)
            for number in duplicates.leaks
            if examples[number].task != REPLAY_TASK
        ),
        hash=_hash(examples),
        _examples={split: tuple(example for example, place in placed if place is split) for split in splits},
        _replay=tuple(
            e for e, place in zip(examples, places, strict=True) if e.task == REPLAY_TASK and place is Split.TRAIN
        ),
        _phrasings={name: task.phrasings for name, task in loaded.items()},
    )


def _load_task(task: TaskSpec, splits: SplitsSpec, fetch: Fetch, field: str, subgroup_column: str | None) -> _Loaded:
    phrasings = _phrasings_of(task, field)
    columns = _Columns.of(task, phrasings, splits, field, subgroup_column)
    own = {"validationSource": Split.VALIDATION, "testSource": Split.TEST}
    sources = {"validationSource": task.validation_source, "testSource": task.test_source}
    drawn = ANYWHERE - {own[name] for name, uri in sources.items() if uri is not None}
    found = _candidates(task.source, f"{field}.source", fetch, columns, drawn)
    rows = _sample(found, task.max_examples, splits.seed)
    for name, uri in sources.items():
        if uri is not None:
            rows += _candidates(uri, f"{field}.{name}", fetch, columns, frozenset({own[name]}))
    renderings = _render_all(rows, task, phrasings, field)
    _refuse_other_labels(task, renderings, field)
    return _Loaded(rows, _choose(rows, renderings, splits.seed), phrasings)


_REPLAY_SPEC = TaskSpec(name=REPLAY_TASK, source="file:///", templates=(_REPLAY_TEMPLATE,))
"""Stands for the replayed rows where a task is asked for; its source is not looked at."""


def _load_replay(replay: ReplaySpec, seed: int, fetch: Fetch) -> _Loaded:
    """Read the general rows: of columns prompt and completion, or of a column messages."""
    field = "spec.data.replay"
    task = _REPLAY_SPEC.model_copy(update={"source": replay.source, "secret_ref": replay.secret_ref})
    first = next(iter(read_rows(fetch(replay.source, f"{field}.source", replay.secret_ref), f"{field}.source")))
    if "messages" in first:
        task = task.model_copy(update={"templates": (), "messages": "messages"})
    phrasings = _phrasings_of(task, field)
    columns = _Columns.of(task, phrasings, SplitsSpec(), field)
    rows = _candidates(task.source, f"{field}.source", fetch, columns, ANYWHERE)
    renderings = _render_all(rows, task, phrasings, field)
    return _Loaded(rows, _choose(rows, renderings, seed), phrasings)


def _choose(rows: Sequence[_Candidate], renderings: Sequence[Sequence[Example]], seed: int) -> list[Example]:
    """Return every row through one of its phrasings."""
    return [each[int(draw(seed, "template", row.key) * len(each))] for row, each in zip(rows, renderings, strict=True)]


def _phrasings_of(task: TaskSpec, field: str) -> tuple[Phrasing, ...]:
    if task.messages is not None:
        return (ChatColumn(task.messages, f"{field}.messages"),)
    return tuple(
        Template(template.prompt, template.completion, f"{field}.templates[{number}]")
        for number, template in enumerate(task.templates)
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns of a row are looked at, and as what."""

    task: TaskSpec
    field: str
    inputs: tuple[str, ...]
    completions: tuple[str, ...]
    optional: frozenset[str]
    chat: ChatColumn | None
    group_by: str | None
    stratify_by: str | None
    subgroup: str | None

    @classmethod
    def of(
        cls,
        task: TaskSpec,
        phrasings: Sequence[Phrasing],
        splits: SplitsSpec,
        field: str,
        subgroup: str | None = None,
    ) -> "_Columns":
        first = phrasings[0]
        return cls(
            task,
            field,
            tuple(sorted(frozenset[str]().union(*(phrasing.prompt_columns for phrasing in phrasings)))),
            tuple(sorted(frozenset[str]().union(*(phrasing.completion_columns for phrasing in phrasings)))),
            frozenset[str]().union(*(phrasing.optional_columns for phrasing in phrasings)),
            first if isinstance(first, ChatColumn) else None,
            splits.group_by,
            splits.stratify_by,
            subgroup,
        )

    def called(self, name: str) -> str:
        """Return what the column that templates call ``name`` is called in the rows."""
        return self.task.columns.get(name, name)

    def values(self, row: Row) -> Row:
        """Return what templates see of ``row``, and what splitting and evaluation need."""
        names = dict.fromkeys([*self.inputs, *self.completions])
        values = {name: row[self.called(name)] for name in names if self.called(name) in row}
        for column in (self.group_by, self.stratify_by, self.subgroup):
            if column is not None and column in row:
                values.setdefault(column, row[column])
        return values

    def text(self, values: Row, number: int) -> str:
        """Return what tells rows apart: neither label nor template is in it."""
        if self.chat is not None:
            return self.chat.read(values, number).asked if self.chat.name in values else ""
        # Without columns in the prompt (plain text to continue) the completion is what tells the rows apart.
        return "\n".join(str(values.get(column, "")) for column in self.inputs or self.completions)

    def refuse_missing(self, found: Collection[str], source: str) -> None:
        """Raise unless every column that is needed is among ``found``."""
        needed = [self.called(name) for name in (*self.inputs, *self.completions) if name not in self.optional]
        settings = {
            "data.splits.groupBy": self.group_by,
            "data.splits.stratifyBy": self.stratify_by,
            "evaluation.holistic.subgroupColumn": self.subgroup,
        }
        missing = [column for column in dict.fromkeys(needed) if column not in found]
        if missing:
            where = f"{self.field}.{'templates' if self.chat is None else 'messages'}"
            raise _no_column(where, missing, found, source)
        for name, column in settings.items():
            if column is not None and column not in found:
                raise _no_column(f"spec.{name}", [column], found, source)


def _no_column(where: str, missing: Sequence[str], found: Collection[str], source: str) -> DataError:
    return DataError(
        f"{where}: {', '.join(map(repr, missing))} not among the columns of {source}, which are "
        f"{_listed(list(found))}. Correct the name (a CSV file's first line must hold the column names), or say in "
        f"columns what the rows call it."
    )


def _candidates(uri: str, field: str, fetch: Fetch, columns: _Columns, places: Collection[Split]) -> list[_Candidate]:
    found: dict[str, None] = {}
    candidates: list[_Candidate] = []
    rows = read_rows(fetch(uri, field, columns.task.secret_ref), field)
    for number, row in enumerate(rows):
        found.update(dict.fromkeys(row))
        values = columns.values(row)
        text = columns.text(values, number)
        candidates.append(
            _Candidate(
                number,
                values,
                text,
                input_key(text),
                places,
                _value_of(row, columns.group_by),
                _value_of(row, columns.stratify_by),
            )
        )
    columns.refuse_missing(found, uri)
    for setting, column in (("groupBy", columns.group_by), ("stratifyBy", columns.stratify_by)):
        if column is not None and any(_is_missing(row.values.get(column)) for row in candidates):
            raise _missing_value(uri, candidates, column, f"spec.data.splits.{setting}", field)
    return candidates


def _value_of(row: Row, column: str | None) -> str:
    return "" if column is None else str(row.get(column, ""))


def _sample(candidates: list[_Candidate], limit: int | None, seed: int) -> list[_Candidate]:
    """Keep ``limit`` rows, drawn by their text: the same ones in whatever order the rows come."""
    if limit is None or len(candidates) <= limit:
        return candidates
    drawn = sorted(candidates, key=lambda row: (draw(seed, "sample", row.key), row.number))[:limit]
    return sorted(drawn, key=lambda row: row.number)


def _render_all(
    rows: Sequence[_Candidate], task: TaskSpec, phrasings: Sequence[Phrasing], field: str
) -> list[list[Example]]:
    """Return every row through every phrasing: what fails must fail before training, not in evaluation."""
    renderings = []
    for row in rows:
        try:
            renderings.append([_render(row, task, phrasing, index) for index, phrasing in enumerate(phrasings)])
        except DataError as error:
            columns = sorted(frozenset[str]().union(*(phrasing.completion_columns for phrasing in phrasings)))
            missing = next((column for column in columns if _is_missing(row.values.get(column))), None)
            if missing is None:
                raise
            # Rows without an answer are rarely alone: count them, so that they are dropped at once.
            alike = [other for other in rows if other.places == row.places]
            raise _missing_value(task.source, alike, missing, "the completion", f"{field}.source") from error
    return renderings


def _render(row: _Candidate, task: TaskSpec, phrasing: Phrasing, index: int) -> Example:
    return Example(
        task=task.name,
        row=row.number,
        template=index,
        key=row.key,
        values=row.values,
        **_texts(phrasing, row.values, row.number),
    )


def _texts(phrasing: Phrasing, values: Mapping[str, object], number: int) -> dict[str, Any]:
    if isinstance(phrasing, ChatColumn):
        chat = phrasing.read(values, number)
        return {"prompt": chat.question, "completion": chat.answer, "earlier": chat.earlier}
    prompt, completion = phrasing.render(values, number)
    return {"prompt": prompt, "completion": completion}


def _missing_value(source: str, rows: Sequence[_Candidate], column: str, use: str, field: str) -> DataError:
    without = [row for row in rows if _is_missing(row.values.get(column))]
    return DataError(
        f"{field}: column {column!r}, used by {use}, has no value in {len(without)} of {len(rows)} rows of "
        f"{source}, first in row {without[0].number} (counted from 0; {_clipped(repr(without[0].values))}). Drop "
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


def _refuse_empty_replay(replay: ReplaySpec, examples: Sequence[Example], places: Sequence[Split]) -> None:
    found = [place for example, place in zip(examples, places, strict=True) if example.task == REPLAY_TASK]
    if Split.TRAIN not in found:
        raise DataError(
            f"spec.data.replay.source: all {len(found)} rows of {replay.source} are like rows kept back for validation "
            f"and test, or drawn to be. Add rows, or leave replay out."
        )


def _refuse_tasks_without_rows(data: DataSpec, placed: Sequence[tuple[Example, Split]]) -> None:
    shares = {
        Split.TRAIN: 1.0 - data.splits.validation - data.splits.test,
        Split.VALIDATION: data.splits.validation,
        Split.TEST: data.splits.test,
    }
    rows = Counter((example.task, place) for example, place in placed)
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
        earlier = [text for turn in example.earlier for text in turn]
        for text in (example.task, *earlier, example.prompt, example.completion):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN_VALUES} more" if len(values) > _SHOWN_VALUES else ""
    return ", ".join(values[:_SHOWN_VALUES]) + more


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
