"""What a user asks for: every block of ``spec``, its meaning, units and bounds.

The field docstrings are the text of ``kubectl explain`` and of docs/spec.md. Defaults live here alone, never in the CRD:
`finetune_api.resolve` fills in those that depend on other fields.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.model import ApiModel

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$")]
ObjectName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Key = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9/]+$")]
ShortText = Annotated[str, Field(min_length=1, max_length=256)]
LongText = Annotated[str, Field(min_length=1, max_length=16384)]
Column = Annotated[str, Field(min_length=1, max_length=128)]
Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
ModelUri = Annotated[str, Field(max_length=1024, pattern=r"^(hf|s3|pvc|file)://[^\s]+$")]
DataUri = Annotated[str, Field(max_length=1024, pattern=r"^(hf|s3|pvc|file|configMap)://[^\s]+$")]
OutputUri = Annotated[str, Field(max_length=1024, pattern=r"^(s3|pvc|file)://[^\s]+$")]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[int, Field(ge=1, le=31_536_000)]


# --- references


class SecretRef(ApiModel):
    """A Secret in the job's namespace; mounted into the pods, never read by the operator."""

    name: ObjectName


class JobRef(ApiModel):
    """Another FineTuneJob of the same namespace."""

    job: ObjectName | None = None
    """Its name."""
    source: ModelUri | None = None
    """A published adapter or weights, where there is no job to name."""


# --- model


class ModelTask(StrEnum):
    """What kind of language model it is."""

    CAUSAL_LM = "causal-lm"
    SEQ2SEQ_LM = "seq2seq-lm"


class DType(StrEnum):
    """Number format of frozen weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ModelSpec(ApiModel):
    """The base model."""

    source: ModelUri
    """hf://organisation/name, s3://bucket/path, pvc://claim/path or file:///path. Weights must be safetensors."""
    revision: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._/-]+$")] | None = None
    """Branch, tag or commit of a hub model; resolved to a commit when the job starts. Default: main."""
    task: ModelTask = ModelTask.CAUSAL_LM
    """causal-lm (Llama, Qwen, Mistral, ...) or seq2seq-lm (T5)."""
    dtype: DType = DType.AUTO
    """Number format of frozen weights; auto measures what this hardware multiplies fastest."""
    trust_remote_code: bool = False
    """Must stay false: code that comes with a model is never run."""
    secret_ref: SecretRef | None = None
    """Secret with HF_TOKEN or AWS_* keys for reading the model."""
    start_from: JobRef | None = None
    """Go on from what another job has published."""


# --- data


class TemplateSpec(ApiModel):
    """One phrasing of a task: Jinja over a row's columns, sandboxed."""

    prompt: LongText
    """What the model is asked, for example ``Summarize:\\n\\n{{ text }}``."""
    completion: LongText
    """What it shall answer, for example ``{{ summary }}``."""


class TaskSpec(ApiModel):
    """Rows and how they become prompts and completions."""

    name: Name
    """Unique in the job; metrics are reported under it."""
    source: DataUri
    """jsonl, csv or parquet: file:///path, s3://bucket/key, configMap://name/key, hf://owner/dataset, pvc://claim/path."""
    templates: Annotated[tuple[TemplateSpec, ...], Field(max_length=16)] = ()
    """One or more phrasings; with several, each row gets one by its hash and the base model may use its best one."""
    library: Name | None = None
    """Named entry of the built-in template library, instead of ``templates``."""
    messages: Column | None = None
    """Column of chat messages, instead of ``templates``."""
    labels: Annotated[tuple[ShortText, ...], Field(max_length=64)] = ()
    """Closed set of completions: accuracy is then measured by likelihood, without generating."""
    max_examples: Count | None = None
    """Use at most so many rows, chosen by seed. Default: all."""
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Share in the mixture, for mixing strategy weights."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_* keys or HF_TOKEN for reading the rows."""


class MixingStrategy(StrEnum):
    """How several tasks share the training steps."""

    PROPORTIONAL = "proportional"
    EQUAL = "equal"
    TEMPERATURE = "temperature"
    WEIGHTS = "weights"


