"""Say what the rows of a job look like, and what about them may not be what was meant. Pure; counts only.

What could identify somebody is counted and never repeated. The patterns find what looks like an address, a number or
a key; that is a reason to look, not a proof.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

import py3langid

from finetune_api.library import entry_with
from finetune_api.report import (
    ColumnData,
    DataReport,
    LengthCount,
    Overlap,
    PersonalData,
    SplitRows,
    TaskData,
    TextPiece,
)
from finetune_api.secret_text import SECRET
from finetune_api.spec import TemplateSpec
from finetune_trainer.example import Encoded, Example
from finetune_trainer.split import Split

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[a-zA-Z]{2,24}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}|\(?\d{3}\)?)(?:[ .-]\d{2,4}){2,3}(?!\w)"
)

_MANY_TRUNCATED_PERCENT = 5.0
_MANY_DUPLICATES = 0.2
_ONE_SIDED = 0.9
_RARE = 10
_MOST_DISTINCT = 1000
_GUESSED_ROWS = 200
_GUESSED_CHARACTERS = 2000
_MOST_LANGUAGES = 3
_NOTHING = "nothing"
"""What a value is called that is not there."""


def describe_task(
    name: str,
    labels: Sequence[str],
    examples: Mapping[Split, Sequence[Example]],
    encoded: Mapping[Split, Sequence[Encoded]],
    decode: Callable[[Sequence[int]], str],
    templates: tuple[TemplateSpec, ...],
    unused: str,
) -> TaskData:
    """Return what one task's rows look like.

    Args:
        name: of the task.
        labels: its closed set; empty when it is open.
        examples: its rows by split.
        encoded: the same as tokens; those of training with all that is learnt.
        decode: the tokenizer's, special tokens included.
        templates: its phrasings; none of chats.
        unused: columns of its source that it does not use, for people.
    """
    entry = entry_with(templates)
    bars: Counter[int] = Counter()
    truncated = 0
    for item in chain.from_iterable(encoded.values()):
        bars[max(4, (len(item.ids) - 1).bit_length())] += 1
        truncated += item.truncated
    answers = Counter(example.completion.strip() for example in examples[Split.TRAIN]) if labels else Counter[str]()
    first = next(iter(encoded[Split.TRAIN]), None)
    return TaskData(
        task=name,
        rows=SplitRows(**{split.value: len(rows) for split, rows in examples.items()}),
        lengths=tuple(_histogram(bars)),
        truncated=truncated,
        labels={label: answers[label] for label in labels},
        columns=tuple(describe_columns(example.values for example in examples[Split.TRAIN])),
        unused=unused,
        languages=guess_languages(examples[Split.TRAIN]),
        sample=() if first is None else tuple(mask_pieces(first, decode)),
        library="" if entry is None else f"{entry.name} {entry.version}",
    )


def describe_columns(rows: Iterable[Mapping[str, object]]) -> Iterator[ColumnData]:
    """Yield every column of ``rows`` in the order in which they first appear."""
    columns: dict[str, _Column] = {}
    for number, row in enumerate(rows):
        for name in (name for name in row if name not in columns):
            columns[name] = _Column(Counter({_NOTHING: number} if number else {}))
        for name, column in columns.items():
            column.add(row.get(name))
    for name, column in columns.items():
        yield ColumnData(name=name, kinds=dict(column.kinds.most_common()), distinct=column.distinct)


@dataclass(slots=True)
class _Column:
    kinds: Counter[str]
    _values: set[int] | None = field(default_factory=set)
    """Hashes, as a text may be long. Absent: too many, or not to be counted."""

    @property
    def distinct(self) -> int | None:
        return None if self._values is None else len(self._values)

    def add(self, value: object) -> None:
        kind = _kind(value)
        self.kinds[kind] += 1
        if self._values is None or kind == _NOTHING:
            return
        if kind in ("list", "object"):
            self._values = None
            return
        self._values.add(hash(value))
        if len(self._values) > _MOST_DISTINCT:
            self._values = None


def _is_there(value: object) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _kind(value: object) -> str:
    if not _is_there(value):
        return _NOTHING
    match value:
        case str():
            return "text"
        case bool():
            return "truth"
        case int() | float():
            return "number"
        case list() | tuple():
            return "list"
        case _:
            return "object"


def guess_languages(examples: Sequence[Example]) -> dict[str, float]:
    """Return the commonest languages of the longest texts of some of the rows, with their shares."""
    step = max(1, len(examples) // _GUESSED_ROWS)
    texts = [_longest_text(example) for example in examples[::step][:_GUESSED_ROWS]]
    found = Counter(py3langid.classify(text)[0] for text in texts if text.strip())
    return {language: count / found.total() for language, count in found.most_common(_MOST_LANGUAGES)}


def _longest_text(example: Example) -> str:
    texts = [value for value in example.values.values() if isinstance(value, str)]
    return max(texts, key=len, default=example.prompt)[:_GUESSED_CHARACTERS]


def mask_pieces(item: Encoded, decode: Callable[[Sequence[int]], str]) -> Iterator[TextPiece]:
    """Yield the text of a row in pieces: what is learnt, and what is only read."""
    learnt = set(item.learnt)
    for is_learnt, places in groupby(range(len(item.ids)), key=learnt.__contains__):
        yield TextPiece(text=decode([item.ids[place] for place in places]), learnt=is_learnt)


def _histogram(bars: Counter[int]) -> Iterator[LengthCount]:
    """Yield how many rows have up to 16, 32, 64, … tokens, from the shortest row's bar to the longest's."""
    for power in range(min(bars, default=0), max(bars, default=-1) + 1):
        yield LengthCount(up_to=1 << power, rows=bars[power])


def find_personal_data(examples: Iterable[Example]) -> PersonalData:
    """Count the rows with something in them that looks like an e-mail address, a telephone number or a secret key."""
    found: Counter[str] = Counter()
    for example in examples:
        text = "\n".join([*(turn for _, turn in example.earlier), example.prompt, example.completion])
        found.update(name for name, pattern in _PATTERNS.items() if pattern.search(text))
    return PersonalData(emails=found["emails"], phones=found["phones"], keys=found["keys"])


_PATTERNS = {"emails": _EMAIL, "phones": _PHONE, "keys": SECRET}


def find_warnings(report: DataReport) -> Iterator[str]:
    """Yield in sentences what may not be what was meant."""
    rows = report.rows.train + report.rows.validation + report.rows.test
    yield from report.leaks()
    if report.truncated_percent > _MANY_TRUNCATED_PERCENT:
        yield (
            f"{report.truncated_percent:.1f} % of the rows are shortened to {report.max_length} tokens; raise "
            f"spec.data.maxLength, or shorten the rows where it hurts least."
        )
    if report.duplicates > _MANY_DUPLICATES * rows:
        yield (
            f"{report.duplicates} of {rows} rows nearly equal another one ({report.exact_duplicates} exactly): the "
            f"model sees them more often than others. Drop the copies."
        )
    if report.personal_data.keys:
        yield f"{report.personal_data.keys} rows hold what looks like a secret key; the model may learn and repeat it."
    if report.personal_data.emails or report.personal_data.phones:
        yield (
            f"{report.personal_data.emails} rows hold an e-mail address and {report.personal_data.phones} a telephone "
            f"number; the model may learn and repeat them. Replace them where nobody agreed to that."
        )
    for overlap in report.overlaps:
        if overlap.overlapping > overlap.given_away:
            yield (
                f"{overlap.overlapping} of {overlap.questions} questions of {overlap.source} share words in a row "
                f"with training rows{_shown(overlap)}. Look whether those rows tell the answer."
            )
    for task in report.tasks:
        yield from _label_warnings(task)


def _shown(overlap: Overlap) -> str:
    return "" if overlap.given_away else f", first {overlap.first!r}"


def _label_warnings(task: TaskData) -> Iterator[str]:
    total = sum(task.labels.values())
    if not total:
        return
    commonest = max(task.labels, key=lambda label: task.labels[label])
    if task.labels[commonest] > _ONE_SIDED * total:
        yield (
            f"{task.labels[commonest] / total:.0%} of the training rows of task {task.task} are labelled "
            f"{commonest!r}; look at macro_f1 besides accuracy."
        )
    rare = [f"{label!r} ({count})" for label, count in task.labels.items() if count < _RARE]
    if rare:
        yield (
            f"of task {task.task} few training rows are labelled {', '.join(rare[:5])}"
            f"{f' and {len(rare) - 5} more' if len(rare) > 5 else ''}; what is rare is hardly learnt."
        )
