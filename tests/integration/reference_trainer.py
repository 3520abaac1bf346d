"""Training as transformers alone does it: what ours is held against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

ROUNDING = 2e-4
"""Of a loss: transformers rounds what it logs to four digits."""


def reference_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    steps: int,
    max_grad_norm: float,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Return the loss of each of ``steps`` steps over all ``rows``, with a weight decay of 0.01."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows),
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=max_grad_norm,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < curve[0] - 0.1, "nothing was learnt"
    return curve