class MixingSpec(ApiModel):
    """How several tasks are mixed."""

    strategy: MixingStrategy = MixingStrategy.PROPORTIONAL
    """proportional: every row counts the same."""
    temperature: Annotated[float, Field(ge=1, le=100)] | None = None
    """For strategy temperature: 1 is proportional, large is equal (arXiv:1910.10683, section 3.5.2)."""
    max_examples_per_task: Count | None = None
    """Cap on a task's size when shares are computed."""


class SplitsSpec(ApiModel):
    """How rows are divided; a row's place depends on its own text, so it stays when rows are added."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of rows that choices are made on."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of rows that nothing but the final evaluation sees."""
    group_by: Column | None = None
    """Rows equal in this column share a split (a film, a customer)."""
    stratify_by: Column | None = None
    """Keep the shares of this column's values equal in all splits."""
    seed: Seed = 17
    """Another seed, another division."""


class DataFormat(StrEnum):
    """How a prompt is wrapped."""

    AUTO = "auto"
    RAW = "raw"
    CHAT = "chat"


class LossOn(StrEnum):
    """Which tokens are learnt."""

    COMPLETION = "completion"
    ALL = "all"


class ReplaySpec(ApiModel):
    """Rows of another kind mixed in against forgetting."""

    source: DataUri
    """Rows with the columns prompt and completion."""
    fraction: Annotated[float, Field(gt=0, le=0.9)] = 0.1
    """Share of all training rows."""


class DataSpec(ApiModel):
    """The rows and how they become tokens."""

    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1, max_length=32)]
    """One task, or several for multi-task instruction tuning."""
    mixing: MixingSpec = MixingSpec()
    splits: SplitsSpec = SplitsSpec()
    format: DataFormat = DataFormat.AUTO
    """raw: text as rendered; chat: through the tokenizer's chat template; auto: chat where there is one."""
    system: LongText | None = None
    """System prompt, for format chat."""
    replay: ReplaySpec | None = None
    max_length: Annotated[int, Field(ge=8, le=131_072)] = 1024
    """Longest prompt and completion together, in tokens; the longest input column of longer rows is shortened."""
    packing: bool = True
    """Put several rows into one forward pass without padding, where a test on the model shows that this is exact."""
    loss_on: LossOn = LossOn.COMPLETION


# --- method


class MethodType(StrEnum):
    """What is trained."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    PROMPT_TUNING = "promptTuning"
    PREFIX_TUNING = "prefixTuning"
    IA3 = "ia3"
    ADAPTER = "adapter"
    SELECTIVE = "selective"


class LoraTargets(StrEnum):
    """Which layers get a low-rank update."""

    ATTENTION = "attention"
    ALL_LINEAR = "allLinear"
    NAMED = "named"


class LoraSpec(ApiModel):
    """Low-rank adaptation (arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices; adapter size grows linearly with it. 4-32 is usual."""
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Scale of the update is alpha / rank. Default: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the update's inputs dropped in training."""
    targets: LoraTargets = LoraTargets.ALL_LINEAR
    """attention, allLinear, or named: the layers in targetNames."""
    target_names: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Names of linear layers, such as q_proj, for targets named."""
    use_dora: bool = False
    """Train magnitude and direction apart (arXiv:2402.09353): better at small ranks, about 1.5 x the step time."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv:2312.03732): keeps large ranks useful."""


class PromptInit(StrEnum):
    """What virtual tokens start from."""

    RANDOM = "random"
    TEXT = "text"


class PromptTuningSpec(ApiModel):
    """A soft prompt: trained vectors before the input (arXiv:2104.08691)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=512)] = 20
    """Length of the soft prompt; 20-100 is usual. Each costs one position of context."""
    init: PromptInit = PromptInit.RANDOM
    init_text: LongText | None = None
    """Text whose token vectors the soft prompt starts from, for init text."""


class PrefixTuningSpec(ApiModel):
    """Trained keys and values in every layer (arXiv:2101.00190)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=512)] = 20


