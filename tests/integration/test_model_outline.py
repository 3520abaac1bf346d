"""What is found from a model's small files alone, before a weight is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig

from finetune_trainer.errors import DataError, OutOfMemoryError
from finetune_trainer.model import (
    ModelFiles,
    find_broken_tensors,
    load_model,
    outline_model,
    position_limit,
    read_config,
)


@pytest.fixture
def files(tiny_model_dir: Path, tmp_path: Path) -> ModelFiles:
    """Return a copy of the tiny model that may be spoilt."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return ModelFiles(tmp_path / "model", "0")


def change_config(files: ModelFiles, **values: object) -> None:
    file = files.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(files: ModelFiles, **values: torch.Tensor) -> None:
    file = files.path / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in values.items()}
    save_file(tensors, file, {"format": "pt"})


def test_an_outline_has_names_and_shapes_and_no_weights(files: ModelFiles):
    outline, model = outline_model(files), load_model(files, torch.float32, None)
    assert {name: tensor.shape for name, tensor in outline.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in outline.parameters())


WRONG_VALUES = {
    "text for a number": ({"hidden_size": "wide"}, ("hidden_size", "'wide'")),
    "a fraction for a count": ({"vocab_size": 3.5}, ("vocab_size", "3.5")),
    "heads that do not divide the width": ({"num_attention_heads": 5}, ("(64)", "(5)")),
    "no heads": ({"num_attention_heads": 0}, ("config.json holds a wrong value",)),
    "an activation nobody knows": ({"hidden_act": "twist"}, ("'twist'",)),
    "a negative width": ({"hidden_size": -4}, ("-4",)),
    "an unknown kind of positions": ({"rope_parameters": {"rope_type": "knot", "rope_theta": 1e4}}, ("'knot'",)),
}


@pytest.mark.parametrize("values, words", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_a_wrong_value_in_config_json_is_named(files: ModelFiles, values: dict[str, object], words: tuple[str, ...]):
    change_config(files, **values)
    with pytest.raises(DataError, match=r"config\.json.*Copy the file again") as caught:
        outline_model(files)
    assert all(word in str(caught.value) for word in words)


def test_weights_of_another_shape_are_named_without_being_loaded_and_counted_beyond_three(files: ModelFiles):
    change_config(files, intermediate_size=96)
    with pytest.raises(
        DataError, match=r"down_proj.weight \(\[64, 128\] instead of \[64, 96\]\).* and 3 more\."
    ) as caught:
        outline_model(files)
    assert len(str(caught.value)) < 600


def test_a_tensor_too_many_is_named(files: ModelFiles):
    change_weights(files, extra=torch.ones(2))
    with pytest.raises(DataError, match="they hold, unknown to the architecture, extra"):
        outline_model(files)


def test_tensors_that_are_no_numbers_are_found(files: ModelFiles):
    assert find_broken_tensors(files) == []
    change_weights(files, model__norm__weight=torch.full((64,), float("nan")))
    assert find_broken_tensors(files) == ["model.norm.weight"]


LIMITS = {
    "a table of positions": (GPT2Config(n_positions=48), 48),
    "rotations": (LlamaConfig(max_position_embeddings=77), 77),
    "none": (BloomConfig(), None),
}


@pytest.mark.parametrize("config, limit", LIMITS.values(), ids=LIMITS.keys())
def test_how_many_tokens_a_model_can_place_is_read_from_its_config(config: PretrainedConfig, limit: int | None):
    assert position_limit(config) == limit


def test_the_limit_survives_the_file(files: ModelFiles):
    assert position_limit(read_config(files)) == 512


def test_weights_larger_than_the_memory_are_named(files: ModelFiles, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        # As torch words it on a CPU.
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("finetune_trainer.model.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(OutOfMemoryError, match=r"the model in .* did not fit into memory; choose a smaller model"):
        load_model(files, torch.float32, None)
