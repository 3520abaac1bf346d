"""Every method: the same numbers as a computation by hand, the same end after an interruption, a result that loads."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from finetune_api.report import Report, TrainingReport
from finetune_api.spec import AdapterSpec
from finetune_trainer import bottleneck, stages
from finetune_trainer.check_stage import check_stage
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import SpecError
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.prefix_projection import NETWORK
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.split import Split
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

from .conftest import make_tokenizer
from .jobs import Silence, tiny_job
from .test_evaluation import likelihood
from .test_train import SAME_LOSS, losses, train, train_until

IDS = torch.tensor([[5, 77, 130, 301, 17, 290, 66, 4]])

# The same sums in another order, float32, two layers.
ROUNDING = 1e-4

METHODS: dict[str, dict[str, Any]] = {
    "lora with magnitudes": {"type": "lora", "lora": {"rank": 4, "useDora": True}},
    "lora of attention": {"type": "lora", "lora": {"rank": 4, "targets": "attention", "useRslora": True}},
    "prompt tuning": {"type": "promptTuning", "promptTuning": {"virtualTokens": 5}},
    "prefix tuning": {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 5}},
    "a prefix through a network": {
        "type": "prefixTuning",
        "prefixTuning": {"virtualTokens": 5, "projection": True},
    },
    "ia3": {"type": "ia3"},
    "ia3 of named layers": {"type": "ia3", "ia3": {"targetNames": ["v_proj", "up_proj"]}},
    "adapters behind both blocks": {"type": "adapter", "adapter": {"bottleneck": 8}},
    "adapters behind one block": {
        "type": "adapter",
        "adapter": {"bottleneck": 8, "placement": "pfeiffer", "activation": "relu"},
    },
    "the last layer": {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 1}},
    "the last layer near its first weights": {
        "type": "selective",
        "selective": {"train": "lastLayers", "lastLayers": 1},
        "regularization": {"type": "l2sp", "strength": 0.01},
    },
    "full near what the base predicts": {"type": "full", "regularization": {"type": "kl", "strength": 0.1}},
    "the last layer near weights that count": {
        "type": "selective",
        "selective": {"train": "lastLayers", "lastLayers": 1},
        "regularization": {"type": "ewc", "strength": 0.1},
    },
    "patterns": {"type": "selective", "selective": {"train": "patterns", "patterns": [r"\.0\.mlp", "norm"]}},
}


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits_of(model: nn.Module, **more: Any) -> Tensor:
    return model(input_ids=IDS, **more).logits


def whole_run(model: Path, folder: Path, method: dict[str, Any]) -> tuple[Report, Path]:
    """Run a job that is interrupted in training, and return its report and where its model was published."""
    job, workspace = tiny_job(model, folder, method=method), Workspace(folder / "workspace")
    workspace.root.mkdir()
    check_stage(Run(job, workspace, Silence(), StopFlag()))
    train_until(5, job, workspace)
    report = stages.run(job, workspace.root, Silence())
    return report, folder / "output" / output_prefix(job) / "model"


def snippet_of_the_card(published: Path) -> str:
    snippet = re.search(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    return snippet[1]


def answer_of_the_card(published: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", snippet_of_the_card(published)],
        cwd=published,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(base: Path, published: Path) -> nn.Module:
    if (published / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(base_of(base), str(published)).eval()
    if (published / bottleneck.CONFIG).is_file():
        return bottleneck.load_adapters(base_of(base), published)
    return base_of(published)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_interrupted_job_ends_as_a_straight_one_and_publishes_what_it_trained(
    tiny_model_dir: Path, tmp_path: Path, method: dict[str, Any]
):
    (tmp_path / "broken").mkdir()
    report, published = whole_run(tiny_model_dir, tmp_path / "broken", method)
    straight = train(tiny_model_dir, tmp_path, method=method)
    assert report.training.resumed_from_step == 5
    assert losses(report.training) == pytest.approx(losses(straight), abs=SAME_LOSS)
    if method["type"] != "full":
        assert 0 < straight.trainable_parameters < straight.parameters
    assert not [path for path in published.iterdir() if path.suffix in (".bin", ".pt")]
    model = loaded(tiny_model_dir, published)
    tuned = logits_of(model)
    reference = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(tuned, reference, atol=SAME_LOSS, rtol=SAME_LOSS)
    base = logits_of(base_of(tiny_model_dir))
    # A soft prompt has logits of its own in front.
    assert (tuned[:, -base.shape[1] :] - base).abs().max() > 0.01
    if method["type"] not in ("full", "selective"):
        with model.disable_adapter() if isinstance(model, PeftModel) else bottleneck.switched_off(model):
            torch.testing.assert_close(logits_of(model), base)
    perplexity = next(metric for metric in report.evaluation.metrics if metric.metric == "perplexity")
    assert perplexity.tuned < perplexity.base


@pytest.mark.parametrize("name", ["prefix tuning", "ia3", "the last layer"])
def test_the_cards_own_snippet_loads_what_was_published(tiny_chat_model_dir: Path, tmp_path: Path, name: str):
    _, published = whole_run(tiny_chat_model_dir, tmp_path, METHODS[name])
    assert answer_of_the_card(published)


def test_the_cards_own_lines_add_adapters_to_the_base(
    tiny_chat_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _, published = whole_run(tiny_chat_model_dir, tmp_path, METHODS["adapters behind both blocks"])
    names: dict[str, Any] = {}
    monkeypatch.chdir(published)
    exec(snippet_of_the_card(published), names)
    assert capsys.readouterr().out.strip()
    expected = logits_of(loaded(tiny_chat_model_dir, published))
    torch.testing.assert_close(logits_of(names["model"]), expected, atol=ROUNDING, rtol=ROUNDING)
    assert (expected - logits_of(base_of(tiny_chat_model_dir))).abs().max() > 0.01


def tuned_files(folder: Path) -> dict[str, Tensor]:
    tuned = folder / "workspace" / "tuned"
    names = ("adapter_model.safetensors", bottleneck.WEIGHTS, "model.safetensors")
    return load_file(next(tuned / name for name in names if (tuned / name).is_file()))


def test_a_soft_prompt_is_vectors_before_the_texts_own(tiny_model_dir: Path, tmp_path: Path):
    report = train(tiny_model_dir, tmp_path, method=METHODS["prompt tuning"])
    (learnt,) = tuned_files(tmp_path).values()
    base = base_of(tiny_model_dir)
    assert learnt.shape == (5, base.config.hidden_size)
    assert report.trainable_parameters == learnt.numel()
    embedded = torch.cat([learnt[None], base.get_input_embeddings()(IDS)], dim=1)
    with torch.no_grad():
        expected = base(inputs_embeds=embedded).logits
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=ROUNDING)


def test_a_prefix_is_keys_and_values_before_every_layers_own(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["prefix tuning"])
    (learnt,) = tuned_files(tmp_path).values()
    base = base_of(tiny_model_dir)
    config = base.config
    cache = DynamicCache()
    # Per virtual token: for every layer its key and its value, head after head.
    per_layer = learnt.view(5, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    for number in range(config.num_hidden_layers):
        key, value = per_layer[:, number].permute(1, 2, 0, 3)[:, None]
        cache.update(key, value, number)
    expected = logits_of(base, past_key_values=cache, attention_mask=torch.ones(1, 5 + IDS.shape[1]))
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=ROUNDING)


def made_by_network(tuned: Path) -> Tensor:
    """Return the prefix of five tokens that the network beside it gives."""
    network = load_file(tuned / NETWORK)
    inner = network["embedding.weight"] @ network["transform.0.weight"].T + network["transform.0.bias"]
    assert inner.shape == (5, 512)
    return inner.tanh() @ network["transform.2.weight"].T + network["transform.2.bias"]


def test_a_prefix_through_a_network_is_published_as_what_the_network_made_of_it(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["a prefix through a network"])
    tuned = tmp_path / "workspace" / "tuned"
    learnt = load_file(tuned / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(learnt, made_by_network(tuned), atol=ROUNDING, rtol=ROUNDING)
    assert not json.loads((tuned / "adapter_config.json").read_text())["prefix_projection"]


def test_ia3_scales_keys_values_and_what_enters_the_feed_forward_layer(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["ia3"])
    base = base_of(tiny_model_dir)
    scales = {
        name.split("base_model.model.")[1].rpartition(".ia3_l")[0]: s for name, s in tuned_files(tmp_path).items()
    }
    assert {name.rpartition(".")[2] for name in scales} == {"k_proj", "v_proj", "down_proj"}
    for name, scale in scales.items():
        layer = base.get_submodule(name)
        # Outputs of keys and values are rows of the weights, inputs of the feed-forward layer are columns.
        layer.weight.data *= scale.view(1, -1) if name.endswith("down_proj") else scale.view(-1, 1)
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, logits_of(base), atol=ROUNDING, rtol=ROUNDING)


def llama_with_adapters(base: PreTrainedModel, learnt: dict[str, Tensor]) -> Tensor:
    """Return the logits of a Llama whose blocks' results are changed, computed layer by layer."""

    def changed(hidden: Tensor, place: str) -> Tensor:
        if f"{place}.down.weight" not in learnt:
            return hidden
        inner = nn.functional.relu if "self_attn" not in " ".join(learnt) else nn.functional.gelu
        down, up = (
            lambda x, part=part: x @ learnt[f"{place}.{part}.weight"].T + learnt[f"{place}.{part}.bias"]
            for part in ("down", "up")
        )
        return hidden + up(inner(down(hidden)))

    body, hidden = base.model, base.model.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    rotation = body.rotary_emb(hidden, positions)
    unseen = torch.full((1, 1, IDS.shape[1], IDS.shape[1]), float("-inf")).triu(1)
    for number, layer in enumerate(body.layers):
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), rotation, unseen)
        hidden = hidden + changed(attended, f"model.layers.{number}.self_attn")
        fed = layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = hidden + changed(fed, f"model.layers.{number}.mlp")
    return base.lm_head(body.norm(hidden))


