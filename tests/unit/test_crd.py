"""The CustomResourceDefinition: structural, bounded, without defaults, and its rules look at fields that exist."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from finetune_api.crd import CHANGEABLE, RULES, NotStructuralError, crd, crd_yaml, structural_schema
from finetune_api.model import ApiModel
from finetune_api.spec import BLOCK_OF, FineTuneJobSpec
from finetune_api.status import ConditionType

Schema = dict[str, Any]
VERSION: Schema = crd()["spec"]["versions"][0]
ROOT: Schema = VERSION["schema"]["openAPIV3Schema"]
SPEC: Schema = ROOT["properties"]["spec"]
KNOWN_KEYS = {
    *("type", "description", "format", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "maxProperties", "required", "properties"),
    *("additionalProperties", "items"),
    *("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


def parts(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield every schema below and including ``schema``."""
    yield path, schema
    for name, one in schema.get("properties", {}).items():
        yield from parts(one, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "[*]")):
        if key in schema:
            yield from parts(schema[key], path + mark)


FIELDS = [*parts(SPEC, "spec"), *parts(ROOT["properties"]["status"], "status")]
BY_PATH = dict(FIELDS)
ALL_RULES = [(path, rule) for path, part in parts(ROOT, "") for rule in part.get("x-kubernetes-validations", [])]


def test_the_whole_contract_is_there() -> None:
    assert len(FIELDS) > 250
    assert {"spec.data.tasks[].templates[].prompt", "spec.method.lora.rank", "status.conditions[].type"} <= set(BY_PATH)


@pytest.mark.parametrize(("path", "part"), FIELDS, ids=[path for path, _ in FIELDS])
def test_a_field_is_structural_and_bounded(path: str, part: Schema) -> None:
    assert set(part) <= KNOWN_KEYS, "no references, unions, titles, defaults or nulls"
    match part["type"]:
        case "object":
            assert isinstance(part.get("properties"), dict) != isinstance(part.get("additionalProperties"), dict)
            assert "properties" in part or "maxProperties" in part
        case "array":
            assert "maxItems" in part
        case "string":
            assert "enum" in part or "maxLength" in part or part.get("format") == "date-time"


@pytest.mark.parametrize("path", [path for path, _ in FIELDS if not path.endswith("]")])
def test_a_field_is_explained(path: str) -> None:
    assert BY_PATH[path].get("description", "").strip()


class Unbounded(ApiModel):
    text: str = ""


class Nested(ApiModel):
    inner: Annotated[tuple[Unbounded, ...], Field(max_length=2)] = ()


class EndlessList(ApiModel):
    numbers: tuple[int, ...] = ()


class EndlessMap(ApiModel):
    labels: Annotated[dict[str, Annotated[str, Field(max_length=3)]], Field()]


class TwoKinds(ApiModel):
    value: int | bool = 0


class Anything(ApiModel):
    value: Any = None


class Multiple(ApiModel):
    value: Annotated[int, Field(multiple_of=2)] = 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(Unbounded, r"x\.text: needs maxLength", id="text without a maximum"),
        pytest.param(Nested, r"x\.inner\[\]\.text: needs maxLength", id="text without a maximum in a list of blocks"),
        pytest.param(EndlessList, r"x\.numbers: needs maxItems", id="a list without a maximum"),
        pytest.param(EndlessMap, r"x\.labels: needs maxProperties", id="a map without a maximum"),
        pytest.param(TwoKinds, r"x\.value: a CRD cannot say anyOf over 2 kinds", id="a union"),
        pytest.param(Anything, r"x\.value: a CRD has no type for", id="any value"),
        pytest.param(Multiple, r"x\.value: a CRD cannot say multipleOf", id="a keyword that is not passed on"),
    ],
)
def test_what_a_crd_cannot_say_is_an_error_with_its_path(model: type[ApiModel], message: str) -> None:
    with pytest.raises(NotStructuralError, match=message):
        structural_schema(model, "x")


class Exclusive(ApiModel):
    share: Annotated[float, Field(gt=0, lt=1)]


class Optional(ApiModel):
    name: Annotated[str, Field(max_length=3)] | None = None


def test_exclusive_bounds_are_flags() -> None:
    share = structural_schema(Exclusive, "x")["properties"]["share"]
    assert share == {
        **{"type": "number", "minimum": 0, "exclusiveMinimum": True},
        **{"maximum": 1, "exclusiveMaximum": True},
    }


def test_an_optional_field_is_not_required_and_has_no_null() -> None:
    schema = structural_schema(Optional, "x")
    assert "required" not in schema
    assert schema["properties"]["name"] == {"type": "string", "maxLength": 3}


