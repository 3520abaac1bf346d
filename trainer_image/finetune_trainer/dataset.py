"""The rows of a job: read, rendered, checked and split, ready for the renderer. Deterministic; knows no tokens.

Training loads it without the test split, whose rows are then not reachable from the object. Rows lie on the disk and
are read when they are asked for: memory does not grow with what they say.
"""

import dataclasses
import hashlib
import math
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finetune_api.spec import REPLAY_TASK, DataSpec, ReplaySpec, SplitsSpec, TaskSpec, TemplateSpec
from finetune_trainer.chat import ChatColumn
from finetune_trainer.drawer import Drawer
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example, pack_example, unpack_example
from finetune_trainer.excerpt import beginning, excerpt, listed
from finetune_trainer.record_file import RecordFile
from finetune_trainer.records import StoredRows
from finetune_trainer.row_limit import MOST_COLUMNS
from finetune_trainer.source import Fetch, Row, fetch_local, read_rows
from finetune_trainer.split import (
    ANYWHERE,
    SPLITS,
    Codes,
    DuplicateStats,
    Numbers,
    Split,
    assign_splits,
    count_by_split,
    draw,
    input_key,
)
from finetune_trainer.template import Template

Phrasing = Template | ChatColumn
"""One way from a row to a prompt and a completion."""

_REPLAY_TEMPLATE = TemplateSpec(prompt="{{ prompt }}", completion="{{ completion }}")


