"""The training stage: Ray Train around transformers' Trainer, one path for every method and number of workers.

Ray Train in local mode (``num_workers=0``) runs the worker function in this process: no cluster, no start-up time.
With several workers each runs `train_here` as one of a `ProcessGroup`.
"""

import math
import os
import resource
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from finetune_api.report import Stage, TaskShare, TrainingReport
from finetune_api.spec import GradientCheckpointing, computes_twice_anyway
from finetune_api.spec.compute import spreads_weights, zero_stage
from finetune_trainer.best_weights import BestWeights
from finetune_trainer.bottleneck import has_adapters, save_adapters
from finetune_trainer.checkpoint import keep_weights, newest_complete, step_of
from finetune_trainer.data_parallel import data_parallelism
from finetune_trainer.errors import (
    DataError,
    FineTuneError,
    OutOfMemoryError,
    Preempted,
    SpecError,
    StorageError,
    TrainingDivergedError,
)
from finetune_trainer.example import Encoded
from finetune_trainer.layout import Layout, LayoutChoice, build_batch, forward, load_for_rows, token_losses, unlearnt
from finetune_trainer.manifest import write_manifest
from finetune_trainer.memory import available_bytes, is_out_of_memory, kept_bytes, memory_errors
from finetune_trainer.methods import count_parameters, prepare_model, why_padded
from finetune_trainer.mixture import EpochRows, Mixture
from finetune_trainer.model import find_broken_tensors, load_tokenizer
from finetune_trainer.precision import PrecisionChoice, choose_precision
from finetune_trainer.progress import Reporter
from finetune_trainer.recorder import Recorder
from finetune_trainer.regularization import regularize
from finetune_trainer.sample_answers import SampleAnswers
from finetune_trainer.scoring import Scorer
from finetune_trainer.sealing import Sealing
from finetune_trainer.settings_map import (
    Steps,
    checkpoints_activations,
    deepspeed_config,
    plan_steps,
    training_arguments,
)
from finetune_trainer.start import first_weights, take_over
from finetune_trainer.tracker import Trackers, open_trackers, put_event_files
from finetune_trainer.training_input import TrainingInput
from finetune_trainer.workspace import Workspace
from finetune_trainer.zero import join_without_gpu, spread_weights

# Tokens of the row that shows how much a forward pass keeps: enough to be typical, little enough to fit anywhere.
_SAMPLE_TOKENS = 256

_LESS_MEMORY = (
    "lower spec.training.microBatchSize or spec.data.maxLength, or set spec.training.gradientCheckpointing: always"
)


def train(given: TrainingInput) -> TrainingReport:
    """Tune the model, leave it in the workspace's ``tuned`` folder and return how it went.

    Raises:
        Preempted: the stop flag was set; a checkpoint is saved.
        TrainingDivergedError: the loss is not a number any more.
        OutOfMemoryError: a step did not fit.
    """
    # Imported here: what only evaluates or publishes would wait for it.
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    outcome: list[TrainingReport | FineTuneError] = []

    def worker() -> None:
        try:
            outcome.append(train_here(given))
        except FineTuneError as error:
            # Ray wraps what a worker raises; the user's message and exit code would be lost.
            outcome.append(error)

    _quiet_ray()
    TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()
    result = outcome[0]
    if isinstance(result, FineTuneError):
        raise result
    return result


def _quiet_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Every core this process was given, unless the environment says otherwise.
    torch.set_num_threads(threads_of_each(1))


def threads_of_each(processes: int) -> int:
    """Return the threads for each of ``processes`` on this machine."""
    # macOS knows no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or cores) // processes)


