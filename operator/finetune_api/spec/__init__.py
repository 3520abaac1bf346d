"""What a FineTuneJob asks for. Every value that is absent has a safe default; the minimum is model, one task, method
and output. One module a block; the rules between blocks are here."""

from collections.abc import Iterator

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
)
from finetune_api.spec.data import (
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
from finetune_api.spec.training import EarlyStoppingSpec, Precision, Schedule, Toggle, TrainingSpec

__all__ = [
    "BLOCK_OF",
    "AdapterSpec",
    "BaselinesSpec",
    "BenchmarkSpec",
    "CheckpointSpec",
    "ComputeSpec",
    "DType",
    "DataSpec",
    "DeepspeedSpec",
    "EarlyStoppingSpec",
    "Engine",
    "EnvSpec",
    "EvaluationSpec",
    "FineTuneJobSpec",
    "ForgettingRemedy",
    "ForgettingSpec",
    "Format",
    "GateSpec",
    "GenerationSpec",
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
    "Toggle",
    "TrainingSpec",
    "VolumeMountSpec",
    "VolumeSpec",
]


class FineTuneJobSpec(Block):
    """What a FineTuneJob asks for."""

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