class Ia3Spec(ApiModel):
    """Trained scales of keys, values and feed-forward activations (arXiv:2205.05638)."""

    target_names: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Names of the scaled layers. Default: PEFT's choice for the architecture."""


class AdapterSpec(ApiModel):
    """Bottleneck adapters (arXiv:1902.00751)."""

    bottleneck: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the inner layer."""


class SelectiveTrain(StrEnum):
    """Which of the model's own weights are trained."""

    BIAS = "bias"
    LAST_LAYERS = "lastLayers"
    PATTERNS = "patterns"


class SelectiveSpec(ApiModel):
    """Train some of the model's own weights."""

    train: SelectiveTrain = SelectiveTrain.BIAS
    last_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """How many of the last layers, for train lastLayers."""
    patterns: Annotated[tuple[ShortText, ...], Field(max_length=64)] = ()
    """RE2 patterns of parameter names, for train patterns."""


class RegularizationType(StrEnum):
    """What holds trained weights near the base."""

    NONE = "none"
    L2SP = "l2sp"
    EWC = "ewc"
    KL = "kl"


class RegularizationSpec(ApiModel):
    """A penalty against drifting from the base; for full and selective."""

    type: RegularizationType = RegularizationType.NONE
    strength: Annotated[float, Field(gt=0, le=1000)] = 0.01


class MethodSpec(ApiModel):
    """How the model is tuned: the type and, if its defaults do not suit, the block of that type."""

    type: MethodType
    lora: LoraSpec | None = None
    """For type lora and qlora."""
    prompt_tuning: PromptTuningSpec | None = None
    prefix_tuning: PrefixTuningSpec | None = None
    ia3: Ia3Spec | None = None
    adapter: AdapterSpec | None = None
    selective: SelectiveSpec | None = None
    regularization: RegularizationSpec | None = None


# --- training


class Schedule(StrEnum):
    """How the learning rate falls behind the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Precision(StrEnum):
    """Number format of the computation."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class GradientCheckpointing(StrEnum):
    """Whether activations are computed again in the backward pass: less memory, about a third more time."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class EarlyStoppingSpec(ApiModel):
    """End when a metric stops getting better."""

    metric: Name = "validation_loss"
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement."""


class TrainingSpec(ApiModel):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """Passes over the training rows; ignored when maxSteps is set."""
    max_steps: Count | None = None
    """Optimiser steps."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Default by method: full 2e-5, lora and qlora 2e-4, promptTuning 2e-2, prefixTuning 5e-3, ia3
    3e-3, adapter 5e-4, selective 1e-3 (the methods' papers and common practice; not tuned for your data)."""
    global_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Rows behind one optimiser step, whatever the number of workers."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Rows in one forward pass of one worker. Default: as many as fit a token budget. Must divide globalBatchSize."""
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Gradients longer than this are scaled down to it."""
    precision: Precision = Precision.AUTO
    """auto: bf16 where this hardware multiplies it clearly faster, measured at the start. Trained weights stay fp32."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.AUTO
    early_stopping: EarlyStoppingSpec | None = None
    eval_every_steps: Count | None = None
    """Steps between two looks at the validation loss. Default: five looks over the run."""
    seed: Seed = 17
    """Seed of initialisation, order and dropout."""


# --- compute


class Engine(StrEnum):
    """What runs the training."""

    AUTO = "auto"
    JOB = "job"
    RAY = "ray"


class Offload(StrEnum):
    """Where optimiser state and weights wait while they are not needed."""

    NONE = "none"
    CPU = "cpu"
    NVME = "nvme"


