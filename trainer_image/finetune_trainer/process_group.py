"""The processes that train one model together, seen from one of them. Alone, it needs nobody to agree with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Every method that asks the others must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of its node, which share a disk."""
    node: int = 0
    nodes: int = 1

    @classmethod
    def joined(cls, environment: Mapping[str, str] = os.environ) -> "ProcessGroup":
        """Return the group that this process was put into, by the variables that torch's launchers set."""
        node = int(environment["NODE_RANK"])
        everybody: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everybody, node)
        return cls(
            rank=distributed.get_rank(),
            size=len(everybody),
            local_rank=int(environment["LOCAL_RANK"]),
            node=node,
            nodes=len(set(everybody)),
        )

    @property
    def is_first(self) -> bool:
        """Whether this process does what one of all does."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what one of each node does."""
        return self.local_rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in some process."""
        if self.size == 1:
            return flag
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        flags = torch.tensor([int(flag)], device=device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags.item())

    def from_first(self, value: T) -> T:
        """Return what the first process gives."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def from_first_of_node(self, value: T) -> T:
        """Return what the first process of this node gives."""
        if self.size == 1:
            return value
        everything: list[Any] = [None] * self.size
        distributed.all_gather_object(everything, (self.node, self.local_rank, value))
        return next(cast(T, given) for node, local_rank, given in everything if (node, local_rank) == (self.node, 0))

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            distributed.barrier()
