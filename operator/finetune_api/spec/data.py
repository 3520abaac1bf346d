"""``spec.data``: the rows, how they become prompts, and which of them are kept back."""

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.prompt_library import library_names, suggest
from finetune_api.spec.field import (
    Column,
    DataUri,
    Flag,
    Int,
    Name,
    Number,
    Prose,
    Revision,
    SecretRef,
    Seed,
    Share,
    TaskName,
    Variable,
)

DEFAULT_MAX_LENGTH = 1024
"""Tokens of a row where the spec leaves it open and the model has places for so many."""

REPLAY_TASK = "replay"
"""What the rows of ``data.replay`` are called among the tasks."""


class Format(StrEnum):
    """How prompts are wrapped for the model."""

    AUTO = "auto"
    RAW = "raw"
    CHAT = "chat"


class LossOn(StrEnum):
    """Which tokens are learnt."""

    COMPLETION = "completion"
    ASSISTANT = "assistant"
    ALL = "all"


class Mixing(StrEnum):
    """How often rows of each task are seen."""

    PROPORTIONAL = "proportional"
    EQUAL = "equal"
    TEMPERATURE = "temperature"
    WEIGHTS = "weights"


class TemplateSpec(Block):
    """One phrasing of a task. Both texts are Jinja over the row's columns, rendered in a sandbox."""

    prompt: Prose
    """What the model is given: ``Review: {{ text }}``. Undefined columns are errors."""
    completion: Prose
    """What it shall answer: ``{{ label }}``. The only part that is learnt, with the end token behind it."""


def _one_way_to_render(
    templates: tuple[TemplateSpec, ...], library: str | None, messages: str | None
) -> Iterator[Problem]:
    given = [
        name for name, is_set in (("templates", templates), ("library", library), ("messages", messages)) if is_set
    ]
    if len(given) != 1:
        yield Problem(
            (),
            given or None,
            "needs exactly one of templates, library and messages",
            "Write one template with prompt and completion." if not given else f"Keep one of {', '.join(given)}.",
        )


def _library_has_the_entry(library: str | None) -> Iterator[Problem]:
    if library is not None and library not in library_names():
        yield Problem(
            ("library",),
            library,
            "is not in the template library",
            f"{suggest(library)} `finetune templates` shows them all.",
        )


def _labels_differ(labels: tuple[str, ...]) -> Iterator[Problem]:
    for label, count in Counter(labels).items():
        if count > 1:
            yield Problem(("labels",), label, f"names a label {count} times", "Name every label once.")
    if len(labels) == 1:
        yield Problem(
            ("labels",), list(labels), "is a choice among one", "Name at least two labels, or leave them out."
        )
    for index, label in enumerate(labels):
        if label != label.strip():
            yield Problem(
                ("labels", index),
                label,
                "begins or ends with white space, which completions are compared without",
                f"Write {label.strip()!r}; white space belongs into the completion template.",
            )


def _chats_have_their_own_turns(messages: str | None, few_shot: int | None) -> Iterator[Problem]:
    if messages is not None and few_shot is not None:
        yield Problem(
            ("fewShot",),
            few_shot,
            "has no place before chats, whose earlier turns are their own",
            "Leave it out, or write templates instead of messages.",
        )


def _is_of_the_hub(revision: str | None, *sources: str | None) -> Iterator[Problem]:
    if revision is not None and not any(source and source.startswith("hf://") for source in sources):
        yield Problem(
            ("revision",),
            revision,
            "pins a hub data set, and no source here is one",
            "Leave it out, or name rows as hf://datasets/organisation/name.",
        )


def _revision_is_of_the_hub(
    revision: str | None, source: str, validation_source: str | None, test_source: str | None
) -> Iterator[Problem]:
    yield from _is_of_the_hub(revision, source, validation_source, test_source)