class DeepspeedSpec(ApiModel):
    """ZeRO (arXiv:1910.02054)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 3
    """0 nothing is split over the workers, 1 optimiser state, 2 gradients too, 3 weights too."""
    offload: Offload = Offload.NONE


class ResourcesSpec(ApiModel):
    """Size of one pod; request and limit alike."""

    cpu: Quantity | None = None
    memory: Quantity | None = None


class CacheVolumeSpec(ApiModel):
    """Downloads of models and data kept across jobs."""

    claim_name: ObjectName


class TolerationSpec(ApiModel):
    """As in a pod."""

    key: Key | None = None
    operator: Annotated[str, Field(max_length=16, pattern="^(Exists|Equal)$")] | None = None
    value: Annotated[str, Field(max_length=63)] | None = None
    effect: Annotated[str, Field(max_length=32, pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$")] | None = None


class EnvSpec(ApiModel):
    """One environment variable with a plain value; secrets come by secretRef."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: Annotated[str, Field(max_length=4096)] = ""


class VolumeSpec(ApiModel):
    """A volume of one of four kinds; host paths cannot be said."""

    name: ObjectName
    claim_name: ObjectName | None = None
    config_map: ObjectName | None = None
    secret: ObjectName | None = None
    empty_dir: Quantity | None = None
    """Size limit of an empty volume."""


class VolumeMountSpec(ApiModel):
    """Where a volume appears."""

    name: ObjectName
    mount_path: Annotated[str, Field(min_length=2, max_length=512, pattern=r"^/[^:]+$")]
    read_only: bool = True


Labels = Annotated[dict[Key, Annotated[str, Field(max_length=1024)]], Field(max_length=32)]


class PodSpec(ApiModel):
    """What may be said about the pods; merged by name into what the operator builds."""

    node_selector: Labels = {}
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(max_length=16)] = ()
    node_affinity: Labels = {}
    """Labels that nodes should have; preferred, not required."""
    labels: Labels = {}
    annotations: Labels = {}
    env: Annotated[tuple[EnvSpec, ...], Field(max_length=64)] = ()
    volumes: Annotated[tuple[VolumeSpec, ...], Field(max_length=16)] = ()
    volume_mounts: Annotated[tuple[VolumeMountSpec, ...], Field(max_length=16)] = ()
    service_account_name: ObjectName | None = None
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=3600)] | None = None


class ComputeSpec(ApiModel):
    """What the job runs on."""

    profile: Name | None = None
    """Named preset of the platform team."""
    engine: Engine = Engine.AUTO
    """auto: ray when workers > 1 or gpusPerWorker > 1, else job."""
    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\s]+$")] | None = None
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = ()
    priority_class_name: ObjectName | None = None
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=64)] | None = None
    """0 = CPU. Default: on a cluster 1; on a laptop what is there."""
    gpu_resource: Key | None = None
    """Default: nvidia.com/gpu."""
    resources: ResourcesSpec | None = None
    deepspeed: DeepspeedSpec | None = None
    shared_memory: Quantity | None = None
    cache_volume: CacheVolumeSpec | None = None
    pod: PodSpec | None = None


# --- evaluation


class MetricName(StrEnum):
    """What is measured on the test split."""

    ACCURACY = "accuracy"
    ROUGE = "rouge"
    BLEU = "bleu"
    CHRF = "chrf"
    EXACT_MATCH = "exact_match"
    TOKEN_F1 = "token_f1"
    PERPLEXITY = "perplexity"


class BaselinesSpec(ApiModel):
    """What the tuned model is compared with."""

    zero_shot: bool = True
    """The base model, asked as well as validation shows possible."""
    few_shot: Annotated[int, Field(ge=0, le=32)] = 0
    """The base model with so many examples in its prompt."""


