"""The memory of one of two processes that train together, as torch's profiler sees it.

    python -m tests.integration.memory_of_two RANK FOLDER...

is one of the two, without Ray around it: one after the other it trains the job in each folder's ``job.json`` on `ROWS`.
The first of them leaves in ``peak`` how many bytes its tensors had when they had most.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from torch import distributed
from torch.profiler import ProfilerActivity, profile

from finetune_api.job import load_job
from finetune_api.resolve import resolve
from finetune_trainer.example import Encoded
from finetune_trainer.mixture import TaskRows, plan_mixture
from finetune_trainer.model import fetch_model
from finetune_trainer.process_group import ProcessGroup
from finetune_trainer.train import train_here
from finetune_trainer.training_input import TrainingInput
from finetune_trainer.workspace import Workspace

from .jobs import Silence

ROWS = [Encoded(tuple([row, *range(1, 150)]), 90) for row in range(8)]
JOB, PEAK = "job.json", "peak"


def allocations(profiler: profile) -> Iterator[int]:
    """Yield the bytes of everything that was allocated and, negative, freed."""
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()


def measured_peaks(folders: Sequence[Path]) -> list[int]:
    """Return what the first of two processes that train the jobs in ``folders`` held of each when it held most."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, rank, *map(str, folders)],
            cwd=Path(__file__).parents[2],
            env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in both] == [0, 0]
    return [int((folder / PEAK).read_text()) for folder in folders]


def train(folder: Path, group: ProcessGroup) -> int:
    """Train the job in ``folder`` and return how many bytes were alive when most were."""
    path = folder / JOB
    job = resolve(load_job(path.read_text(), path.name))
    workspace = Workspace(folder / "workspace")
    files = fetch_model(job.spec.model, workspace.models)
    mixture = plan_mixture([TaskRows("rows", range(len(ROWS)))], job.spec.data.mixing, seed=1)
    given = TrainingInput(job, files, ROWS, mixture, {}, workspace, Silence(), threading.Event(), group=group)
    # The weights are loaded under it as well.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_here(given)
    return max(accumulate(allocations(profiler)))


def main(rank: int, folders: Sequence[Path]) -> None:
    """Meet the other process and train with it."""
    distributed.init_process_group("gloo", init_method=(folders[0] / "meeting").as_uri(), rank=rank, world_size=2)
    group = ProcessGroup.joined()
    for folder in folders:
        peak = train(folder, group)
        if group.is_first:
            (folder / PEAK).write_text(str(peak))


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
