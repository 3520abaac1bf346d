"""What a training run will need, worked out from the model's config alone: no weights are read, nothing is computed.

One micro-batch is run forward and backward on tensors without contents (torch's FakeTensorMode), so the numbers come
from the same model code, layout and method as training's own, whatever the architecture.
"""

import math
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from finetune_api.job import FineTuneJob
from finetune_api.spec import (
    DType,
    FineTuneJobSpec,
    MethodType,
    Precision,
    RegularizationType,
    computes_twice_anyway,
    evaluates_only,
)
from finetune_api.spec.compute import gpu_memory_bytes, processes, zero_stage
from finetune_api.spec.field import amount
from finetune_api.status import MemoryStatus, PlanStatus, figure
from finetune_trainer import attention
from finetune_trainer.data_parallel import BUCKET_BYTES
from finetune_trainer.encoder_decoder import decoder_start
from finetune_trainer.example import Encoded
from finetune_trainer.fit import check_task, row_length
from finetune_trainer.gpu_room import hold_against_gpu, in_gib
from finetune_trainer.layout import Batch, Layout, build_batch, forward
from finetune_trainer.location import Mounts
from finetune_trainer.methods import count_parameters, prepare_model, why_padded
from finetune_trainer.model import build_model, fetch_small_files, position_limit, read_config_in
from finetune_trainer.precision import PrecisionChoice, choose_precision, decide_precision
from finetune_trainer.quantization import outline_four_bits
from finetune_trainer.regularization import copies_bytes, divergence, trained_bytes
from finetune_trainer.settings_map import Steps, plan_steps
from finetune_trainer.storage import Storage
from finetune_trainer.zero_memory import Alone, spread

RUNTIME_BYTES = 1_200_000_000
"""What Python, torch and ray take of a process's memory before anything is loaded: measured 0.9 to 1.1 GB."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the rows are like."""

    rows: int
    """To train on."""
    longest: Sequence[Encoded]
    """The longest of them, longest first: as many as a micro-batch may hold, or all."""


def whole_rows(tokens: int, rows: int, start: int | None = None) -> Workload:
    """Return a workload whose every row has ``tokens`` tokens, all of them learnt: the most that a job may meet.

    ``start`` is what an encoder-decoder model's decoder begins with: as many tokens are read then, and as many learnt.
    """
    prompt = 0 if start is None else tokens
    # No two begin alike: packed rows would share what they have in common.
    return Workload(
        rows,
        [Encoded((number, *range(1, prompt + tokens)), prompt, decoder_start=start) for number in range(min(rows, 64))],
    )


def plan_run(
    spec: FineTuneJobSpec,
    config: PretrainedConfig,
    workload: Workload,
    precision: PrecisionChoice,
    *,
    tokenizer_path: str,
    gpus: int,
) -> PlanStatus:
    """Return parameters, memory of one worker by term, and what may not be what was meant.

    Args:
        spec: the resolved spec.
        config: the base model's.
        workload: the rows, or what they may be.
        precision: what the workers will compute in.
        tokenizer_path: folder of the base model's tokenizer, which the first text of a soft prompt needs.
        gpus: over all workers; 0 trains on the CPU.
    """
    alone: dict[tuple[object, ...], Alone] = {}

    def planned(asked: FineTuneJobSpec) -> PlanStatus:
        longest = len(workload.longest[0].ids)
        steps = plan_steps(asked.training, workload.rows, longest, processes(asked.compute), zero_stage(asked.compute))
        # Nothing else that is asked for again changes what one process would hold by itself.
        gradients = _keeps_gradients(asked, steps), _fills_buckets(asked, steps)
        of = steps.micro_batch, gradients, computes_twice_anyway(asked), _is_all_bfloat16(asked, precision)
        if of not in alone:
            alone[of] = _plan_alone(asked, config, workload, precision, tokenizer_path, gpus, steps)
        plan = spread(alone[of], asked, steps.workers)
        return plan if plan.memory is None else plan.model_copy(update={"warnings": _warnings(asked, plan)})

    return hold_against_gpu(planned(spec), spec, planned)


def _plan_alone(
    spec: FineTuneJobSpec,
    config: PretrainedConfig,
    workload: Workload,
    precision: PrecisionChoice,
    tokenizer_path: str,
    gpus: int,
    steps: Steps,
) -> Alone:
    model = _built(spec, config, precision, tokenizer_path)
    parameters, trainable = count_parameters(model)
    plan = PlanStatus(
        parameters=parameters,
        trainable_parameters=trainable,
        trainable_percent=figure(100 * trainable / parameters),
        gpus=gpus,
        gpu_memory_bytes=gpu_memory_bytes(spec.compute),
        micro_batch_size=steps.micro_batch,
    )
    all_bfloat16 = _is_all_bfloat16(spec, precision)
    largest = max(parameter.numel() for parameter in model.parameters())
    largest_trained = max((parameter.numel() for parameter in model.parameters() if parameter.requires_grad), default=0)
    copies = _copies(spec, model, on_gpu=gpus > 0)
    reason = ""
    for layout in (Layout.PADDED,) if why_padded(spec) else (Layout.PACKED, Layout.PADDED):
        try:
            _set_attention(_root(model), layout)
            memory = _memory(model, workload.longest[: steps.micro_batch], layout, precision, spec, steps)
            plan = plan.model_copy(update={"memory": memory.model_copy(update={"copies": copies})})
            return Alone(plan, largest, largest_trained, all_bfloat16)
        except _CANNOT_FOLLOW as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            # It is no outline any more: its parameters have been given form.
            model = _built(spec, config, precision, tokenizer_path)
    unknown = f"the memory is not planned: the model cannot be followed without its weights ({reason})."
    return Alone(plan.model_copy(update={"warnings": (unknown,)}), largest, largest_trained, all_bfloat16)


