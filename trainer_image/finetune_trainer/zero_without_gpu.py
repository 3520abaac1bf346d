"""ZeRO 1 and 2 as CPUs like it: steps ask for less new memory, those of stage 2 for none as large as the weights.

DeepSpeed suits the allocator of GPUs, which gives at once what it got back. The kernel of a CPU clears every page of a
large tensor anew, and each step had several as large as the weights: gradients laid out anew, their copy in float64 for
a norm, gloo's of all weights that it gathers. On two workers that was a third of a step (docs/performance.md).

Importing this takes seconds and registers what plain training must not meet.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.runtime.engine
import torch
from deepspeed.runtime.zero import stage_1_and_2
from torch import distributed

_PIECE = 1_000_000
"""Numbers of a gradient that are copied at once: 8 MB in float64, which malloc gives again."""


class FrugalZero(stage_1_and_2.DeepSpeedZeroOptimizer):  # type: ignore[misc] # deepspeed is untyped
    """Adds gradients up in one buffer for this worker's share of them, which it keeps.

    DeepSpeed does so itself where gradients are added up in another type than that of the weights.
    """

    @property
    def _keeps_share(self) -> bool:
        return bool(self.partition_gradients) and not self.cpu_offload

    def _use_compact_grad_partition_buffer(self, group: int) -> bool:
        return self._keeps_share or bool(super()._use_compact_grad_partition_buffer(group))

    def _build_compact_grad_partition_buffer(self, group: int) -> Any:
        shares: dict[int, Any] = self.__dict__.setdefault("_shares", {})
        if group in shares:
            shares[group].flat_partition.zero_()
        else:
            shares[group] = super()._build_compact_grad_partition_buffer(group)
        return shares[group]

    def get_grad_norm_direct(
        self, gradients: Sequence[torch.Tensor], params: Sequence[torch.nn.Parameter], norm_type: float = 2
    ) -> torch.Tensor:
        """Return the norm in float64, as DeepSpeed does, of pieces whose copies find room in memory that was used."""
        whole = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pieces = [
            (piece, param)
            for gradient, param in zip(whole, params, strict=False)
            for piece in torch.split(gradient.reshape(-1), _PIECE)
        ]
        norm: torch.Tensor = super().get_grad_norm_direct(
            [piece for piece, _ in pieces], [param for _, param in pieces], norm_type
        )
        return norm

    def copy_grads_in_partition(self, param: torch.nn.Parameter, group_idx: int | None = None) -> None:
        """Let go of a gradient that has been added."""
        if self._keeps_share:
            self.clear_grad_attribute(param)
        else:
            super().copy_grads_in_partition(param, group_idx)


def exchange_shares(
    groups_flat: Sequence[torch.Tensor],
    partitioned_param_groups: Sequence[Sequence[torch.Tensor]],
    dp_process_group: Sequence[distributed.ProcessGroup],
    start_alignment_factor: int,
    allgather_bucket_size: int,
) -> None:
    """Give every worker all weights, each share sent from where it lies to where it belongs.

    In place of `deepspeed.runtime.utils.all_gather_dp_groups`: gloo gathers into memory of its own, as much as all
    weights take, and copies it out.
    """
    for shares, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        sent = [
            distributed.broadcast(share, group=group, group_src=owner, async_op=True)
            for owner, share in enumerate(shares)
        ]
        for work in filter(None, sent):
            work.wait()


def install() -> None:
    """Make DeepSpeed work this way for the rest of the process."""
    deepspeed.runtime.engine.DeepSpeedZeroOptimizer = FrugalZero
    stage_1_and_2.all_gather_dp_groups = exchange_shares