@dataclass(frozen=True)
class _Opened:
    """The rows of one split, task after task."""

    rows: Sequence[Example]
    places: Mapping[str, range]

    @classmethod
    def of(cls, rows: Sequence[Example], counts: Mapping[str, int]) -> "_Opened":
        places: dict[str, range] = {}
        start = 0
        for task, count in counts.items():
            places[task] = range(start, start + count)
            start += count
        return cls(rows, places)


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
    """Rows of sources of their own that are nearly equal to a training row: ``task.testSource``, and their number."""
    seed: int
    """Of all that is drawn: splits, phrasings, rows that are shown."""
    unused: Mapping[str, str]
    """By task, which columns of its source it does not use, for people."""
    hash: str
    """sha256 over every example's task, prompt and completion in order, opened or not: equal data, equal hash."""
    _opened: Mapping[Split, _Opened] = dataclasses.field(repr=False)
    _replay: Sequence[Example] = dataclasses.field(repr=False)
    _phrasings: Mapping[str, tuple[Phrasing, ...]] = dataclasses.field(repr=False)
    _drawers: dict[str, Drawer] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def examples(self, split: Split, task: str | None = None) -> Sequence[Example]:
        """Return the examples of ``split``, task after task, or of one task alone, each in its source's order.

        Raises:
            LookupError: the data set was loaded without this split.
        """
        rows = self._of(split).rows
        if task is None:
            return rows
        places = self.places(split)[task]
        return rows[places.start : places.stop]

    def places(self, split: Split) -> Mapping[str, range]:
        """Return where each task's rows are among the examples of ``split``.

        Raises:
            LookupError: the data set was loaded without this split.
        """
        return self._of(split).places

    def _of(self, split: Split) -> _Opened:
        if split not in self._opened:
            raise LookupError(f"the {split} split was not opened; it is no business of this stage")
        return self._opened[split]

    def drawer(self, task: str) -> Drawer:
        """Return who draws from the training rows of ``task``: made when first asked for, as it reads them all."""
        if task not in self._drawers:
            self._drawers[task] = Drawer(self.examples(Split.TRAIN, task), self.labels(task))
        return self._drawers[task]

    def replay(self) -> Sequence[Example]:
        """Return the general rows that are mixed into training: none that is like a row of validation or test."""
        return self._replay

    def with_examples(self, examples: Mapping[Split, Sequence[Example]], replay: Sequence[Example]) -> "Dataset":
        """Return the same tasks with other rows in the splits, task after task, and others to be mixed in."""
        counts = {split: Counter(row.task for row in rows) for split, rows in examples.items()}
        return dataclasses.replace(
            self,
            sizes={split: len(examples.get(split, ())) for split in Split},
            _opened={
                split: _Opened.of(rows, {task: counts[split][task] for task in self.tasks})
                for split, rows in examples.items()
            },
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
        """Return the same row, and those shown before it, through another template of their task."""
        shown = tuple(self.rendered(row, template_index) for row in example.shown)
        return dataclasses.replace(self._render(example, template_index, example.values), shown=shown)

    def asked(self, example: Example) -> str:
        """Return the texts that the prompt alone is made of, without the template; of a chat what was said before."""
        phrasings = self._phrasings[example.task]
        if isinstance(column := phrasings[0], ChatColumn):
            return column.read(example.values, example.row).asked
        return "\n".join(str(example.values.get(column, "")) for column in sorted(_asked_columns(phrasings)))

    def with_input(self, example: Example, change: Callable[[str], str]) -> Example:
        """Return the same row with every text changed that the prompt alone is made of; of a chat its last question."""
        phrasings = self._phrasings[example.task]
        if isinstance(column := phrasings[0], ChatColumn):
            asked_again = column.read(example.values, example.row).with_question(change)
            return self._render(example, example.template, {**example.values, column.name: asked_again})
        asked = _asked_columns(phrasings)
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


def _asked_columns(phrasings: Sequence[Phrasing]) -> frozenset[str]:
    completed = frozenset[str]().union(*(phrasing.completion_columns for phrasing in phrasings))
    return frozenset[str]().union(*(phrasing.prompt_columns for phrasing in phrasings)) - completed


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
    group: str = ""
    stratum: str = ""


@dataclass(frozen=True, slots=True)
class _SourceRows:
    """What one source of a task gives."""

    rows: StoredRows[_Candidate]
    places: Collection[Split]
    """Where they may be; one place when the source fixes it."""
    unused: str = ""
    """Columns that are not looked at, for people."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One task's rows, every one rendered."""

    sources: Sequence[_SourceRows]
    phrasings: tuple[Phrasing, ...]

    @property
    def count(self) -> int:
        return sum(len(source.rows) for source in self.sources)


def load_dataset(
    data: DataSpec,
    splits: Collection[Split] = tuple(Split),
    fetch: Fetch = fetch_local,
    folder: Path | None = None,
    subgroup_column: str | None = None,
) -> Dataset:
    """Read, render, check and split the rows of every task; keep those of ``splits``.

    Args:
        data: what the job says of its rows.
        splits: whose rows can be asked for afterwards.
        fetch: finds each task's file of rows. Default: on this machine only.
        folder: on whose disk the rows lie, meanwhile about five times over. Default: where the machine keeps temporary
            files.
        subgroup_column: ``spec.evaluation.holistic.subgroupColumn``; kept among the values of every row.

    Raises:
        SpecError: a template is no valid Jinja, or a source cannot be read by this program.
        DataError: the rows are not what the job says they are.
        StorageError: the disk is full or broken.
    """
    rendered = RecordFile(folder)
    loaded = {
        task.name: _load_task(task, data.splits, fetch, f"spec.data.tasks[{index}]", rendered, subgroup_column)
        for index, task in enumerate(data.tasks)
    }
    if data.replay is not None:
        loaded[REPLAY_TASK] = _load_replay(data.replay, data.splits.seed, fetch, rendered)
    sources = [source for task in loaded.values() for source in task.sources]
    places, clusters, duplicates = assign_splits(
        (row.text for source in sources for row in source.rows),
        data.splits.validation,
        data.splits.test,
        data.splits.seed,
        groups=None if data.splits.group_by is None else (row.group for source in sources for row in source.rows),
        strata=None if data.splits.stratify_by is None else (row.stratum for source in sources for row in source.rows),
        allowed=(source.places for source in sources for _ in range(len(source.rows))),
        kind=rendered,
    )
    by_task: dict[str, Codes] = {}
    start = 0
    for name, task in loaded.items():
        by_task[name] = places[start : start + task.count]
        start += task.count
    if data.replay is not None:
        _refuse_empty_replay(data.replay, by_task[REPLAY_TASK])
    counts = {task.name: count_by_split(by_task[task.name]) for task in data.tasks}
    _refuse_tasks_without_rows(data, counts)
    examples = StoredRows(rendered, unpack_example)
    clustered = {task.name for task in data.tasks if task.few_shot is not None}
    opened, replay = _kept(rendered, by_task, splits, clusters, clustered)
    return Dataset(
        tasks=tuple(task.name for task in data.tasks),
        specs={task.name: task for task in data.tasks} | {REPLAY_TASK: _REPLAY_SPEC},
        sizes={split: sum(count[split] for count in counts.values()) for split in Split},
        duplicates=duplicates,
        leaks=tuple(
            (f"{example.task}.{SPLITS[places[index]].value}Source", example.row)
            for index, example in zip(duplicates.leaks, map(examples.__getitem__, duplicates.leaks), strict=True)
            if example.task != REPLAY_TASK
        ),
        seed=data.splits.seed,
        unused={task.name: loaded[task.name].sources[0].unused for task in data.tasks},
        hash=_hash(examples),
        _opened={
            split: _Opened.of(rows, {task: count[split] for task, count in counts.items()})
            for split, rows in opened.items()
        },
        _replay=replay,
        _phrasings={name: task.phrasings for name, task in loaded.items()},
    )


def _kept(
    rendered: RecordFile,
    by_task: Mapping[str, Codes],
    splits: Collection[Split],
    clusters: Numbers,
    clustered: Collection[str],
) -> tuple[dict[Split, StoredRows[Example]], StoredRows[Example]]:
    """Return the rows of ``splits`` and the replayed ones, in files where no others are.

    Rows of the tasks ``clustered`` know the number of their cluster.
    """
    opened, replay = {split: rendered.empty() for split in splits}, rendered.empty()
    records = rendered.records(0, len(rendered))
    start = 0
    for name, codes in by_task.items():
        for number, (place, record) in enumerate(zip(map(SPLITS.__getitem__, codes), records, strict=False), start):
            if name == REPLAY_TASK:
                if place is Split.TRAIN:
                    replay.append(record)
            elif place in opened:
                opened[place].append(_with_cluster(record, clusters[number]) if name in clustered else record)
        start += len(codes)
    return (
        {split: StoredRows(rows, unpack_example) for split, rows in opened.items()},
        StoredRows(replay, unpack_example),
    )


def _with_cluster(record: bytes, cluster: int) -> bytes:
    return pack_example(dataclasses.replace(unpack_example(record), cluster=int(cluster)))


def _load_task(
    task: TaskSpec,
    splits: SplitsSpec,
    fetch: Fetch,
    field: str,
    rendered: RecordFile,
    subgroup_column: str | None,
) -> _Loaded:
    phrasings = _phrasings_of(task, field)
    columns = _Columns.of(task, phrasings, splits, field, subgroup_column)
    own = {"validationSource": Split.VALIDATION, "testSource": Split.TEST}
    uris = {"validationSource": task.validation_source, "testSource": task.test_source}
    drawn = ANYWHERE - {own[name] for name, uri in uris.items() if uri is not None}
    found, unused = _candidates(task.source, f"{field}.source", fetch, columns, rendered.empty())
    sources = [_SourceRows(_sample(found, task.max_examples, splits.seed), drawn, unused)]
    for name, uri in uris.items():
        if uri is not None:
            rows, _ = _candidates(uri, f"{field}.{name}", fetch, columns, rendered.empty())
            sources.append(_SourceRows(rows, frozenset({own[name]})))
    _render_all(sources, task, phrasings, splits.seed, field, rendered)
    return _Loaded(sources, phrasings)


_REPLAY_SPEC = TaskSpec(name=REPLAY_TASK, source="file:///", templates=(_REPLAY_TEMPLATE,))
"""Stands for the replayed rows where a task is asked for; its source is not looked at."""


def _load_replay(replay: ReplaySpec, seed: int, fetch: Fetch, rendered: RecordFile) -> _Loaded:
    """Read the general rows: of columns prompt and completion, or of a column messages."""
    field = "spec.data.replay"
    task = _REPLAY_SPEC.model_copy(
        update={"source": replay.source, "secret_ref": replay.secret_ref, "revision": replay.revision}
    )
    path = fetch(replay.source, f"{field}.source", replay.secret_ref, replay.revision)
    first = next(iter(read_rows(path, f"{field}.source")))
    if "messages" in first:
        task = task.model_copy(update={"templates": (), "messages": "messages"})
    phrasings = _phrasings_of(task, field)
    columns = _Columns.of(task, phrasings, SplitsSpec(), field)
    rows, _ = _candidates(task.source, f"{field}.source", fetch, columns, rendered.empty())
    sources = [_SourceRows(rows, ANYWHERE)]
    _render_all(sources, task, phrasings, seed, field, rendered)
    return _Loaded(sources, phrasings)


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

    @property
    def used(self) -> frozenset[str]:
        """What the columns that are looked at are called in the rows."""
        further = {self.group_by, self.stratify_by, self.subgroup} - {None}
        return frozenset(map(self.called, (*self.inputs, *self.completions))) | cast("set[str]", further)

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
        f"{listed(list(found))}. Correct the name (a CSV file's first line must hold the column names), or say in "
        f"columns what the rows call it."
    )


