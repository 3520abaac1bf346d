"""What was loaded is left alone by the collector, which works again behind it, and by the end of the process."""

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


ENDS = """
import atexit, sys, threading, time
from finetune_trainer.garbage import exit_at_once

class Large:
    def __del__(self):
        print("taken apart")

def finish():
    time.sleep(0.2)
    print("a thread ended")

large = Large()
atexit.register(print, "what waited for the end was called")
threading.Thread(target=finish).start()
sys.stdout.write("begun\\n")
exit_at_once(75)
"""


def test_a_process_that_ends_at_once_ends_its_threads_and_says_all_that_it_had_to_say() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "")
    assert done.stdout.splitlines() == ["begun", "a thread ended", "what waited for the end was called"]