class TaskSpec(Block):
    """Rows with the templates and labels that belong to them."""

    rules = (
        _one_way_to_render,
        _library_has_the_entry,
        _labels_differ,
        _chats_have_their_own_turns,
        _revision_is_of_the_hub,
    )

    name: TaskName
    """Short name, unique in the job; gates and reports use it."""
    source: DataUri
    """The rows: a file (jsonl, json, csv, txt, parquet, arrow; text also packed as .gz or .zst), a folder of them, or a
    pattern: ``file://./rows/train*.jsonl``. file:// (``./`` is relative to the manifest), s3://, pvc://,
    configMap://name/key, or a hub data set: ``hf://datasets/organisation/name/data/train*``."""
    validation_source: DataUri | None = None
    """Rows for validation from a place of their own, read as those of ``source`` are; ``splits.validation`` is then not
    cut from ``source``."""
    test_source: DataUri | None = None
    """Rows for the test from a place of their own, read as those of ``source`` are; ``splits.test`` is then not cut
    from ``source``. The check stage counts those that are like a training row."""
    revision: Revision | None = None
    """Branch, tag or commit of the hub data sets in ``source``, ``validationSource`` and ``testSource``; a commit
    stays what it is. Absent: the branch main."""
    templates: Annotated[tuple[TemplateSpec, ...], Field(max_length=16)] = ()
    """Phrasings of the task; each row is trained with one, chosen by the seed. The base model is measured with the one
    that suits it best on the validation rows."""
    library: Name | None = None
    """A named entry of the built-in template library instead of own templates: sentiment, summarize-dialogue, nli;
    ``finetune templates`` lists them. Becomes its templates when the job is accepted."""
    messages: Column | None = None
    """A column of chats instead of templates: lists of {role, content} or {from, value} that end with the assistant's
    turn, which is learnt; with ``lossOn: assistant`` its earlier turns too. Needs a chat template."""
    columns: Annotated[dict[Variable, Column], Field(max_length=32)] = Field(default_factory=dict)
    """What the rows call the columns that the templates name, where that differs: ``{text: "Review Body"}``."""
    labels: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=256)] = ()
    """The closed set of answers. With it the task is scored by likelihood: accuracy instead of generated text. Every
    completion must be one of them."""
    few_shot: Annotated[Int, Field(ge=1, le=64)] | None = None
    """Show this many other rows with their answers before every question: while training, and alike when base and tuned
    model are evaluated. Drawn for each row by ``splits.seed`` from this task's training rows alone, never the row
    itself or one that is nearly equal or of its group; of a closed set every label as often as can be. Only the row's
    own completion is learnt. Those that leave no room within ``maxLength`` are left out. Tokens, time and memory grow
    with them. For a mix of prompts with and without, name the same source in two tasks. Absent: the prompt alone."""
    max_examples: Annotated[Int, Field(ge=1, le=100_000_000)] | None = None
    """Use this many rows at most, drawn by the seed. Absent: all."""
    weight: Annotated[Number, Field(gt=0, le=1000)] = 1.0
    """Share of this task among the rows seen, relative to the others', under ``mixing.strategy: weights``."""
    secret_ref: SecretRef | None = None
    """Secret with the keys of an s3:// source: those of spec.output.secretRef, with AWS_ENDPOINT_URL for a store that
    is not AWS. Absent: the output's store is meant, with its endpoint and Secret. For an hf:// source, with the hub's
    token as HF_TOKEN or token."""


def _temperature_is_used(strategy: Mixing, temperature: float | None) -> Iterator[Problem]:
    if temperature is not None and strategy is not Mixing.TEMPERATURE:
        yield Problem(
            ("temperature",),
            temperature,
            f"has no effect under strategy {strategy.value}",
            "Leave it out, or set strategy: temperature.",
        )


class MixingSpec(Block):
    """How several tasks share the training."""

    rules = (_temperature_is_used,)

    strategy: Mixing = Mixing.PROPORTIONAL
    """proportional: every row once an epoch; equal: every task as often; temperature: in between; weights: by
    ``tasks[].weight``."""
    temperature: Annotated[Number, Field(ge=1, le=100)] | None = None
    """1 is proportional, large is equal; 2 is usual (arXiv:1910.10683). Only for strategy temperature."""
    max_examples_per_task: Annotated[Int, Field(ge=1, le=100_000_000)] | None = None
    """Rows of a task beyond this many do not raise its share, so that one huge task does not drown the others."""


def _training_rows_are_left(validation: float, test: float) -> Iterator[Problem]:
    if validation + test >= 0.9:
        yield Problem(
            (),
            f"{validation:g} + {test:g}",
            f"keeps {validation + test:.2f} of the rows back and leaves almost none for training",
            "Lower validation or test until together they are below 0.9; 0.1 each is usual.",
        )


def _one_column_decides(group_by: str | None, stratify_by: str | None) -> Iterator[Problem]:
    if group_by is not None and group_by == stratify_by:
        yield Problem(
            ("stratifyBy",),
            stratify_by,
            "is also groupBy: rows with equal values cannot stay together and be spread at once",
            "Leave one of them out.",
        )