def _candidates(
    uri: str, field: str, fetch: Fetch, columns: _Columns, records: RecordFile
) -> tuple[StoredRows[_Candidate], str]:
    """Put the rows of one source into ``records``, which are empty; also return which columns are not used."""
    found: dict[str, None] = {}
    used = columns.used
    lacking: set[str] = set()
    splitting = {"groupBy": columns.group_by, "stratifyBy": columns.stratify_by}
    path = fetch(uri, field, columns.task.secret_ref, columns.task.revision)
    for number, row in enumerate(read_rows(path, field)):
        # Every row may have names of its own: those beyond any table's are not kept.
        found.update(dict.fromkeys(row if len(found) < MOST_COLUMNS else used.intersection(row)))
        values = columns.values(row)
        text = columns.text(values, number)
        group, stratum = _value_of(row, columns.group_by), _value_of(row, columns.stratify_by)
        lacking.update(column for column in splitting.values() if column and _is_missing(values.get(column)))
        records.append(pickle.dumps((number, values, text, input_key(text), group, stratum), pickle.HIGHEST_PROTOCOL))
    candidates = StoredRows(records, _unpack_candidate)
    columns.refuse_missing(found, uri)
    for setting, column in splitting.items():
        if column is not None and column in lacking:
            raise _missing_value(uri, candidates, column, f"spec.data.splits.{setting}", field)
    return candidates, listed([beginning(name) for name in found if name not in used])


