"""``spec.method``: which parameters are trained."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.spec.field import Flag, Int, Number


class MethodType(StrEnum):
    """The ways to tune a model."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    PROMPT_TUNING = "promptTuning"
    PREFIX_TUNING = "prefixTuning"
    IA3 = "ia3"
    ADAPTER = "adapter"
    SELECTIVE = "selective"


OWN_WEIGHTS = (MethodType.FULL, MethodType.SELECTIVE)
"""Methods that change the model's own weights; the others leave them as they are and add some."""


class LoraTargets(StrEnum):
    """Which layers get low-rank updates."""

    ALL_LINEAR = "allLinear"
    ATTENTION = "attention"
    NAMED = "named"


class PromptInit(StrEnum):
    """What a soft prompt starts as."""

    TEXT = "text"
    RANDOM = "random"


class AdapterPlacement(StrEnum):
    """Behind which blocks of every layer adapters come."""

    HOULSBY = "houlsby"
    PFEIFFER = "pfeiffer"


class Activation(StrEnum):
    """What bends an adapter's inner values."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


class SelectiveTrain(StrEnum):
    """Which of the model's own weights are trained."""

    BIAS = "bias"
    LAST_LAYERS = "lastLayers"
    PATTERNS = "patterns"


class RegularizationType(StrEnum):
    """What holds the weights near the base model."""

    NONE = "none"
    L2SP = "l2sp"
    EWC = "ewc"
    KL = "kl"


LayerName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.]+$")]


def _names_go_with_named(targets: LoraTargets, target_names: tuple[str, ...]) -> Iterator[Problem]:
    if targets is LoraTargets.NAMED and not target_names:
        yield Problem(("targetNames",), None, "is needed by targets: named", "Name the layers: [q_proj, v_proj].")
    if targets is not LoraTargets.NAMED and target_names:
        yield Problem(
            ("targetNames",),
            list(target_names),
            f"has no effect under targets {targets.value}",
            "Set targets: named, or leave targetNames out.",
        )


def _twice_the_rank(fields: dict[str, Any]) -> int:
    return 2 * int(fields.get("rank", 16))


