"""bfloat16 on GPUs: full and LoRA on one, ZeRO over all of them. Skipped, with the reason, where there are none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.report import Progress, TrainingReport
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.stages import Run, train_stage
from finetune_trainer.workspace import Workspace

from ..integration.jobs import tiny_job

GPUS = torch.cuda.device_count()
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "training__learningRate": 1e-3},
    "lora": {"method": {"type": "lora", "lora": {"rank": 4}}},
}

pytestmark = pytest.mark.skipif(GPUS == 0, reason="torch finds no GPU on this machine")


class Silence:
    def report(self, progress: Progress) -> None:
        pass


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_gpus_of_one_node_learn_under_zero(tiny_model_dir: Path, tmp_path: Path, method: str, stage: int):
    # With one GPU nothing is spread, but the path is the same.
    compute = {"engine": "ray", "gpusPerWorker": min(GPUS, 4), "deepspeed": {"stage": stage}}
    report, workspace = train(tiny_model_dir, tmp_path, compute=compute, **METHODS[method])
    assert_it_learnt(report, workspace)
