"""Rows shown answered before a question: the base model may learn a task from its prompt alone.

They are training rows, rendered as the question is: earlier turns of a chat, or text above it.
"""

import dataclasses
import random
from array import array
from collections.abc import Sequence

import numpy as np

from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError
from finetune_trainer.example import Example
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split

_ROWS_AT_ONCE = 1024


def draw_shown(dataset: Dataset, task: str, count: int, seed: int) -> list[Example]:
    """Return ``count`` training rows of a task, or all there are; of a closed set every label as often as can be.

    Which ones depends on the rows and the seed alone.
    """
    rows = dataset.examples(Split.TRAIN, task)
    generator = random.Random(seed)
    order = array("q", range(len(rows)))
    generator.shuffle(order)
    if not dataset.labels(task):
        return [rows[place] for place in order[:count]]
    met: dict[str, int] = {}
    ranks = array("q")
    for place in order:
        answer = rows[place].completion.strip()
        ranks.append(met.get(answer, 0))
        met[answer] = ranks[-1] + 1
    # The first of every label, then the second of every label: a stable sort keeps the shuffled order in each round.
    in_rounds = [rows[order[number]] for number in np.argsort(ranks, kind="stable")[:count]]
    # Neighbours of one label would teach that labels come in runs.
    generator.shuffle(in_rounds)
    return in_rounds


def with_shown(dataset: Dataset, examples: Sequence[Example], template: int, shown: Sequence[Example]) -> list[Example]:
    """Return ``examples`` rendered by ``template``, each behind ``shown`` rendered by the same."""
    answered = [dataset.rendered(row, template) for row in shown]
    pairs = tuple((row.prompt, row.completion) for row in answered)
    return [dataclasses.replace(dataset.rendered(example, template), shown=pairs) for example in examples]


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
