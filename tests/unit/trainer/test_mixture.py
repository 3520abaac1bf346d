"""Mixtures: shares as the strategies say, counts exact, no row before its turn."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from finetune_api.spec import Mixing, MixingSpec
from finetune_trainer.mixture import EpochRows, Mixture, TaskRows, plan_mixture, task_shares


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


def seen(mixture: Mixture, epochs: int) -> list[int]:
    return [row for number in range(epochs) for row in mixture.epoch(number)]


@pytest.mark.parametrize(("sentence", "mixing", "given_tasks", "counts"), CASES, ids=[case[0] for case in CASES])
def test_mixture(sentence: str, mixing: MixingSpec, given_tasks: list[TaskRows], counts: dict[str, int]) -> None:
    mixture = plan_mixture(given_tasks, mixing, seed=3)
    assert mixture.counts == counts
    owner = {row: task.name for task in given_tasks for row in task.rows}
    for epochs in (1, 2):
        drawn = Counter(owner[row] for row in seen(mixture, epochs))
        assert drawn == {name: epochs * count for name, count in counts.items()}


@given(
    some.lists(some.integers(1, 60), min_size=1, max_size=5),
    some.sampled_from([Mixing.PROPORTIONAL, Mixing.EQUAL, Mixing.TEMPERATURE]),
    some.integers(1, 3),
)
def test_no_row_is_seen_twice_more_than_another_of_its_task(sizes: list[int], strategy: Mixing, epochs: int) -> None:
    mixing = MixingSpec(strategy=strategy, temperature=2.0 if strategy is Mixing.TEMPERATURE else None)
    drawn = Counter(seen(plan_mixture(tasks(*sizes), mixing, seed=1), epochs))
    for task in tasks(*sizes):
        times = [drawn[row] for row in task.rows]
        assert max(times) - min(times) <= 1
    assert sum(drawn.values()) == epochs * sum(sizes)
    assert sum(task_shares(tasks(*sizes), mixing).values()) == pytest.approx(1)


@given(some.lists(some.integers(1, 40), min_size=1, max_size=4), some.integers(0, 200))
def test_what_was_drawn_is_known_behind_every_row(sizes: list[int], count: int) -> None:
    mixture = plan_mixture(tasks(*sizes), MixingSpec(strategy=Mixing.EQUAL), seed=5)
    rows = seen(mixture, 1 + count // mixture.epoch_length)[:count]
    owner = {row: task.name for task in mixture.tasks for row in task.rows}
    counted = Counter(owner[row] for row in rows)
    assert mixture.drawn(count) == {task.name: counted[task.name] for task in mixture.tasks}


def test_a_proportional_epoch_is_every_row_once() -> None:
    mixture = plan_mixture(tasks(7, 5), MixingSpec(), seed=9)
    assert sorted(mixture.epoch(0)) == sorted(mixture.epoch(1)) == list(range(12))
    assert mixture.epoch(0) != mixture.epoch(1)
    assert mixture.epoch(1) == plan_mixture(tasks(7, 5), MixingSpec(), seed=9).epoch(1)
    assert mixture.epoch(1) != plan_mixture(tasks(7, 5), MixingSpec(), seed=8).epoch(1)


def test_replayed_rows_have_their_share_of_all_rows_seen() -> None:
    mixture = plan_mixture(tasks(60, 30), MixingSpec(), 1, replay=range(90, 95), fraction=0.1)
    assert mixture.counts == {"t0": 60, "t1": 30, "replay": 10}
    assert mixture.shares == pytest.approx({"t0": 0.6, "t1": 0.3, "replay": 0.1})
    assert Counter(row for row in mixture.epoch(0) if row >= 90) == dict.fromkeys(range(90, 95), 2)


def test_a_trainer_reads_the_rows_of_the_epoch_it_is_in() -> None:
    mixture = plan_mixture(tasks(4, 40), MixingSpec(max_examples_per_task=4), seed=2)
    rows = EpochRows([f"row {number}" for number in range(44)], mixture, "filler")
    for number in (0, 1, 5, 1):
        rows.turn_to(number)
        assert [rows[index] for index in range(len(rows))] == [f"row {place}" for place in mixture.epoch(number)]


@pytest.mark.parametrize("together, fillers", [(1, 0), (4, 0), (3, 1), (16, 8)])
def test_an_epoch_is_filled_up_to_what_all_workers_take_at_once(together: int, fillers: int) -> None:
    mixture = plan_mixture(tasks(8), MixingSpec(), seed=2)
    rows = EpochRows([f"row {number}" for number in range(8)], mixture, "filler", together)
    read = [rows[index] for index in range(len(rows))]
    assert sorted(read[:8]) == [f"row {number}" for number in range(8)]
    assert read[8:] == ["filler"] * fillers