@pytest.mark.parametrize("name, places", [("adapters behind both blocks", 4), ("adapters behind one block", 2)])
def test_adapters_change_what_blocks_give_before_it_is_added(
    tiny_model_dir: Path, tmp_path: Path, name: str, places: int
):
    report = train(tiny_model_dir, tmp_path, method=METHODS[name])
    learnt = load_file(tmp_path / "workspace" / "tuned" / bottleneck.WEIGHTS)
    # Down and up, each with its bias terms.
    assert report.trainable_parameters == places * (64 * 8 + 8 + 8 * 64 + 64) == sum(x.numel() for x in learnt.values())
    with torch.no_grad():
        expected = llama_with_adapters(base_of(tiny_model_dir), learnt)
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_new_adapters_change_nothing_and_can_learn(biased_model_dir: Path, placement: str):
    base, expected = base_of(biased_model_dir), logits_of(base_of(biased_model_dir))
    model = bottleneck.add_adapters(base, AdapterSpec(placement=placement))
    assert torch.equal(logits_of(model), expected)
    model(input_ids=IDS).logits.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Checkpoints hold no base, and can be gone on from.
    assert set(model.state_dict()) == trained
    model.load_state_dict(model.state_dict())
    assert all((".up." in name) == bool(model.get_parameter(name).grad.any()) for name in trained)
    blocks = ("attn", "mlp") if placement == "houlsby" else ("mlp",)
    assert {name.split(".bottleneck_adapter.")[0] for name in trained} == {
        f"transformer.h.{layer}.{block}" for layer in range(2) for block in blocks
    }


