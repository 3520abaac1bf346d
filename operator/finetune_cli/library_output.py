"""Keep what libraries print, log and warn out of the display and in a log file. Used by commands that load models."""

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from finetune_trainer.durable import disk_errors

LOG_FILE = "log.txt"

_ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers looks at it too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # Tokenisers warn about every fork that comes after their threads.
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train announces its next version on every start otherwise.
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@contextlib.contextmanager
def diverted_to(folder: Path) -> Iterator[None]:
    """Within the block, whatever is printed, logged or warned goes to ``log.txt`` in ``folder``.

    Must be entered before the libraries are imported: some read these variables, and keep sys.stderr, at import.

    Raises:
        StorageError: the log cannot be written.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with disk_errors("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
        # By line: what was said before a crash is in the file.
        file = (folder / LOG_FILE).open("a", encoding="utf-8", errors="replace", buffering=1)
    # Not at the end of the block: libraries that kept sys.stderr write to it until the process ends.
    atexit.register(file.close)
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), _logging_to(file):
        yield


@contextlib.contextmanager
def _logging_to(file: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("finetune_trainer")
    level_before = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level_before)
