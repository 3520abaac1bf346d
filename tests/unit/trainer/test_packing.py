"""A pack holds every sequence whole, and every common beginning once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.packing import Pack, pack

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=12)


def unpacked(packed: Pack) -> list[list[int]]:
    return [packed.tokens[place].tolist() for place in packed.places]


@given(sequences)
def test_every_sequence_can_be_read_back_with_its_positions(given_sequences: list[list[int]]):
    packed = pack(given_sequences)
    assert unpacked(packed) == given_sequences
    for place in packed.places:
        assert packed.positions[place].tolist() == list(range(len(place)))


@given(sequences)
def test_common_beginnings_stand_once(given_sequences: list[list[int]]):
    beginnings = {tuple(sequence[:end]) for sequence in given_sequences for end in range(1, len(sequence) + 1)}
    assert len(pack(given_sequences).tokens) == len(beginnings)


@given(sequences)
def test_scatter_finds_every_token_of_the_row_in_the_gathered_rows(given_sequences: list[list[int]]):
    packed = pack(given_sequences)
    assert packed.tokens[packed.gather().flatten()][packed.scatter()].tolist() == packed.tokens.tolist()


@given(sequences)
def test_attention_runs_over_no_sequence_that_another_goes_on_from(given_sequences: list[list[int]]):
    distinct = {tuple(sequence) for sequence in given_sequences}
    ends = {one for one in distinct if not any(other[: len(one)] == one for other in distinct - {one})}
    packed = pack(given_sequences)
    assert {tuple(packed.tokens[branch].tolist()) for branch in packed.branches} == ends
    assert len(packed.branches) == len(ends)


def test_sequences_that_share_nothing_stand_side_by_side():
    packed = pack([[1, 2], [3]])
    assert packed.tokens.tolist() == [1, 2, 3]
    assert packed.positions.tolist() == [0, 1, 0]


@pytest.mark.parametrize("nothing", [[], [[]], [[1], []]], ids=["no sequence", "an empty one", "one of two empty"])
def test_there_must_be_something_to_pack(nothing: list[list[int]]):
    with pytest.raises(ValueError, match="at least one"):
        pack(nothing)