def low_rank_updates(folder: Path) -> dict[str, dict[str, Tensor]]:
    updates: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tuned_files(folder).items():
        layer, _, part = name.split("base_model.model.")[1].partition(".lora_")
        updates.setdefault(layer, {})[part.split(".")[0].split("_")[0]] = tensor
    return updates


def test_lora_of_attention_adds_a_product_scaled_by_the_root_of_its_rank(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["lora of attention"])
    base = base_of(tiny_model_dir)
    updates = low_rank_updates(tmp_path)
    assert {name.rpartition(".")[2] for name in updates} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, update in updates.items():
        base.get_submodule(name).weight.data += 8 / 4**0.5 * update["B"] @ update["A"]
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, logits_of(base), atol=ROUNDING, rtol=ROUNDING)


def test_dora_learns_lengths_and_directions_of_rows_apart(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["lora with magnitudes"])
    base = base_of(tiny_model_dir)
    for name, update in low_rank_updates(tmp_path).items():
        weight = base.get_submodule(name).weight.data
        moved = weight + 8 / 4 * update["B"] @ update["A"]
        weight.copy_(update["magnitude"].view(-1, 1) * moved / moved.norm(dim=1, keepdim=True))
    actual = logits_of(loaded(tiny_model_dir, tmp_path / "workspace" / "tuned"))
    torch.testing.assert_close(actual, logits_of(base), atol=ROUNDING, rtol=ROUNDING)


