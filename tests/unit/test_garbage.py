"""The collector leaves alone what was loaded, and works again behind it."""

import gc
import subprocess
import sys

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


LOADS_NATIVE_TYPES = """
from finetune_trainer.garbage import kept_for_good
with kept_for_good():
    import triton._C.libtriton
"""


def test_no_library_complains_at_the_end_of_what_was_kept() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS_NATIVE_TYPES], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
