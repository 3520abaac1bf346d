"""What becomes of a checkpoint when its files are written: declared complete, uploaded or not, older ones removed."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.checkpoint import discard_old, seal
from finetune_trainer.training_input import TrainingInput

logger = logging.getLogger(__name__)


class Sealing(TrainerCallback):
    """Seals every checkpoint that the trainer writes, once all processes have written their parts."""

    def __init__(self, given: TrainingInput) -> None:
        self._group = given.group
        self._upload = given.upload
        self._keep = given.job.spec.checkpoint.keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal it, on every node; upload it, if every node has stored its part of the one before."""
        # All have written when all have answered: those of one node write into one folder.
        is_busy = self._group.any(self._upload is not None and self._upload.is_busy)
        if not self._group.is_first_of_node:
            return
        folder = Path(str(args.output_dir))
        checkpoint = seal(folder, state.global_step)
        # The one that is made to stop is what the next attempt goes on from, however long the others take.
        if self._upload is not None and (control.should_training_stop or not is_busy):
            self._upload.submit(checkpoint)
        elif self._upload is not None:
            logger.info("checkpoint not uploaded step=%s reason=the one before is on its way", state.global_step)
        discard_old(folder, self._keep)
