"""Which checkpoints several nodes store, each of which uploads at its own pace."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.errors import Preempted
from finetune_trainer.sealing import Sealing

STEPS = range(1, 31)


class Table:
    """Where the nodes meet behind every step."""

    def __init__(self, nodes: int) -> None:
        self._flags: list[bool] = [False] * nodes
        self._met = threading.Barrier(nodes)

    def any(self, node: int, flag: bool) -> bool:
        """Whether ``flag`` is set on some node."""
        self._flags[node] = flag
        self._met.wait(30)
        answer = any(self._flags)
        self._met.wait(30)
        return answer


class Network:
    """Lets the upload of a node go on when it has been asked as often as ``asks`` says."""

    def __init__(self, asks: int) -> None:
        self._asks = asks
        self._left = threading.Semaphore(0)
        self.stored: list[int] = []

    def push(self, folder: Path, step: int) -> None:
        for _ in range(self._asks):
            assert self._left.acquire(timeout=30)
        self.stored.append(step)

    def tick(self) -> None:
        self._left.release()


def stored_by_a_node(folder: Path, table: Table, node: int, network: Network, is_stopped: bool) -> list[int]:
    """Train one of several nodes, which is stopped behind its last step, and return which steps it has stored."""
    group = SimpleNamespace(is_first_of_node=True, any=lambda flag: table.any(node, flag))
    job = SimpleNamespace(spec=SimpleNamespace(checkpoint=SimpleNamespace(keep=2)))
    made: Any = SimpleNamespace(output_dir=folder / "checkpoints")
    with pytest.raises(Preempted), CheckpointUpload(folder / "uploads", network.push) as upload:
        given: Any = SimpleNamespace(group=group, job=job, upload=upload)
        sealing = Sealing(given)
        for step in STEPS:
            checkpoint = made.output_dir / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "shard").write_text("weights")
            stops = is_stopped and step == STEPS[-1]
            sealing.on_save(made, TrainerState(global_step=step), TrainerControl(should_training_stop=stops))
            network.tick()
        for _ in range(3 * len(STEPS)):
            network.tick()
        raise Preempted("stopped")
    return network.stored


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "killed"])
@pytest.mark.parametrize("asks", [(0, 1), (2, 3), (7, 1)], ids=str)
def test_nodes_store_the_same_checkpoints_however_slow_each_of_them_is(
    tmp_path: Path, threads: ThreadPoolExecutor, asks: tuple[int, int], is_stopped: bool
):
    table = Table(2)
    nodes = [
        threads.submit(stored_by_a_node, tmp_path / str(node), table, node, Network(each), is_stopped)
        for node, each in enumerate(asks)
    ]
    first, second = (node.result(60) for node in nodes)
    assert first == second != []
    assert not is_stopped or first[-1] == STEPS[-1]
