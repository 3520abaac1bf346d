"""A base of 4 bits, on a CPU: the numbers of arXiv:2305.14314 by hand, and a job that trains beside it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_api.spec import LoraSpec, MethodSpec, MethodType
from finetune_trainer import stages, train
from finetune_trainer.methods import prepare_model
from finetune_trainer.model import ModelFiles, load_model
from finetune_trainer.run import output_prefix

from ..integration.conftest import CONTEXT_LENGTH, make_tokenizer, save_tiny_encoder_decoder, save_tiny_model
from ..integration.jobs import Silence, tiny_job

IDS = torch.tensor([[5, 77, 130, 31, 17, 29, 66, 4]])

ROUNDING = 2**-5
"""bfloat16 keeps 8 bits, of which sums in another order lose up to three on the way through these layers."""

# Appendix E of the paper.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

QLORA: dict[str, Any] = {"type": "qlora", "lora": {"rank": 4, "dropout": 0.1}}
TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq-lm"}
"""What is trained here, by the model."""


def save_tiny_gpt2(folder: Path) -> Path:
    """Write a random GPT-2, whose weights lie transposed."""
    tokenizer = make_tokenizer(None)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_LENGTH, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(17)
        config = GPT2Config(**sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# No layer is narrower than the 64 weights of a block.
SAVE: dict[str, Callable[[Path], Path]] = {
    "llama": save_tiny_model,
    "gpt2": save_tiny_gpt2,
    "t5": partial(save_tiny_encoder_decoder, head_width=16),
}


@pytest.fixture(scope="module", params=SAVE)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles(SAVE[request.param](tmp_path_factory.mktemp(request.param)), request.param)


def nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    return levels[(numbers[..., None] - levels).abs().argmin(-1)]


def levels_of_constants() -> Tensor:
    """Return what a byte can say: a sign, a power of ten, and with the bits that are left a number in 0.1 to 1.

    The dynamic data type of arXiv:2110.02861, section 2.1.
    """
    levels = torch.tensor([0.0, 1.0])
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        numbers = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)
        levels = torch.cat([levels, numbers, -numbers])
    return levels.sort().values


def in_four_bits(weight: Tensor) -> Tensor:
    """Return what is left of ``weight`` in blocks of 64 with constants that are quantised in blocks of 256."""
    blocks = weight.float().reshape(-1, 64)
    constants = blocks.abs().amax(1)
    mean = constants.mean()
    rest = functional.pad(constants - mean, (0, -len(constants) % 256)).view(-1, 256)
    largest = rest.abs().amax(1, keepdim=True)
    kept = (nearest(rest / largest, levels_of_constants()) * largest).flatten()[: len(constants)] + mean
    return (nearest(blocks / constants[:, None], LEVELS) * kept[:, None]).reshape(weight.shape).bfloat16()


def by_hand(files: ModelFiles) -> PreTrainedModel:
    """Return the whole model with linear layers, but the output's and T5's second ones, as 4 bits leave them."""
    model = load_model(files, torch.bfloat16, None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in ("lm_head", "wo"):
            weight = module.weight.data
            weight.copy_(in_four_bits(weight.T).T if isinstance(module, Conv1D) else in_four_bits(weight))
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, labels=IDS).logits.float()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING * expected.abs().max().item())


def test_the_base_answers_with_the_weights_that_the_paper_leaves(files: ModelFiles):
    base = load_model(files, torch.bfloat16, None, four_bit=True)
    expected = logits_of(by_hand(files))
    assert_close(logits_of(base), expected)
    with pytest.raises(AssertionError):
        assert_close(logits_of(load_model(files, torch.bfloat16, None)), expected)


def with_adapter(base: PreTrainedModel, method: MethodType, files: ModelFiles) -> nn.Module:
    torch.manual_seed(17)
    model = prepare_model(base, MethodSpec(type=method, lora=LoraSpec(rank=4)), str(files.path))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero at first, and then lora_A has no gradient
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_an_adapter_has_the_gradients_that_it_has_beside_these_weights(files: ModelFiles):
    base = load_model(files, torch.bfloat16, None, four_bit=True)
    found = gradients(with_adapter(base, MethodType.QLORA, files).eval())
    expected = gradients(with_adapter(by_hand(files).float(), MethodType.LORA, files).eval())
    assert found.keys() == expected.keys()
    assert all(".lora_" in name for name in found)
    for name, gradient in expected.items():
        # Backwards they go through the layers once more. Beside whole weights they are off by 0.16 and more.
        assert (found[name] - gradient).norm() < 2 * ROUNDING * gradient.norm(), name


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's, under the names that they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def test_a_job_moves_the_adapter_alone_and_publishes_what_it_trained(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: list[nn.Module] = []

    def keep(*given: Any) -> nn.Module:
        trained.append(prepare_model(*given))
        return trained[-1]

    monkeypatch.setattr(train, "prepare_model", keep)
    changes = {"training__maxSteps": 20, "model__task": TASKS[files.revision], "model__dtype": "auto"}
    job = tiny_job(files.path, tmp_path, method=QLORA, **changes)
    report = stages.run(job, tmp_path / "workspace", Silence())
    losses = [point.loss for point in report.training.curve if point.loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    [parity] = report.parity
    assert parity.difference <= parity.allowed

    (tuned,) = trained
    fresh = load_model(files, torch.bfloat16, None, four_bit=True)
    base = logits_of(fresh)
    left = own_parameters(tuned)
    for name, parameter in own_parameters(fresh).items():
        torch.testing.assert_close(left.pop(name), parameter, rtol=0, atol=0, check_dtype=False)
    assert not left
    published = PeftModel.from_pretrained(fresh, str(tmp_path / "output" / output_prefix(job) / "model"))
    assert_close(logits_of(published), logits_of(tuned))
    with pytest.raises(AssertionError):
        assert_close(base, logits_of(tuned))
