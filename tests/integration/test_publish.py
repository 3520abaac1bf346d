"""A published folder stands for itself: loaded afresh it gives the tuned logits, and its card's snippet runs."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.job import FineTuneJob
from finetune_api.report import (
    ArtifactKind,
    DataReport,
    EvaluationReport,
    MetricComparison,
    Report,
    SplitRows,
    TrainingReport,
)
from finetune_api.resolve import resolve
from finetune_api.spec import ModelSpec
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.file_store import FileStore
from finetune_trainer.manifest import is_complete, verify_manifest, write_manifest
from finetune_trainer.model import fetch_model, load_model, load_tokenizer
from finetune_trainer.prompt_file import PromptFile
from finetune_trainer.publish import export_model, publish
from finetune_trainer.quantization import four_bit_config

TEXT = "Classify this review as positive or negative.\n\nThe soup was cold.\n\nSentiment:"
PROMPT = "Classify this review as positive or negative.\n\n{{ review_body }}\n\nSentiment:"


@dataclass
class Rendering:
    """Stands for the renderer: what publication asks of it."""

    format: Literal["raw", "chat"] = "chat"
    system: str | None = None
    max_length: int = 512
    end_token_ids: tuple[int, ...] = (2,)
    assistant_header: str = ""


def make_job(source: str) -> FineTuneJob:
    return FineTuneJob.model_validate(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "reviews"},
            "spec": {
                "model": {"source": source},
                "data": {
                    "tasks": [
                        {
                            "name": "sentiment",
                            "source": "file:///data/reviews.jsonl",
                            "templates": [{"prompt": PROMPT, "completion": " {{ label }}"}],
                            "labels": ["negative", "positive"],
                        }
                    ]
                },
                "method": {"type": "lora"},
                "output": {"uri": "file:///out"},
            },
        }
    )


def make_report(revision: str | None = "f" * 40, *, evaluated: bool = True) -> Report:
    metrics = (
        MetricComparison(
            task="sentiment", metric="accuracy", base=0.875, tuned=0.95, delta=0.075, low=0.04, high=0.11, rows=200
        ),
        MetricComparison(
            task="sentiment", metric="perplexity", base=9.5, tuned=1.25, delta=-8.25, rows=200, higher_is_better=False
        ),
    )
    return Report(
        name="reviews",
        namespace="default",
        spec_hash="ab" * 32,
        base_model="hf://acme/tiny",
        base_revision=revision,
        data=DataReport(
            rows=SplitRows(train=2400, validation=300, test=300), duplicates=49, hash="cd" * 32, format="chat"
        ),
        training=TrainingReport(
            method="lora", parameters=106_624, trainable_parameters=2048, steps=60, epochs=1.0, final_loss=0.11
        ),
        evaluation=EvaluationReport(metrics=metrics) if evaluated else None,
        seed=17,
        versions={"torch": "2.15", "peft": "0.21"},
    )


@dataclass
class Tuned:
    """A model as it leaves training, with all it was made from."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    source: Path

    def logits(self, model: nn.Module) -> torch.Tensor:
        ids = torch.tensor([self.tokenizer(TEXT).input_ids])
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.float()


def tune(folder: Path, method: str, dtype: torch.dtype = torch.float32) -> Tuned:
    """Load the tiny model and move every trainable weight away from where it started, as training would."""
    files = fetch_model(ModelSpec(source=folder.as_uri()), folder / "cache", environment={})
    tokenizer, model = load_tokenizer(files), load_model(files, dtype, "sdpa")
    torch.manual_seed(11)
    match method:
        case "lora":
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
            tuned: nn.Module = get_peft_model(model, lora)
        case "prompt tuning":
            soft = PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=5,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text="Classify the sentiment",
                tokenizer_name_or_path=str(folder),
            )
            tuned = get_peft_model(model, soft)
        case _:
            tuned = model
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tuned.train()
    model.config.use_cache = False
    tokenizer("x", padding="max_length", max_length=9, truncation=True)  # leaves its mark on the fast tokenizer
    return Tuned(tuned.eval(), tokenizer, folder)


def export(
    tuned: Tuned, folder: Path, *, hub: bool = False, merge: bool = False, rendering: Rendering | None = None
) -> Path:
    job = make_job("hf://acme/tiny" if hub else tuned.source.as_uri())
    export_model(tuned.model, tuned.tokenizer, rendering or Rendering(), job, make_report(), folder, merge=merge)
    return folder


def load_base(tuned: Tuned, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tuned.source, dtype=dtype)


# --- what was published is what was tuned


