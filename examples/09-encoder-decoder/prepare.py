"""Make a T5 of 1.5 M random parameters, with the tokenizer of example 02.

    python prepare.py

Writes ``prepared/model/`` beside this file; what is there already is kept.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "prepared" / "model"
PIECES = HERE.parent / "02-full-tiny" / "prepared" / "model"
SEED = 17


def main() -> int:
    """Prepare the model; 0 when it is there."""
    if TARGET.exists():
        print("model: prepared/model is there")
        return 0
    made = subprocess.run([sys.executable, PIECES.parents[1] / "prepare.py"], check=False)
    if made.returncode != 0:
        return made.returncode
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix=".partial-") as scratch:
        result = Path(scratch, TARGET.name)
        write_model(PIECES, result)
        try:
            result.replace(TARGET)
        except OSError:
            # Another process was faster, and has made the same.
            if not TARGET.exists():
                raise
    print("model: done")
    return 0


def write_model(pieces: Path, folder: Path) -> None:
    """Write a random model for the tokenizer in ``pieces``, and that tokenizer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, imported on the way, else warns that it finds no GPU
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(pieces)
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.decoder_start_token_id = tokenizer.pad_token_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
