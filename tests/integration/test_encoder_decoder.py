"""Encoder-decoder models: the numbers of transformers' own training and scoring, and every method from check to card.

Inputs: a tiny random T5 with a SentencePiece-like tokenizer. Everything is float32 on the CPU.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    T5Config,
)

from finetune_api.report import ExitCode, Report, Stage
from finetune_api.spec import (
    MethodSpec,
    MethodType,
    RegularizationSpec,
    RegularizationType,
    SelectiveSpec,
    SelectiveTrain,
)
from finetune_trainer import stages
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import SpecError
from finetune_trainer.example import Encoded
from finetune_trainer.generation import generate
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.layout import Layout, build_batch, forward, token_losses
from finetune_trainer.methods import prepare_model
from finetune_trainer.model import ModelFiles
from finetune_trainer.plan import plan_from_config
from finetune_trainer.regularization import regularize
from finetune_trainer.renderer import Renderer
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.scoring import Scorer
from finetune_trainer.small_model import make_small
from finetune_trainer.split import Split
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

from .conftest import save_tiny_encoder_decoder
from .jobs import Silence, tiny_job, write_reviews
from .reference_trainer import ROUNDING, reference_losses
from .test_methods import low_rank_updates, made_by_network, snippet_of_the_card
from .test_train import losses

IDS = torch.tensor([[5, 77, 130, 101, 17, 90, 66, 1]])
WRITTEN = torch.tensor([[0, 44, 131, 12]])

# The same sums in another order, float32, five layers.
SAME_SUM = 1e-4

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "lora": {"rank": 4}},
    "prompt tuning": {"type": "promptTuning", "promptTuning": {"virtualTokens": 5}},
    "prefix tuning": {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 5}},
    "ia3": {"type": "ia3"},
    "the last layer near what the base predicts": {
        "type": "selective",
        "selective": {"train": "lastLayers", "lastLayers": 1},
        "regularization": {"type": "kl", "strength": 0.1},
    },
    "full near its first weights": {"type": "full", "regularization": {"type": "l2sp", "strength": 0.01}},
    "full near weights that count": {"type": "full", "regularization": {"type": "ewc", "strength": 0.1}},
}


def seq2seq_job(model: Path, folder: Path, **changes: Any):
    return tiny_job(model, folder, model__task="seq2seq-lm", **changes)


def whole_run(model: Path, folder: Path, **changes: Any) -> tuple[Report, Path]:
    """Return the report and where the model was published."""
    job = seq2seq_job(model, folder, **changes)
    (folder / "workspace").mkdir()
    report = stages.run(job, folder / "workspace", Silence())
    return report, folder / "output" / output_prefix(job) / "model"


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def loaded(base: Path, published: Path) -> nn.Module:
    if (published / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(base_of(base), str(published)).eval()
    return base_of(published)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=WRITTEN).logits


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_runs_from_check_to_a_card_that_answers(
    tiny_encoder_decoder_dir: Path, tmp_path: Path, method: dict[str, Any]
):
    report, published = whole_run(tiny_encoder_decoder_dir, tmp_path, method=method)
    assert report.published
    # Always of the same rows, unlike the loss of a step.
    seen = [point.validation_loss for point in report.training.curve if point.validation_loss is not None]
    assert seen[-1] < seen[0]
    model = loaded(tiny_encoder_decoder_dir, published)
    assert (logits_of(model) - logits_of(base_of(tiny_encoder_decoder_dir))).abs().max() > 0.01
    with contextlib.chdir(published):
        exec(snippet_of_the_card(published), names := {})
    torch.testing.assert_close(logits_of(names["model"]), logits_of(model), atol=SAME_SUM, rtol=SAME_SUM)


def test_ia3_scales_keys_values_and_what_leaves_the_feed_forward_layers_of_both_sides(tiny_encoder_decoder_dir: Path):
    tuned = prepare_model(base_of(tiny_encoder_decoder_dir), MethodSpec(type=MethodType.IA3), "").eval()
    by_hand = base_of(tiny_encoder_decoder_dir)
    scales = {name: scale for name, scale in tuned.named_parameters() if ".ia3_l." in name}
    layers = [name.partition("base_model.model.")[2].partition(".ia3_l.")[0] for name in scales]
    assert {layer.split(".")[0] for layer in layers} == {"encoder", "decoder"}
    assert {layer.rpartition(".")[2] for layer in layers} == {"k", "v", "wo"}
    for layer, scale in zip(layers, scales.values(), strict=True):
        scale.data += 0.3 * torch.randn_like(scale)
        # Outputs of keys and values are rows of the weights, inputs of the feed-forward layer's last one are columns.
        by_hand.get_submodule(layer).weight.data *= scale.view((1, -1) if layer.endswith("wo") else (-1, 1))
    torch.testing.assert_close(logits_of(tuned), logits_of(by_hand), atol=SAME_SUM, rtol=SAME_SUM)


def test_the_last_layer_is_the_decoders(tiny_encoder_decoder_dir: Path):
    method = MethodSpec(
        type=MethodType.SELECTIVE, selective=SelectiveSpec(train=SelectiveTrain.LAST_LAYERS, last_layers=1)
    )
    model = prepare_model(base_of(tiny_encoder_decoder_dir), method, "")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("decoder.block.1.")}


ROWS = (
    ("Sentiment of: the film was a wonderful surprise", "positive"),
    ("Sentiment of: the plot", "negative"),
    ("Summarize: we waited an hour for cold soup and nobody said sorry", "cold soup after an hour"),
)


def encoded_rows(folder: Path, rows: Sequence[tuple[str, str]] = ROWS) -> list[Encoded]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer, "auto", None, 64, decoder_start=tokenizer.pad_token_id)
    plain = renderer.encode_continuations(rows)
    return [replace(item, ids=(*item.ids, tokenizer.eos_token_id)) for item in plain]


def padded_by_transformers(folder: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, completions = zip(*ROWS, strict=True)
    inputs = tokenizer(list(prompts), padding=True, return_tensors="pt")
    labels = tokenizer(text_target=list(completions), padding=True, return_tensors="pt").input_ids
    return {**inputs, "labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100)}


@pytest.mark.parametrize("like_flan", [False, True], ids=["like the first T5", "like FLAN-T5"])
def test_loss_and_gradients_are_those_of_transformers_own_forward(tmp_path: Path, like_flan: bool):
    folder = save_tiny_encoder_decoder(tmp_path, like_flan=like_flan)
    expected, model = base_of(folder), base_of(folder)
    loss = expected(**padded_by_transformers(folder)).loss
    loss.backward()
    batch = build_batch(encoded_rows(folder), Layout.PADDED)
    ours = token_losses(forward(model, batch), batch["labels"]).mean()
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=SAME_SUM)
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, atol=SAME_SUM, rtol=SAME_SUM)


def test_training_goes_down_the_curve_of_transformers_own_trainer(tmp_path: Path):
    folder = save_tiny_encoder_decoder(tmp_path / "model", dropout=0.0)
    rows = [json.loads(line) for line in write_reviews(tmp_path / "reviews.jsonl", 20).read_text().splitlines()]
    job = seq2seq_job(
        folder,
        tmp_path,
        method={"type": "full"},
        data__splits={"validation": 0, "test": 0.2},
        training__learningRate=1e-3,
        training__schedule="constant",
        training__warmupRatio=0,
        training__weightDecay=0.01,
    )
    dataset = load_dataset(job.spec.data)
    chosen = [rows[example.row] for example in dataset.examples(Split.TRAIN)]
    # Every step sees all rows, whatever their order.
    training = job.spec.training.model_copy(update={"global_batch_size": len(chosen), "max_steps": 5})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"training": training})})
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    report = train_stage(Run(job, workspace, Silence(), StopFlag()))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [f"Review: {row['text']}\nSentiment:" for row in chosen]
    features = [
        {"input_ids": tokenizer(prompt).input_ids, "labels": tokenizer(text_target=row["label"]).input_ids}
        for prompt, row in zip(prompts, chosen, strict=True)
    ]
    expected = reference_losses(base_of(folder), tokenizer, features, tmp_path / "reference", 5, training.max_grad_norm)
    assert losses(report) == pytest.approx(expected, abs=ROUNDING)


def test_the_encoder_reads_each_prompt_once_for_all_its_labels(tiny_encoder_decoder_dir: Path):
    model = base_of(tiny_encoder_decoder_dir)
    texts = [(prompt, label) for prompt, _ in ROWS for label in ("positive", "negative", "neither")]
    items = encoded_rows(tiny_encoder_decoder_dir, texts)
    alone = [Scorer(model, Layout.PADDED).token_logprobs([item])[0] for item in items]
    read: list[int] = []
    handle = model.encoder.block[0].register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    together = Scorer(model, Layout.PADDED, batch_tokens=40).token_logprobs(items)
    handle.remove()
    assert sum(read) == len(ROWS)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=SAME_SUM)


@pytest.mark.parametrize("method", ["full", "lora", "prompt tuning", "prefix tuning", "ia3"])
def test_a_prompt_of_several_labels_scores_as_each_alone_under_every_method(
    tiny_encoder_decoder_dir: Path, method: str
):
    spec = MethodSpec.model_validate(METHODS[method])
    model = prepare_model(base_of(tiny_encoder_decoder_dir), spec, "").eval()
    items = encoded_rows(tiny_encoder_decoder_dir, [(ROWS[0][0], label) for label in ("positive", "negative")])
    alone = [Scorer(model, Layout.PADDED).token_logprobs([item])[0] for item in items]
    for one, other in zip(Scorer(model, Layout.PADDED).token_logprobs(items), alone, strict=True):
        np.testing.assert_allclose(one, other, atol=SAME_SUM)


@pytest.mark.parametrize("method", ["full", "prompt tuning", "prefix tuning"])
def test_answers_in_a_batch_are_those_of_each_prompt_alone(tmp_path: Path, method: str):
    # Its own output layer lets a random model say more than its end.
    folder = save_tiny_encoder_decoder(tmp_path, like_flan=True)
    spec = MethodSpec.model_validate(METHODS[method])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = prepare_model(base_of(folder), spec, "").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [item.prompt_ids for item in encoded_rows(folder)]
    # An end that is hardly ever said, or random models would say little else than theirs.
    end = len(tokenizer) - 1
    together = generate(model, tokenizer, prompts, 8, [end], 3, lambda done, total: None)
    alone = [[*takewhile(lambda token: token != end, greedy(model, prompt, 8))] for prompt in prompts]
    assert together == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    assert any(together)

    def searched(chosen: Sequence[tuple[int, ...]]) -> list[str]:
        return generate(model, tokenizer, chosen, 8, [end], 3, lambda done, total: None, num_beams=4)

    assert searched(prompts) == [searched([prompt])[0] for prompt in prompts] != together


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return what the likeliest token, step by step, makes of whole forward passes."""
    written = [0]
    for _ in range(tokens):
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([written])}
        written.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
    return written[1:]


