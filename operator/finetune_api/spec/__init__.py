"""What a FineTuneJob asks for: one module a block, the rules between blocks here.

Every value that is absent has a safe default; the minimum is model, one task, method and output.
"""

from collections.abc import Iterable, Iterator

from finetune_api.block import Block, Problem
from finetune_api.spec.base import DType, ModelSpec, ModelTask, StartFrom
from finetune_api.spec.compute import (
    ComputeSpec,
    DeepspeedSpec,
    Engine,
    EnvSpec,
    Offload,
    PodSpec,
    ResourcesSpec,
    VolumeMountSpec,
    VolumeSpec,
    is_distributed,
    processes,
    spreads_weights,
    zero_stage,
)
from finetune_api.spec.data import (
    DEFAULT_MAX_LENGTH,
    REPLAY_TASK,
    DataSpec,
    Format,
    LossOn,
    Mixing,
    MixingSpec,
    ReplaySpec,
    SplitsSpec,
    TaskSpec,
    TemplateSpec,
)
from finetune_api.spec.evaluation import (
    SUBGROUP_GAP,
    WRITTEN,
    BaselinesSpec,
    BenchmarkSpec,
    EvaluationSpec,
    ForgettingRemedy,
    ForgettingSpec,
    GateSpec,
    GenerationSpec,
    HolisticSpec,
    Metric,
    Perturbation,
)
from finetune_api.spec.field import SecretRef
from finetune_api.spec.method import (
    BLOCK_OF,
    OWN_WEIGHTS,
    Activation,
    AdapterPlacement,
    AdapterSpec,
    Ia3Spec,
    LoraSpec,
    LoraTargets,
    MethodSpec,
    MethodType,
    PrefixTuningSpec,
    PromptInit,
    PromptTuningSpec,
    RegularizationSpec,
    RegularizationType,
    SelectiveSpec,
    SelectiveTrain,
)
from finetune_api.spec.output import CheckpointSpec, OutputSpec, Preflight, PublishOn, RunPolicySpec
from finetune_api.spec.training import (
    VALIDATION_LOSS,
    WATCHED_FIGURES,
    EarlyStoppingSpec,
    GradientCheckpointing,
    MlflowSpec,
    Precision,
    ReportToSpec,
    Schedule,
    TrainingSpec,
    WandbSpec,
    evaluates_only,
)

__all__ = [
    "BLOCK_OF",
    "DEFAULT_MAX_LENGTH",
    "OWN_WEIGHTS",
    "REPLAY_TASK",
    "Activation",
    "AdapterPlacement",
    "AdapterSpec",
    "BaselinesSpec",
    "BenchmarkSpec",
    "CheckpointSpec",
    "ComputeSpec",
    "DType",
    "DataSpec",
    "DeepspeedSpec",
    "EarlyStoppingSpec",
    "VALIDATION_LOSS",
    "Engine",
    "EnvSpec",
    "EvaluationSpec",
    "FineTuneJobSpec",
    "ForgettingRemedy",
    "ForgettingSpec",
    "Format",
    "GateSpec",
    "GenerationSpec",
    "GradientCheckpointing",
    "HolisticSpec",
    "Ia3Spec",
    "LoraSpec",
    "LoraTargets",
    "LossOn",
    "MethodSpec",
    "MethodType",
    "Metric",
    "Mixing",
    "MixingSpec",
    "MlflowSpec",
    "ModelSpec",
    "ModelTask",
    "Offload",
    "OutputSpec",
    "Perturbation",
    "PodSpec",
    "Precision",
    "PrefixTuningSpec",
    "Preflight",
    "PromptInit",
    "PromptTuningSpec",
    "PublishOn",
    "RegularizationSpec",
    "RegularizationType",
    "ReplaySpec",
    "ReportToSpec",
    "ResourcesSpec",
    "RunPolicySpec",
    "Schedule",
    "SecretRef",
    "SelectiveSpec",
    "SelectiveTrain",
    "SplitsSpec",
    "StartFrom",
    "TaskSpec",
    "TemplateSpec",
    "TrainingSpec",
    "VolumeMountSpec",
    "VolumeSpec",
    "WandbSpec",
    "evaluates_only",
    "holistic_figures",
    "last_zero_stage",
    "needs_whole_weights",
]


SINGLE_WORKER = (MethodType.PROMPT_TUNING, MethodType.PREFIX_TUNING, MethodType.IA3)
HAVE_ONE_GPU = (*SINGLE_WORKER, MethodType.QLORA)
LOW_RANK = (MethodType.LORA, MethodType.QLORA)


