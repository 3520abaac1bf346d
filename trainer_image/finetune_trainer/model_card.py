"""README.md of a published model: what it is, how good it is, how to use it. Pure: same report, same page."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune_api.report import ArtifactKind, Report
from finetune_api.spec import LoraSpec, MethodType, ModelTask
from finetune_trainer.prompt_file import PromptFile, PromptTask
from finetune_trainer.template import Template
from finetune_trainer.vllm_command import max_lora_rank, refused_kind, serve_command, served_name


@dataclass(frozen=True, slots=True)
class BaseReference:
    """How to name the base model to whoever loads the result."""

    name: str
    """Hub id, or absolute path of a local folder."""
    revision: str | None
    """Commit for the hub; None for a local folder, whose files have no revisions."""
    on_hub: bool

    @property
    def is_elsewhere(self) -> bool:
        """Whether it lies in a bucket or on a volume, from where it must be fetched."""
        return "://" in self.name

    @property
    def link(self) -> str:
        """Its name as markdown."""
        return f"[`{self.name}`](https://huggingface.co/{self.name})" if self.on_hub else f"`{self.name}`"


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How far the merged weights are from base and adapter side by side."""

    difference: float
    """Largest absolute difference of a logit."""
    effect: float
    """Largest absolute difference that the adapter makes to the base."""
    largest: float
    """Largest absolute logit."""
    tokens: int
    """Tokens of the probe."""

    @property
    def is_lossy(self) -> bool:
        """Whether rounding moves logits more than half as far as the adapter: a weak adapter is rounded away."""
        return self.difference > self.effect / 2 and self.difference > 1e-4 * self.largest


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says beyond the report."""

    kind: ArtifactKind
    base: BaseReference
    dtype: str
    """Type of the base's weights, as torch names it: ``bfloat16``."""
    prompt: PromptFile
    merge: MergeCheck | None = None
    licence: str | None = None
    """As the base model's own card states it."""
    lora: LoraSpec | None = None
    """Of lora and qlora."""


_PIPELINE = {ModelTask.CAUSAL_LM: "text-generation", ModelTask.SEQ2SEQ_LM: "text2text-generation"}
_AUTO_CLASS = {ModelTask.CAUSAL_LM: "AutoModelForCausalLM", ModelTask.SEQ2SEQ_LM: "AutoModelForSeq2SeqLM"}
_ANSWER = {ModelTask.CAUSAL_LM: 'output[0, inputs["input_ids"].shape[1]:]', ModelTask.SEQ2SEQ_LM: "output[0]"}


