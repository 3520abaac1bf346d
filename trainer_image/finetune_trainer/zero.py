"""What DeepSpeed has to be told: by Accelerate alone it finds no CPUs, and takes whole models onto GPUs."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn


def join_without_gpu() -> None:
    """Make Accelerate take this process for one of torch's process group, trained by DeepSpeed; undo what was before.

    Left to itself it looks for GPUs, finds none and takes the process for the only one.
    """
    # Imported here: takes seconds, and registers what plain training must not meet.
    import deepspeed.ops
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    from finetune_trainer import zero_without_gpu

    zero_without_gpu.install()

    # Compiled where it runs, and the image has no compiler; gloo does the same.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def spread_weights(model: nn.Module, configuration: Mapping[str, Any]) -> None:
    """Leave each process its part of ``model``'s weights alone, going from tensor to tensor.

    DeepSpeed does the same when training begins, but takes the whole model onto every GPU first.
    """
    import deepspeed

    if configuration["bf16"]["enabled"]:
        # What is spread already, DeepSpeed leaves as it is.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    # It fills in what is left open.
    deepspeed.zero.Init(module=model, config_dict_or_path=copy.deepcopy(dict(configuration)))
