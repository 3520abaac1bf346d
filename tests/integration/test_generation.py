"""Greedy answers of the tiny model: as its own logits say, whatever the batch, and with PEFT methods in place."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.generation import generate

from .conftest import SENTENCES

Ids = tuple[int, ...]

# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEXTS = (
    "The food was",
    "It broke",
    "Question: what is the capital of France? Answer:",
    "Great phone, the battery",
    "W",
    "The food",
)


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in tokenizer(list(TEXTS), add_special_tokens=False)["input_ids"]]


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], **changes: object
) -> list[str]:
    arguments = {
        "max_new_tokens": 8,
        "end_token_ids": (tokenizer.eos_token_id,),
        "batch_size": 2,
        "on_progress": lambda done, total: None,
    }
    return generate(model, tokenizer, prompts, **(arguments | changes))


def ids_by_hand(model: nn.Module, prompt: Ids, ends: set[int], steps: int = 8) -> list[int]:
    """Return the greedy answer found by running the whole text again for every token, alone and without a cache."""
    ids = list(prompt)
    model.eval()
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def by_hand(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], *ends: int) -> list[str]:
    """Return the answers by hand as text; the tokenizer's end token ends them unless ``ends`` says otherwise."""
    return [
        tokenizer.decode(ids_by_hand(model, prompt, set(ends or (tokenizer.eos_token_id,))), skip_special_tokens=True)
        for prompt in prompts
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_answers_are_the_greedy_ones_in_the_order_of_the_prompts(model, tokenizer, prompts, batch_size):
    expected = by_hand(model, tokenizer, prompts)
    assert len(set(expected)) > 1
    assert answers(model, tokenizer, prompts, batch_size=batch_size) == expected


def test_an_answer_ends_before_any_of_the_end_tokens(model, tokenizer, prompts):
    free = ids_by_hand(model, prompts[0], set())
    ends = (tokenizer.eos_token_id, free[3])
    found = answers(model, tokenizer, prompts, end_token_ids=ends)
    assert found == by_hand(model, tokenizer, prompts, *ends)
    assert found[0] == tokenizer.decode(free[: free.index(free[3])])


def test_the_models_own_sampling_settings_are_not_used(model, tokenizer, prompts):
    expected = answers(model, tokenizer, prompts)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=400, repetition_penalty=9.0, min_new_tokens=3)
    assert answers(model, tokenizer, prompts) == expected


def test_a_model_left_in_training_mode_answers_without_dropout(model, tokenizer, prompts):
    expected = answers(model, tokenizer, prompts)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.9))
    nn.init.zeros_(tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    tuned.train()
    assert answers(tuned, tokenizer, prompts) == expected


def test_a_soft_prompt_is_in_front_of_every_answer(model, tokenizer, prompts):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(model, config)
        nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight, std=0.5)
    expected = by_hand(tuned, tokenizer, prompts)
    assert answers(tuned, tokenizer, prompts) == expected
    with tuned.disable_adapter():
        base = answers(tuned, tokenizer, prompts)
    assert base == answers(model, tokenizer, prompts)
    assert base != expected


def beams_by_hand(model: nn.Module, prompt: Ids, width: int, steps: int) -> list[int]:
    """Return the likeliest answer of a beam search by whole forward passes; no answer ends."""
    model.eval()
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, said in beams:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1]
            best = logits.float().log_softmax(-1).topk(width)
            longer += [
                (score + value, [*said, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(longer, reverse=True)[:width]
    return beams[0][1]


PEFT = {
    "whole": None,
    "promptTuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefixTuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT.keys())
def test_beams_find_what_a_search_by_hand_finds(model, tokenizer, prompts, config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        asked = model if config is None else get_peft_model(model, config)
    # Random models hardly ever say it; where one does, the answers differ.
    never = len(tokenizer) - 1
    expected = [tokenizer.decode(beams_by_hand(asked, prompt, 4, 6), skip_special_tokens=True) for prompt in prompts]
    found = answers(asked, tokenizer, prompts, end_token_ids=(never,), max_new_tokens=6, num_beams=4)
    assert found == expected
    assert found != answers(asked, tokenizer, prompts, end_token_ids=(never,), max_new_tokens=6), "greedy misses some"


def test_the_same_base_gives_the_same_answers_whatever_the_method(tiny_model_dir, tokenizer):
    """In bfloat16 a batch's other rows move a row's numbers: the base is put into the same batches by every method."""
    ids = tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"]
    prompts = [tuple(ids[start : start + 3 + start % 7]) for start in range(48)]
    base = []
    for config in (
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
        tuned = get_peft_model(model, config)
        with tuned.disable_adapter():
            base.append(answers(tuned, tokenizer, prompts, batch_size=16, max_new_tokens=24))
    assert base[0] == base[1]


def test_progress_counts_answers(model, tokenizer, prompts):
    seen: list[tuple[int, int]] = []
    answers(model, tokenizer, prompts, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_no_prompts_have_no_answers(model, tokenizer):
    assert answers(model, tokenizer, []) == []