def test_status_is_a_subresource_and_conditions_are_kept_by_type() -> None:
    assert VERSION["subresources"] == {"status": {}}
    assert BY_PATH["status.conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_columns_say_what_matters_first() -> None:
    columns = VERSION["additionalPrinterColumns"]
    narrow = [column["name"] for column in columns if not column.get("priority")]
    assert narrow == ["Phase", "Method", "Progress", "Metric", "Delta", "Published", "Age"]
    assert [column["name"] for column in columns if column.get("priority")] == ["Model", "GPUs", "ETA", "Message"]


def test_columns_show_fields_that_exist() -> None:
    of_condition = re.compile(r'conditions\[\?\(@\.type=="(\w+)"\)\]')
    written = [column["jsonPath"].removeprefix(".") for column in VERSION["additionalPrinterColumns"]]
    assert {kind for path in written for kind in of_condition.findall(path)} == {ConditionType.PUBLISHED}
    paths = [of_condition.sub("conditions[]", path) for path in written]
    assert [path for path in paths if path not in BY_PATH] == ["metadata.creationTimestamp"]


def test_the_definition_fits_into_the_annotation_of_kubectl_apply() -> None:
    assert len(json.dumps(crd())) < 262_144


def test_the_yaml_says_the_same_without_anchors() -> None:
    assert yaml.safe_load(crd_yaml()) == crd()
    assert not re.search(r"[&*]id\d", crd_yaml())


# --- rules


@pytest.mark.parametrize(("path", "rule"), ALL_RULES, ids=[f"{path}: {rule['message']}" for path, rule in ALL_RULES])
def test_a_rule_is_readable_and_looks_at_fields_that_exist(path: str, rule: Schema) -> None:
    place = path.removeprefix(".")
    assert rule["rule"].count("(") == rule["rule"].count(")")
    assert 10 < len(rule["message"]) < 300
    names = set(re.findall(r"\b(?:self|oldSelf)((?:\.\w+)+)(?!\w|\()", rule["rule"]))
    names.add(rule.get("fieldPath", ""))
    known = {*BY_PATH, "metadata.name"}
    assert [name for name in names if name and f"{place}{name}".removeprefix(".") not in known] == []


def test_there_are_rules_for_all_parts() -> None:
    assert len(ALL_RULES) > 25
    assert {path.removeprefix(".") for path, _ in ALL_RULES} >= set(RULES)


def test_one_rule_alone_freezes_the_spec() -> None:
    transitions = [(path, rule) for path, rule in ALL_RULES if "oldSelf" in rule["rule"]]
    assert [path for path, _ in transitions] == [".spec"]


def test_everything_is_frozen_but_the_allow_list() -> None:
    [rule] = [rule["rule"] for path, rule in ALL_RULES if "oldSelf" in rule["rule"]]
    compared = set(re.findall(r"self\.([\w.]+) == oldSelf\.\1(?=\W|$)", rule))
    blocks = set(SPEC["properties"]) - {"runPolicy"}
    policy = {f"runPolicy.{name}" for name in SPEC["properties"]["runPolicy"]["properties"]}
    assert compared == blocks | (policy - set(CHANGEABLE))
    assert set(CHANGEABLE) < policy


def test_what_may_change_is_what_was_promised() -> None:
    assert set(CHANGEABLE) == {"runPolicy.suspend", "runPolicy.activeDeadlineSeconds", "runPolicy.childTtlSeconds"}


def test_lists_with_keys_and_sets_refuse_duplicates() -> None:
    keys = {path: part["x-kubernetes-list-map-keys"] for path, part in FIELDS if "x-kubernetes-list-map-keys" in part}
    assert keys == {
        "spec.data.tasks": ["name"],
        "spec.compute.imagePullSecrets": ["name"],
        "spec.compute.pod.env": ["name"],
        "spec.compute.pod.volumes": ["name"],
        "spec.compute.pod.volumeMounts": ["mountPath"],
        "status.conditions": ["type"],
        "status.stages": ["stage"],
    }
    for path, names in keys.items():
        assert set(names) <= set(BY_PATH[f"{path}[]"]["required"]), "a list's key must be there"
    sets = [path for path, part in FIELDS if part.get("x-kubernetes-list-type") == "set"]
    assert sets == ["spec.data.tasks[].labels", "spec.evaluation.metrics"]


def test_adding_or_removing_an_optional_block_is_a_change() -> None:
    [rule] = [rule["rule"] for path, rule in ALL_RULES if "oldSelf" in rule["rule"]]
    optional = set(SPEC["properties"]) - set(SPEC["required"]) - {"runPolicy"}
    assert [name for name in optional if f"has(self.{name}) == has(oldSelf.{name})" not in rule] == []


def test_every_method_block_is_refused_beside_other_methods() -> None:
    rules = {rule["fieldPath"]: rule["rule"] for rule in BY_PATH["spec.method"]["x-kubernetes-validations"]}
    for method, block in BLOCK_OF.items():
        if block is not None:
            assert f"'{method.value}'" in rules[f".{block}"]


def test_every_uri_refuses_the_folders_of_one_machine() -> None:
    uris = [path for path, part in FIELDS if re.match(r"\^\(.*\bfile\b", part.get("pattern", ""))]
    assert len(uris) >= 6
    for path in uris:
        assert "startsWith('file://')" in BY_PATH[path]["x-kubernetes-validations"][0]["rule"]


def test_required_fields_are_the_models() -> None:
    required = {field.alias for field in FineTuneJobSpec.model_fields.values() if field.is_required()}
    assert set(SPEC["required"]) == required
