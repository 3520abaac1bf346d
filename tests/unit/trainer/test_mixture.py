"""Mixtures: shares as the strategies say, counts exact, no row before its turn."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as some

from finetune_api.spec import Mixing, MixingSpec
from finetune_trainer.mixture import TaskRows, draw_rows, epoch_counts, task_shares


def tasks(*sizes: int, weights: tuple[float, ...] = ()) -> list[TaskRows]:
    start = 0
    made = []
    for number, size in enumerate(sizes):
        weight = weights[number] if weights else 1.0
        made.append(TaskRows(f"t{number}", range(start, start + size), weight))
        start += size
    return made


CASES = [
    ("proportional follows the sizes", MixingSpec(), tasks(900, 100), {"t0": 900, "t1": 100}),
    ("equal shares them evenly", MixingSpec(strategy=Mixing.EQUAL), tasks(900, 100), {"t0": 500, "t1": 500}),
    (
        "temperature 2 goes by square roots",
        MixingSpec(strategy=Mixing.TEMPERATURE, temperature=2.0),
        tasks(900, 100),
        {"t0": 750, "t1": 250},
    ),
    (
        "weights are what was asked for",
        MixingSpec(strategy=Mixing.WEIGHTS),
        tasks(900, 100, weights=(1.0, 3.0)),
        {"t0": 250, "t1": 750},
    ),
    (
        "a cap bounds a huge task",
        MixingSpec(max_examples_per_task=100),
        tasks(900, 100),
        {"t0": 100, "t1": 100},
    ),
]


@pytest.mark.parametrize(("sentence", "mixing", "given_tasks", "counts"), CASES, ids=[case[0] for case in CASES])
def test_mixture(sentence: str, mixing: MixingSpec, given_tasks: list[TaskRows], counts: dict[str, int]) -> None:
    assert epoch_counts(given_tasks, mixing) == counts
    drawn = list(islice(draw_rows(given_tasks, mixing, seed=3), 2 * sum(counts.values())))
    owner = {row: task.name for task in given_tasks for row in task.rows}
    assert Counter(owner[row] for row in drawn) == {name: 2 * count for name, count in counts.items()}


@given(
    some.lists(some.integers(1, 60), min_size=1, max_size=5),
    some.sampled_from([Mixing.PROPORTIONAL, Mixing.EQUAL, Mixing.TEMPERATURE]),
    some.integers(1, 3),
)
def test_no_row_is_seen_twice_more_than_another_of_its_task(sizes: list[int], strategy: Mixing, epochs: int) -> None:
    mixing = MixingSpec(strategy=strategy, temperature=2.0 if strategy is Mixing.TEMPERATURE else None)
    drawn = Counter(islice(draw_rows(tasks(*sizes), mixing, seed=1), epochs * sum(sizes)))
    for task in tasks(*sizes):
        seen = [drawn[row] for row in task.rows]
        assert max(seen) - min(seen) <= 1
    assert sum(drawn.values()) == epochs * sum(sizes)
    assert sum(task_shares(tasks(*sizes), mixing).values()) == pytest.approx(1)


def test_a_proportional_epoch_is_every_row_once() -> None:
    assert sorted(islice(draw_rows(tasks(7, 5), MixingSpec(), seed=9), 12)) == list(range(12))


def test_equal_seeds_give_equal_orders_and_others_do_not() -> None:
    first, again, other = (list(islice(draw_rows(tasks(50, 20), MixingSpec(), seed), 70)) for seed in (1, 1, 2))
    assert first == again != other
