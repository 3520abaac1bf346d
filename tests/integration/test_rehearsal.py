"""The whole pipeline in small, before anything is paid for: for every method, with no trace left."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)

from finetune_api.job import FineTuneJob
from finetune_api.report import DataReport, ExitCode, Progress, Stage
from finetune_api.spec import MethodType
from finetune_trainer import check_stage, publish_stage, small_model, stages
from finetune_trainer.check_stage import REHEARSED_PARAMETERS
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import Preempted, SpecError, StorageError
from finetune_trainer.model import ModelFiles
from finetune_trainer.rehearsal import STEPS, small_dataset
from finetune_trainer.run import output_prefix
from finetune_trainer.small_model import make_small
from finetune_trainer.split import Split

from .conftest import save_tiny_model
from .jobs import tiny_job


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that is large enough to be rehearsed for."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("larger-model"),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    assert LlamaForCausalLM.from_pretrained(folder).num_parameters() > REHEARSED_PARAMETERS
    return folder


class Listener:
    """Keeps what it is told; at a message, asks for a stop as the kubelet does."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.messages: list[str] = []
        self._stop_at = stop_at

    def report(self, progress: Progress) -> None:
        assert progress.stage is Stage.CHECK
        self.messages.append(progress.message)
        if self._stop_at is not None and re.search(self._stop_at, progress.message):
            self._stop_at = None
            os.kill(os.getpid(), signal.SIGTERM)


METHODS = [
    pytest.param({"method": {"type": "full"}}, id="full"),
    pytest.param({"method": {"type": "lora"}, "output__merge": True}, id="lora, merged as well"),
    pytest.param({"method": {"type": "promptTuning"}}, id="promptTuning"),
    pytest.param({"method": {"type": "prefixTuning"}}, id="prefixTuning"),
    pytest.param({"method": {"type": "ia3"}}, id="ia3"),
    pytest.param({"method": {"type": "adapter"}}, id="adapter"),
    pytest.param(
        {"method": {"type": "selective", "selective": {"train": "patterns", "patterns": ["layers\\.7\\.mlp"]}}},
        id="selective, a layer that a smaller model would lack",
    ),
    pytest.param({"method": {"type": "lora"}, "compute": {"workers": 2, "gpusPerWorker": 0}}, id="on several workers"),
    pytest.param({"evaluation__baselines": {"fewShot": 8}, "evaluation__metrics": ["rouge", "bleu"]}, id="few-shot"),
]


@pytest.mark.parametrize("changes", METHODS)
def test_every_method_is_rehearsed_and_leaves_nothing(model_dir: Path, tmp_path: Path, changes: dict[str, object]):
    job = tiny_job(model_dir, tmp_path, **changes)
    is_cached = job.spec.method.type is MethodType.PREFIX_TUNING
    assert_rehearsed(
        job, tmp_path, "padded: a prefix is a cache" if is_cached else "packed: packed examples stay apart"
    )


@pytest.mark.parametrize("kind", ["full", "lora", "promptTuning", "prefixTuning", "ia3"])
def test_an_encoder_decoder_is_rehearsed(
    tiny_encoder_decoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(check_stage, "REHEARSED_PARAMETERS", 0)
    changes = {"model__task": "seq2seq-lm", "method": {"type": kind}, "evaluation__metrics": ["accuracy", "rouge"]}
    if kind == "lora":
        changes["output__merge"] = True
    assert_rehearsed(
        tiny_job(tiny_encoder_decoder_dir, tmp_path, **changes), tmp_path, "padded: every layer of an encoder"
    )


def assert_rehearsed(job: FineTuneJob, tmp_path: Path, layout: str) -> None:
    listener = Listener()
    report = stages.check(job, tmp_path / "workspace", listener)
    assert report.rehearsal is not None
    assert (report.rehearsal.steps, report.rehearsal.why_not) == (STEPS, "")
    assert report.layout.startswith(layout)
    said = "\n".join(listener.messages)
    assert "rehearsing: resuming at step 1" in said
    assert "rehearsing: holding model, loaded afresh, against the evaluated model" in said
    assert f"publishing report to {job.spec.output.uri}/{output_prefix(job)}/rehearsal/" in said
    assert ("holding merged" in said) is job.spec.output.merge
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert not (tmp_path / "workspace" / "rehearsal").exists()


def test_a_run_that_was_rehearsed_is_not_rehearsed_again(model_dir: Path, tmp_path: Path):
    job = tiny_job(model_dir, tmp_path)
    first = stages.check(job, tmp_path / "workspace", Listener())
    again = Listener()
    assert stages.check(job, tmp_path / "workspace", again) == first
    assert not [message for message in again.messages if "rehears" in message]


@pytest.mark.parametrize("preflight", ["skip", "warn"])
def test_who_skips_the_preflight_skips_the_rehearsal(model_dir: Path, tmp_path: Path, preflight: str):
    job = tiny_job(model_dir, tmp_path, runPolicy__preflight=preflight)
    report = stages.check(job, tmp_path / "workspace", Listener())
    assert (report.rehearsal is None) is (preflight == "skip")


def test_a_tiny_model_is_its_own_rehearsal(tiny_model_dir: Path, tmp_path: Path):
    report = stages.check(tiny_job(tiny_model_dir, tmp_path), tmp_path / "workspace", Listener())
    assert report.rehearsal is None
    assert report.layout.startswith("packed: packed examples stay apart (relative logit error ")


def test_what_would_fail_when_the_model_is_published_fails_in_the_check(model_dir: Path, tmp_path: Path):
    job = tiny_job(model_dir, tmp_path)
    blocked = tmp_path / "output" / output_prefix(job)
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="Not a directory"):
        stages.check(job, tmp_path / "workspace", Listener())
    assert blocked.is_file()
    assert not (tmp_path / "workspace" / "rehearsal").exists()