class SplitsSpec(Block):
    """Which rows are kept back. A row's place depends on its input's hash alone, so it stays when rows are added."""

    rules = (_training_rows_are_left, _one_column_decides)

    validation: Share = 0.1
    """Share of the rows for choosing (checkpoint, the base model's template); never trained on."""
    test: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of the rows for the final measurement; opened once, by evaluation. 1,000 rows detect a gain of 0.05 with
    90 % power, 300 rows with 48 %."""
    group_by: Column | None = None
    """Column whose equal values stay together: a film, a customer. Keeps what belongs together from leaking."""
    stratify_by: Column | None = None
    """Column whose values' shares are kept equal in all splits: the label. Rows at the border between two splits may
    change places when rows are added."""
    seed: Seed = 17
    """Another seed, another split."""


def _replay_revision_is_of_the_hub(revision: str | None, source: str) -> Iterator[Problem]:
    yield from _is_of_the_hub(revision, source)


class ReplaySpec(Block):
    """General rows mixed in against forgetting."""

    rules = (_replay_revision_is_of_the_hub,)

    source: DataUri
    """Rows with columns prompt and completion, or messages; read as those of a task."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub data set, as for a task. Absent: the branch main."""
    fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of the rows seen that are replayed; 0.05-0.1 is usual (arXiv:2403.08763)."""
    secret_ref: SecretRef | None = None
    """Secret with the keys of an s3:// source: those of spec.output.secretRef, with AWS_ENDPOINT_URL for a store that
    is not AWS. Absent: the output's store is meant, with its endpoint and Secret."""


def _task_names_differ(tasks: tuple[TaskSpec, ...]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, task in enumerate(tasks):
        if task.name in seen:
            yield Problem(
                ("tasks", index, "name"),
                task.name,
                f"is already the name of tasks[{seen[task.name]}]",
                "Give every task a name of its own.",
            )
        seen.setdefault(task.name, index)


def _replay_is_no_task(tasks: tuple[TaskSpec, ...], replay: ReplaySpec | None) -> Iterator[Problem]:
    for index, task in enumerate(tasks):
        if replay is not None and task.name == REPLAY_TASK:
            yield Problem(
                ("tasks", index, "name"),
                task.name,
                "is what the rows of spec.data.replay are called",
                "Give the task another name.",
            )


def _raw_prompts_have_no_system(format: Format, system: str | None) -> Iterator[Problem]:
    if format is Format.RAW and system is not None:
        yield Problem(
            ("system",),
            system,
            "has no place in format raw",
            "Put the text into the templates, or set spec.data.format: chat.",
        )


def _messages_are_chat(tasks: tuple[TaskSpec, ...], format: Format) -> Iterator[Problem]:
    for index, task in enumerate(tasks):
        if task.messages is not None and format is Format.RAW:
            yield Problem(
                ("tasks", index, "messages"),
                task.messages,
                "needs a chat template, and format is raw",
                "Set spec.data.format: chat, or write templates.",
            )


def _shown_rows_are_not_learnt(tasks: tuple[TaskSpec, ...], loss_on: LossOn) -> Iterator[Problem]:
    for index, task in enumerate(tasks):
        if task.few_shot is not None and loss_on is LossOn.ALL:
            yield Problem(
                ("tasks", index, "fewShot"),
                task.few_shot,
                "cannot go with lossOn: all, under which the shown rows would be learnt again with every question",
                "Set spec.data.lossOn: completion, or leave fewShot out.",
            )


class DataSpec(Block):
    """The rows."""

    rules = (
        _task_names_differ,
        _replay_is_no_task,
        _raw_prompts_have_no_system,
        _messages_are_chat,
        _shown_rows_are_not_learnt,
    )

    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1, max_length=32)]
    """One task, or several for multi-task instruction tuning."""
    mixing: MixingSpec = MixingSpec()
    """How several tasks share the training."""
    splits: SplitsSpec = SplitsSpec()
    """Rows kept back for validation and test."""
    format: Format = Format.AUTO
    """raw: the prompt as it stands. chat: through the model's own chat template. auto: chat when it has one."""
    system: Prose | None = None
    """System prompt for format chat. Absent: the template's own, which the report shows."""
    replay: ReplaySpec | None = None
    """General rows mixed in against forgetting."""
    max_length: Annotated[Int, Field(ge=16, le=1_048_576)] | None = None
    """Longest row in tokens, prompt and completion together; under task seq2seq-lm, of prompt and completion each.
    Longer prompts are shortened in their longest column; completions never. Memory grows at least linearly with it.
    Absent: 1024, or fewer where the model has fewer places for tokens."""
    packing: Flag = True
    """Put several rows into one sequence without padding, isolated from each other; several times faster on short rows.
    Where the model cannot isolate them, as no encoder-decoder model can, rows are padded all the same."""
    loss_on: LossOn = LossOn.COMPLETION
    """completion: learn the answer only. assistant: of a chat, every turn of the assistant. all: learn the prompt too,
    for plain text."""
