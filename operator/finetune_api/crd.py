"""The CustomResourceDefinition, generated from the models. What a CRD cannot say is an error here, never left out.

No defaults are written (a default block under ``lora`` would appear beside ``type: full``; `finetune_api.resolve`
fills them in). Everything has a maximum, because the API server refuses a rule whose worst case is too expensive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from finetune_api.model import ApiModel
from finetune_api.spec import BLOCK_OF, FineTuneJobSpec, MethodType, SplitsSpec
from finetune_api.spec.compute import GPU_RESOURCES
from finetune_api.spec.field import DATA_URI, DEVICE, MODEL_URI, OUTPUT_URI
from finetune_api.status import FineTuneJobStatus

GROUP = "finetune.dev"
VERSION = "v1alpha1"
PLURAL = "finetunejobs"
CHANGEABLE = (
    "runPolicy.suspend",
    "runPolicy.activeDeadlineSeconds",
    "runPolicy.childTtlSeconds",
)
"""The only fields of the spec that may change once the object exists."""

Schema = dict[str, Any]


class NotStructuralError(Exception):
    """A field of the contract that a CRD cannot express, or that has no maximum."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of FineTuneJob.

    Raises:
        NotStructuralError: naming the first field that cannot be expressed.
    """
    spec = structural_schema(FineTuneJobSpec, "spec")
    _add_rules(spec)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": PLURAL,
                "singular": "finetunejob",
                "kind": "FineTuneJob",
                "listKind": "FineTuneJobList",
                "shortNames": ["ftj"],
                "categories": ["finetune"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
                    "schema": {"openAPIV3Schema": _root(spec, structural_schema(FineTuneJobStatus, "status"))},
                }
            ],
        },
    }


def crd_yaml(annotations: Mapping[str, str] | None = None) -> str:
    """Return the CustomResourceDefinition with ``annotations`` as YAML, ready for ``kubectl apply -f -``."""
    definition = crd()
    if annotations:
        definition["metadata"]["annotations"] = dict(annotations)
    text: str = yaml.dump(definition, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)
    return text


class _PlainDumper(yaml.SafeDumper):
    """Writes equal lists out instead of referring to the first one."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _root(spec: Schema, status: Schema) -> Schema:
    return {
        "type": "object",
        "description": "One model to tune, evaluate and publish.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"Always {GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": "Always FineTuneJob."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [
            {
                "rule": "self.metadata.name.size() <= 40",
                "message": "metadata.name may have 40 characters at most: names of pods are built from it",
            },
            {
                "rule": "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "message": "metadata.name must be lower-case letters, digits and '-', beginning with a letter",
            },
        ],
    }


# --- columns of kubectl get: name, type, path, priority (1 is for -o wide)

_COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Method", "string", ".spec.method.type", 0),
    ("Progress", "string", ".status.summary.progress", 0),
    ("Metric", "string", ".status.summary.metric", 0),
    ("Delta", "string", ".status.summary.delta", 0),
    ("Published", "string", '.status.conditions[?(@.type=="Published")].reason', 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.model.source", 1),
    ("GPUs", "integer", ".status.plan.gpus", 1),
    ("ETA", "string", ".status.summary.eta", 1),
    ("Message", "string", ".status.summary.message", 1),
)


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return column | {"priority": priority} if priority else column


# --- structural schema


def structural_schema(model: type[ApiModel], path: str) -> Schema:
    """Return the structural OpenAPI v3 schema of ``model``, as a CRD takes it.

    Args:
        model: a model whose lists, maps and texts all have a maximum.
        path: how its place is called in errors.

    Raises:
        NotStructuralError: naming the first field that cannot be expressed.
    """
    schema = model.model_json_schema(by_alias=True)
    return _Converter(schema.pop("$defs", {})).convert(schema, path)