class LoraSpec(Block):
    """Low-rank updates of linear layers (arXiv:2106.09685); qlora does the same on a 4-bit base (arXiv:2305.14314)."""

    rules = (_names_go_with_named,)

    rank: Annotated[Int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices; 4-32 is usual. Trainable parameters and their memory grow linearly with it."""
    alpha: Annotated[Int, Field(ge=1, le=4096)] = Field(default_factory=_twice_the_rank)
    """Scale of the update: its effect is alpha / rank. Absent: 2 x rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the update's inputs dropped while training; 0-0.1 is usual."""
    targets: LoraTargets = LoraTargets.ALL_LINEAR
    """allLinear is the most able (arXiv:2305.14314), attention costs less, named takes ``targetNames``."""
    target_names: Annotated[tuple[LayerName, ...], Field(max_length=64)] = ()
    """Last parts of layer names, for targets named: [q_proj, v_proj]."""
    use_dora: Flag = False
    """Learn magnitude and direction apart (arXiv:2402.09353): better at low rank, slower."""
    use_rslora: Flag = False
    """Scale by alpha / sqrt(rank) (arXiv:2312.03732): for ranks above 64."""


def _text_goes_with_text(init: PromptInit, init_text: str | None) -> Iterator[Problem]:
    if init is PromptInit.TEXT and init_text is None:
        yield Problem(
            ("initText",), None, "is needed by init: text", "Write the task in a few words, or set init: random."
        )
    if init is PromptInit.RANDOM and init_text is not None:
        yield Problem(("initText",), init_text, "has no effect under init: random", "Leave it out or set init: text.")


class PromptTuningSpec(Block):
    """Vectors before the prompt, everything else frozen (arXiv:2104.08691)."""

    rules = (_text_goes_with_text,)

    virtual_tokens: Annotated[Int, Field(ge=1, le=1000)] = 20
    """Vectors learnt; 20-100 is usual. Each takes the room of one token in every row."""
    init: PromptInit = PromptInit.RANDOM
    """text starts from the words of ``initText``, which learns faster, most of all on small models."""
    init_text: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Words to start from; cut or repeated to ``virtualTokens`` tokens."""


class PrefixTuningSpec(Block):
    """Keys and values before every layer's own (arXiv:2101.00190)."""

    virtual_tokens: Annotated[Int, Field(ge=1, le=1000)] = 20
    """Length of the prefix; 10-200 is usual. Each takes the room of one token in every row."""
    projection: Flag = False
    """Learn the prefix through a network of width 512, of which the prefix alone is published: steadier, more memory
    while training. Its last layer has 1024 weights for every number of a key and of a value in every layer."""


def _feedforward_is_target(target_names: tuple[str, ...], feedforward_names: tuple[str, ...]) -> Iterator[Problem]:
    for index, name in enumerate(feedforward_names):
        if name not in target_names:
            yield Problem(("feedforwardNames", index), name, "is not among targetNames", "Add it to targetNames.")


class Ia3Spec(Block):
    """Learnt scales of keys, values and feed-forward activations (arXiv:2205.05638). Very few parameters."""

    rules = (_feedforward_is_target,)

    target_names: Annotated[tuple[LayerName, ...], Field(max_length=64)] = ()
    """Last parts of the names of the layers to scale. Absent: keys, values and feed-forward layers, which are known
    for the usual architectures."""
    feedforward_names: Annotated[tuple[LayerName, ...], Field(max_length=64)] = ()
    """Those of ``targetNames`` whose input is scaled instead of their output."""


class AdapterSpec(Block):
    """Small networks between the blocks, h + up(activation(down(h))), that begin as nothing (arXiv:1902.00751)."""

    bottleneck: Annotated[Int, Field(ge=1, le=8192)] = 64
    """Width of the adapters; parameters grow linearly with it. A sixteenth of the model's width is usual."""
    placement: AdapterPlacement = AdapterPlacement.HOULSBY
    """houlsby: behind the attention and behind the feed-forward block of every layer (arXiv:1902.00751). pfeiffer:
    behind the feed-forward block alone (arXiv:2005.00247), half the parameters. Before the residual is added."""
    activation: Activation = Activation.GELU
    """Between down and up."""


def _patterns_go_with_patterns(train: SelectiveTrain, patterns: tuple[str, ...]) -> Iterator[Problem]:
    if train is SelectiveTrain.PATTERNS and not patterns:
        yield Problem(
            ("patterns",), None, "is needed by train: patterns", "Name the parameters: ['layers\\.2[0-9]\\.mlp']."
        )
    if train is not SelectiveTrain.PATTERNS and patterns:
        yield Problem(
            ("patterns",),
            list(patterns),
            f"has no effect under train: {train.value}",
            "Set train: patterns, or leave them out.",
        )


def _layers_go_with_layers(train: SelectiveTrain, last_layers: int | None) -> Iterator[Problem]:
    if train is not SelectiveTrain.LAST_LAYERS and last_layers is not None:
        yield Problem(
            ("lastLayers",),
            last_layers,
            f"has no effect under train: {train.value}",
            "Set train: lastLayers, or leave it out.",
        )


class SelectiveSpec(Block):
    """Some of the model's own weights."""

    rules = (_patterns_go_with_patterns, _layers_go_with_layers)

    train: SelectiveTrain = SelectiveTrain.BIAS
    """bias (BitFit, arXiv:2106.10199), lastLayers, or patterns over parameter names."""
    last_layers: Annotated[Int, Field(ge=1, le=1000)] | None = None
    """How many of the topmost layers are trained. Absent with train lastLayers: 2."""
    patterns: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=32)] = ()
    """RE2 patterns; a parameter whose name contains a match is trained."""