@pytest.mark.parametrize("method", ["lora", "prompt tuning"])
def test_adapter_loaded_afresh_gives_the_tuned_logits(tiny_chat_model_dir: Path, tmp_path: Path, method: str) -> None:
    tuned = tune(tiny_chat_model_dir, method)
    folder = export(tuned, tmp_path / "model")
    again = PeftModel.from_pretrained(load_base(tuned), folder)
    torch.testing.assert_close(tuned.logits(again), tuned.logits(tuned.model), rtol=0, atol=0)
    changed = (tuned.logits(tuned.model)[0, -1] - tuned.logits(load_base(tuned))[0, -1]).abs().max()
    assert changed > 0.01, "the adapter does something"


def test_full_weights_loaded_afresh_give_the_tuned_logits(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_chat_model_dir, "full")
    folder = export(tuned, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(tuned.logits(again), tuned.logits(tuned.model), rtol=0, atol=0)
    assert again.config.use_cache, "the cache that training switched off is on again"
    assert not tuned.model.config.use_cache, "the exported model itself is left as it was"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_merged_weights_give_the_adapters_logits(
    tiny_chat_model_dir: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    tuned = tune(tiny_chat_model_dir, "lora", dtype)
    folder = export(tuned, tmp_path / "merged", merge=True)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = tuned.logits(tuned.model)
    # The tolerance is that of the check on export: merging rounds each weight to the base's type once more.
    assert (tuned.logits(again) - expected).abs().max() < tolerance * expected.abs().max()
    assert again.dtype == dtype
    assert isinstance(tuned.model, PeftModel), "the tuned model itself stays unmerged"
    assert "merge check" in (folder / "README.md").read_text()
    assert verify_manifest(folder).about["kind"] == "merged"


def test_published_tokenizer_gives_the_same_tokens_and_chat_prompt(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_chat_model_dir, "lora")
    folder = export(tuned, tmp_path / "model")
    again, fresh = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_chat_model_dir)
    assert again(TEXT).input_ids == fresh(TEXT).input_ids, "no padding or truncation is left over from training"
    chat = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == fresh.apply_chat_template(chat, tokenize=False)


def test_the_card_of_a_base_in_four_bits_loads_it_as_it_was_evaluated(
    tiny_chat_model_dir: Path, tmp_path: Path
) -> None:
    tuned = tune(tiny_chat_model_dir, "lora", torch.bfloat16)
    training = make_report().training.model_copy(update={"method": "qlora"})
    report = make_report().model_copy(update={"training": training})
    job, folder = make_job(tuned.source.as_uri()), tmp_path / "model"
    export_model(tuned.model, tuned.tokenizer, Rendering(), job, report, folder)
    card = (folder / "README.md").read_text()
    assert "bfloat16, linear layers in 4 bits (nf4, double-quantised) |" in card
    assert "needs a GPU and the package bitsandbytes" in card
    # What needs a GPU is left out: the settings alone are made.
    snippet = card.partition("```python")[2].partition("```")[0]
    compile(snippet, "README.md", "exec")
    settings = re.search(r"four_bits = BitsAndBytesConfig\(.*?\n\)", snippet, re.DOTALL)
    names: dict[str, Any] = {"BitsAndBytesConfig": BitsAndBytesConfig}
    exec(settings[0] if settings else "", names)
    assert names["four_bits"].to_dict() == four_bit_config().to_dict()
    assert 'dtype="bfloat16", quantization_config=four_bits)' in snippet


# --- what is in the folder, and what must not be


@pytest.mark.parametrize("method", ["lora", "prompt tuning", "full"])
def test_folder_is_complete_and_holds_no_pickles(tiny_chat_model_dir: Path, tmp_path: Path, method: str) -> None:
    folder = export(tune(tiny_chat_model_dir, method), tmp_path / "model")
    manifest = verify_manifest(folder)
    names = {entry.path for entry in manifest.files}
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    common = {"README.md", "prompt.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == common | (weights if method == "full" else adapter)
    assert manifest.about == {
        "kind": "weights" if method == "full" else "adapter",
        "specHash": "ab" * 32,
        "base": str(tiny_chat_model_dir),
        "baseRevision": "f" * 40,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", ["lora", "prompt tuning", "full"])
def test_hub_base_is_named_by_id_and_commit_and_no_local_path_leaks(
    tiny_chat_model_dir: Path, tmp_path: Path, method: str
) -> None:
    tuned = tune(tiny_chat_model_dir, method)
    folder = export(tuned, tmp_path / "model", hub=True)
    for path in folder.iterdir():
        assert str(tiny_chat_model_dir).encode() not in path.read_bytes(), path.name
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    if method != "full":
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "f" * 40)
    front = ModelCard.load(folder / "README.md").data.to_dict()
    assert front["base_model"] == "acme/tiny"
    assert front["base_model_relation"] == ("finetune" if method == "full" else "adapter")


def test_local_base_is_named_by_its_path(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    folder = export(tune(tiny_chat_model_dir, "lora"), tmp_path / "model")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_chat_model_dir), None)


def test_same_model_gives_the_same_bytes(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    first = export(tune(tiny_chat_model_dir, "lora"), tmp_path / "a")
    second = export(tune(tiny_chat_model_dir, "lora"), tmp_path / "b")
    assert verify_manifest(first) == verify_manifest(second)


def test_export_replaces_what_stood_in_the_folder(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    folder = export(tune(tiny_chat_model_dir, "lora"), tmp_path / "model")
    assert not (folder / "pytorch_model.bin").exists()


def test_prompt_file_holds_all_that_the_prompt_is_made_of(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    rendering = Rendering(system="Be brief.", assistant_header="<think></think>")
    folder = export(tune(tiny_chat_model_dir, "lora"), tmp_path / "model", rendering=rendering)
    prompt = PromptFile.model_validate_json((folder / "prompt.json").read_text())
    assert prompt.model_dump(by_alias=True) == {
        "version": 1,
        "modelTask": "causal-lm",
        "format": "chat",
        "system": "Be brief.",
        "assistantHeader": "<think></think>",
        "maxLength": 512,
        "endTokenIds": (2,),
        "endTokens": ("<|im_end|>",),
        "tasks": (
            {
                "name": "sentiment",
                "templates": ({"prompt": PROMPT, "completion": " {{ label }}"},),
                "fewShot": None,
                "labels": ("negative", "positive"),
            },
        ),
    }


# --- the model card


def snippet_of(folder: Path) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return snippet


# PEFT says so at every step of a soft prompt's generation; positions then count from the soft prompt, as in training.
@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize(
    ("method", "rendering"),
    [
        pytest.param("lora", Rendering(), id="adapter, chat"),
        pytest.param("lora", Rendering(system="Be brief."), id="adapter, chat with system prompt"),
        pytest.param("prompt tuning", Rendering(format="raw"), id="soft prompt, raw"),
        pytest.param("full", Rendering(), id="full weights, chat"),
        pytest.param("merged", Rendering(format="raw"), id="merged weights, raw"),
    ],
)
def test_loading_snippet_of_the_card_gives_the_tuned_models_answer(
    tiny_chat_model_dir: Path, tmp_path: Path, method: str, rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune(tiny_chat_model_dir, "lora" if method == "merged" else method)
    folder = export(tuned, tmp_path / "model", merge=method == "merged", rendering=rendering)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"print": lambda answer: None}
    exec(compile(snippet_of(folder), "README.md", "exec"), names)

    question = PROMPT.replace("{{ review_body }}", "…")
    if rendering.format == "chat":
        system = [{"role": "system", "content": rendering.system}] if rendering.system else []
        chat = [*system, {"role": "user", "content": question}]
        question = tuned.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tuned.tokenizer(question, add_special_tokens=False).input_ids])
    mask = torch.ones_like(ids)
    output = tuned.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=[2]
    )
    assert names["answer"] == tuned.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_card_shows_the_reports_numbers_and_is_valid_for_a_hub(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_chat_model_dir, "lora")
    job = resolve(make_job("hf://acme/tiny"))
    folder = tmp_path / "model"
    export_model(tuned.model, tuned.tokenizer, Rendering(), job, make_report(), folder, licence="apache-2.0")
    text = (folder / "README.md").read_text()
    assert "| sentiment | accuracy | 0.875 | 0.95 | 0.075 [0.04, 0.11] | 200 |" in text
    assert "| sentiment | perplexity (lower is better) | 9.5 | 1.25 | -8.25 | 200 |" in text
    assert "2,400 for training, 300 for validation, 300 for the test" in text
    assert "acme/tiny" in text and "f" * 40 in text and "float32" in text
    assert "--max-lora-rank 16 --lora-modules reviews=." in text
    card = ModelCard(text).data
    assert (card.license, card.library_name) == ("apache-2.0", "peft")
    assert [(r.metric_type, r.metric_value) for r in card.eval_results] == [("accuracy", 0.95), ("perplexity", 1.25)]


def test_card_of_an_unevaluated_model_says_so(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_chat_model_dir, "lora")
    report = make_report(None, evaluated=False)
    export_model(tuned.model, tuned.tokenizer, Rendering(), make_job("hf://acme/tiny"), report, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "It was not evaluated." in text
    assert "no licence was found" in text
    assert "image of the trainer" not in text, "no operator said which"


def test_card_states_the_type_of_a_bfloat16_base(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    folder = export(tune(tiny_chat_model_dir, "lora", torch.bfloat16), tmp_path / "model")
    text = (folder / "README.md").read_text()
    assert "| weights of the base | bfloat16 |" in text
    assert 'dtype="bfloat16"' in text


def test_words_of_a_user_do_not_break_out_of_the_card(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_chat_model_dir, "lora")
    evil = MetricComparison(task="a|b\n# Hacked <script>", metric="accuracy", tuned=0.5, rows=1)
    report = make_report().model_copy(update={"evaluation": EvaluationReport(metrics=(evil,))})
    export_model(tuned.model, tuned.tokenizer, Rendering(), make_job("hf://acme/tiny"), report, tmp_path / "model")
    body = (tmp_path / "model" / "README.md").read_text().split("\n---\n", 1)[1]
    assert "\n# Hacked" not in body and "<script>" not in body
    assert r"| a\|b \# Hacked \<script\> | accuracy | - | 0.5 | - | 1 |" in body
    assert yaml.safe_load((tmp_path / "model" / "README.md").read_text().split("---\n")[1])["model-index"]


# --- refusals and faults


@pytest.mark.parametrize(
    ("method", "said"), [("prompt tuning", "PROMPT_TUNING adapter cannot be merged"), ("full", "no adapter to merge")]
)
def test_only_lora_merges(tiny_chat_model_dir: Path, tmp_path: Path, method: str, said: str) -> None:
    with pytest.raises(SpecError, match=rf"spec\.output\.merge: .*{said}"):
        export(tune(tiny_chat_model_dir, method), tmp_path / "model", merge=True)
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def test_card_of_a_merge_says_when_rounding_undoes_the_adapter(tiny_chat_model_dir: Path, tmp_path: Path) -> None:
    strong, weak = (tune(tiny_chat_model_dir, "lora", torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        for name, parameter in weak.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    warning = "Rounding undoes much of what was tuned"
    assert warning not in (export(strong, tmp_path / "strong", merge=True) / "README.md").read_text()
    assert warning in (export(weak, tmp_path / "weak", merge=True) / "README.md").read_text()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_disk_that_fills_up_at_any_file_leaves_nothing_half_exported(
    tiny_chat_model_dir: Path, full_disk: Path, method: str
) -> None:
    tuned = tune(tiny_chat_model_dir, method)
    filler = full_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(full_disk).free - 4096))
    failures = 0
    while True:
        try:
            export(tuned, full_disk / "model")
        except StorageError as error:
            assert re.search(r"No space left on device.*[Ff]ree space", str(error))
            assert [path.name for path in full_disk.iterdir()] == ["filler"]
            failures += 1
            os.truncate(filler, filler.stat().st_size - 4096)
        else:
            break
    assert failures > 10, "the disk really filled up, at one file after the other"
    verify_manifest(full_disk / "model")


# --- into the store


def make_folder(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "weights").write_text(content)
    write_manifest(folder, {"kind": "adapter"})
    return folder


def test_published_artifact_says_where_and_what(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "one")
    store = FileStore(tmp_path / "store")
    artifact = publish(folder, store, "default/reviews-1a2b3c4d/model")
    assert artifact.kind is ArtifactKind.ADAPTER
    assert artifact.uri == f"{(tmp_path / 'store').as_uri()}/default/reviews-1a2b3c4d/model"
    assert artifact.sha256 == verify_manifest(tmp_path / "store/default/reviews-1a2b3c4d/model").sha256
    assert artifact.bytes == 3


def test_publishing_the_same_again_writes_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "one")
    store = FileStore(tmp_path / "store")
    first = publish(folder, store, "model")
    before = {path: path.stat().st_ino for path in (tmp_path / "store" / "model").iterdir()}
    assert publish(folder, store, "model") == first
    assert {path: path.stat().st_ino for path in (tmp_path / "store" / "model").iterdir()} == before


def test_publishing_something_else_replaces_the_whole(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    publish(make_folder(tmp_path / "one", "one"), store, "model")
    artifact = publish(make_folder(tmp_path / "two", "two"), store, "model")
    assert verify_manifest(tmp_path / "store" / "model").sha256 == artifact.sha256


def test_published_folder_that_lost_a_file_is_published_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "one")
    store = FileStore(tmp_path / "store")
    publish(folder, store, "model")
    (tmp_path / "store" / "model" / "weights").unlink()
    publish(folder, store, "model")
    verify_manifest(tmp_path / "store" / "model")


def test_folder_changed_after_its_manifest_is_not_published(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "one")
    (folder / "weights").write_text("two")
    store = FileStore(tmp_path / "store")
    with pytest.raises(DataError, match="weights: sha256"):
        publish(folder, store, "model")
    assert store.list() == ()


def test_unfinished_folder_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert not is_complete(tmp_path / "model")
    with pytest.raises(DataError, match="is unfinished"):
        publish(tmp_path / "model", FileStore(tmp_path / "store"), "model")
