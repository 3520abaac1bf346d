"""Make a Llama of 2.4 M random parameters and a tokenizer of 4096 pieces learnt from the demo's reviews.

    python prepare.py

Writes ``prepared/model/`` beside this file; what is there already is kept. The reviews come from example 01.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
TARGET = HERE / "prepared" / "model"
REVIEWS = HERE.parent / "01-sentiment-lora" / "prepared" / "reviews.jsonl"
VOCABULARY = 4096
END = "<|end|>"
SEED = 17


def main() -> int:
    """Prepare the model; 0 when it is there."""
    if TARGET.exists():
        print("model: prepared/model is there")
        return 0
    fetched = subprocess.run([sys.executable, REVIEWS.parents[1] / "prepare.py", "reviews"], check=False)
    if fetched.returncode != 0:
        return fetched.returncode
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix=".partial-") as scratch:
        result = Path(scratch, TARGET.name)
        write_model(review_texts(REVIEWS), result)
        try:
            result.replace(TARGET)
        except OSError:
            # Another process was faster, and has made the same.
            if not TARGET.exists():
                raise
    print("model: done")
    return 0


def review_texts(rows: Path) -> list[str]:
    """Return the sentences and, so that they get pieces of their own, the words that the job's template adds."""
    with rows.open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    return [f"{entry['review_body']}\nSentiment: {entry['label']}" for entry in entries]


def write_model(texts: Iterable[str], folder: Path) -> None:
    """Write a random model and the tokenizer that ``texts`` give; equal texts, equal files."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, imported on the way, else warns that it finds no GPU
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learn_pieces(texts), eos_token=END, pad_token=END)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learn_pieces(texts: Iterable[str]) -> "Tokenizer":
    """Learn byte-level pieces (BPE), so that any text can be written with them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return pieces


if __name__ == "__main__":
    raise SystemExit(main())
