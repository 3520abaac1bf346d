"""What Python's garbage collector need not look at."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_for_good() -> Iterator[None]:
    """Let the collector neither run inside nor ever look at what is there at the end: for imports of large libraries.

    While torch and transformers are imported it else takes a fifth of the time, and finds nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Libraries that look at the end for what was never given back would find all of this, and print it.
        atexit.register(gc.unfreeze)
        gc.enable()
