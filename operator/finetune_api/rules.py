"""What fields must be to each other. Each rule looks at a spec whose single fields are sound and yields what is wrong."""

from collections import Counter
from collections.abc import Callable, Iterator

from finetune_api.problem import FieldError, shown
from finetune_api.spec import (
    BenchmarkSuite,
    DataFormat,
    FineTuneJobSpec,
    LoraTargets,
    MethodType,
    MetricName,
    MixingStrategy,
    PromptInit,
    RegularizationType,
    SelectiveTrain,
)

Rule = Callable[[FineTuneJobSpec], Iterator[FieldError]]

_BLOCK_OF = {
    MethodType.LORA: "lora",
    MethodType.QLORA: "lora",
    MethodType.PROMPT_TUNING: "promptTuning",
    MethodType.PREFIX_TUNING: "prefixTuning",
    MethodType.IA3: "ia3",
    MethodType.ADAPTER: "adapter",
    MethodType.SELECTIVE: "selective",
}
_SINGLE_WORKER = (MethodType.PROMPT_TUNING, MethodType.PREFIX_TUNING, MethodType.IA3)
_METRICS = {
    "accuracy": MetricName.ACCURACY,
    "exact_match": MetricName.EXACT_MATCH,
    "rouge1": MetricName.ROUGE,
    "rouge2": MetricName.ROUGE,
    "rougeL": MetricName.ROUGE,
    "bleu": MetricName.BLEU,
    "chrf": MetricName.CHRF,
    "token_f1": MetricName.TOKEN_F1,
    "perplexity": MetricName.PERPLEXITY,
}


def broken_rules(spec: FineTuneJobSpec) -> list[FieldError]:
    """Return everything that is wrong with ``spec`` as a whole."""
    return [error for rule in _RULES for error in rule(spec)]