def test_a_prefix_through_a_network_is_keys_and_values_before_the_decoders_own(
    tiny_encoder_decoder_dir: Path, tmp_path: Path
):
    method = {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 5, "projection": True}}
    whole_run(tiny_encoder_decoder_dir, tmp_path, method=method)
    tuned = tmp_path / "workspace" / "tuned"
    (learnt,) = load_file(tuned / "adapter_model.safetensors").values()
    torch.testing.assert_close(learnt, made_by_network(tuned), atol=SAME_SUM, rtol=SAME_SUM)
    base = base_of(tiny_encoder_decoder_dir)
    config = base.config
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    layers = config.num_decoder_layers
    # Per virtual token: pairs of key and value, head after head. PEFT 0.21 lays them out twice and keeps of any two
    # the first, as the second would be of the cross-attention, which it leaves alone.
    pairs = learnt.view(5, layers, 2, config.num_heads, config.d_kv)
    for number in range(layers):
        key, value = pairs[:, 2 * number % layers].permute(1, 2, 0, 3)[:, None]
        cache.self_attention_cache.update(key, value, number)
    with torch.no_grad():
        expected = base(input_ids=IDS, decoder_input_ids=WRITTEN, past_key_values=cache).logits
    actual = logits_of(loaded(tiny_encoder_decoder_dir, tuned))
    torch.testing.assert_close(actual, expected, atol=SAME_SUM, rtol=SAME_SUM)


