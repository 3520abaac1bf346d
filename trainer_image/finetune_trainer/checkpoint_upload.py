"""Copies sealed checkpoints to the output store in the background; training never waits for it.

One at a time: what is sealed while another one is on its way is not uploaded at all. So all nodes of a run can agree on
which ones they store, each its part of them: were every node to choose by itself, few would be stored by all.
"""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from finetune_trainer.checkpoint import step_of
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import FineTuneError

logger = logging.getLogger(__name__)

Push = Callable[[Path, int], None]
"""Stores the checkpoint in a folder, taken behind a step; raises FineTuneError."""


class CheckpointUpload:
    """While entered, uploads what it is given. Left by an error, such as a stop request, it finishes the last one.

    Left without an error, training has ended and its result is what counts: nothing more is uploaded.
    """

    def __init__(self, folder: Path, push: Push) -> None:
        self._folder = folder
        self._push = push
        self._pool = ThreadPoolExecutor(1, "checkpoint-upload")
        self._uploads: list[Future[None]] = []

    def __enter__(self) -> "CheckpointUpload":
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    @property
    def is_busy(self) -> bool:
        """Whether one is still on its way."""
        return any(not upload.done() for upload in self._uploads[-1:])

    def submit(self, checkpoint: Path) -> None:
        """Upload a sealed checkpoint, behind the one that is on its way; it may be removed as soon as this returns."""
        copy = self._folder / checkpoint.name
        with disk_errors("create", copy):
            # Links cost nothing, and the trainer removes old checkpoints while this one is still being read.
            shutil.copytree(checkpoint, copy, copy_function=os.link, dirs_exist_ok=True)
        self._uploads.append(self._pool.submit(self._upload, copy))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is None)
        shutil.rmtree(self._folder, ignore_errors=True)
        defects = [defect for one in self._uploads if not one.cancelled() and (defect := one.exception())]
        if defects and error is None:
            raise defects[0]
        for defect in defects:
            # What ended training matters more.
            logger.error("uploading a checkpoint failed", exc_info=defect)

    def _upload(self, copy: Path) -> None:
        try:
            self._push(copy, step_of(copy))
        except FineTuneError as error:
            # The next checkpoint is tried again; older ones are still there.
            logger.warning("checkpoint not uploaded step=%s reason=%s", step_of(copy), error)
        else:
            logger.info("checkpoint uploaded step=%s", step_of(copy))
        finally:
            shutil.rmtree(copy, ignore_errors=True)
