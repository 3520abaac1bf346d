"""What Python need not tidy up: large libraries, neither while they are loaded nor when the process ends."""

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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


def exit_at_once(code: int) -> NoReturn:
    """End the process once threads have ended, what waits for the end was called, and all that was said is written.

    What else `sys.exit` does, taking thousands of modules apart, takes up to two seconds behind torch, for which a pod
    keeps its GPU. Processes of `multiprocessing` end in the same way.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