class RegularizationSpec(Block):
    """A pull back towards the base model, against forgetting."""

    type: RegularizationType = RegularizationType.NONE
    """l2sp: half the squared distance from the base weights (arXiv:1802.01483); with spec.model.startFrom the base is,
    here, what training goes on from. ewc: the same, each weight by its
    importance for what the base predicts, the diagonal of its Fisher information per token, estimated on 64 training
    rows (arXiv:1612.00796). kl: towards the base outputs, KL(base || tuned) per learnt token, which costs a second
    forward pass and room for the base. l2sp and ewc cost one or two more copies of what is trained."""
    strength: Annotated[Number, Field(gt=0, le=1000)] = 0.01
    """Weight of the pull beside the loss per token. ewc is kl to second order, so a strength means much the same to
    both; l2sp knows no importance and needs less. The loss in the report is without the pull."""


BLOCK_OF = {
    MethodType.FULL: None,
    MethodType.LORA: "lora",
    MethodType.QLORA: "lora",
    MethodType.PROMPT_TUNING: "promptTuning",
    MethodType.PREFIX_TUNING: "prefixTuning",
    MethodType.IA3: "ia3",
    MethodType.ADAPTER: "adapter",
    MethodType.SELECTIVE: "selective",
}
"""The block that belongs to a method; the only one that may be set."""


def _only_the_methods_block(
    type: MethodType,
    lora: LoraSpec | None,
    prompt_tuning: PromptTuningSpec | None,
    prefix_tuning: PrefixTuningSpec | None,
    ia3: Ia3Spec | None,
    adapter: AdapterSpec | None,
    selective: SelectiveSpec | None,
) -> Iterator[Problem]:
    blocks = {
        "lora": lora,
        "promptTuning": prompt_tuning,
        "prefixTuning": prefix_tuning,
        "ia3": ia3,
        "adapter": adapter,
        "selective": selective,
    }
    for name, block in blocks.items():
        if block is not None and name != BLOCK_OF[type]:
            owners = [str(method) for method, own in BLOCK_OF.items() if own == name]
            yield Problem(
                (name,),
                block.model_dump(mode="json", by_alias=True, exclude_unset=True),
                f"belongs to another method than {type.value}",
                f"Remove it, or set spec.method.type: {' or '.join(owners)}.",
            )


def _regularization_pulls_weights(type: MethodType, regularization: RegularizationSpec | None) -> Iterator[Problem]:
    if regularization is not None and regularization.type is not RegularizationType.NONE and type not in OWN_WEIGHTS:
        yield Problem(
            ("regularization", "type"),
            regularization.type.value,
            f"is for methods that change the model's own weights, not for {type.value}",
            f"Leave regularization out, or set spec.method.type: {' or '.join(OWN_WEIGHTS)}.",
        )


def _magnitudes_need_whole_weights(type: MethodType, lora: LoraSpec | None) -> Iterator[Problem]:
    if type is MethodType.QLORA and lora is not None and lora.use_dora:
        yield Problem(
            ("lora", "useDora"), True, "is not supported with qlora yet", "Leave it out, or set spec.method.type: lora."
        )


class MethodSpec(Block):
    """Which parameters are trained: a type, and at most the one block that belongs to it."""

    rules = (_only_the_methods_block, _regularization_pulls_weights, _magnitudes_need_whole_weights)

    type: MethodType
    """full: every weight, memory about 16 bytes a parameter. lora: small updates, the usual choice. qlora: lora on a
    base of 4 bits (nf4, double-quantised, products in bfloat16), for one GPU that is too small for lora. promptTuning,
    prefixTuning, ia3: very few parameters. adapter: small networks between layers. selective: some of the model's own
    weights."""
    lora: LoraSpec | None = None
    """Settings of lora and qlora."""
    prompt_tuning: PromptTuningSpec | None = None
    """Settings of promptTuning."""
    prefix_tuning: PrefixTuningSpec | None = None
    """Settings of prefixTuning."""
    ia3: Ia3Spec | None = None
    """Settings of ia3."""
    adapter: AdapterSpec | None = None
    """Settings of adapter."""
    selective: SelectiveSpec | None = None
    """Settings of selective."""
    regularization: RegularizationSpec | None = None
    """A pull back towards the base model; for full and selective."""
