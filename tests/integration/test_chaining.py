"""Jobs that go on from what another job has published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.job import FineTuneJob
from finetune_api.report import ArtifactKind, Progress, Report
from finetune_trainer import stages
from finetune_trainer.errors import DataError, FineTuneError, SpecError
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import verify_manifest, write_manifest
from finetune_trainer.start import fetch_start
from finetune_trainer.storage import Storage

from .conftest import save_tiny_model
from .jobs import tiny_job, write_reviews
from .s3_server import S3Server

LORA = {"type": "lora", "lora": {"rank": 4, "dropout": 0.0}}
NEXT_TO_NOTHING = {"training__maxSteps": 1, "training__learningRate": 1e-9, "training__evalEverySteps": 1}
"""So small a step that the weights stay what they were at the beginning."""


class Silence:
    def report(self, progress: Progress) -> None:
        pass


def run(job: FineTuneJob, folder: Path) -> Report:
    return stages.run(job, folder / "workspace", Silence())


def model_of(report: Report) -> Path:
    return Path(next(one.uri for one in report.artifacts if one.kind is not ArtifactKind.REPORT).removeprefix("file://"))


@pytest.fixture(scope="module")
def general(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What first jobs of several methods have published. Read only."""
    methods: dict[str, dict[str, Any]] = {
        "lora": LORA,
        "full": {"type": "full"},
        "promptTuning": {"type": "promptTuning", "promptTuning": {"virtualTokens": 4}},
    }
    found = {}
    for name, method in methods.items():
        folder = tmp_path_factory.mktemp(f"general-{name}")
        job = tiny_job(tiny_model_dir, folder, method=method, training__maxSteps=4)
        found[name] = model_of(run(job, folder))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


METHODS = {
    "lora": LORA,
    "full": {"type": "full"},
    "selective": {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 1}},
    "promptTuning": {"type": "promptTuning", "promptTuning": {"virtualTokens": 4}},
}


@pytest.mark.parametrize("method", METHODS)
def test_training_begins_with_the_weights_that_the_other_job_has_published(
    general: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, method: str
):
    start = general["full" if method == "selective" else method]
    job = tiny_job(
        tiny_model_dir,
        tmp_path,
        model__startFrom={"source": start.as_uri()},
        method=METHODS[method],
        **NEXT_TO_NOTHING,
    )
    published = model_of(run(job, tmp_path))
    before, after = weights(start), weights(published)
    assert before.keys() == after.keys()
    for name, value in before.items():
        # One step of AdamW moves a weight by about the learning rate.
        assert torch.allclose(value, after[name], atol=1e-7), name
    assert verify_manifest(published).sha256 != verify_manifest(start).sha256
