"""Which rows a model is asked while it learns."""

import pytest

from finetune_trainer.example import Encoded
from finetune_trainer.sample_answers import MOST_QUESTIONS, choose_questions


def rows(count: int) -> list[Encoded]:
    return [Encoded((number,), 0) for number in range(count)]


@pytest.mark.parametrize(
    "sizes, asked",
    [
        ({"a": 100}, [("a", 0), ("a", 25), ("a", 50), ("a", 75)]),
        ({"a": 100, "b": 10}, [("a", 0), ("a", 50), ("b", 0), ("b", 5)]),
        ({"a": 1}, [("a", 0)]),
        ({"a": 0, "b": 3}, [("b", 0), ("b", 1)]),
        ({}, []),
        ({str(number): 9 for number in range(MOST_QUESTIONS + 3)}, [(str(n), 0) for n in range(MOST_QUESTIONS)]),
    ],
    ids=["one task", "two tasks", "one row", "a task without rows", "nothing kept back", "more tasks than questions"],
)
def test_questions_come_from_all_over_every_task(sizes, asked):
    chosen = choose_questions({task: rows(count) for task, count in sizes.items()})
    assert [(task, item.ids[0]) for task, item in chosen] == asked