def _soft_prompts_have_one_worker(method: MethodSpec, compute: ComputeSpec) -> Iterator[Problem]:
    for field, count in (("workers", compute.workers), ("gpusPerWorker", compute.gpus_per_worker or 0)):
        if method.type in SINGLE_WORKER and count > 1:
            yield Problem(
                ("compute", field),
                count,
                f"is too many: {method.type.value} runs on one worker",
                f"Set {field}: 1; so few parameters gain nothing from more.",
            )


def _quantization_needs_a_gpu(method: MethodSpec, compute: ComputeSpec) -> Iterator[Problem]:
    if method.type is MethodType.QLORA and compute.gpus_per_worker == 0:
        yield Problem(
            ("compute", "gpusPerWorker"), 0, "is too few: qlora needs a GPU", "Set gpusPerWorker: 1, or take lora."
        )


def _quantized_bases_have_one_gpu(method: MethodSpec, compute: ComputeSpec) -> Iterator[Problem]:
    if method.type is not MethodType.QLORA:
        return
    for field, count in (("workers", compute.workers), ("gpusPerWorker", compute.gpus_per_worker or 0)):
        if count > 1:
            yield Problem(
                ("compute", field), count, "is too many: qlora trains on one GPU", f"Set {field}: 1, or take lora."
            )
    if compute.deepspeed is not None:
        yield Problem(
            ("compute", "deepspeed"),
            compute.deepspeed.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "has nothing to spread: qlora trains on one GPU",
            "Leave it out, or take lora.",
        )


def _quantized_bases_have_their_formats(
    model: ModelSpec, method: MethodSpec, training: TrainingSpec
) -> Iterator[Problem]:
    if method.type is not MethodType.QLORA:
        return
    why = "is not what qlora does: its base lies in 4 bits and computes in bfloat16"
    if model.dtype is DType.FLOAT32:
        yield Problem(("model", "dtype"), model.dtype.value, why, "Leave it out, or take lora.")
    if training.precision is Precision.FP32:
        yield Problem(("training", "precision"), training.precision.value, why, "Leave it out, or take lora.")


def _bottlenecks_tune_decoders_alone(model: ModelSpec, method: MethodSpec) -> Iterator[Problem]:
    if method.type is MethodType.ADAPTER and model.task is ModelTask.SEQ2SEQ_LM:
        yield Problem(
            ("method", "type"), method.type.value, "is not supported with seq2seq-lm yet", "Take lora, or full."
        )


def _batch_is_shared_evenly(training: TrainingSpec, compute: ComputeSpec) -> Iterator[Problem]:
    count = processes(compute)
    share, rest = divmod(training.global_batch_size, count)
    micro = training.micro_batch_size
    if rest:
        yield Problem(
            ("training", "globalBatchSize"),
            training.global_batch_size,
            f"cannot be shared evenly by {count} processes (workers x gpusPerWorker)",
            f"Take a multiple of {count}.",
        )
    elif micro is not None and count > 1 and share % micro:
        yield Problem(
            ("training", "microBatchSize"),
            micro,
            f"does not divide {share}, which is what each of {count} processes does of globalBatchSize "
            f"{training.global_batch_size}",
            f"Take a divisor of {share}, or leave it out.",
        )


def _prefixes_keep_activations(method: MethodSpec, training: TrainingSpec) -> Iterator[Problem]:
    if method.type is MethodType.PREFIX_TUNING and training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        yield Problem(
            ("training", "gradientCheckpointing"),
            training.gradient_checkpointing.value,
            "is not possible under prefixTuning: a prefix is a cache, which a second computation would fill again",
            "Leave it out, or take promptTuning.",
        )


def needs_whole_weights(method: MethodSpec, training: TrainingSpec) -> bool:
    """Return whether every process must have all weights, which ZeRO's stage 3 spreads."""
    pull = method.regularization
    is_pulled = pull is not None and pull.type is not RegularizationType.NONE
    return is_pulled or training.early_stopping is not None