def train_here(given: TrainingInput) -> TrainingReport:
    """Do in this process what `train` says, as one of the group.

    The report, and what is in the ``tuned`` folder, are those of the group's first process.
    """
    spec, group = given.job.spec, given.group
    resume = newest_complete(given.workspace.checkpoints)
    if resume is not None:
        _refuse_other_spread(resume, group.size)
    set_seed(spec.training.seed)
    reporter = Reporter(given.sink, Stage.TRAIN)
    reporter.say("loading the base model")
    # Nodes may have other processors than the first; each would then wait for weights of its own length.
    precision = group.from_first(choose_precision(spec.method.type, spec.training.precision, spec.model.dtype))
    first = first_weights(given.files, given.start)
    base, layout = load_for_rows(first, precision.weights, why_padded(spec), four_bit=precision.four_bit)
    if spec.data.packing and layout.layout is Layout.PADDED:
        reporter.say(f"rows are padded, which is slower: {layout.reason}")
    longest = max(given.train, key=lambda item: len(item.ids))
    steps = plan_steps(
        spec.training, given.mixture.epoch_length, len(longest.ids), group.size, zero_stage(spec.compute)
    )
    with memory_errors(f"training {steps.micro_batch} rows at a time", _LESS_MEMORY):
        model = prepare_model(base, spec.method, str(given.files.path))
        if given.start is not None:
            take_over(model, given.start)
        parameters = count_parameters(model)
        # One that has less memory than the others decides for all.
        twice = group.any(
            computes_twice_anyway(spec)
            or _computes_twice(spec.training.gradient_checkpointing, model, longest, steps, layout.layout)
        )
        if twice:
            reporter.say("activations are computed twice, which needs less memory")
        stopping = spec.training.early_stopping
        best = BestWeights(model, stopping.patience, group) if stopping is not None else None
        trackers = open_trackers(given.job, given.workspace, given.mounts) if group.is_first else Trackers()
        trainer, recorder = _build_trainer(given, model, layout, precision, steps, twice, best, trackers)
    reporter.say(f"resuming at step {step_of(resume)}" if resume else "training")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError, SafetensorError) as error:
        raise _named(error, steps, given.workspace) from error
    finally:
        is_over = trainer.state.global_step >= steps.total or (best is not None and best.has_ended)
        for warning in trackers.close(is_over):
            reporter.say(f"note: {warning}")
    if not is_over:
        raise Preempted(f"stopped at step {trainer.state.global_step} of {steps.total}; the checkpoint is saved.")
    if best is not None:
        best.restore()
    _save_tuned(trainer, model, given)
    report = _summarise(given, parameters, trainer, recorder, steps, layout, precision, resume)
    return report.model_copy(
        update={
            "best_step": best.step if best is not None else None,
            "watched": given.watched.metric if given.watched is not None else None,
            "warnings": (*recorder.warnings(trainer.state), *trackers.warnings),
        }
    )


def _refuse_other_spread(checkpoint: Path, processes: int) -> None:
    """Refuse a checkpoint whose optimiser state DeepSpeed has spread over another number of processes.

    What is not spread is the same for any number: plain data parallelism goes on from it.
    """
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if parts not in (0, processes):
        raise SpecError(
            f"spec.compute: the checkpoint of step {step_of(checkpoint)} was spread by DeepSpeed over {parts} "
            f"processes, and this is a run of {processes}: it cannot be divided anew. Go back to as many workers "
            "and GPUs, or train from the start under another name."
        )


def _named(error: Exception, steps: Steps, workspace: Workspace) -> Exception:
    """Return the error in words a user can act on; one that has none as it is."""
    text = str(error)
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"a training step with {steps.micro_batch} rows did not fit into memory; {_LESS_MEMORY}.", steps.micro_batch
        )
    # torch's own file writer says a full disk as a RuntimeError about its container format.
    if isinstance(error, OSError | SafetensorError) or "inline_container" in text or "PytorchStreamWriter" in text:
        return _unwritable("a checkpoint", workspace.checkpoints, error)
    return error


def _unwritable(what: str, place: Path, error: Exception) -> StorageError:
    return StorageError(
        f"cannot write {what} to {place}: {str(error).splitlines()[0][:200]}. Free space there, or give another folder "
        "with --workspace; running again goes on from the last complete checkpoint."
    )


def _computes_twice(
    wanted: GradientCheckpointing, model: nn.Module, longest: Encoded, steps: Steps, layout: Layout
) -> bool:
    """Decide by a short row whether the activations of a whole micro-batch are kept or computed twice."""
    if wanted is GradientCheckpointing.NEVER:
        return False
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    sample = longest.without_beginning(max(0, len(longest.ids) - _SAMPLE_TOKENS))
    batch = {name: value.to(device) for name, value in build_batch([sample], layout).items()}
    kept = kept_bytes(model.train(), lambda: token_losses(forward(model, batch), batch["labels"]).sum())
    tokens = steps.micro_batch * len(longest.ids)
    return checkpoints_activations(
        wanted, kept * tokens // len(sample.ids), count_parameters(model)[1], available_bytes()
    )