_CANNOT_FOLLOW = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that refuses packed rows, or looks at values where there are none."""


def _built(
    spec: FineTuneJobSpec, config: PretrainedConfig, precision: PrecisionChoice, tokenizer_path: str
) -> nn.Module:
    with torch.device("meta"):
        base = build_model(config, precision.weights)
    if precision.four_bit:
        outline_four_bits(base)
    return prepare_model(base, spec.method, tokenizer_path)


def _set_attention(root: PreTrainedModel, layout: Layout) -> None:
    """Let the model attend as `load_for_rows` has it for that layout."""
    if layout is Layout.PADDED:
        attention.give_back(root)
    elif attention.is_taken_by(root):
        root.set_attn_implementation(attention.register())
    else:
        raise TypeError(f"{type(root).__name__} does its attention by itself")


def _warnings(spec: FineTuneJobSpec, plan: PlanStatus) -> tuple[str, ...]:
    asked = spec.compute.resources.memory if spec.compute.resources else None
    needed = (plan.memory_bytes_per_gpu or 0) + RUNTIME_BYTES
    if plan.gpus or asked is None or needed <= amount(asked):
        return ()
    return (
        f"training needs about {in_gib(needed)} of memory and spec.compute.resources.memory is {asked}: raise it, or "
        "lower spec.training.microBatchSize or spec.data.maxLength.",
    )


def plan_from_config(job: FineTuneJob, cache: Path) -> PlanStatus:
    """Return the plan of the resolved ``job`` for rows as long as it allows, all of their tokens learnt.

    A job that trains nothing has no memory of training to plan. Only the model's small files are read, into ``cache``
    where they are not on this machine.

    Raises:
        FineTuneError: the model is not there or is not one that can be tuned, or the spec does not fit it.
    """
    spec = job.spec
    folder = fetch_small_files(spec.model, cache, Storage(spec.output, Mounts.from_environment(os.environ)))
    config = read_config_in(folder)
    check_task(spec.model, config)
    length = row_length(spec, position_limit(config))
    gpus = expected_gpus(spec, is_local=spec.output.uri.startswith("file://"))
    precision = expected_precision(spec, on_gpu=gpus > 0)
    if evaluates_only(spec.training):
        parameters, _ = count_parameters(_built(spec, config, precision, str(folder)))
        return PlanStatus(parameters=parameters, trainable_parameters=0, trainable_percent=figure(0), gpus=gpus)
    workload = whole_rows(length.tokens, spec.training.global_batch_size, decoder_start(config))
    return plan_run(spec, config, workload, precision, tokenizer_path=str(folder), gpus=gpus)


def expected_gpus(spec: FineTuneJobSpec, is_local: bool) -> int:
    """Return the GPUs over all workers: one for each in a cluster where the spec says nothing, this machine's else."""
    each = spec.compute.gpus_per_worker
    if each is None and spec.method.type is MethodType.QLORA:
        # There is none without, wherever this is asked.
        each = 1
    if each is None:
        each = int(torch.cuda.is_available()) if is_local else 1
    return spec.compute.workers * each


def expected_precision(spec: FineTuneJobSpec, on_gpu: bool) -> PrecisionChoice:
    """Return what training will choose: for a CPU by this machine's; for a GPU bfloat16, which all in use do fast."""
    method, training, dtype = spec.method.type, spec.training.precision, spec.model.dtype
    if not on_gpu or training is not Precision.AUTO or dtype is not DType.AUTO:
        return choose_precision(method, training, dtype)
    return decide_precision(method, Precision.BF16, dtype)


# --- memory


