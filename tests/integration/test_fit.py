"""What does not fit the base model ends the check stage; what fits by a hair runs to its end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GPT2Config, PretrainedConfig

from finetune_api.job import load_job
from finetune_api.report import Progress
from finetune_api.resolve import resolve
from finetune_trainer import stages
from finetune_trainer.errors import FineTuneError, SpecError
from finetune_trainer.generation import generate

from .conftest import make_tokenizer
from .jobs import tiny_document, tiny_job


class Heard:
    """Keeps every message."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def report(self, progress: Progress) -> None:
        self.messages.append(progress.message)


@pytest.fixture(scope="module")
def short_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT-2 with 96 learnt positions: one more is an index error."""
    folder = tmp_path_factory.mktemp("short-model")
    tokenizer = make_tokenizer(None)
    config = GPT2Config(
        n_positions=96, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(17)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(model: Path, folder: Path, **changes: Any) -> Heard:
    document = tiny_document(model, folder, **changes)
    if changes.get("data__maxLength", 0) is None:
        del document["spec"]["data"]["maxLength"]
    heard = Heard()
    stages.run(resolve(load_job(json.dumps(document), str(folder / "job.yaml"))), folder / "workspace", heard)
    return heard


@pytest.mark.parametrize("method", ["lora", "promptTuning"])
def test_a_model_with_few_places_is_tuned_and_asked_within_them(short_model_dir: Path, tmp_path: Path, method: str):
    # Rows of 60 to 95 tokens; answers of 64 would run past the 96 places.
    heard = run(
        short_model_dir,
        tmp_path,
        data__maxLength=None,
        method={"type": method},
        training={"maxSteps": 2, "globalBatchSize": 8},
        evaluation__metrics=["exact_match"],
        evaluation__generation={"maxNewTokens": 64},
    )
    assert any("the model has places for 96" in message for message in heard.messages)


def test_a_row_that_is_written_too_long_ends_the_check(short_model_dir: Path, tmp_path: Path):
    with pytest.raises(SpecError, match=r"spec\.data\.maxLength \(256\): the model has places for 96 tokens"):
        run(short_model_dir, tmp_path)


def test_an_answer_cut_short_by_the_places_does_not_shorten_its_neighbours(short_model_dir: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(short_model_dir), make_tokenizer(None)
    prompts = [tuple(range(10, 10 + length)) for length in (90, 40, 89)]

    def answers(chosen: list[tuple[int, ...]]) -> list[str]:
        # No token ends an answer: each is as long as it may be.
        return generate(model, tokenizer, chosen, 30, [len(tokenizer) + 1], 8, lambda done, total: None)

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


CONFIGS = {
    "falcon": FalconConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0),
    "gemma2": Gemma2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=0,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_model_with_an_attention_of_its_own_is_tuned_measured_and_published(config: PretrainedConfig, tmp_path: Path):
    tokenizer = make_tokenizer(None)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(17)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    heard = run(
        tmp_path / "model",
        tmp_path,
        training__maxSteps=4,
        output={"uri": (tmp_path / "output").as_uri(), "merge": True},
    )
    assert any(message.startswith("rows are padded, which is slower: ") for message in heard.messages)
    assert {path.parent.name for path in (tmp_path / "output").rglob("model.safetensors")} == {"merged"}


UNFIT = {
    "layers that are not there": (
        {"method": {"type": "lora", "lora": {"targets": "named", "targetNames": ["q_proj", "query"]}}},
        r"targetNames: query: no linear layers .* it has down_proj, gate_proj, k_proj",
    ),
}


@pytest.mark.parametrize("changes, words", UNFIT.values(), ids=UNFIT.keys())
def test_what_the_model_does_not_have_ends_the_check(tiny_model_dir: Path, tmp_path: Path, changes: Any, words: str):
    heard = Heard()
    with pytest.raises(FineTuneError, match=words):
        stages.run(tiny_job(tiny_model_dir, tmp_path, **changes), tmp_path / "workspace", heard)
    assert not any("tokenising" in message for message in heard.messages), "found before that"


def test_a_layer_may_be_named_with_a_part_of_its_path(tiny_model_dir: Path, tmp_path: Path):
    lora = {"targets": "named", "targetNames": ["self_attn.q_proj"]}
    job = tiny_job(tiny_model_dir, tmp_path, method={"type": "lora", "lora": lora}, training__maxSteps=4)
    assert stages.run(job, tmp_path / "workspace", Heard()).training.trainable_parameters > 0