def _spread_weights_are_left_alone(
    method: MethodSpec, training: TrainingSpec, compute: ComputeSpec
) -> Iterator[Problem]:
    if not spreads_weights(compute):
        return
    remedy = "Leave it out, or lower spec.compute.deepspeed.stage to 2."
    if training.early_stopping is not None:
        asked = training.early_stopping.model_dump(mode="json", by_alias=True)
        yield Problem(
            ("training", "earlyStopping"), asked, "keeps whole weights, which deepspeed stage 3 spreads", remedy
        )
    pull = method.regularization
    if pull is not None and pull.type is not RegularizationType.NONE:
        yield Problem(
            ("method", "regularization", "type"),
            pull.type.value,
            "compares whole weights, which deepspeed stage 3 spreads",
            remedy,
        )


def _rounds_products_without_gpus(
    model: ModelSpec, method: MethodSpec, training: TrainingSpec, compute: ComputeSpec
) -> bool:
    """Return whether weights are float32 and their products bfloat16, which DeepSpeed computes on GPUs alone."""
    has_exact_weights = method.type in OWN_WEIGHTS or model.dtype is DType.FLOAT32
    return has_exact_weights and compute.gpus_per_worker == 0 and training.precision is Precision.BF16


def _zero_is_exact_without_gpus(
    model: ModelSpec, method: MethodSpec, training: TrainingSpec, compute: ComputeSpec
) -> Iterator[Problem]:
    if compute.deepspeed is not None and _rounds_products_without_gpus(model, method, training, compute):
        yield Problem(
            ("training", "precision"),
            training.precision.value,
            "with float32 weights under deepspeed needs GPUs, and spec.compute.gpusPerWorker is 0",
            "Set precision: fp32, or leave spec.compute.deepspeed out.",
        )


def _products_are_no_finer_than_weights(model: ModelSpec, training: TrainingSpec) -> Iterator[Problem]:
    if model.dtype is DType.BFLOAT16 and training.precision is Precision.FP32:
        yield Problem(
            ("training", "precision"),
            training.precision.value,
            "contradicts spec.model.dtype bfloat16: products of rounded weights are not exact",
            "Set spec.model.dtype: float32, or precision: bf16.",
        )


def _only_low_rank_merges(method: MethodSpec, output: OutputSpec) -> Iterator[Problem]:
    if not output.merge or method.type is MethodType.LORA:
        return
    problem = f"needs lora, and the method is {method.type.value}"
    if method.type is MethodType.QLORA:
        problem += ": weights of 4 bits would round the adapter away"
    yield Problem(
        ("output", "merge"),
        True,
        problem,
        "Leave it out." if method.type in OWN_WEIGHTS else "Leave it out, or take lora.",
    )