def _unpack_candidate(record: bytes) -> _Candidate:
    # From a file without a name, as in `unpack_example`.
    return _Candidate(*pickle.loads(record))


def _value_of(row: Row, column: str | None) -> str:
    return "" if column is None else str(row.get(column, ""))


def _sample(candidates: StoredRows[_Candidate], limit: int | None, seed: int) -> StoredRows[_Candidate]:
    """Keep ``limit`` rows, drawn by their text: the same ones in whatever order the rows come."""
    if limit is None or len(candidates) <= limit:
        return candidates
    draws = array("d", (draw(seed, "sample", row.key) for row in candidates))
    chosen = sorted(range(len(draws)), key=draws.__getitem__)[:limit]
    return candidates.at(sorted(chosen))


def _render_all(
    sources: Iterable[_SourceRows],
    task: TaskSpec,
    phrasings: Sequence[Phrasing],
    seed: int,
    field: str,
    rendered: RecordFile,
) -> None:
    """Render every row through every phrasing, as what fails must fail before training, and keep one of them."""
    others: dict[str, _Strays] = {}
    for source in sources:
        for row, renderings in _renderings(source, task, phrasings, field):
            if task.labels:
                for answer in dict.fromkeys(example.completion.strip() for example in renderings):
                    if answer in task.labels:
                        continue
                    others.setdefault(answer, _Strays(row.number)).rows += 1
            rendered.append(pack_example(renderings[int(draw(seed, "template", row.key) * len(renderings))]))
    if others:
        raise _other_labels(task, others, field)