def test_an_error_of_any_stage_keeps_its_words_and_its_exit_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **options: object) -> None:
        raise SpecError("the licence forbids it")

    monkeypatch.setattr(publish_stage, "export_model", refuse)
    result = stages.run_one(Stage.CHECK, tiny_job(model_dir, tmp_path), tmp_path / "workspace", Listener())
    assert result.exit_code is ExitCode.BAD_SPEC
    assert result.message == "in the rehearsal: the licence forbids it"
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]


@pytest.mark.parametrize("moment", ["rehearsing: training", "rehearsing: loading the models"])
def test_a_stop_ends_the_rehearsal_and_leaves_nothing(model_dir: Path, tmp_path: Path, moment: str):
    job = tiny_job(model_dir, tmp_path)
    with pytest.raises(Preempted, match="stopped in the check stage, which starts again"):
        stages.check(job, tmp_path / "workspace", Listener(stop_at=moment))
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert not (tmp_path / "workspace" / "rehearsal").exists()


def test_no_row_of_validation_or_test_is_used(model_dir: Path, tmp_path: Path):
    whole = load_dataset(tiny_job(model_dir, tmp_path).spec.data)
    small = small_dataset(whole)
    train = {example.row for example in whole.examples(Split.TRAIN)}
    for split in Split:
        rows = small.examples(split)
        assert {example.row for example in rows} <= train
        assert {example.completion for example in rows} == {" negative", " positive"}


def test_a_few_of_the_replayed_rows_are_enough(model_dir: Path, tmp_path: Path):
    general = [{"prompt": f"Say {number}:", "completion": f" {number}"} for number in range(60)]
    (tmp_path / "general.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in general))
    replay = {"source": (tmp_path / "general.jsonl").as_uri(), "fraction": 0.2}
    job = tiny_job(model_dir, tmp_path, data__replay=replay)
    whole = load_dataset(job.spec.data)
    small = small_dataset(whole)
    assert 0 < len(small.replay()) <= 8 < len(whole.replay())
    report = stages.check(job, tmp_path / "workspace", Listener())
    assert report.rehearsal is not None and report.rehearsal.steps == STEPS


# --- tiny models of many architectures

COMMON = {"vocab_size": 600, "bos_token_id": 0, "eos_token_id": 1}
ARCHITECTURES = [
    LlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=6, **COMMON),
    Qwen3Config(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=6, **COMMON),
    Gemma2Config(hidden_size=256, num_attention_heads=4, head_dim=32, num_hidden_layers=6, **COMMON),
    MixtralConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=6, intermediate_size=512, **COMMON),
    PhiConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=6, intermediate_size=512, **COMMON),
    GPT2Config(n_embd=256, n_head=8, n_layer=6, **COMMON),
    GPTNeoXConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=6, intermediate_size=512, **COMMON),
    OPTConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=6, word_embed_proj_dim=256, **COMMON),
    BloomConfig(hidden_size=256, n_head=8, n_layer=6, **COMMON),
    FalconConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=6, **COMMON),
]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_a_tiny_model_has_the_layers_of_its_architecture(config: PretrainedConfig, model_dir: Path, tmp_path: Path):
    big = tmp_path / "big"
    config.save_pretrained(big)
    (big / "tokenizer_config.json").write_text((model_dir / "tokenizer_config.json").read_text())
    assert make_small(ModelFiles(big, "x"), tmp_path / "small") == ""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(big))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() < whole.num_parameters()

    def layers(model: torch.nn.Module) -> set[str]:
        return {re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()}

    assert layers(small) == layers(whole)
    assert (tmp_path / "small" / "tokenizer_config.json").is_file()


def test_an_architecture_that_cannot_be_made_small_is_said_and_stops_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **options: object) -> None:
        raise ValueError("sizes must divide\nhere is more")

    monkeypatch.setattr(small_model, "small_config", refuse)
    listener = Listener()
    report: DataReport = stages.check(tiny_job(model_dir, tmp_path), tmp_path / "workspace", listener)
    assert report.rehearsal is not None
    assert report.rehearsal.why_not == "no tiny llama can be built (ValueError: sizes must divide)"
    assert "note: not rehearsed: no tiny llama can be built (ValueError: sizes must divide)" in listener.messages
