"""Rows shown answered before a question: those of a task with fewShot, and what may serve the base instead of tuning.

They are training rows, rendered as the question is: earlier turns of a chat, or text above it. A task's own are drawn
for each row anew, whenever the row is asked for, by its task, its number and its text: equal in every stage and life.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import overload

from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split

_ROWS_AT_ONCE = 1024

# --- of a task with fewShot


def as_asked(dataset: Dataset, split: Split, task: str | None = None) -> Sequence[Example]:
    """Return the examples of ``split`` as the model sees them: where their task says so, behind shown rows."""
    rows = dataset.examples(split, task)
    names = dataset.tasks if task is None else (task,)
    return _Behind(rows, dataset) if any(dataset.task(name).few_shot is not None for name in names) else rows


@dataclasses.dataclass(frozen=True, slots=True)
class _Behind(Sequence[Example]):
    """Rows of which each gets its shown ones when it is asked for."""

    rows: Sequence[Example]
    dataset: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "_Behind": ...
    def __getitem__(self, index: int | slice) -> "Example | _Behind":
        if isinstance(index, slice):
            return dataclasses.replace(self, rows=self.rows[index])
        return self._behind_shown(self.rows[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self._behind_shown, self.rows)

    def _behind_shown(self, example: Example) -> Example:
        count = self.dataset.task(example.task).few_shot
        if count is None:
            return example
        generator = random.Random(f"{self.dataset.seed}/shown/{example.task}/{example.row}/{example.key}")
        drawn = self.dataset.drawer(example.task).draw(count, generator, example.cluster)
        return dataclasses.replace(example, shown=tuple(self._in_template(row, example.template) for row in drawn))

    def _in_template(self, row: Example, template: int) -> Example:
        return row if row.template == template else self.dataset.rendered(row, template)


def check_shown(dataset: Dataset) -> None:
    """Find tasks that have too few training rows to show before every row.

    Raises:
        DataError: one has.
    """
    for index, name in enumerate(dataset.tasks):
        if (count := dataset.task(name).few_shot) is None:
            continue
        drawer = dataset.drawer(name)
        if len(drawer) - drawer.largest_cluster < count:
            raise DataError(
                f"spec.data.tasks[{index}].fewShot ({count}): task {name!r} has {len(drawer)} training rows, of which "
                f"{drawer.largest_cluster} are nearly equal or of one group and are not shown to each other, so only "
                f"{len(drawer) - drawer.largest_cluster} can be shown. Lower it, or add rows."
            )


# --- of the base, beside its answers to the prompt alone


def draw_shown(dataset: Dataset, task: str, count: int, seed: int) -> list[Example]:
    """Return ``count`` training rows of a task, or all there are; of a closed set every label as often as can be.

    Which ones depends on the rows and the seed alone.
    """
    return dataset.drawer(task).draw(count, random.Random(seed))


def with_shown(dataset: Dataset, examples: Sequence[Example], template: int, shown: Sequence[Example]) -> list[Example]:
    """Return ``examples`` rendered by ``template``, each behind ``shown``, or what it has, rendered by the same."""
    answered = tuple(dataset.rendered(row, template) for row in shown)
    rendered = [dataset.rendered(example, template) for example in examples]
    return [dataclasses.replace(row, shown=answered) for row in rendered] if answered else rendered


def check_room(dataset: Dataset, renderer: Renderer, count: int, seed: int, room: int) -> None:
    """Find rows that do not fit behind the shown ones.

    Args:
        dataset: with all splits open.
        renderer: shortens nothing.
        count: rows shown.
        seed: draws them.
        room: tokens that the model has places for, answers aside.

    Raises:
        DataError: a row of validation or test is too long.
    """
    for task in dataset.tasks:
        shown = draw_shown(dataset, task, count, seed)
        asked = [dataset.examples(split, task) for split in (Split.VALIDATION, Split.TEST)]
        for template in range(dataset.phrasings(task)):
            too_long = sum(
                len(item.ids) > room
                for rows in asked
                for start in range(0, len(rows), _ROWS_AT_ONCE)
                for item in renderer.encode_many(
                    with_shown(dataset, rows[start : start + _ROWS_AT_ONCE], template, shown), dataset
                )
            )
            if too_long:
                raise DataError(
                    f"spec.evaluation.baselines.fewShot ({count}): with {len(shown)} rows shown before them, "
                    f"{too_long} of {sum(map(len, asked))} rows of task {task!r} do not fit into the {room:,} tokens "
                    f"that the model has for a prompt. Lower it, or leave it out."
                )
