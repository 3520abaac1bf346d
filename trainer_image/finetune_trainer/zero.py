"""DeepSpeed where there is no GPU, as Accelerate and DeepSpeed itself hardly expect it."""

import os

from accelerate import PartialState
from accelerate.state import AcceleratorState


def ask_for_huge_pages() -> None:
    """Have torch ask for pages of 2 MB, before it has any tensor of that size.

    DeepSpeed lays gradients out in new memory at every step; touched in pages of 4 KB that is a fifth of a step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def join_without_gpu() -> None:
    """Make Accelerate take this process for one of torch's process group, trained by DeepSpeed; undo what was before.

    Left to itself it looks for GPUs, finds none and takes the process for the only one.
    """
    # Imported here: takes seconds, and registers what plain training must not meet.
    import deepspeed.ops
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    # Compiled where it runs, and the image has no compiler; gloo does the same.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
