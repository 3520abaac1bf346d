"""How much memory is left, and what is said when it was not enough."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from finetune_trainer.errors import OutOfMemoryError

_CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and details of this process's control group, version 2 and 1."""


@contextlib.contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn every way in which Python and torch say that memory is short into one error.

    Raises:
        OutOfMemoryError: ``what`` did not fit; ``remedy`` completes the sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{what} did not fit into memory; {remedy}.") from error


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    # Of what a GPU's libraries take beside torch's own allocator.
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is about memory; on a CPU torch says so in a RuntimeError's text alone."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in _OUT_OF_MEMORY)


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return how much ``forward`` keeps for a backward pass besides the model's own parameters.

    Random numbers that it draws are drawn again afterwards.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # An operation that keeps its own outcome would else keep itself alive, and with it all that was before.
        return tensor.detach()

    with torch.random.fork_rng(), torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        outcome = forward()  # holds what is kept, so that no two tensors have the same address
    del outcome
    return sum(kept.values())


def forget_peak(root: Path = Path("/")) -> bool:
    """Begin to measure `peak_bytes` anew, and return whether that is possible here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        # Linux, proc_pid_clear_refs(5): the peak of the resident set becomes what it is now.
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(root: Path = Path("/")) -> int:
    """Return the largest memory since `forget_peak`: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = (root / "proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that training can still have: of the GPU where there is one, else of this process.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return min(_of_machine(root), *(_of_cgroup(root, *names) for names in _CGROUPS))


_UNLIMITED = 1 << 62


def _of_machine(root: Path) -> int:
    file = root / "proc/meminfo"
    if not file.is_file():  # no Linux: whoever runs there is asked to set what does not fit
        return _UNLIMITED
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _of_cgroup(root: Path, limit: str, use: str, details: str) -> int:
    if not (root / limit).is_file():
        return _UNLIMITED
    text = (root / limit).read_text().strip()
    if text == "max":
        return _UNLIMITED
    statistics = dict(line.split() for line in (root / details).read_text().splitlines())
    # Files read once are counted as used and given back when memory is asked for.
    reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return max(0, int(text) - int((root / use).read_text()) + reclaimable)