def render_card(report: Report, facts: CardFacts) -> str:
    """Return the card as markdown with YAML front matter."""
    environment = Environment(
        loader=PackageLoader("finetune_trainer", "."),
        undefined=StrictUndefined,
        autoescape=False,  # markdown; whatever a user wrote goes through ``cell``
        keep_trailing_newline=True,
        trim_blocks=False,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("model_card.md.j2").render(
        kind=facts.kind.value,
        base=facts.base,
        report=report,
        dtype=facts.dtype,
        four_bit=_is_four_bit(report),
        merge=facts.merge,
        licence=facts.licence,
        front_matter=_front_matter(report, facts),
        few_shot={task.name: task.few_shot for task in facts.prompt.tasks if task.few_shot is not None},
        format=facts.prompt.format,
        snippet=_snippet(report, facts),
        vllm=_vllm(report, facts),
    )


def _front_matter(report: Report, facts: CardFacts) -> str:
    """Return the facts that a hub reads: https://huggingface.co/docs/hub/model-cards."""
    front: dict[str, object] = {
        "library_name": "peft" if _is_loaded_by_peft(report, facts) else "transformers",
        "pipeline_tag": _PIPELINE[facts.prompt.model_task],
        "tags": ["fine-tuned", report.training.method],
    }
    if facts.base.on_hub:
        front["base_model"] = facts.base.name
        front["base_model_relation"] = "adapter" if facts.kind is ArtifactKind.ADAPTER else "finetune"
    if facts.licence is not None:
        front["license"] = facts.licence
    if report.evaluation is not None and report.evaluation.metrics:
        front["model-index"] = [{"name": report.name, "results": _results(report, facts)}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _results(report: Report, facts: CardFacts) -> list[dict[str, object]]:
    metrics = report.evaluation.metrics if report.evaluation is not None else ()
    return [
        {
            "task": {"type": _PIPELINE[facts.prompt.model_task]},
            "dataset": {"name": f"{task} (test split)", "type": "custom"},
            "metrics": [
                {"type": metric.metric, "value": round(metric.tuned, 6)} for metric in metrics if metric.task == task
            ],
        }
        for task in dict.fromkeys(metric.task for metric in metrics)
    ]


def _snippet(report: Report, facts: CardFacts) -> str:
    """Return Python that loads the model, asks it one question in the form it was trained in, and prints the answer."""
    task = facts.prompt.tasks[0]
    four_bit, by_peft = _is_four_bit(report), _is_loaded_by_peft(report, facts)
    has_bottlenecks = report.training.method == MethodType.ADAPTER
    lines = [
        "import json",
        "",
        *(["import torch"] if has_bottlenecks else []),
        *(["from jinja2.sandbox import ImmutableSandboxedEnvironment"] if task.templates else []),
        *(["from peft import PeftModel"] if by_peft else []),
        *(["from safetensors.torch import load_file"] if has_bottlenecks else []),
        f"from transformers import {_AUTO_CLASS[facts.prompt.model_task]}, AutoTokenizer"
        + (", BitsAndBytesConfig" if four_bit else ""),
        "",
        'folder = "."',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *_load(facts, four_bit, by_peft, has_bottlenecks),
        "",
        'with open(f"{folder}/prompt.json", encoding="utf-8") as file:',
        "    settings = json.load(file)",
        *_prompt(task),
        *_tokenise(facts.prompt),
        *(["inputs = inputs.to(model.device)"] if four_bit else []),
        'output = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=settings["endTokenIds"])',
        f"answer = tokenizer.decode({_ANSWER[facts.prompt.model_task]}, skip_special_tokens=True).strip()",
        "print(answer)",
    ]
    return "\n".join(lines)


def _vllm(report: Report, facts: CardFacts) -> str | None:
    """Return the command that serves what is published, run in its folder; None for what vLLM does not load."""
    if facts.prompt.model_task is not ModelTask.CAUSAL_LM:
        return None
    if facts.kind is not ArtifactKind.ADAPTER:
        return shlex.join(serve_command(".", report.name))
    if facts.lora is None or refused_kind(report.training.method, facts.lora.use_dora):
        return None
    rank, base = max_lora_rank(facts.lora.rank), facts.base
    if rank is None:
        return None
    # As for `finetune render --serve`: what lies in a bucket or on a volume has been brought to a folder.
    model, name = ("base", served_name(base.name)) if base.is_elsewhere else (base.name, base.name)
    return shlex.join(serve_command(model, name, base.revision, {report.name: "."}, rank))


def _prompt(task: PromptTask) -> Sequence[str]:
    if not task.templates:
        return ('prompt = "…"',)
    template = Template(task.templates[0].prompt, task.templates[0].completion, "prompt")
    row = {column: "…" for column in sorted(template.prompt_columns)}
    return (
        f"row = {json.dumps(row, ensure_ascii=False)}",
        'template = settings["tasks"][0]["templates"][0]["prompt"]',
        "jinja = ImmutableSandboxedEnvironment(keep_trailing_newline=True)",
        "prompt = jinja.from_string(template).render(row)",
    )


def _is_loaded_by_peft(report: Report, facts: CardFacts) -> bool:
    return facts.kind is ArtifactKind.ADAPTER and report.training.method != MethodType.ADAPTER


def _load(facts: CardFacts, four_bit: bool, by_peft: bool, has_bottlenecks: bool) -> Sequence[str]:
    if by_peft:
        quantised = _FOUR_BITS if four_bit else ()
        return (*quantised, _load_base("base", facts, four_bit), "model = PeftModel.from_pretrained(base, folder)")
    if has_bottlenecks:
        return (_load_base("model", facts, four_bit), *_ADD_BOTTLENECKS)
    return (f"model = {_AUTO_CLASS[facts.prompt.model_task]}.from_pretrained(folder, dtype={json.dumps(facts.dtype)})",)


def _load_base(variable: str, facts: CardFacts, four_bit: bool) -> str:
    base, dtype = json.dumps(facts.base.name, ensure_ascii=False), json.dumps(facts.dtype)
    revision = f", revision={json.dumps(facts.base.revision)}" if facts.base.revision is not None else ""
    quantised = ", quantization_config=four_bits" if four_bit else ""
    auto_class = _AUTO_CLASS[facts.prompt.model_task]
    return f"{variable} = {auto_class}.from_pretrained({base}{revision}, dtype={dtype}{quantised})"


def _is_four_bit(report: Report) -> bool:
    """Whether the base's linear layers lay in 4 bits while it was tuned and evaluated."""
    return report.training.method == MethodType.QLORA


_FOUR_BITS = (
    "four_bits = BitsAndBytesConfig(",
    "    load_in_4bit=True,",
    '    bnb_4bit_quant_type="nf4",',
    "    bnb_4bit_use_double_quant=True,",
    '    bnb_4bit_compute_dtype="bfloat16",',
    ")",
)


_ADD_BOTTLENECKS = (
    'with open(f"{folder}/bottleneck_config.json", encoding="utf-8") as file:',
    "    adapters = json.load(file)",
    'weights = load_file(f"{folder}/bottleneck.safetensors")',
    'linear, activation = torch.nn.functional.linear, getattr(torch.nn.functional, adapters["activation"])',
    "",
    "",
    "def add_adapter(place):",
    '    down = weights[f"{place}.down.weight"], weights[f"{place}.down.bias"]',
    '    up = weights[f"{place}.up.weight"], weights[f"{place}.up.bias"]',
    "",
    "    def adapt(block, inputs, output):",
    "        hidden = output[0] if isinstance(output, tuple) else output",
    "        change = linear(activation(linear(hidden.float(), *down)), *up)",
    "        hidden = hidden + change.to(hidden.dtype)",
    "        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden",
    "",
    "    model.get_submodule(place).register_forward_hook(adapt)",
    "",
    "",
    'for place in adapters["places"]:',
    "    add_adapter(place)",
)


def _tokenise(prompt: PromptFile) -> Sequence[str]:
    if prompt.format == "raw":
        return ('inputs = tokenizer(prompt.rstrip(), return_tensors="pt")',)
    return (
        'messages = [{"role": "user", "content": prompt.strip()}]',
        *(
            ['messages.insert(0, {"role": "system", "content": settings["system"]})']
            if prompt.system is not None
            else []
        ),
        "prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        'prompt += settings["assistantHeader"]',
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
    )


def _cell(value: object) -> str:
    """Return text that stays one cell of a markdown table and starts no markup of its own."""
    text = " ".join(str(value).split())
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in text)
