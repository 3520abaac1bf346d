"""A job whose adapter does nothing, or whose files are not the evaluated model, fails and publishes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.report import ExitCode, Stage
from finetune_trainer import publish_stage, stages
from finetune_trainer.errors import ParityError, SpecError
from finetune_trainer.manifest import write_manifest

from .jobs import Silence, tiny_job

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"output__merge": True},
    "full": {"method": {"type": "full"}},
    "prompt tuning": {"method": {"type": "promptTuning", "promptTuning": {"virtualTokens": 4}}},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_published_files_are_the_model_that_was_evaluated(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    report = stages.run(tiny_job(tiny_model_dir, tmp_path, **changes), tmp_path / "work", Silence())
    assert [one.kind for one in report.parity] == [one.kind for one in report.artifacts]
    assert all(one.difference <= one.allowed for one in report.parity)
    assert report.evaluation is not None
    assert report.evaluation.probe is not None
    assert report.evaluation.probe.effect > 0


def test_an_adapter_that_does_nothing_fails_the_job(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_model_dir, tmp_path)
    run = tmp_path / "work"
    stages.run_one(Stage.CHECK, job, run, Silence())
    stages.run_one(Stage.TRAIN, job, run, Silence())
    weights = run / "tuned" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    write_manifest(run / "tuned", json.loads((run / "tuned" / "MANIFEST.json").read_text()).get("about", {}))
    result = stages.run_one(Stage.EVALUATE, job, run, Silence())
    assert result.exit_code is ExitCode.BAD_SPEC
    assert "tuning had no effect" in result.message
    with pytest.raises(SpecError, match="tuning had no effect"):
        stages.run(job, run, Silence())
    assert not list((tmp_path / "output").rglob("COMPLETE"))


@pytest.mark.parametrize("name", ["model", "merged"])
def test_files_that_changed_on_their_way_are_not_published(
    tiny_model_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = publish_stage.export_model

    def damage(*arguments: Any, merge: bool, licence: str | None) -> None:
        written(*arguments, merge=merge, licence=licence)
        folder: Path = arguments[-1]
        if folder.name == name:
            weights = folder / ("model.safetensors" if merge else "adapter_model.safetensors")
            save_file({key: tensor * 0.5 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})

    monkeypatch.setattr(publish_stage, "export_model", damage)
    job = tiny_job(tiny_model_dir, tmp_path, output__merge=True)
    with pytest.raises(ParityError, match="does not answer as the evaluated model does"):
        stages.run(job, tmp_path / "work", Silence())
    assert not list((tmp_path / "output").rglob("COMPLETE"))