def test_a_soft_prompt_is_vectors_before_the_encoders_input(tiny_encoder_decoder_dir: Path, tmp_path: Path):
    report, _ = whole_run(tiny_encoder_decoder_dir, tmp_path, method=METHODS["prompt tuning"])
    tuned = tmp_path / "workspace" / "tuned"
    (learnt,) = load_file(tuned / "adapter_model.safetensors").values()
    base = base_of(tiny_encoder_decoder_dir)
    assert learnt.shape == (5, base.config.d_model)
    assert report.training.trainable_parameters == learnt.numel()
    assert len(report.soft_prompt) == 5
    with torch.no_grad():
        embedded = torch.cat([learnt[None], base.shared(IDS)], dim=1)
        expected = base(inputs_embeds=embedded, decoder_input_ids=WRITTEN).logits
    actual = logits_of(loaded(tiny_encoder_decoder_dir, tuned))
    torch.testing.assert_close(actual, expected, atol=SAME_SUM, rtol=SAME_SUM)


@pytest.mark.parametrize("like_flan", [False, True], ids=["like the first T5", "like FLAN-T5"])
def test_shared_embeddings_survive_publication(tmp_path: Path, like_flan: bool):
    folder = save_tiny_encoder_decoder(tmp_path / "model", like_flan=like_flan)
    _, published = whole_run(folder, tmp_path, method={"type": "full"})
    again = base_of(published)
    assert (again.lm_head.weight is again.shared.weight) is not like_flan
    assert again.encoder.embed_tokens.weight is again.decoder.embed_tokens.weight is again.shared.weight
    torch.testing.assert_close(logits_of(again), logits_of(base_of(tmp_path / "workspace" / "tuned")), atol=0, rtol=0)
    # What transformers 4 goes by.
    assert json.loads((published / "config.json").read_text())["tie_word_embeddings"] is not like_flan