@dataclass(slots=True)
class _Strays:
    """Rows with an answer that is no label."""

    first: int
    rows: int = 0


def _renderings(
    source: _SourceRows, task: TaskSpec, phrasings: Sequence[Phrasing], field: str
) -> Iterator[tuple[_Candidate, list[Example]]]:
    for row in source.rows:
        try:
            yield row, [_render(row, task, phrasing, index) for index, phrasing in enumerate(phrasings)]
        except DataError as error:
            columns = sorted(frozenset[str]().union(*(phrasing.completion_columns for phrasing in phrasings)))
            missing = next((column for column in columns if _is_missing(row.values.get(column))), None)
            if missing is None:
                raise
            # Rows without an answer are rarely alone: count them, so that they are dropped at once.
            raise _missing_value(task.source, source.rows, missing, "the completion", f"{field}.source") from error


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
    without = (row for row in rows if _is_missing(row.values.get(column)))
    first = next(without)
    return DataError(
        f"{field}: column {column!r}, used by {use}, has no value in {1 + sum(1 for _ in without)} of {len(rows)} rows "
        f"of {source}, first in row {first.number} (counted from 0; {excerpt(first.values)}). Drop these rows "
        f"or fill the value in."
    )


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _other_labels(task: TaskSpec, others: Mapping[str, _Strays], field: str) -> DataError:
    stray_answers = [
        f"{excerpt(answer)} ({stray.rows}, first in row {stray.first})"
        for answer, stray in sorted(others.items(), key=lambda item: -item[1].rows)
    ]
    return DataError(
        f"{field}.labels: {list(task.labels)} do not cover every completion of {task.source}; others are "
        f"{listed(stray_answers)}. Rows count from 0. Add the labels, correct the completion template or drop the rows."
    )


def _refuse_empty_replay(replay: ReplaySpec, codes: Codes) -> None:
    if not count_by_split(codes)[Split.TRAIN]:
        raise DataError(
            f"spec.data.replay.source: all {len(codes)} rows of {replay.source} are like rows kept back for "
            f"validation and test, or drawn to be. Add rows, or leave replay out."
        )


def _refuse_tasks_without_rows(data: DataSpec, counts: Mapping[str, Mapping[Split, int]]) -> None:
    shares = {
        Split.TRAIN: 1.0 - data.splits.validation - data.splits.test,
        Split.VALIDATION: data.splits.validation,
        Split.TEST: data.splits.test,
    }
    for index, task in enumerate(data.tasks):
        rows = counts[task.name]
        empty = [split.value for split, share in shares.items() if share > 0 and not rows[split]]
        if empty:
            sizes = ", ".join(f"{split.value} {rows[split]}" for split in Split)
            raise DataError(
                f"spec.data.tasks[{index}] ({task.name}): no rows for {' and '.join(empty)} ({sizes}). Add rows, raise "
                f"the share in spec.data.splits or take another spec.data.splits.seed."
            )


def _hash(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        earlier = [text for turn in example.earlier for text in turn]
        for text in (example.task, *earlier, example.prompt, example.completion):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
