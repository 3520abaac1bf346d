"""The collector leaves alone what was loaded, and works again behind it."""

import gc

import pytest

from finetune_trainer.garbage import kept_for_good


@pytest.mark.parametrize("error", [None, ImportError("no torch")])
def test_what_was_made_inside_is_not_looked_at_again(error: ImportError | None) -> None:
    before = gc.get_freeze_count()
    try:
        with kept_for_good():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]  # type: ignore[var-annotated]
            if error:
                raise error
    except ImportError as caught:
        assert caught is error
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)
    gc.unfreeze()