def test_training_begins_with_the_published_weights_of_both_sides(tiny_encoder_decoder_dir: Path, tmp_path: Path):
    method = METHODS["lora"]
    _, start = whole_run(tiny_encoder_decoder_dir, tmp_path, method=method, output__publishOn="always")
    # One step of AdamW moves a weight by about the learning rate.
    training = {"maxSteps": 1, "learningRate": 1e-9}
    job = seq2seq_job(
        tiny_encoder_decoder_dir,
        tmp_path,
        method=method,
        model__startFrom={"source": start.as_uri()},
        training=training,
    )
    result = stages.run_one(Stage.TRAIN, job, tmp_path / "second", Silence())
    assert result.exit_code is ExitCode.OK, result.message
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "second" / "tuned")
    )
    assert {name.split(".")[2] for name in before} == {"encoder", "decoder"}
    torch.testing.assert_close(after, before, atol=1e-7, rtol=0)


def test_shown_rows_the_forgetting_test_and_written_answers_work(tiny_encoder_decoder_dir: Path, tmp_path: Path):
    report, _ = whole_run(
        tiny_encoder_decoder_dir,
        tmp_path,
        method={"type": "lora"},
        evaluation__metrics=["accuracy", "exact_match"],
        evaluation__baselines={"fewShot": 2},
        evaluation__forgetting={"maxDrop": 1.0},
        output__publishOn="always",
    )
    found = {metric.metric: metric for metric in report.evaluation.metrics}
    assert {"accuracy", "exact_match", "perplexity", "bits_per_byte"} <= set(found)
    assert found["accuracy"].few_shot is not None
    assert report.evaluation.forgetting is not None
    assert report.evaluation.probe.effect > 0
    assert all(parity.difference <= parity.allowed for parity in report.parity)


def test_lengths_and_directions_scaled_by_the_root_of_the_rank_are_merged_as_computed_by_hand(
    tiny_encoder_decoder_dir: Path, tmp_path: Path
):
    method = {"type": "lora", "lora": {"rank": 4, "useDora": True, "useRslora": True}}
    report, published = whole_run(tiny_encoder_decoder_dir, tmp_path, method=method, output__merge=True)
    assert len(report.parity) == 2
    by_hand = base_of(tiny_encoder_decoder_dir)
    updates = low_rank_updates(tmp_path)
    assert {name.split(".")[0] for name in updates} == {"encoder", "decoder"}
    for name, update in updates.items():
        weight = by_hand.get_submodule(name).weight.data
        moved = weight + 8 / 4**0.5 * update["B"] @ update["A"]
        weight.copy_(update["magnitude"].view(-1, 1) * moved / moved.norm(dim=1, keepdim=True))
    expected = logits_of(by_hand)
    for model in (base_of(published.parent / "merged"), loaded(tiny_encoder_decoder_dir, published)):
        torch.testing.assert_close(logits_of(model), expected, atol=SAME_SUM, rtol=SAME_SUM)


def importance_by_hand(folder: Path, seed: int) -> list[Tensor]:
    """Return the mean square, over drawn tokens, of the gradients of what transformers' own forward predicts."""
    model, tokenizer = base_of(folder), AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    squares = [torch.zeros_like(weight) for weight in model.parameters()]
    tokens = 0
    for prompt, completion in ROWS:
        answer = tokenizer(text_target=completion, return_tensors="pt").input_ids
        predicted = model(**tokenizer(prompt, return_tensors="pt"), labels=answer).logits[0].log_softmax(-1)
        drawn = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(-predicted.gather(1, drawn).sum(), list(model.parameters()))
        squares = [square + gradient**2 for square, gradient in zip(squares, gradients, strict=True)]
        tokens += len(drawn)
    return [square / tokens for square in squares]