def changed(base: Path, folder: Path) -> set[str]:
    before, after = load_file(base / "model.safetensors"), tuned_files(folder)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_bias_terms_change_and_the_whole_model_is_published(biased_model_dir: Path, tmp_path: Path):
    report, published = whole_run(biased_model_dir, tmp_path, {"type": "selective"})
    names = load_file(biased_model_dir / "model.safetensors").keys()
    biases = {name for name in names if name.endswith("bias")}
    # Softmax takes no notice of what is added to every key: their third of c_attn's bias has no gradient, the rest has.
    assert changed(biased_model_dir, tmp_path) == biases
    assert report.training.resumed_from_step == 5
    answers, base = logits_of(base_of(published)), logits_of(base_of(biased_model_dir))
    assert torch.equal(answers, logits_of(base_of(tmp_path / "workspace" / "tuned")))
    assert (answers - base).abs().max() > 0.01


def test_only_the_last_layer_changes(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["the last layer"])
    names = load_file(tiny_model_dir / "model.safetensors").keys()
    assert changed(tiny_model_dir, tmp_path) == {name for name in names if ".layers.1." in name}


def test_only_what_a_pattern_is_in_changes(tiny_model_dir: Path, tmp_path: Path):
    train(tiny_model_dir, tmp_path, method=METHODS["patterns"])
    names = load_file(tiny_model_dir / "model.safetensors").keys()
    assert changed(tiny_model_dir, tmp_path) == {name for name in names if ".0.mlp" in name or "norm" in name}


@pytest.mark.parametrize("method", ["ia3", "adapter", "selective"])
def test_packed_and_padded_rows_agree(tiny_model_dir: Path, tmp_path: Path, method: str):
    settings = {"ia3": {"type": "ia3"}, "adapter": {"type": "adapter"}, "selective": METHODS["the last layer"]}[method]
    packed = train(tiny_model_dir, tmp_path, "packed", method=settings)
    padded = train(tiny_model_dir, tmp_path, "padded", method=settings, data__packing=False)
    assert (packed.layout[:6], padded.layout[:6]) == ("packed", "padded")
    assert losses(packed) == pytest.approx(losses(padded), abs=SAME_LOSS)


def test_prefix_tuning_is_padded_and_does_not_depend_on_the_micro_batch(tiny_model_dir: Path, tmp_path: Path):
    def trained(size: int) -> TrainingReport:
        method = METHODS["prefix tuning"]
        return train(tiny_model_dir, tmp_path, f"by-{size}", method=method, training__microBatchSize=size)

    whole, split = trained(8), trained(2)
    assert whole.layout.startswith("padded: a prefix is a cache")
    assert losses(split) == pytest.approx(losses(whole), abs=SAME_LOSS)