def _no_remote_code(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if spec.model.trust_remote_code:
        yield FieldError(
            "spec.model.trustRemoteCode",
            "True",
            "code that comes with a model is never run.",
            "Remove it and use a model whose architecture transformers has.",
        )


def _task_names_differ(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    counts = Counter(task.name for task in spec.data.tasks)
    for index, task in enumerate(spec.data.tasks):
        if counts[task.name] > 1:
            yield FieldError(
                f"spec.data.tasks[{index}].name", shown(task.name), "is used twice.", "Give each task its own name."
            )


def _task_has_one_form(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    for index, task in enumerate(spec.data.tasks):
        given = [name for name in ("templates", "library", "messages") if getattr(task, name)]
        if len(given) != 1:
            yield FieldError(
                f"spec.data.tasks[{index}]",
                ", ".join(given),
                "must have exactly one of templates, library and messages.",
                "Write templates with a prompt and a completion." if not given else "Keep one of them.",
            )


def _labels_are_several(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    for index, task in enumerate(spec.data.tasks):
        path = f"spec.data.tasks[{index}].labels"
        if len(task.labels) == 1:
            yield FieldError(path, shown(list(task.labels)), "a single label is always right.", "Name all labels.")
        if len(set(task.labels)) < len(task.labels):
            yield FieldError(path, shown(list(task.labels)), "has a label twice.", "Name each label once.")
        if any(label != label.strip() for label in task.labels):
            yield FieldError(
                path,
                shown(list(task.labels)),
                "has white space around a label.",
                "Put it into the completion template.",
            )


def _accuracy_needs_labels(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if MetricName.ACCURACY in spec.evaluation.metrics and not any(task.labels for task in spec.data.tasks):
        yield FieldError(
            "spec.evaluation.metrics",
            "accuracy",
            "accuracy needs a closed set of answers, and no task has labels.",
            "Set spec.data.tasks[].labels, or use exact_match.",
        )


def _splits_leave_rows(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    splits = spec.data.splits
    if splits.validation + splits.test >= 1:
        yield FieldError(
            "spec.data.splits",
            f"{splits.validation:g} + {splits.test:g}",
            "validation and test leave no rows for training.",
            "Lower one of them; 0.1 each is usual.",
        )


def _system_needs_chat(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if spec.data.system is not None and spec.data.format is DataFormat.RAW:
        yield FieldError(
            "spec.data.system",
            shown(spec.data.system),
            "a system prompt exists in format chat only.",
            "Set spec.data.format: chat, or put the text into the prompt templates.",
        )


def _mixing_has_its_number(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    mixing = spec.data.mixing
    if mixing.temperature is not None and mixing.strategy is not MixingStrategy.TEMPERATURE:
        yield FieldError(
            "spec.data.mixing.temperature",
            f"{mixing.temperature:g}",
            f"has no meaning for strategy {mixing.strategy.value}.",
            "Remove it, or set strategy: temperature.",
        )
    for index, task in enumerate(spec.data.tasks):
        if task.weight is not None and mixing.strategy is not MixingStrategy.WEIGHTS:
            yield FieldError(
                f"spec.data.tasks[{index}].weight",
                f"{task.weight:g}",
                f"has no meaning for mixing strategy {mixing.strategy.value}.",
                "Remove it, or set spec.data.mixing.strategy: weights.",
            )


def _method_has_its_block_only(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    method = spec.method
    own = _BLOCK_OF.get(method.type)
    blocks = {
        "lora": method.lora,
        "promptTuning": method.prompt_tuning,
        "prefixTuning": method.prefix_tuning,
        "ia3": method.ia3,
        "adapter": method.adapter,
        "selective": method.selective,
    }
    for name, block in blocks.items():
        if block is not None and name != own:
            yield FieldError(
                f"spec.method.{name}",
                "",
                f"is set, but spec.method.type is {method.type.value}.",
                f"Remove it, or set type: {name}.",
            )
    penalty = method.regularization
    if penalty and penalty.type is not RegularizationType.NONE and method.type not in _REGULARIZED:
        yield FieldError(
            "spec.method.regularization.type",
            penalty.type.value,
            f"is for full and selective, not for {method.type.value}, which leaves the base weights alone.",
            "Remove it.",
        )


_REGULARIZED = (MethodType.FULL, MethodType.SELECTIVE)


def _lora_names_its_targets(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    lora = spec.method.lora
    if lora is None:
        return
    if lora.targets is LoraTargets.NAMED and not lora.target_names:
        yield FieldError(
            "spec.method.lora.targetNames", "", "is empty, but targets is named.", "Name layers, such as q_proj."
        )
    if lora.targets is not LoraTargets.NAMED and lora.target_names:
        yield FieldError(
            "spec.method.lora.targetNames",
            shown(list(lora.target_names)),
            f"has no meaning for targets {lora.targets.value}.",
            "Remove it, or set targets: named.",
        )


def _prompt_init_has_its_text(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    prompt = spec.method.prompt_tuning
    if prompt is None:
        return
    if prompt.init is PromptInit.TEXT and prompt.init_text is None:
        yield FieldError(
            "spec.method.promptTuning.initText", "", "is missing, but init is text.", "Describe the task in a sentence."
        )
    if prompt.init is PromptInit.RANDOM and prompt.init_text is not None:
        yield FieldError(
            "spec.method.promptTuning.initText",
            shown(prompt.init_text),
            "has no meaning for init random.",
            "Set init: text.",
        )


def _selective_says_what(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    selective = spec.method.selective
    if selective is None:
        return
    needed = {SelectiveTrain.LAST_LAYERS: ("lastLayers", selective.last_layers)}
    needed[SelectiveTrain.PATTERNS] = ("patterns", selective.patterns or None)
    for train, (name, value) in needed.items():
        if (selective.train is train) != (value is not None):
            state = "is missing, but" if value is None else "is set, but"
            yield FieldError(
                f"spec.method.selective.{name}", "", f"{state} train is {selective.train.value}.", "Make the two agree."
            )


def _micro_batch_divides(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    training, workers = spec.training, spec.compute.workers
    if training.global_batch_size % workers:
        yield FieldError(
            "spec.training.globalBatchSize",
            str(training.global_batch_size),
            f"cannot be divided by {workers} workers.",
            "Choose a multiple of spec.compute.workers.",
        )
    elif training.micro_batch_size and (training.global_batch_size // workers) % training.micro_batch_size:
        yield FieldError(
            "spec.training.microBatchSize",
            str(training.micro_batch_size),
            f"does not divide the {training.global_batch_size // workers} rows of a worker's share of a step.",
            "Choose a divisor, or leave it out.",
        )


def _few_workers_for_small_methods(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if spec.method.type in _SINGLE_WORKER and spec.compute.workers > 1:
        yield FieldError(
            "spec.compute.workers",
            str(spec.compute.workers),
            f"{spec.method.type.value} trains on one worker.",
            "Set workers: 1.",
        )


def _deepspeed_needs_ray(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    compute = spec.compute
    if compute.deepspeed and compute.workers == 1 and compute.engine.value != "ray":
        yield FieldError(
            "spec.compute.deepspeed", "", "needs several workers or engine: ray.", "Raise workers, or remove it."
        )


def _one_process_needs_job_engine(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    compute = spec.compute
    if compute.engine.value == "job" and (compute.workers > 1 or (compute.gpus_per_worker or 0) > 1):
        yield FieldError(
            "spec.compute.engine", "job", "runs one worker with one GPU.", "Use engine: auto or ray for more."
        )


def _qlora_needs_gpu(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if spec.method.type is MethodType.QLORA and spec.compute.gpus_per_worker == 0:
        yield FieldError(
            "spec.compute.gpusPerWorker",
            "0",
            "qlora needs a GPU: 4-bit weights have no CPU kernels.",
            "Use lora on CPU.",
        )


def _merge_needs_adapter(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    if spec.output.merge and spec.method.type not in (MethodType.LORA, MethodType.QLORA):
        yield FieldError(
            "spec.output.merge",
            "True",
            f"{spec.method.type.value} has nothing to merge.",
            "Remove it; only lora and qlora merge.",
        )


def _gates_have_a_metric(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    tasks = {task.name: task for task in spec.data.tasks}
    for index, gate in enumerate(spec.evaluation.gates):
        path = f"spec.evaluation.gates[{index}]"
        task_name, _, metric = gate.metric.rpartition(".")
        task = tasks.get(task_name)
        if task is None or metric not in _METRICS:
            yield FieldError(
                f"{path}.metric",
                shown(gate.metric),
                "names no metric of this job.",
                f"Write <task>.<metric>, with a task of {sorted(tasks)} and a metric of {sorted(_METRICS)}.",
            )
        elif spec.evaluation.metrics and metric != "perplexity" and _METRICS[metric] not in spec.evaluation.metrics:
            yield FieldError(
                f"{path}.metric",
                shown(gate.metric),
                "is not computed.",
                f"Add {_METRICS[metric].value} to spec.evaluation.metrics.",
            )
        if gate.min is None and gate.max is None and gate.min_delta is None:
            yield FieldError(path, shown(gate.metric), "has no bound.", "Set min, max or minDelta.")


def _custom_benchmark_has_source(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    for index, benchmark in enumerate(spec.evaluation.benchmarks):
        if (benchmark.suite is BenchmarkSuite.CUSTOM) != (benchmark.source is not None):
            yield FieldError(
                f"spec.evaluation.benchmarks[{index}].source",
                shown(benchmark.source) if benchmark.source else "",
                "goes with suite custom, and only with it.",
                "Name a task file for suite custom; remove it elsewhere.",
            )


def _chaining_names_one_thing(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    start = spec.model.start_from
    if start and (start.job is None) == (start.source is None):
        yield FieldError("spec.model.startFrom", "", "must name either a job or a source.", "Set exactly one of them.")


_RULES: tuple[Rule, ...] = (
    _no_remote_code,
    _task_names_differ,
    _task_has_one_form,
    _labels_are_several,
    _accuracy_needs_labels,
    _splits_leave_rows,
    _system_needs_chat,
    _mixing_has_its_number,
    _method_has_its_block_only,
    _lora_names_its_targets,
    _prompt_init_has_its_text,
    _selective_says_what,
    _micro_batch_divides,
    _few_workers_for_small_methods,
    _deepspeed_needs_ray,
    _one_process_needs_job_engine,
    _qlora_needs_gpu,
    _merge_needs_adapter,
    _gates_have_a_metric,
    _custom_benchmark_has_source,
    _chaining_names_one_thing,
)