class GenerationSpec(ApiModel):
    """How answers are generated; greedy."""

    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Default: the longest training completion and 8 more, at most 64."""
    num_beams: Annotated[int, Field(ge=1, le=32)] = 1


class ForgettingRemedy(StrEnum):
    """What is tried when too much was forgotten."""

    NONE = "none"
    LORA_SCALE = "loraScale"
    EARLIER_CHECKPOINT = "earlierCheckpoint"


class ForgettingSpec(ApiModel):
    """How much the model may lose elsewhere."""

    sources: Annotated[tuple[DataUri, ...], Field(max_length=16)] = ()
    max_drop: Share = 0.02
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    remedy: ForgettingRemedy = ForgettingRemedy.NONE


class BenchmarkSuite(StrEnum):
    """Public benchmarks by name."""

    GLUE = "glue"
    SUPERGLUE = "superglue"
    MMLU = "mmlu"
    BIGBENCH_HARD = "bigbench-hard"
    CUSTOM = "custom"


class BenchmarkSpec(ApiModel):
    """One benchmark."""

    suite: BenchmarkSuite
    source: DataUri | None = None
    """Task file, for suite custom."""
    limit: Count | None = None
    """Questions per task."""


class Perturbation(StrEnum):
    """How inputs are disturbed to test robustness."""

    TYPOS = "typos"
    CASE = "case"


class HolisticSpec(ApiModel):
    """Axes beside accuracy (HELM, arXiv:2211.09110)."""

    subgroup_column: Column | None = None
    perturbations: Annotated[tuple[Perturbation, ...], Field(max_length=2)] = ()


class GateSpec(ApiModel):
    """A number that decides whether the model is published."""

    metric: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    """<task>.<metric>, for example sentiment.accuracy."""
    min: float | None = None
    max: float | None = None
    min_delta: float | None = None
    """The lower confidence bound of tuned minus base must exceed this."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


class EvaluationSpec(ApiModel):
    """How base and tuned model are compared."""

    metrics: Annotated[tuple[MetricName, ...], Field(max_length=16)] = ()
    """Default: accuracy for tasks with labels, rouge and exact_match for others; perplexity always."""
    baselines: BaselinesSpec = BaselinesSpec()
    generation: GenerationSpec = GenerationSpec()
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """At most so many test rows per task, chosen by seed."""
    resources: ResourcesSpec | None = None
    forgetting: ForgettingSpec | None = None
    benchmarks: Annotated[tuple[BenchmarkSpec, ...], Field(max_length=16)] = ()
    holistic: HolisticSpec | None = None
    gates: Annotated[tuple[GateSpec, ...], Field(max_length=32)] = ()


# --- output, checkpoints, policy


class PublishOn(StrEnum):
    """When the model is published; the report always is."""

    GATES = "gates"
    ALWAYS = "always"
    NEVER = "never"


class OutputSpec(ApiModel):
    """Where the result goes."""

    uri: OutputUri
    """s3://bucket/prefix, pvc://claim/path or file:///path; results land below <namespace>/<name>-<id>/."""
    endpoint: Annotated[str, Field(max_length=512, pattern=r"^https?://[^\s]+$")] | None = None
    """Of an S3 server other than AWS."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; workload identity when absent."""
    merge: bool = False
    """Publish full weights with the adapter merged in, beside the adapter."""
    publish_on: PublishOn = PublishOn.GATES
    """gates: when all gates pass, which no gates do; always; never: the report alone."""


class CheckpointSpec(ApiModel):
    """Points that an interrupted run goes on from."""

    every_steps: Count = 200
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """How many are kept while training; at least 2, because the newest may be unfinished."""


class Preflight(StrEnum):
    """What happens when the check stage finds something."""

    OFF = "off"
    WARN = "warn"
    ENFORCE = "enforce"


class RunPolicySpec(ApiModel):
    """How the job is run; the only part that may change after creation."""

    suspend: bool = False
    active_deadline_seconds: Seconds | None = None
    start_deadline_seconds: Seconds = 1800
    child_ttl_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = 86_400
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    preflight: Preflight = Preflight.ENFORCE
    check_queue_name: ObjectName | None = None


class FineTuneJobSpec(ApiModel):
    """One fine-tuning job: base model, rows, method, where the result goes."""

    model: ModelSpec
    data: DataSpec
    method: MethodSpec
    training: TrainingSpec = TrainingSpec()
    compute: ComputeSpec = ComputeSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    output: OutputSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    run_policy: RunPolicySpec = RunPolicySpec()