def _memory(
    model: nn.Module,
    rows: Sequence[Encoded],
    layout: Layout,
    precision: PrecisionChoice,
    spec: FineTuneJobSpec,
    steps: Steps,
) -> MemoryStatus:
    all_bfloat16 = _is_all_bfloat16(spec, precision)
    if all_bfloat16:
        model.to(torch.bfloat16)
    # What a trial decides when training begins is planned as kept.
    if computes_twice_anyway(spec):
        _root(model).activation_checkpointing_enable({"use_reentrant": False})
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    pull = spec.method.regularization
    compares_outputs = pull is not None and pull.type is RegularizationType.KL
    keeps_gradients = _keeps_gradients(spec, steps)
    autocast = precision.autocast and not all_bfloat16
    passes = _measure(model.train(), rows, layout, autocast, keeps_gradients, compares_outputs)
    bucket = _bucket(model, passes.gradients, keeps_gradients) if _fills_buckets(spec, steps) else 0
    return MemoryStatus(
        weights=weights,
        gradients=passes.gradients,
        optimiser=0,  # See `spread`.
        activations=passes.activations,
        logits=passes.logits,
        exchanged=bucket,
    )


def _is_all_bfloat16(spec: FineTuneJobSpec, precision: PrecisionChoice) -> bool:
    """Whether weights and gradients are bfloat16, as DeepSpeed has them where others compute under autocast."""
    return precision.autocast and spec.compute.deepspeed is not None


def _keeps_gradients(spec: FineTuneJobSpec, steps: Steps) -> bool:
    """Whether there are gradients when a pass begins: those of an earlier one, or DeepSpeed's own."""
    return steps.accumulation > 1 or spec.compute.deepspeed is not None


def _fills_buckets(spec: FineTuneJobSpec, steps: Steps) -> bool:
    """Whether gradients travel in buckets of torch's data parallelism; see `data_parallelism`."""
    return steps.workers > 1 and spec.compute.deepspeed is None


def _bucket(model: nn.Module, gradients: int, keeps_gradients: bool) -> int:
    """Return what one bucket takes beside ``gradients``: those of earlier passes move into it, others begin in it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    largest = max(parameter.numel() * parameter.element_size() for parameter in trained)
    return min(max(BUCKET_BYTES, largest), trained_bytes(model) - (0 if keeps_gradients else gradients))


def _copies(spec: FineTuneJobSpec, model: nn.Module, on_gpu: bool) -> int:
    copies = copies_bytes(spec.method.regularization, model)
    if spec.training.early_stopping is None or on_gpu:
        return copies
    # They are kept in main memory, which is where a CPU has everything.
    return copies + trained_bytes(model)


@dataclass(frozen=True, slots=True)
class _Passes:
    """Bytes that are alive when most are, besides the weights."""

    gradients: int
    activations: int
    logits: int


def _measure(
    model: nn.Module,
    rows: Sequence[Encoded],
    layout: Layout,
    autocast: bool,
    keeps_gradients: bool,
    compares_outputs: bool,
) -> _Passes:
    """Run a micro-batch forward and backward without computing anything.

    ``keeps_gradients`` begins with gradients, as behind another micro-batch; ``compares_outputs`` runs the base beside
    the model, as a pull towards its outputs does.
    """
    inputs = build_batch(rows, layout)
    # PEFT keeps the numbers of virtual tokens in a plain attribute, as real ones.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _give_form(model)
        batch: Batch = {name: fake.from_tensor(value) for name, value in inputs.items()}
        with _Footprint() as footprint:
            if keeps_gradients:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = forward(model, batch)
            before_loss = footprint.live - logits.untyped_storage().nbytes()
            loss = _loss(logits, batch["labels"])
            if compares_outputs:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    expected = forward(model, batch)
                # As in `_loss`: all are chosen.
                loss = loss + divergence(logits.flatten(0, 1).clone(), expected.flatten(0, 1).clone())
                del expected
            del logits
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
    gradients = footprint.bytes_at_peak(
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    )
    rest = footprint.peak - gradients
    earlier = gradients if keeps_gradients else 0
    of_logits = max(0, min(rest, rest - (before_loss - earlier)))
    return _Passes(gradients, rest - of_logits, of_logits)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `token_losses` summed; that one looks at values to leave padding out, and here there are none."""
    chosen = logits.flatten(0, 1).clone()
    return functional.cross_entropy(chosen.float(), labels[:, 1:].flatten(), reduction="none").sum()


def _give_form(model: nn.Module) -> None:
    """Replace what lies on the meta device, where a forward pass cannot begin, by tensors of the same form."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in known:
                formed = torch.empty(parameter.shape, dtype=parameter.dtype)
                known[id(parameter)] = nn.Parameter(formed, parameter.requires_grad)
            module.register_parameter(name, known[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _root(model: nn.Module) -> PreTrainedModel:
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(root, PreTrainedModel)
    return root


class _Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many bytes are alive of what operations make under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._made: dict[int, int] = {}
        """Number of the operation that made a storage which is alive."""
        self._operation = 0
        self._peak_operation = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._operation += 1
        taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in taken:
                self._note(leaf)
        if self.live > self.peak:
            self.peak, self._peak_operation = self.live, self._operation
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._made:
            return
        self._made[key] = self._operation
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        if self._made.pop(key, None) is not None:
            self.live -= size

    def bytes_at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of those of ``tensors`` that were there when most was."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum(one.nbytes() for one in storages if self._made.get(one._cdata, math.inf) <= self._peak_operation)
