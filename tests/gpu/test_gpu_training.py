"""bfloat16 on GPUs: full, LoRA and QLoRA on one, ZeRO over all. Skipped, with the reason, where there are none."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.report import TrainingReport
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.model import fetch_model, load_model
from finetune_trainer.run import Run
from finetune_trainer.stages import run
from finetune_trainer.train_stage import train_stage
from finetune_trainer.workspace import Workspace

from ..integration.jobs import Silence, tiny_job

GPUS = torch.cuda.device_count()
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "training__learningRate": 1e-3},
    "lora": {"method": {"type": "lora", "lora": {"rank": 4}}},
}

QLORA: dict[str, Any] = {"method": {"type": "qlora", "lora": {"rank": 4}}}

pytestmark = pytest.mark.skipif(GPUS == 0, reason="torch finds no GPU on this machine")


def train(model: Path, folder: Path, **changes: Any) -> tuple[TrainingReport, Workspace]:
    workspace = Workspace(folder / "workspace")
    workspace.root.mkdir()
    job = tiny_job(model, folder, model__dtype="bfloat16", training__precision="bf16", training__maxSteps=20, **changes)
    return train_stage(Run(job, workspace, Silence(), StopFlag())), workspace


def assert_it_learnt(report: TrainingReport, workspace: Workspace) -> None:
    losses = [point.loss for point in report.curve if point.loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    [file] = workspace.tuned.glob("*.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


@pytest.mark.parametrize("method", METHODS)
def test_one_gpu_learns_in_bfloat16(tiny_model_dir: Path, tmp_path: Path, method: str):
    report, workspace = train(tiny_model_dir, tmp_path, compute__gpusPerWorker=1, **METHODS[method])
    assert_it_learnt(report, workspace)
    assert "bfloat16" in report.precision
    assert 0 < report.peak_memory_bytes < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: requirements/gpu.txt"
)
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_one_gpu_learns_beside_a_base_of_four_bits_and_publishes_what_it_evaluated(
    tiny_model_dir: Path, encoder_decoder_dir: Path, tmp_path: Path, task: str
):
    model = {"causal-lm": tiny_model_dir, "seq2seq-lm": encoder_decoder_dir}[task]
    changes = {"training__maxSteps": 20, "output__publishOn": "always"}
    job = tiny_job(model, tmp_path, model__dtype="auto", model__task=task, **QLORA, **changes)
    report = run(job, tmp_path / "workspace", Silence())
    assert_it_learnt(report.training, Workspace(tmp_path / "workspace"))
    assert "4-bit" in report.training.precision
    files = fetch_model(job.spec.model, tmp_path)
    # No weight counts as half.
    whole = load_model(files, torch.float32, None).num_parameters()
    assert report.training.parameters == report.training.trainable_parameters + whole
    [parity] = report.parity
    assert parity.difference <= parity.allowed
    [published] = (tmp_path / "output").rglob("adapter_model.safetensors")
    base = load_model(files, torch.bfloat16, None, four_bit=True)
    kinds = {type(module).__name__ for module in base.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Linear", "Linear4bit"}  # the output layer, T5's wo, and all others
    assert all(torch.isfinite(tensor).all() for tensor in load_file(published).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_gpus_of_one_node_learn_under_zero(tiny_model_dir: Path, tmp_path: Path, method: str, stage: int):
    # With one GPU nothing is spread, but the path is the same.
    compute = {"engine": "ray", "gpusPerWorker": min(GPUS, 4), "deepspeed": {"stage": stage}}
    report, workspace = train(tiny_model_dir, tmp_path, compute=compute, **METHODS[method])
    assert_it_learnt(report, workspace)
