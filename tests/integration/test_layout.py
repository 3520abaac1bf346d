"""Packed, padded and one by one: the same numbers, for every model that the probe lets through."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from finetune_api.spec.method import MethodSpec
from finetune_trainer import attention
from finetune_trainer.errors import SpecError
from finetune_trainer.example import Encoded
from finetune_trainer.layout import Layout, build_batch, choose_layout, forward, load_for_rows, token_losses
from finetune_trainer.methods import prepare_model
from finetune_trainer.model import ModelFiles
from finetune_trainer.prompt_cache import keeps_prompts
from finetune_trainer.scoring import Scorer

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PACKABLE = {
    "llama": LlamaConfig(**SHAPE),
    "mistral with a window shorter than the rows": MistralConfig(**SHAPE, sliding_window=4),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1),
}

# float32 rounding over two layers, sums in another order: 1e-7 a product, measured 4e-7 of the largest logit.
ROUNDING = 1e-5


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).eval()


def some_items() -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    instruction = torch.randint(64, (6,), generator=generator).tolist()
    lengths = [9, 3, 14, 3, 7]
    tails = [torch.randint(64, (length,), generator=generator).tolist() for length in lengths]
    prompts = [[*instruction, *tail] for tail in tails]
    return [Encoded((*prompt, 2, 1), len(prompt)) for prompt in prompts] + [Encoded((5, 6, 7), 0)]


def direct_logprobs(model: nn.Module, item: Encoded) -> np.ndarray:
    """One row at a time, full softmax over full logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)
    first = max(item.prompt_length, 1)
    return np.array([logprobs[place - 1, item.ids[place]].item() for place in range(first, len(item.ids))])


@pytest.mark.parametrize("config", PACKABLE.values(), ids=PACKABLE.keys())
@pytest.mark.parametrize("layout", Layout)
def test_scores_equal_a_direct_computation(config: PretrainedConfig, layout: Layout):
    model = random_model(config)
    items = some_items()
    for scored, item in zip(Scorer(model, layout, batch_tokens=40).token_logprobs(items), items, strict=True):
        np.testing.assert_allclose(scored, direct_logprobs(model, item), atol=ROUNDING)


def test_labels_of_one_token_cost_no_more_than_their_prompt():
    model = random_model(PACKABLE["llama"])
    seen: list[tuple[int, int]] = []
    model.register_forward_hook(
        lambda module, args, inputs, output: seen.append((inputs["input_ids"].shape[1], output.logits.shape[1])),
        with_kwargs=True,
    )
    prompt = (5, 6, 7, 8)
    labels = [Encoded((*prompt, label), len(prompt)) for label in (9, 10, 11)]
    scores = Scorer(model, Layout.PACKED, batch_tokens=6).continuations(labels)
    assert seen == [(len(prompt), 1)]
    for (scored, _), item in zip(scores, labels, strict=True):
        assert scored == pytest.approx(direct_logprobs(model, item).sum(), abs=ROUNDING)


@pytest.mark.parametrize("config", PACKABLE.values(), ids=PACKABLE.keys())
def test_packed_equals_padded_in_loss_and_gradients(config: PretrainedConfig):
    model = random_model(config)
    gradients = {}
    for layout in Layout:
        model.zero_grad()
        batch = build_batch(some_items(), layout)
        token_losses(forward(model, batch), batch["labels"]).mean().backward()
        gradients[layout] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, padded in gradients[Layout.PADDED].items():
        packed = gradients[Layout.PACKED][name]
        assert (packed - padded).abs().max() <= 1e-4 * padded.abs().max() + 1e-7, name


@pytest.mark.parametrize("config", PACKABLE.values(), ids=PACKABLE.keys())
def test_the_probe_lets_attention_models_pack(config: PretrainedConfig):
    assert choose_layout(random_model(config), 64).layout is Layout.PACKED


def test_the_probe_refuses_a_state_space_model():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64))
    assert choose_layout(model, 64).layout is Layout.PADDED


def test_the_probe_refuses_a_model_whose_attention_does_not_listen():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="sdpa").eval()
    choice = choose_layout(model, 64)
    assert choice.layout is Layout.PADDED