def loss_per_token(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the summed loss of a micro-batch over the completion tokens of the whole global batch.

    Trainer hands the count over all micro-batches and workers, so gradients do not depend on how rows are split.
    """
    losses = token_losses(outputs.logits, labels)
    return losses.sum() / (num_items_in_batch if num_items_in_batch is not None else losses.numel())


def _build_trainer(
    given: TrainingInput,
    model: nn.Module,
    layout: LayoutChoice,
    precision: PrecisionChoice,
    steps: Steps,
    checkpoint_activations: bool,
    best: BestWeights | None,
    trackers: Trackers,
) -> tuple[Trainer, Recorder]:
    spec = given.job.spec
    without_gpu = not torch.cuda.is_available()
    if without_gpu and spec.compute.deepspeed is not None:
        join_without_gpu()
    deepspeed = None
    if spec.compute.deepspeed is not None:
        _, trainable = count_parameters(model)
        deepspeed = deepspeed_config(
            spec.compute.deepspeed, spec.training, steps, precision.autocast, without_gpu, trainable
        )
    arguments = training_arguments(
        spec.training,
        steps,
        given.workspace.checkpoints,
        checkpoint_every=spec.checkpoint.every_steps,
        checkpoint_activations=checkpoint_activations,
        autocast=precision.autocast,
        use_cpu=without_gpu,
        deepspeed=deepspeed,
    )
    every = spec.training.eval_every_steps or max(1, steps.total // 5)
    epoch_rows = EpochRows(given.train, given.mixture, unlearnt(given.train[0]), steps.micro_batch * steps.workers)
    # Weights that are spread are gathered by all workers together for every token.
    asks = given.group.is_first or spreads_weights(spec.compute)
    sampled = SampleAnswers(model, load_tokenizer(given.files), given.validation) if asks else None
    recorder = Recorder(given, epoch_rows, Scorer(model, layout.layout), sampled, every, steps)
    settings = TrainingArguments(**arguments)
    if deepspeed is not None and spreads_weights(spec.compute):
        spread_weights(model, deepspeed)
    trainer = Trainer(
        model=model,
        args=settings,
        data_collator=partial(build_batch, layout=layout.layout),
        train_dataset=epoch_rows,
        compute_loss_func=regularize(
            loss_per_token, model, spec.method.regularization, given.train, spec.training.seed, precision.autocast
        ),
        # The best weights are part of a checkpoint when it is sealed.
        callbacks=[
            recorder,
            *([best] if best is not None else []),
            *trackers.callbacks,
            _Guard(given),
            Sealing(given),
            _EpochTurner(epoch_rows, steps),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.ddp_handler = data_parallelism(spec.method.regularization)
    return trainer, recorder


class _EpochTurner(TrainerCallback):
    """Draws each epoch's rows as it begins, also behind a checkpoint."""

    def __init__(self, rows: EpochRows[Encoded], steps: Steps) -> None:
        self._rows = rows
        self._steps = steps

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._rows.turn_to(state.global_step // self._steps.per_epoch)


class _Guard(TrainerCallback):
    """Ends training when it should end: on a stop request, and as soon as the loss is not a number."""

    def __init__(self, given: TrainingInput) -> None:
        self._stop = given.stop
        self._files = given.files

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint brings the rate that it was made with.
        set_peak_rate(kwargs["lr_scheduler"], args.learning_rate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # The tuned weights are what is kept now; and who went on from here would do a step too many.
            control.should_save = False
        elif self._stop.is_set():
            control.should_save = True
            control.should_training_stop = True
        # Looked at first: a state that has gone wrong must not take the place of one that has not.
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        # A gradient that is no number makes every weight so; behind the first step that is not the training's fault.
        figures = ("loss", "grad_norm") if state.global_step == 1 else ("loss",)
        for figure in figures:
            if not math.isfinite(logs.get(figure, 0.0)):
                broken = find_broken_tensors(self._files) if state.global_step == 1 else []
                raise divergence(
                    f"{_FIGURES[figure]} is {logs[figure]}",
                    state.global_step,
                    args.learning_rate,
                    self._files.path,
                    broken,
                )


def set_peak_rate(scheduler: Any, rate: float) -> None:
    """Let ``scheduler``, or the one that it wraps, go on where it is with another peak rate."""
    while (inner := getattr(scheduler, "scheduler", None)) is not None:
        scheduler = inner
    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
    for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        group["lr"] = rate * share(scheduler.last_epoch)
    # What the next step's log shows.
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


_FIGURES = {"loss": "the loss", "grad_norm": "the gradient"}


def divergence(what: str, step: int, learning_rate: float, model: Path, broken: Sequence[str]) -> FineTuneError:
    """Return who is to blame for ``what``, a figure that is no number: first ``broken`` tensors of the base. Pure."""
    if broken:
        return DataError(
            f"the weights in {model} hold NaN or infinity (first in {', '.join(broken)}): nothing can be learnt from "
            "them. Fetch the model again, or choose another one in spec.model.source."
        )
    if step == 1:
        return TrainingDivergedError(
            f"{what} at the first step, before anything was learnt: the base model in {model} overflows on these "
            "rows. Set spec.model.dtype: float32 and spec.training.precision: fp32, or choose another model in "
            "spec.model.source."
        )
    return TrainingDivergedError(
        f"{what} at step {step}; lower spec.training.learningRate (now {learning_rate:g}) or set "
        "spec.training.precision: fp32."
    )


def _save_tuned(trainer: Trainer, model: nn.Module, given: TrainingInput) -> None:
    """Write what was trained, once, whole."""
    assert isinstance(model, PreTrainedModel | PeftModel)
    folder = given.workspace.tuned
    # With weights that are spread all processes take part, one layer after the other.
    state = (
        trainer.accelerator.get_state_dict(trainer.model_wrapped) if spreads_weights(given.job.spec.compute) else None
    )
    if not given.group.is_first:
        return
    try:
        if isinstance(model, PreTrainedModel) and has_adapters(model):
            save_adapters(model, folder, state=state)
        else:
            model.save_pretrained(str(folder), state_dict=state)
        if given.job.spec.evaluation.goes_back:
            keep_weights(given.workspace.checkpoints, folder)
        put_event_files(given.workspace.root, folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable("the tuned model", folder, error) from error
    write_manifest(folder)


def _summarise(
    given: TrainingInput,
    parameters: tuple[int, int],
    trainer: Trainer,
    recorder: Recorder,
    steps: Steps,
    layout: LayoutChoice,
    precision: PrecisionChoice,
    resume: Path | None,
) -> TrainingReport:
    curve = recorder.curve(trainer.state)
    done = trainer.state.global_step
    last = [point.loss for point in curve if point.loss is not None and point.step > done - max(1, done // 10)]
    return TrainingReport(
        method=given.job.spec.method.type.value,
        parameters=parameters[0],
        trainable_parameters=parameters[1],
        steps=done,
        epochs=float(trainer.state.epoch or 0),
        final_loss=sum(last) / len(last) if last else None,
        curve=curve,
        samples=recorder.samples(trainer.state),
        mixture=_describe_mixture(given.mixture, done, steps),
        seconds=recorder.seconds,
        estimate=recorder.estimate if done == trainer.state.max_steps else None,
        rows_per_second=recorder.rows_per_second,
        tokens_per_second=recorder.tokens_per_second,
        peak_memory_bytes=peak_memory_bytes(),
        precision=precision.reason,
        layout=str(layout),
        resumed_from_step=step_of(resume) if resume else None,
    )


def _describe_mixture(mixture: Mixture, done: int, steps: Steps) -> tuple[TaskShare, ...]:
    # The last step of an epoch takes what is left of it.
    epochs, rest = divmod(done, steps.per_epoch)
    seen = epochs * mixture.epoch_length + rest * steps.rows
    drawn = mixture.drawn(seen)
    return tuple(
        TaskShare(
            task=task.name,
            rows=len(task.rows),
            share=mixture.shares[task.name],
            expected=mixture.shares[task.name] * seen,
            drawn=drawn[task.name],
        )
        for task in mixture.tasks
    )


def peak_memory_bytes() -> int:
    """Return the highest memory use so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