_PASSED_ON = ("description", "pattern", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "format")
_LEFT_OUT = ("title", "default", "examples")
_TYPES = ("object", "array", "string", "integer", "number", "boolean")


@dataclass(frozen=True, slots=True)
class _Converter:
    """Turns one of pydantic's JSON schemas into a structural one."""

    definitions: Mapping[str, Schema]

    def convert(self, schema: Schema, path: str) -> Schema:
        given = self._inlined(schema, path)
        kind = "string" if "enum" in given else given.get("type")
        if kind not in _TYPES:
            raise NotStructuralError(path, f"a CRD has no type for {given or 'any value'}")
        result: Schema = {"type": kind}
        for key in list(given):
            if key in _PASSED_ON or key.startswith("x-kubernetes-"):
                result[key] = given.pop(key)
        for key in ("type", *_LEFT_OUT):
            given.pop(key, None)
        match kind:
            case "object":
                self._object(given, result, path)
            case "array":
                self._array(given, result, path)
            case "string":
                _string(given, result, path)
            case "integer" | "number":
                _number(given, result)
        if given:
            raise NotStructuralError(path, f"a CRD cannot say {', '.join(sorted(given))}")
        return _in_order(result)

    def _inlined(self, schema: Schema, path: str) -> Schema:
        """Return ``schema`` without references and without the null of optional fields."""
        given = dict(schema)
        while "$ref" in given or "anyOf" in given or "allOf" in given:
            if "$ref" in given:
                given = {**self.definitions[given.pop("$ref").removeprefix("#/$defs/")], **given}
                continue
            key = "anyOf" if "anyOf" in given else "allOf"
            choices = [choice for choice in given.pop(key) if choice != {"type": "null"}]
            if len(choices) != 1:
                raise NotStructuralError(path, f"a CRD cannot say {key} over {len(choices)} kinds of values")
            given = {**choices[0], **given}
        return given

    def _object(self, given: Schema, result: Schema, path: str) -> None:
        given.pop("propertyNames", None)  # a CRD says nothing about keys; pydantic looks at them again
        if "properties" in given:
            if given.pop("additionalProperties", False) is not False:
                raise NotStructuralError(path, "a CRD has either named fields or free ones")
            properties = given.pop("properties")
            if required := given.pop("required", []):
                result["required"] = required
            result["properties"] = {name: self.convert(one, f"{path}.{name}") for name, one in properties.items()}
            return
        values = [given.pop(key) for key in ("additionalProperties",) if isinstance(given.get(key), dict)]
        values += given.pop("patternProperties", {}).values()
        if len(values) != 1:
            raise NotStructuralError(path, "a map needs exactly one kind of values")
        _needs(result, "maxProperties", path)
        result["additionalProperties"] = self.convert(values[0], f"{path}[*]")

    def _array(self, given: Schema, result: Schema, path: str) -> None:
        _needs(result, "maxItems", path)
        if "items" not in given:
            raise NotStructuralError(path, "a list needs one kind of items")
        result["items"] = self.convert(given.pop("items"), f"{path}[]")


def _string(given: Schema, result: Schema, path: str) -> None:
    if "const" in given:
        given["enum"] = [given.pop("const")]
    if "enum" in given:
        result["enum"] = given.pop("enum")
    elif result.get("format") != "date-time":
        _needs(result, "maxLength", path)
    if result.get("pattern") in (MODEL_URI, DATA_URI, OUTPUT_URI):
        result["x-kubernetes-validations"] = [_NO_FILES]


