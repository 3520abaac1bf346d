"""What is trained: the model's own weights, or what PEFT or `bottleneck` adds to them. One small function a method."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_api.spec import (
    AdapterSpec,
    FineTuneJobSpec,
    Ia3Spec,
    LoraSpec,
    LoraTargets,
    MethodSpec,
    MethodType,
    ModelTask,
    PrefixTuningSpec,
    PromptInit,
    PromptTuningSpec,
    SelectiveSpec,
)
from finetune_trainer.bottleneck import add_adapters, find_places, switched_off
from finetune_trainer.errors import SpecError
from finetune_trainer.prefix_projection import project_prefix
from finetune_trainer.quantization import weights_of
from finetune_trainer.selection import selected_parameters

_SHOWN_LAYERS = 12


def prepare_model(model: PreTrainedModel, method: MethodSpec, tokenizer_path: str) -> nn.Module:
    """Return ``model`` ready to be trained by ``method``: what shall not change is frozen, what shall is float32.

    Args:
        model: the base model.
        method: the resolved ``spec.method``.
        tokenizer_path: folder of the base model's tokenizer, which turns a soft prompt's first text into tokens.

    Raises:
        SpecError: the model has no layer that the method can act on.
    """
    match method.type:
        case MethodType.FULL:
            return model.requires_grad_(True)
        case MethodType.LORA:
            return get_peft_model(model, _lora_config(model, method.lora or LoraSpec()))
        case MethodType.QLORA:
            # Whether activations are computed twice is decided elsewhere, for all methods.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            return get_peft_model(model, _lora_config(model, method.lora or LoraSpec()))
        case MethodType.PROMPT_TUNING:
            config = _prompt_tuning_config(model, method.prompt_tuning or PromptTuningSpec(), tokenizer_path)
            return get_peft_model(model, config) if model.config.is_encoder_decoder else SoftPromptModel(model, config)
        case MethodType.PREFIX_TUNING:
            asked = method.prefix_tuning or PrefixTuningSpec()
            prefix = _prefix_tuning_config(model, asked)
            return project_prefix(model, prefix) if asked.projection else get_peft_model(model, prefix)
        case MethodType.IA3:
            return get_peft_model(model, _ia3_config(model, method.ia3 or Ia3Spec()))
        case MethodType.ADAPTER:
            return add_adapters(model, method.adapter or AdapterSpec())
        case MethodType.SELECTIVE:
            chosen = selected_parameters(model, method.selective or SelectiveSpec())
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in chosen)
            return model


def untuned(model: nn.Module) -> AbstractContextManager[None]:
    """Let ``model`` be its base for a while: what `prepare_model` has added is off, weights of its own stay."""
    return model.disable_adapter() if isinstance(model, PeftModel) else switched_off(model)


def check_method(model: PreTrainedModel, method: MethodSpec) -> None:
    """Find out whether ``model``, with or without weights, has the layers that the resolved ``method`` acts on.

    Raises:
        SpecError: it has not.
    """
    match method.type:
        case MethodType.LORA | MethodType.QLORA:
            _lora_targets(model, method.lora or LoraSpec())
        case MethodType.PREFIX_TUNING:
            _prefix_tuning_config(model, method.prefix_tuning or PrefixTuningSpec())
        case MethodType.IA3:
            _ia3_config(model, method.ia3 or Ia3Spec())
        case MethodType.ADAPTER:
            find_places(model, (method.adapter or AdapterSpec()).placement)
        case MethodType.SELECTIVE:
            selected_parameters(model, method.selective or SelectiveSpec())


def why_padded(spec: FineTuneJobSpec) -> str:
    """Return why this job's rows must not be packed, whatever the model; empty where it is the model that decides."""
    if spec.model.task is ModelTask.SEQ2SEQ_LM:
        return "every layer of an encoder goes by places in its whole row"
    if spec.method.type is MethodType.PREFIX_TUNING:
        return "a prefix is a cache, and packed rows have none"
    return "" if spec.data.packing else "spec.data.packing is false"


