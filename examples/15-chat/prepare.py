"""Give the model of example 02 a chat template.

    python prepare.py

Writes ``prepared/model/`` beside this file; what is there already is kept.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "prepared" / "model"
BASE = HERE.parent / "02-full-tiny" / "prepared" / "model"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Ends every turn with the end token, so that each answer of a chat can be learnt to its end."""


def main() -> int:
    """Prepare the model; 0 when it is there."""
    if TARGET.exists():
        print("model: prepared/model is there")
        return 0
    made = subprocess.run([sys.executable, BASE.parents[1] / "prepare.py"], check=False)
    if made.returncode != 0:
        return made.returncode
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix=".partial-") as scratch:
        result = Path(scratch, TARGET.name)
        write_model(BASE, result)
        try:
            result.replace(TARGET)
        except OSError:
            # Another process was faster, and has made the same.
            if not TARGET.exists():
                raise
    print("model: done")
    return 0


def write_model(base: Path, folder: Path) -> None:
    """Copy the model in ``base`` and write the template into its tokenizer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, imported on the way, else warns that it finds no GPU
    from transformers import AutoTokenizer

    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