class OfBatches(torch.nn.Module):
    """A model whose answer to a row depends on what lies beside it, as with experts that take few tokens a batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        answer = self.model(**inputs)
        answer.logits = answer.logits + inputs["input_ids"].numel()
        return answer


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused_by_its_layouts():
    model = OfBatches(random_model(PACKABLE["llama"]))
    with pytest.raises(SpecError, match=r"influence each other, packed \(.*\) and padded as well \("):
        choose_layout(model, 64)


def save(config: PretrainedConfig, folder: Path) -> ModelFiles:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelFiles(folder, "0")


def test_packing_can_be_declined(tiny_model_dir: Path):
    model, choice = load_for_rows(ModelFiles(tiny_model_dir, "0"), torch.float32, "spec.data.packing is false")
    assert (choice.layout, choice.reason) == (Layout.PADDED, "spec.data.packing is false")
    assert model.config._attn_implementation == "sdpa"


UNPACKABLE = {
    "falcon looks its attention up among its own": (
        FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1),
        "sdpa",
        "FalconForCausalLM does its attention by itself",
    ),
    "bloom would see the future": (
        BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4),
        "eager",
        "BloomForCausalLM does its attention by itself",
    ),
    "gemma2 caps its scores": (Gemma2Config(**SHAPE, head_dim=16), "eager", "refuses packed rows"),
}


@pytest.mark.parametrize("config, attends_by, reason", UNPACKABLE.values(), ids=UNPACKABLE.keys())
def test_a_model_that_cannot_be_packed_is_padded_and_attends_as_transformers_would_have_it(
    config: PretrainedConfig, attends_by: str, reason: str, tmp_path: Path
):
    files = save(config, tmp_path)
    model, choice = load_for_rows(files, torch.float32, "")
    assert choice.layout is Layout.PADDED
    assert reason in choice.reason
    assert model.config._attn_implementation == attends_by
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for scored, item in zip(Scorer(model, choice.layout).token_logprobs(some_items()), some_items(), strict=True):
        np.testing.assert_allclose(scored, direct_logprobs(untouched, item), atol=ROUNDING)


def labelled_items() -> list[Encoded]:
    """Labels of one to four tokens behind prompts of three lengths, and one prompt with a single label."""
    labels = [(9,), (9, 1), (4, 1), (7, 7, 2, 1)]
    prompts = [(5, 6, 7, 8, 9, 10, 11), (6, 5, 8, 7, 9, 11, 10), (12, 13, 14, 15), tuple(range(3, 20))]
    return [Encoded((*prompt, *label), len(prompt)) for label in labels for prompt in prompts] + [Encoded((3, 4, 1), 2)]


CONTINUED = {
    "gpt2 counts positions": PACKABLE["gpt2"],
    "bloom has biases instead of positions": UNPACKABLE["bloom would see the future"][0],
    "falcon": UNPACKABLE["falcon looks its attention up among its own"][0],
    "gemma2 with a window shorter than the prompts": Gemma2Config(**SHAPE, head_dim=16, sliding_window=5),
}


def tokens_read(model: nn.Module) -> list[int]:
    """Return a list that grows by the tokens of each row of each forward pass."""
    seen: list[int] = []
    model.register_forward_hook(
        lambda module, args, inputs, output: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("config", CONTINUED.values(), ids=CONTINUED.keys())
@pytest.mark.parametrize("batch_tokens", [20, 2048])
def test_padded_labels_go_on_from_a_prompt_that_is_read_once(config: PretrainedConfig, batch_tokens: int):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    items = labelled_items()
    expected = [direct_logprobs(model, item) for item in items]
    seen = tokens_read(model)
    found = Scorer(model, Layout.PADDED, batch_tokens).token_logprobs(items)
    for scored, alone in zip(found, expected, strict=True):
        np.testing.assert_allclose(scored, alone, atol=ROUNDING)
    prompts = {item.prompt_ids for item in items}
    longest = max(len(item.completion_ids) for item in items)
    assert sum(seen) <= 1 + sum(map(len, prompts)) + len(items) * longest


def test_padded_labels_behind_a_state_that_cannot_be_kept_are_read_with_their_prompts():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)).eval()
    assert not keeps_prompts(model)
    for scored, item in zip(
        Scorer(model, Layout.PADDED).token_logprobs(labelled_items()), labelled_items(), strict=True
    ):
        np.testing.assert_allclose(scored, direct_logprobs(model, item), atol=ROUNDING)


@pytest.mark.parametrize("method", ["promptTuning", "prefixTuning", "lora"])
def test_padded_labels_behind_a_tuned_prompt_score_as_they_do_alone(method: str, tiny_model_dir: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = prepare_model(base, MethodSpec.model_validate({"type": method}), str(tiny_model_dir)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    items = labelled_items()
    assert keeps_prompts(model)
    scorer = Scorer(model, Layout.PADDED)
    alone = [scorer.token_logprobs([item])[0] for item in items]
    for scored, expected in zip(scorer.token_logprobs(items), alone, strict=True):
        np.testing.assert_allclose(scored, expected, atol=ROUNDING)


def test_batches_do_not_change_the_mean_loss(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation=attention.register())
    losses = [Scorer(model, Layout.PACKED, batch_tokens=size).mean_loss(some_items()) for size in (1, 30, 4096)]
    assert max(losses) - min(losses) <= ROUNDING