class SoftPromptModel(PeftModelForCausalLM):
    """PEFT's prompt tuning that packed rows and chosen logits work with.

    PEFT puts the virtual tokens before the input but leaves positions, pack indices and ``logits_to_keep`` as they
    were. Here the virtual tokens are the root of the pack's prefix tree: computed once, seen by every sequence.
    """

    def forward(
        self,
        *args: Any,
        logits_to_keep: Tensor | None = None,
        pack_gather: Tensor | None = None,
        pack_scatter: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model behind the soft prompt; arguments as `finetune_trainer.layout.build_batch` makes them."""
        virtual = self.active_peft_config.num_virtual_tokens
        if logits_to_keep is not None:
            kwargs["logits_to_keep"] = logits_to_keep + virtual
        if pack_gather is None or pack_scatter is None:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._forward_packed(pack_gather, pack_scatter, virtual, **kwargs)

    def _forward_packed(
        self, gather: Tensor, scatter: Tensor, virtual: int, input_ids: Tensor, position_ids: Tensor, **kwargs: Any
    ) -> Any:
        embed = cast(PreTrainedModel, self.get_base_model()).get_input_embeddings()
        embedded = embed(input_ids)
        prompt = self.get_prompt(batch_size=1).to(embedded.dtype)
        root = torch.arange(virtual, device=gather.device)
        rows, longest = gather.shape
        # Every sequence grows by the virtual tokens at its front, so its cells in the flattened gather move along.
        sequence, place = scatter // longest, scatter % longest
        return self.base_model(
            inputs_embeds=torch.cat([prompt, embedded], dim=1),
            position_ids=torch.cat([root[None], position_ids + virtual], dim=1),
            pack_gather=torch.cat([root.expand(rows, -1), gather + virtual], dim=1),
            pack_scatter=torch.cat([root, sequence * (longest + virtual) + place + virtual]),
            **kwargs,
        )


def _lora_config(model: PreTrainedModel, lora: LoraSpec) -> LoraConfig:
    return LoraConfig(
        task_type=_task_type(model),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        target_modules=_lora_targets(model, lora),
        fan_in_fan_out=_holds_transposed(model),
    )


def _task_type(model: PreTrainedModel) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def _holds_transposed(model: nn.Module) -> bool:
    """Return whether weights lie as inputs x outputs, as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _lora_targets(model: nn.Module, lora: LoraSpec) -> str | list[str]:
    match lora.targets:
        case LoraTargets.ALL_LINEAR:
            return "all-linear"
        case LoraTargets.ATTENTION:
            return attention_layer_names(model)
        case LoraTargets.NAMED:
            return _existing_names(model, list(lora.target_names), "spec.method.lora.targetNames")


def attention_layer_names(model: nn.Module) -> list[str]:
    """Return the names, without their path, of the linear layers inside attention blocks.

    Raises:
        SpecError: there is none.
    """
    names = {
        child_name
        for module in model.modules()
        if "attention" in type(module).__name__.lower()
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear | Conv1D)
    }
    if not names:
        raise SpecError(
            f"spec.method.lora.targets: no linear layers found in attention blocks of {type(model).__name__}; "
            "set targets: named and targetNames."
        )
    return sorted(names)


def _existing_names(model: nn.Module, wanted: list[str], field: str) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    missing = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in linear})
        more = f" and {len(known) - _SHOWN_LAYERS} more" if len(known) > _SHOWN_LAYERS else ""
        raise SpecError(
            f"{field}: {', '.join(missing)}: no linear layers of this model "
            f"({type(model).__name__}); it has {', '.join(known[:_SHOWN_LAYERS])}{more}. Name some of these."
        )
    return wanted


def _prompt_tuning_config(model: PreTrainedModel, prompt: PromptTuningSpec, tokenizer_path: str) -> PromptTuningConfig:
    from_text = prompt.init is PromptInit.TEXT
    return PromptTuningConfig(
        task_type=_task_type(model),
        num_virtual_tokens=prompt.virtual_tokens,
        # PEFT would make vectors for the decoder as well, which nothing reads.
        num_transformer_submodules=1,
        prompt_tuning_init=PromptTuningInit.TEXT if from_text else PromptTuningInit.RANDOM,
        prompt_tuning_init_text=prompt.init_text if from_text else None,
        tokenizer_name_or_path=tokenizer_path if from_text else None,
    )


def _prefix_tuning_config(model: PreTrainedModel, prefix: PrefixTuningSpec) -> PrefixTuningConfig:
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise SpecError(
            f"spec.method.type: {type(model).__name__} keeps no keys and values that a prefix could stand before. "
            "Take promptTuning or lora."
        )
    config = PrefixTuningConfig(task_type=_task_type(model), num_virtual_tokens=prefix.virtual_tokens)
    if model.config.is_encoder_decoder:
        # The prefix stands in the decoder; an attention of T5 may be wider or narrower than the model.
        config.num_layers = model.config.num_decoder_layers
        config.num_attention_heads = model.config.num_heads
        config.token_dim = model.config.num_heads * model.config.d_kv
    return config


def _ia3_config(model: PreTrainedModel, ia3: Ia3Spec) -> IA3Config:
    kind = model.config.model_type
    targets, feedforward = list(ia3.target_names), list(ia3.feedforward_names)
    if not targets:
        targets = list(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, ()))
        feedforward = list(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, ()))
    if not targets:
        raise SpecError(
            f"spec.method.ia3.targetNames: which layers of {type(model).__name__} hold keys, values and feed-forward "
            "networks is not known here. Name them, and in feedforwardNames the feed-forward ones among them."
        )
    return IA3Config(
        task_type=_task_type(model),
        target_modules=_existing_names(model, targets, "spec.method.ia3.targetNames"),
        feedforward_modules=feedforward,
        fan_in_fan_out=_holds_transposed(model),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; shared ones count once."""
    counted = {
        parameter: weights_of(module, parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }
    return sum(counted.values()), sum(count for parameter, count in counted.items() if parameter.requires_grad)