def _number(given: Schema, result: Schema) -> None:
    """OpenAPI 3.0 has flags where JSON schema has exclusive bounds."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if bound in given:
            result[bound] = given.pop(bound)
        if exclusive in given:
            result[bound] = given.pop(exclusive)
            result[exclusive] = True
    if result["type"] == "integer" and "format" not in result:
        result["format"] = "int64"


def _needs(result: Schema, maximum: str, path: str) -> None:
    if maximum not in result:
        raise NotStructuralError(path, f"needs {maximum}: the API server prices rules by the largest value")


_ORDER = ("description", "type", "format", "enum", "pattern", "required", "properties", "additionalProperties", "items")


def _in_order(schema: Schema) -> Schema:
    return dict(sorted(schema.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)))


# --- rules in CEL: what admission can refuse without looking at data or hardware


@dataclass(frozen=True, slots=True)
class CelRule:
    """One rule and what a user is told whom it refuses."""

    rule: str
    message: str
    field: str = ""
    """The field to point at, as ``.lora``; empty for the block itself."""

    def as_schema(self) -> Schema:
        """Return the rule as it stands under ``x-kubernetes-validations``."""
        schema = {"rule": self.rule, "message": self.message}
        return schema | {"fieldPath": self.field} if self.field else schema


_NO_FILES: Schema = {
    "rule": "!self.startsWith('file://')",
    "message": "file:// is a folder of one machine, which pods do not see; use s3:// or pvc://",
}


def _immutability(model: type[ApiModel]) -> CelRule:
    """Return the one rule that freezes the spec.

    It stands on ``spec``, because a rule on an optional field does not stop the field from being added or removed.
    """
    open_blocks = {name.partition(".")[0] for name in CHANGEABLE}
    terms = []
    for name, field in model.model_fields.items():
        alias = field.alias or name
        if alias not in open_blocks:
            terms.append(_unchanged("self", "oldSelf", alias, field.is_required()))
            continue
        block = field.annotation
        assert isinstance(block, type) and issubclass(block, ApiModel)
        terms += [
            _unchanged_inside(alias, inner.alias or inner_name)
            for inner_name, inner in block.model_fields.items()
            if f"{alias}.{inner.alias or inner_name}" not in CHANGEABLE
        ]
    names = ", ".join(CHANGEABLE)
    return CelRule(
        " && ".join(terms), f"the spec cannot be changed, except for {names}; make a new FineTuneJob with a new name"
    )


def _unchanged(new: str, old: str, name: str, required: bool) -> str:
    if required:
        return f"{new}.{name} == {old}.{name}"
    both = f"has({new}.{name}) == has({old}.{name})"
    return f"{both} && (!has({new}.{name}) || {new}.{name} == {old}.{name})"


def _unchanged_inside(block: str, name: str) -> str:
    """Compare one field of an optional block; an absent block has it absent."""
    new = f"(has(self.{block}) && has(self.{block}.{name}))"
    old = f"(has(oldSelf.{block}) && has(oldSelf.{block}.{name}))"
    return f"{new} == {old} && (!{new} || !{old} || self.{block}.{name} == oldSelf.{block}.{name})"


def _one_block_each() -> tuple[CelRule, ...]:
    """A method's block may stand beside the types that it belongs to only."""
    owners: dict[str, list[MethodType]] = {}
    for method, block in BLOCK_OF.items():
        if block is not None:
            owners.setdefault(block, []).append(method)
    return tuple(
        CelRule(
            f"!has(self.{block}) || self.type in [{', '.join(repr(method.value) for method in methods)}]",
            f"{block} belongs to another method; remove it, or set type: {' or '.join(methods)}",
            f".{block}",
        )
        for block, methods in owners.items()
    )


def _exactly_one(*names: str, lists: tuple[str, ...] = ()) -> str:
    """Return a rule that one of the fields is given; an empty list counts as not given."""
    given = [f"has(self.{name}) && self.{name}.size() > 0" for name in lists] + [f"has(self.{name})" for name in names]
    return f"[{', '.join(given)}].filter(is_set, is_set).size() == 1"


def _share_kept_back() -> str:
    defaults = {name: SplitsSpec.model_fields[name].default for name in ("validation", "test")}
    return " + ".join(f"(has(self.{name}) ? self.{name} : {value})" for name, value in defaults.items())