def _only_low_rank_scales(method: MethodSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    forgetting = evaluation.forgetting
    if forgetting is None or forgetting.remedy is not ForgettingRemedy.LORA_SCALE:
        return
    if method.type not in LOW_RANK:
        yield Problem(
            ("evaluation", "forgetting", "remedy"),
            forgetting.remedy.value,
            f"needs lora or qlora, and the method is {method.type.value}",
            "Set remedy: none.",
        )
    elif method.lora is not None and method.lora.use_dora:
        yield Problem(
            ("evaluation", "forgetting", "remedy"),
            forgetting.remedy.value,
            "has nothing to weaken under useDora: at scale 0 the learnt magnitudes would remain",
            "Set remedy: none, or spec.method.lora.useDora: false.",
        )


def _remedies_need_validation_rows(data: DataSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    forgetting = evaluation.forgetting
    if forgetting is None or forgetting.remedy is ForgettingRemedy.NONE or data.splits.validation:
        return
    if any(task.validation_source is None for task in data.tasks):
        yield Problem(
            ("data", "splits", "validation"),
            0,
            f"leaves no rows for remedy {forgetting.remedy.value} to choose on",
            "Set it to 0.1, or spec.evaluation.forgetting.remedy: none.",
        )


def _workers_checkpoints_stay_apart(compute: ComputeSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    if evaluation.goes_back and is_distributed(compute):
        yield Problem(
            ("evaluation", "forgetting", "remedy"),
            ForgettingRemedy.EARLIER_CHECKPOINT.value,
            "is not supported with the ray engine yet: what several workers keep is not loaded by one",
            "Set remedy: none, or loraScale for a LoRA adapter.",
        )


def _earlier_checkpoints_are_loaded(
    method: MethodSpec, training: TrainingSpec, evaluation: EvaluationSpec
) -> Iterator[Problem]:
    if not evaluation.goes_back:
        return
    place, remedy = ("evaluation", "forgetting", "remedy"), ForgettingRemedy.EARLIER_CHECKPOINT.value
    if method.type is MethodType.ADAPTER:
        yield Problem(place, remedy, "is not supported with method adapter yet", "Set remedy: none.")
    if evaluates_only(training):
        yield Problem(place, remedy, "has no checkpoints to go back to with epochs: 0", "Set remedy: none.")


def _encoders_read_plain_prompts(model: ModelSpec, data: DataSpec) -> Iterator[Problem]:
    if model.task is not ModelTask.SEQ2SEQ_LM:
        return
    if data.loss_on is not LossOn.COMPLETION:
        yield Problem(
            ("data", "lossOn"),
            data.loss_on.value,
            "is not possible with seq2seq-lm: the encoder reads the prompt, and only what the decoder writes is learnt",
            "Set it to completion, or leave it out.",
        )
    if data.format is Format.CHAT:
        yield Problem(
            ("data", "format"),
            data.format.value,
            "is not possible with seq2seq-lm: encoder-decoder models have no chat template",
            "Leave it out.",
        )
    for index, task in enumerate(data.tasks):
        if task.messages is not None:
            yield Problem(
                ("data", "tasks", index, "messages"),
                task.messages,
                "is not possible with seq2seq-lm: encoder-decoder models know no turns",
                "Write templates, or take an instruct model and task: causal-lm.",
            )


def _weights_are_used(data: DataSpec) -> Iterator[Problem]:
    for index, task in enumerate(data.tasks):
        if task.weight != 1.0 and data.mixing.strategy is not Mixing.WEIGHTS:
            yield Problem(
                ("data", "tasks", index, "weight"),
                task.weight,
                f"has no effect under mixing strategy {data.mixing.strategy.value}",
                "Set spec.data.mixing.strategy: weights, or leave it out.",
            )


def _examples_are_shown_once(data: DataSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    shown = [index for index, task in enumerate(data.tasks) if task.few_shot is not None]
    if evaluation.baselines.few_shot is not None and shown:
        yield Problem(
            ("evaluation", "baselines", "fewShot"),
            evaluation.baselines.few_shot,
            f"cannot go with spec.data.tasks[{shown[0]}].fewShot, by which the base is shown training rows already",
            "Leave one of them out.",
        )


def _accuracy_needs_labels(data: DataSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    if any(task.labels for task in data.tasks):
        return
    for index, metric in enumerate(evaluation.metrics):
        if metric.needs_labels:
            yield Problem(
                ("evaluation", "metrics", index),
                metric.value,
                "needs a closed set of answers, and no task has labels",
                "Add labels to a task, or take exact_match.",
            )


def _gates_name_what_is_measured(data: DataSpec, evaluation: EvaluationSpec) -> Iterator[Problem]:
    measured = [figure for task in data.tasks for figure in measured_figures(task, evaluation)]
    measured += holistic_figures(data.tasks, evaluation)
    tasks = {task.name for task in data.tasks}
    for index, gate in enumerate(evaluation.gates):
        # Only the harness knows the tasks of a benchmark: the check stage looks for these.
        is_of_benchmark = bool(evaluation.benchmarks) and gate.metric.partition(".")[0] not in tasks
        if gate.metric not in measured and not is_of_benchmark:
            yield Problem(
                ("evaluation", "gates", index, "metric"),
                gate.metric,
                "is not measured",
                f"Name one of {', '.join(measured)}, or ask for it: spec.evaluation.metrics, spec.evaluation.holistic.",
            )


def measured_figures(task: TaskSpec, evaluation: EvaluationSpec) -> tuple[str, ...]:
    """Return ``<task>.<figure>`` for every figure that evaluation computes for ``task``."""
    usual = (Metric.ACCURACY,) if task.labels else (Metric.EXACT_MATCH, Metric.ROUGE)
    metrics = dict.fromkeys((*(evaluation.metrics or usual), Metric.PERPLEXITY))
    return tuple(
        f"{task.name}.{figure}"
        for metric in metrics
        for figure in metric.figures
        if task.labels or not metric.needs_labels
    )


def holistic_figures(tasks: Iterable[TaskSpec], evaluation: EvaluationSpec) -> tuple[str, ...]:
    """Return ``<task>.<figure>`` for what ``spec.evaluation.holistic`` asks and a gate can name."""
    holistic = evaluation.holistic
    if holistic is None:
        return ()
    names = []
    for task in tasks:
        figure = "accuracy" if task.labels else "token_probability"
        names += [f"{task.name}.{figure}_{how}" for how in holistic.perturbations]
        names += [f"{task.name}.{SUBGROUP_GAP}"] if holistic.subgroup_column else []
    return (*names, f"{WRITTEN}.insulting_answers", f"{WRITTEN}.gender_skew")


def _something_is_evaluated(model: ModelSpec, training: TrainingSpec) -> Iterator[Problem]:
    if evaluates_only(training) and model.start_from is None:
        yield Problem(
            ("training", "epochs"),
            training.epochs,
            "trains nothing, and no model is named that could be evaluated",
            "Name a published one in spec.model.startFrom, or set epochs: 3.",
        )


def _stopping_watches_what_is_measured(data: DataSpec, training: TrainingSpec) -> Iterator[Problem]:
    stopping = training.early_stopping
    if stopping is None:
        return
    labelled = (task.name for task in data.tasks if task.labels)
    known = [VALIDATION_LOSS, *(f"{task}.{figure}" for task in labelled for figure in WATCHED_FIGURES)]
    if stopping.metric not in known:
        yield Problem(
            ("training", "earlyStopping", "metric"),
            stopping.metric,
            "is not measured while a model learns",
            f"Name one of {', '.join(known)}.",
        )


def _stopping_needs_validation_rows(data: DataSpec, training: TrainingSpec) -> Iterator[Problem]:
    if training.early_stopping is not None and data.splits.validation == 0:
        yield Problem(
            ("data", "splits", "validation"),
            0,
            "leaves no rows for early stopping to watch",
            "Set it to 0.1, or leave spec.training.earlyStopping out.",
        )


class FineTuneJobSpec(Block):
    """What a FineTuneJob asks for."""

    rules = (
        _soft_prompts_have_one_worker,
        _quantization_needs_a_gpu,
        _quantized_bases_have_one_gpu,
        _quantized_bases_have_their_formats,
        _bottlenecks_tune_decoders_alone,
        _batch_is_shared_evenly,
        _prefixes_keep_activations,
        _spread_weights_are_left_alone,
        _zero_is_exact_without_gpus,
        _products_are_no_finer_than_weights,
        _only_low_rank_merges,
        _only_low_rank_scales,
        _remedies_need_validation_rows,
        _workers_checkpoints_stay_apart,
        _earlier_checkpoints_are_loaded,
        _encoders_read_plain_prompts,
        _weights_are_used,
        _examples_are_shown_once,
        _accuracy_needs_labels,
        _gates_name_what_is_measured,
        _something_is_evaluated,
        _stopping_watches_what_is_measured,
        _stopping_needs_validation_rows,
    )

    model: ModelSpec
    """The model to start from."""
    data: DataSpec
    """The rows."""
    method: MethodSpec
    """Which parameters are trained."""
    training: TrainingSpec = TrainingSpec()
    """How long, how fast, how precisely."""
    compute: ComputeSpec = ComputeSpec()
    """What the job runs on."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured."""
    output: OutputSpec
    """Where the results go."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """States that training can go on from."""
    run_policy: RunPolicySpec = RunPolicySpec()
    """How the run is looked after."""


def computes_twice_anyway(spec: FineTuneJobSpec) -> bool:
    """Return whether activations are computed twice whatever memory there is; else a trial decides, or all are kept."""
    wanted = spec.training.gradient_checkpointing
    # One GPU may not hold the whole model that a trial would need, and who spreads weights is short of memory.
    is_short = wanted is GradientCheckpointing.AUTO and spreads_weights(spec.compute)
    return wanted is GradientCheckpointing.ALWAYS or is_short


def may_compute_twice(spec: FineTuneJobSpec) -> bool:
    """Return whether attempts that run out of memory may come to compute activations twice that were kept."""
    # never is somebody's decision.
    is_forbidden = spec.training.gradient_checkpointing is GradientCheckpointing.NEVER
    return not is_forbidden and not computes_twice_anyway(spec)


def last_zero_stage(spec: FineTuneJobSpec) -> int:
    """Return the ZeRO stage that attempts which run out of memory may come to; the spec's own where none helps."""
    asked = zero_stage(spec.compute)
    # What is spread is what is trained: of an adapter there is nothing to win.
    has_nothing_to_spread = processes(spec.compute) == 1 or spec.method.type is not MethodType.FULL
    is_refused = _rounds_products_without_gpus(spec.model, spec.method, spec.training, spec.compute)
    if has_nothing_to_spread or is_refused:
        return asked
    return max(asked, 2 if needs_whole_weights(spec.method, spec.training) else 3)