@pytest.mark.parametrize("method", ["prefixTuning", "ia3", "adapter", "selective"])
def test_what_is_trained_beside_a_bfloat16_model_is_float32(biased_model_dir: Path, tmp_path: Path, method: str):
    rounded = train(biased_model_dir, tmp_path, method={"type": method}, model__dtype="bfloat16")
    exact = train(biased_model_dir, tmp_path, "exact", method={"type": method})
    # Eight bits of a number are kept: 0.4 % of a logit, averaged over the rows of a batch; measured 0.002.
    assert losses(rounded) == pytest.approx(losses(exact), abs=0.02)
    trained = changed(biased_model_dir, tmp_path) if method == "selective" else tuned_files(tmp_path)
    assert {tuned_files(tmp_path)[name].dtype for name in trained} == {torch.float32}


@pytest.mark.parametrize("kind", ["l2sp", "ewc", "kl"])
def test_a_pull_keeps_the_model_nearer_its_base(tiny_model_dir: Path, tmp_path: Path, kind: str):
    def moved(strength: float) -> float:
        pull = {"type": kind, "strength": strength}
        train(tiny_model_dir, tmp_path, f"by-{strength}", method={"type": "full", "regularization": pull})
        tuned = logits_of(base_of(tmp_path / f"by-{strength}" / "tuned"))
        base = logits_of(base_of(tiny_model_dir))
        return float((base.softmax(-1) * (base.log_softmax(-1) - tuned.log_softmax(-1))).sum(-1).mean())

    assert moved(100.0) < 0.8 * moved(1e-6)


def test_training_ends_when_validation_gets_no_better_and_the_best_weights_are_published(
    tiny_model_dir: Path, tmp_path: Path
):
    # So high a rate that the first steps help and later ones harm.
    settings = {
        "maxSteps": 60,
        "globalBatchSize": 8,
        "learningRate": 0.1,
        "schedule": "constant",
        "warmupRatio": 0.0,
        "evalEverySteps": 2,
        "earlyStopping": {"patience": 3},
    }
    job, workspace = tiny_job(tiny_model_dir, tmp_path, training=settings), Workspace(tmp_path / "workspace")
    report = stages.run(job, workspace.root, Silence())
    validated = {p.step: p.validation_loss for p in report.training.curve if p.validation_loss is not None}
    best = min(validated, key=lambda step: validated[step])
    assert report.training.best_step == best
    assert report.training.steps == best + 3 * 2 < 60
    assert report.training.estimate is None, "of 60 steps, which were not made"
    published = tmp_path / "output" / output_prefix(job) / "model"
    assert f"of step {best}, which had the lowest loss" in (published / "README.md").read_text()
    # Trained up to there and no further, the same job has the same weights.
    short = tiny_job(tiny_model_dir, tmp_path, training={**settings, "maxSteps": best})
    other = Workspace(tmp_path / "short")
    other.root.mkdir()
    train_stage(Run(short, other, Silence(), StopFlag()))
    expected = load_file(other.tuned / "adapter_model.safetensors")
    actual = load_file(published / "adapter_model.safetensors")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_the_weights_that_name_most_labels_of_validation_rows_are_kept(tiny_model_dir: Path, tmp_path: Path):
    settings = {
        "maxSteps": 60,
        "globalBatchSize": 8,
        "learningRate": 0.03,
        "schedule": "constant",
        "evalEverySteps": 2,
        "earlyStopping": {"metric": "sentiment.accuracy", "patience": 3},
    }
    job = tiny_job(tiny_model_dir, tmp_path, training=settings)
    report = stages.run(job, tmp_path / "workspace", Silence())
    reached = {point.step: point.watched for point in report.training.curve if point.watched is not None}
    best = max(reached, key=lambda step: reached[step])
    assert (report.training.best_step, report.training.watched) == (best, "sentiment.accuracy")
    assert report.training.steps == best + 3 * 2 < 60
    published = tmp_path / "output" / output_prefix(job) / "model"
    assert f"of step {best}, which had the highest sentiment.accuracy on the" in (published / "README.md").read_text()
    model, tokenizer = loaded(tiny_model_dir, published), make_tokenizer(None)
    right = [
        max(
            ("negative", "positive"),
            key=lambda label: likelihood(model, tokenizer, f"Review: {text}\nSentiment:", f" {label}").sum(),
        )
        == row.values["label"]
        for row in load_dataset(job.spec.data).examples(Split.VALIDATION)
        for text in [row.values["text"]]
    ]
    assert sum(right) / len(right) == reached[best] > min(reached.values())


