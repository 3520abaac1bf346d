"""How much memory there is, what a forward pass needs of it, and what is said when it is not enough."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune_api.spec import GradientCheckpointing
from finetune_trainer.errors import OutOfMemoryError
from finetune_trainer.memory import (
    available_bytes,
    forget_peak,
    is_out_of_memory,
    kept_bytes,
    memory_errors,
    peak_bytes,
)
from finetune_trainer.settings_map import checkpoints_activations

GIB = 1 << 30
AUTO, ALWAYS, NEVER = GradientCheckpointing
CASES = {
    "always, however much there is": (ALWAYS, 1, 0, 1000, True),
    "never, however little there is": (NEVER, 1000, 0, 1, False),
    "auto: they fit with room to spare": (AUTO, 10 * GIB, 0, 16 * GIB, False),
    "auto: they would fill nearly all": (AUTO, 13 * GIB, 0, 16 * GIB, True),
    "auto: gradients and moments leave too little": (AUTO, 10 * GIB, GIB // 4, 16 * GIB, True),
    "auto: nothing is known to be left": (AUTO, 1, 0, 0, True),
}


@pytest.mark.parametrize("wanted, activations, trainable, available, twice", CASES.values(), ids=CASES.keys())
def test_activations_are_computed_twice_where_they_do_not_fit(
    wanted: GradientCheckpointing, activations: int, trainable: int, available: int, twice: bool
):
    assert checkpoints_activations(wanted, activations, trainable, available) is twice


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
V2 = "sys/fs/cgroup/memory"
V1 = "sys/fs/cgroup/memory/memory"
PLACES = {
    "a machine": ({}, 8000 * 1024),
    "a control group without a limit": ({f"{V2}.max": "max\n", f"{V2}.current": "5\n", f"{V2}.stat": ""}, 8000 * 1024),
    "a control group": (
        {f"{V2}.max": "1000\n", f"{V2}.current": "700\n", f"{V2}.stat": "anon 5\ninactive_file 100\n"},
        400,
    ),
    "a control group of version 1": (
        {
            f"{V1}.limit_in_bytes": "1000\n",
            f"{V1}.usage_in_bytes": "700\n",
            f"{V1}.stat": "inactive_file 1\ntotal_inactive_file 200\n",
        },
        500,
    ),
}


@pytest.mark.parametrize("files, available", PLACES.values(), ids=PLACES.keys())
def test_what_is_left_is_read_from_the_narrowest_limit(
    files: dict[str, str], available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write(tmp_path, MACHINE | files)
    assert available_bytes(tmp_path) == available


def test_what_a_forward_pass_keeps_is_counted_without_the_weights():
    layer = nn.Linear(100, 50)
    rows = torch.ones(8, 100)
    # The product keeps its input, tanh its output; 4 bytes each.
    assert kept_bytes(layer, lambda: torch.tanh(layer(rows)).sum()) == 4 * (8 * 100 + 8 * 50)


def test_nothing_that_was_counted_stays():
    layer = nn.Linear(100, 50)
    outcomes: list[weakref.ref[torch.Tensor]] = []

    def forward() -> torch.Tensor:
        outcome = torch.tanh(layer(torch.ones(8, 100)))
        outcomes.append(weakref.ref(outcome))
        return outcome.sum()

    kept_bytes(layer, forward)
    [kept] = outcomes
    assert kept() is None


def test_counting_draws_no_random_numbers():
    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    before = torch.random.get_rng_state()
    kept_bytes(layer, lambda: layer(torch.ones(2, 4)).sum())
    assert torch.equal(torch.random.get_rng_state(), before)


SHORT = {
    "Python": MemoryError(),
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.mark.parametrize("error", SHORT.values(), ids=SHORT.keys())
def test_every_way_to_be_short_of_memory_is_one_error(error: Exception):
    with (
        pytest.raises(OutOfMemoryError, match=r"a batch did not fit into memory; lower it\."),
        memory_errors("a batch", "lower it"),
    ):
        raise error


def test_another_error_stays_itself():
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors("a batch", "lower it"):
        raise RuntimeError("shapes differ")


def test_a_peak_is_that_since_it_was_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if not forget_peak():
        pytest.skip("this system does not let a process forget its peak")
    before = peak_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_bytes() - before >= 60 << 20
    del block
    assert forget_peak()
    assert peak_bytes() < before + (60 << 20)


def test_where_a_peak_cannot_be_forgotten_it_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not forget_peak(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'",
    ],
)
def test_what_libraries_say_of_memory_is_known(said: str):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