_FROZEN = "['promptTuning', 'prefixTuning', 'ia3']"
_OF_COMPUTE = "has(self.compute) && has(self.compute"
_IS_EXTENDED_RESOURCE = (
    f"name.matches(r'{DEVICE}') && !name.contains('kubernetes.io/') && !name.startsWith('requests.')"
)
_IS_NO_GPU = " && ".join(
    (
        *(f"!name.startsWith('{beginning}')" for beginning in GPU_RESOURCES),
        "(!has(self.gpuResource) || name != self.gpuResource)",
    )
)
_KINDS_OF_VOLUMES = ("persistentVolumeClaim", "configMap", "secret", "emptyDir")

RULES: dict[str, tuple[CelRule, ...]] = {
    "spec": (
        _immutability(FineTuneJobSpec),
        CelRule(
            f"!(self.method.type in {_FROZEN}) || !({_OF_COMPUTE}.workers)) || self.compute.workers == 1",
            "promptTuning, prefixTuning and ia3 train on one worker; set compute.workers: 1",
            ".compute.workers",
        ),
        CelRule(
            f"self.method.type != 'qlora' || !({_OF_COMPUTE}.gpusPerWorker)) || self.compute.gpusPerWorker > 0",
            "qlora needs a GPU; set compute.gpusPerWorker: 1, or method.type: lora",
            ".compute.gpusPerWorker",
        ),
        CelRule(
            "!has(self.output.merge) || !self.output.merge || self.method.type == 'lora'",
            "only lora has an adapter to merge; leave merge out",
            ".output.merge",
        ),
    ),
    "spec.model": (
        CelRule(
            "!has(self.trustRemoteCode) || !self.trustRemoteCode",
            "code from a model's repository is never run; take a model that transformers itself implements",
            ".trustRemoteCode",
        ),
    ),
    "spec.model.startFrom": (CelRule(_exactly_one("job", "source"), "needs exactly one of job and source"),),
    "spec.data": (
        CelRule(
            "!has(self.system) || !has(self.format) || self.format != 'raw'",
            "a system prompt has no place in format raw; set format: chat, or put it into the templates",
            ".system",
        ),
    ),
    "spec.data.tasks[]": (
        CelRule(
            _exactly_one("library", "messages", lists=("templates",)),
            "needs exactly one of templates, library and messages",
        ),
    ),
    "spec.data.mixing": (
        CelRule(
            "!has(self.temperature) || (has(self.strategy) && self.strategy == 'temperature')",
            "temperature is for strategy: temperature; leave it out, or set that",
            ".temperature",
        ),
    ),
    "spec.data.splits": (
        CelRule(
            f"{_share_kept_back()} < 0.9",
            "validation and test leave almost no rows for training; lower them below 0.9 together",
        ),
    ),
    "spec.method": (
        *_one_block_each(),
        CelRule(
            "!has(self.regularization) || !has(self.regularization.type) || self.regularization.type == 'none'"
            " || self.type in ['full', 'selective']",
            "regularization is for full and selective; leave it out",
            ".regularization.type",
        ),
    ),
    "spec.method.lora": (
        CelRule(
            "(has(self.targets) && self.targets == 'named') == (has(self.targetNames) && self.targetNames.size() > 0)",
            "targetNames go with targets: named, and only with it",
            ".targetNames",
        ),
    ),
    "spec.method.promptTuning": (
        CelRule(
            "(has(self.init) && self.init == 'text') == has(self.initText)",
            "initText goes with init: text, and only with it",
            ".initText",
        ),
    ),
    "spec.method.selective": (
        CelRule(
            "(has(self.train) && self.train == 'patterns') == (has(self.patterns) && self.patterns.size() > 0)",
            "patterns go with train: patterns, and only with it",
            ".patterns",
        ),
        CelRule(
            "!has(self.lastLayers) || (has(self.train) && self.train == 'lastLayers')",
            "lastLayers goes with train: lastLayers",
            ".lastLayers",
        ),
    ),
    "spec.training": (
        CelRule(
            "!has(self.microBatchSize) || (has(self.globalBatchSize) ? self.globalBatchSize : 16)"
            " % self.microBatchSize == 0",
            "microBatchSize must divide globalBatchSize (16 when absent)",
            ".microBatchSize",
        ),
    ),
    "spec.compute": (
        CelRule(
            "!has(self.engine) || self.engine != 'job' || ((!has(self.workers) || self.workers == 1)"
            " && (!has(self.gpusPerWorker) || self.gpusPerWorker <= 1))",
            "engine job runs one process; use ray or auto for several workers or GPUs",
            ".engine",
        ),
        CelRule(
            "!has(self.deepspeed) || (has(self.engine) && self.engine == 'ray') || (has(self.workers) && self.workers"
            " > 1) || (has(self.gpusPerWorker) && self.gpusPerWorker > 1)",
            "deepspeed needs several workers or GPUs, or engine: ray",
            ".deepspeed",
        ),
        CelRule(
            "!has(self.gpuResource) || !has(self.gpusPerWorker) || self.gpusPerWorker > 0",
            "gpuResource has no effect with gpusPerWorker: 0",
            ".gpuResource",
        ),
        CelRule(
            f"!has(self.devicesPerWorker) || self.devicesPerWorker.all(name, {_IS_EXTENDED_RESOURCE})",
            "devicesPerWorker names extended resources, as vpc.amazonaws.com/efa; kubernetes.io/ and requests. belong"
            " to Kubernetes itself",
            ".devicesPerWorker",
        ),
        CelRule(
            f"!has(self.devicesPerWorker) || self.devicesPerWorker.all(name, {_IS_NO_GPU})",
            "devicesPerWorker is for devices other than GPUs; ask for those with gpusPerWorker and gpuResource",
            ".devicesPerWorker",
        ),
    ),
    "spec.compute.pod.env[]": (
        CelRule(_exactly_one("value", "valueFrom"), "needs exactly one of value and valueFrom"),
    ),
    "spec.compute.pod.volumes[]": (
        CelRule(_exactly_one(*_KINDS_OF_VOLUMES), f"needs exactly one of {', '.join(_KINDS_OF_VOLUMES)}"),
    ),
    "spec.output": (
        CelRule(
            "!has(self.endpoint) || self.uri.startsWith('s3://')",
            "endpoint is for an s3:// output",
            ".endpoint",
        ),
    ),
}
"""Where a rule stands, and the rule; ``[]`` are a list's items."""

_MAPS = {
    "spec.data.tasks": "name",
    "spec.compute.pod.env": "name",
    "spec.compute.pod.volumes": "name",
    "spec.compute.pod.volumeMounts": "mountPath",
    "spec.compute.imagePullSecrets": "name",
}
"""Lists with one entry a key: duplicates are refused, server-side apply merges by key."""
_SETS = ("spec.data.tasks[].labels", "spec.evaluation.metrics")
"""Lists without duplicates."""


def _add_rules(spec: Schema) -> None:
    for path, rules in RULES.items():
        _at(spec, path)["x-kubernetes-validations"] = [rule.as_schema() for rule in rules]
    for path, key in _MAPS.items():
        _at(spec, path).update({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]})
    for path in _SETS:
        _at(spec, path)["x-kubernetes-list-type"] = "set"


def _at(spec: Schema, path: str) -> Schema:
    """Return the part of the schema that describes ``path``."""
    schema = spec
    for step in path.split(".")[1:]:
        name = step.removesuffix("[]")
        if name not in schema.get("properties", {}):
            raise NotStructuralError(path, f"a rule is written for it, but there is no field {name}")
        schema = schema["properties"][name]
        if step.endswith("[]"):
            schema = schema["items"]
    return schema