def test_a_soft_prompt_that_has_learnt_nothing_is_near_the_words_it_began_with(tiny_model_dir: Path, tmp_path: Path):
    method = {"type": "promptTuning", "promptTuning": {"virtualTokens": 4, "init": "text", "initText": "positive soup"}}
    settings = {"maxSteps": 1, "globalBatchSize": 8, "learningRate": 1e-9}
    job = tiny_job(tiny_model_dir, tmp_path, method=method, training=settings)
    report = stages.run(job, tmp_path / "workspace", Silence())
    # Words that are too few are said again.
    words = (make_tokenizer(None)("positive soup")["input_ids"] * 4)[:4]
    for virtual, word in zip(report.soft_prompt, words, strict=True):
        for nearest in (virtual.cosine[0], virtual.l2[0]):
            assert nearest.id == word
            assert nearest.distance == pytest.approx(0, abs=1e-5)
    published = tmp_path / "output" / output_prefix(job) / "report"
    assert "What the soft prompt is near to" in (published / "report.html").read_text()
    assert Report.model_validate_json((published / "report.json").read_text()).soft_prompt == report.soft_prompt


REFUSED = {
    "bias terms of a model without any": (
        {"type": "selective"},
        r"spec\.method\.selective\.train: LlamaForCausalLM has no bias terms.*lastLayers",
    ),
    "more layers than there are": (
        {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 3}},
        r"spec\.method\.selective\.lastLayers \(3\): the model has 2 layers",
    ),
    "a pattern that is in no name": (
        {"type": "selective", "selective": {"train": "patterns", "patterns": ["mlp", "c_fc"]}},
        r"spec\.method\.selective\.patterns\[1\] \('c_fc'\) is in no parameter's name of LlamaForCausalLM; it has",
    ),
    "a pattern that is none": (
        {"type": "selective", "selective": {"train": "patterns", "patterns": ["(a"]}},
        r"spec\.method\.selective\.patterns\[0\] \('\(a'\) is no RE2 pattern: .*missing \)",
    ),
    "a pattern that only backtracking can match": (
        {"type": "selective", "selective": {"train": "patterns", "patterns": [r"(a)\1"]}},
        r"is no RE2 pattern",
    ),
    "ia3 of layers that are not there": (
        {"type": "ia3", "ia3": {"targetNames": ["c_fc"]}},
        r"spec\.method\.ia3\.targetNames: c_fc: no linear layers of this model",
    ),
    "a prefix that leaves no room": (
        {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 500}},
        r"spec\.method\.prefixTuning\.virtualTokens \(500\): the model has places for 512",
    ),
}


@pytest.mark.parametrize("method, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_the_model_ends_the_check(
    tiny_model_dir: Path, tmp_path: Path, method: dict[str, Any], message: str
):
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    job = tiny_job(tiny_model_dir, tmp_path, method=method)
    with pytest.raises(SpecError, match=message):
        check_stage(Run(job, workspace, Silence(), StopFlag()))


def test_a_base_of_four_bits_is_refused_before_anything_is_read(tmp_path: Path):
    workspace = Workspace(tmp_path / "workspace")
    job = tiny_job(tmp_path / "nothing", tmp_path, method={"type": "qlora"}, model__dtype="auto")
    missing = "a GPU, and torch finds none" if not torch.cuda.is_available() else "the package bitsandbytes"
    with pytest.raises(SpecError, match=f"spec.method.type: qlora needs {missing}"):
        stages.check(job, workspace.root, Silence())
    assert not (tmp_path / "output").exists()
