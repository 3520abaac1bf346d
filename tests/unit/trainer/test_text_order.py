"""Sorting on the disk: what Python's own sort gives, whatever the pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer import text_order
from finetune_trainer.records import ListRecords
from finetune_trainer.text_order import order_texts


@given(st.lists(st.text(st.characters(), max_size=4)), st.sampled_from([1, 8, 1 << 20]))
def test_texts_are_sorted_and_equal_ones_stand_once(texts, piece_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_order, "_PIECE_BYTES", piece_bytes)
        order = order_texts(texts, ListRecords())
    assert list(order.distinct) == sorted(set(texts))
    assert [order.distinct[rank] for rank in order.ranks] == texts
