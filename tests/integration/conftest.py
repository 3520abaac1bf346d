"""Integration level of the trainer: real torch, transformers and PEFT on a tiny random Llama; no network, CPU, seconds.

Inputs: nothing from outside. The model (random weights, fixed seed) and its tokenizer (byte-level BPE trained on the
sentences below) are made once per session. Outputs: folders under pytest's temporary directory.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from .s3_server import S3Server, serve_s3

# Ray's workers give way to every other process, by a niceness of 15: beside other tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

SENTENCES = (
    "This film is a wonderful surprise, the best I have seen this year.",
    "The plot is dull, the acting is worse and I want my money back.",
    "Great phone, the battery lasts for two days and the sound is clear.",
    "It broke after a week. Do not buy this product, it is a waste of money.",
    "The food was fresh, the service friendly and we will come back soon.",
    "We waited an hour for cold soup and nobody said sorry.",
    "Classify this review as positive or negative.",
    "Sentiment: positive",
    "Sentiment: negative",
    "Summarize the text below in one sentence.",
    "Question: what is the capital of France? Answer: Paris.",
    "system user assistant",
)
"""What the tokenizer learns its merges from; any other text still encodes, byte by byte."""

VOCABULARY_SIZE = 512
CONTEXT_LENGTH = 512

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; with a chat template its end token is ``<|im_end|>``, also used as padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    end_token = "<|im_end|>" if chat_template else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end_token,
        # Padding equals the end token, as in SmolLM2: whoever masks by pad id never learns to stop.
        pad_token=end_token,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_tiny_model(folder: Path, chat_template: str | None = None, **sizes: int) -> Path:
    """Write a random two-layer Llama (0.1 M parameters, fp32, tied embeddings) with its tokenizer to ``folder``.

    ``sizes`` of its config make it a larger one.
    """
    tokenizer = make_tokenizer(chat_template)
    return save_random_model(
        folder, LlamaForCausalLM, LlamaConfig, tokenizer, **(TINY | sizes), tie_word_embeddings=True
    )


def save_random_model(
    folder: Path,
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    tokenizer: PreTrainedTokenizerFast,
    **sizes: int,
) -> Path:
    """Write a random causal language model with its tokenizer to ``folder``."""
    config = config_class(
        vocab_size=len(tokenizer),
        **sizes,
        max_position_embeddings=CONTEXT_LENGTH,
        # Wider than the usual 0.02: the logits of a tiny random model are otherwise nearly flat and tests see nothing.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_sentencepiece_tokenizer() -> T5Tokenizer:
    """Return a tokenizer as T5 has it: pieces that begin with their space, and an end token behind every text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0)


def save_tiny_encoder_decoder(
    folder: Path, *, like_flan: bool = False, dropout: float = 0.1, head_width: int = 8
) -> Path:
    """Write a random T5 with its tokenizer to ``folder``: more encoder than decoder layers, narrow attention.

    Like the first T5 its output layer is its embedding; like FLAN-T5 it has one of its own, and gates.
    """
    tokenizer = make_sentencepiece_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=head_width,
        d_ff=128,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu" if like_flan else "relu",
        tie_word_embeddings=not like_flan,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model = T5ForConditionalGeneration(config)
        if like_flan:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 8)
    model.save_pretrained(folder)
    if like_flan:
        # As the files on the hub say it, to which transformers 5 adds a name of its own.
        path = folder / "config.json"
        saved = json.loads(path.read_text()) | {"tie_word_embeddings": False}
        del saved["scale_decoder_outputs"]
        path.write_text(json.dumps(saved))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model with encoder and decoder, like the first T5. Read only."""
    return save_tiny_encoder_decoder(tmp_path_factory.mktemp("tiny-encoder-decoder"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model without chat template. Read only: copy it before changing it."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same model as an instruct model: ChatML template, ends turns with ``<|im_end|>``. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-chat-model"), CHATML)


@pytest.fixture(scope="session")
def biased_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT-2: layers with bias terms, weights that lie transposed. Read only."""
    folder = tmp_path_factory.mktemp("biased-model")
    tokenizer = make_tokenizer(None)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT_LENGTH,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that no test stops."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server