@pytest.mark.parametrize("kind", ["l2sp", "kl", "ewc"])
def test_a_pull_has_the_gradient_of_the_distance_from_the_base(tiny_encoder_decoder_dir: Path, kind: str):
    base, model, by_hand = (base_of(tiny_encoder_decoder_dir) for _ in range(3))
    pull = RegularizationSpec(type=RegularizationType(kind), strength=0.5)
    rows = encoded_rows(tiny_encoder_decoder_dir)
    loss = regularize(lambda outputs, *_: 0.0 * outputs.logits.sum(), model, pull, rows, seed=1, autocast=False)
    for tuned in (model, by_hand):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for weight in tuned.parameters():
                weight.data += 0.05 * torch.randn_like(weight)
    batch = build_batch(rows, Layout.PADDED)
    loss(model(**{name: value for name, value in batch.items() if name != "labels"}), batch["labels"]).backward()
    if kind == "kl":
        padded = padded_by_transformers(tiny_encoder_decoder_dir)
        learnt = padded["labels"] != -100
        theirs, expected = (one(**padded).logits[learnt].log_softmax(-1) for one in (by_hand, base))
        (0.5 * (expected.exp() * (expected - theirs)).sum(-1).mean()).backward()
    counts = (
        importance_by_hand(tiny_encoder_decoder_dir, seed=1) if kind == "ewc" else [1.0] * len(list(base.parameters()))
    )
    for (name, one), other, first, count in zip(
        model.named_parameters(), by_hand.parameters(), base.parameters(), counts, strict=True
    ):
        wanted = other.grad if kind == "kl" else 0.5 * count * (other - first)
        assert one.grad is not None and wanted is not None, name
        torch.testing.assert_close(one.grad, wanted, atol=SAME_SUM, rtol=SAME_SUM)


def check(model: Path, folder: Path, **changes: Any) -> None:
    stages.check(tiny_job(model, folder, **changes), folder / "workspace", Silence())


def test_a_task_of_the_other_kind_is_refused_and_the_right_one_named(
    tiny_encoder_decoder_dir: Path, tiny_model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    with pytest.raises(SpecError, match=r"spec\.model\.task \(causal-lm\).*encoder and a decoder.*task: seq2seq-lm"):
        check(tiny_encoder_decoder_dir, tmp_path)
    with pytest.raises(SpecError, match=r"spec\.model\.task \(seq2seq-lm\).*decoder alone.*task: causal-lm"):
        check(tiny_model_dir, tmp_path_factory.mktemp("other"), model__task="seq2seq-lm")
    job = tiny_job(tiny_encoder_decoder_dir, tmp_path)
    with pytest.raises(SpecError, match="task: seq2seq-lm"):
        plan_from_config(job, tmp_path / "cache")


def test_the_plan_counts_what_is_trained_and_the_memory_of_both_sides(tiny_encoder_decoder_dir: Path, tmp_path: Path):
    short, long = (
        plan_from_config(
            seq2seq_job(tiny_encoder_decoder_dir, tmp_path, method={"type": "full"}, data__maxLength=length),
            tmp_path / "cache",
        )
        for length in (64, 256)
    )
    assert short.parameters == short.trainable_parameters == base_of(tiny_encoder_decoder_dir).num_parameters()
    assert short.memory is not None and long.memory is not None
    # Logits are of completions alone, as many tokens as a prompt may have.
    vocabulary = base_of(tiny_encoder_decoder_dir).config.vocab_size
    assert long.memory.logits >= 4 * 256 * vocabulary
    assert long.memory.activations > 3 * short.memory.activations


def test_a_tiny_model_of_the_architecture_can_be_rehearsed_with(tmp_path: Path):
    big = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=6, num_heads=8, vocab_size=512, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(big).save_pretrained(tmp_path / "big")
    assert make_small(ModelFiles(tmp_path / "big", "0"), tmp_path / "small") == ""
    small = base_of(tmp_path / "small")
    assert (len(small.encoder.block), len(small.decoder.block)) == (4, 4)
    assert small.config.vocab_size == big.vocab_size
    assert small.num_parameters() < base_of(tmp_path / "big").num_parameters() / 5
