"""Read a job's own rows for the forgetting test: a closed choice each, as in the suite that ships with the image."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from finetune_trainer.errors import DataError
from finetune_trainer.general_suite import SHIPPED, GeneralRow
from finetune_trainer.labels import with_label
from finetune_trainer.source import Row, read_rows

_COLUMNS = ("prompt", "completion", "labels")
_LONGEST_NAME = 60


def name_sources(uris: Sequence[str]) -> list[str]:
    """Return a short name for each, all different: the file's, with a number where another one has it already."""
    names = [SHIPPED]
    for uri in uris:
        name = short = PurePosixPath(urlsplit(uri).path).stem[:_LONGEST_NAME] or "source"
        number = 1
        while name in names:
            number += 1
            name = f"{short}-{number}"
        names.append(name)
    return names[1:]


def read_general_rows(path: Path, name: str, field: str) -> list[GeneralRow]:
    """Return the rows of the file at ``path``.

    Args:
        path: jsonl or parquet; CSV knows no lists.
        name: of the source, in the report.
        field: the setting that names the file, for messages.

    Raises:
        DataError: a row is not what the test needs.
    """
    return [_general_row(row, number, name, field) for number, row in enumerate(read_rows(path, field))]


def _general_row(row: Row, number: int, name: str, field: str) -> GeneralRow:
    where = f"{field}, row {number} (counted from 0)"
    missing = [column for column in _COLUMNS if row.get(column) in (None, "", [])]
    if missing:
        raise DataError(
            f"{where}: no value in {', '.join(missing)}; its columns are {', '.join(row)}. Every row needs prompt, "
            f"completion and labels."
        )
    prompt, completion, labels = (row[column] for column in _COLUMNS)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(
            f"{where}: labels is {labels!r}, not a list of texts. Write the rows as jsonl or parquet; CSV has no lists."
        )
    answers = [label.strip() for label in labels]
    right = str(completion).strip()
    if len(set(answers)) != len(answers) or len(answers) < 2 or right not in answers:
        raise DataError(
            f"{where}: labels {labels} must be two or more different texts, and completion {right!r} one of them."
        )
    group = row.get("group")
    return GeneralRow(
        task=name,
        group=f"row {number}" if group is None else f"group {group}",
        prompt=str(prompt),
        choices=tuple(with_label(str(completion), answer) for answer in answers),
        right=answers.index(right),
        source=name,
    )
