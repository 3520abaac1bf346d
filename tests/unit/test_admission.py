"""What an API server with our definition refuses, against what the table of bad specs says it does.

The schema is tried for real: a structural schema is JSON schema of draft 4. Rules in CEL need an API server; here every
row that counts on one is held against the places where rules stand.
"""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft4Validator

from finetune_api.crd import crd

from .attacks import ATTACKS, FOREIGN, Attack
from .bad_specs import BAD_SPECS, REACHABLE, Admission, BadSpec
from .builders import make_manifest

Schema = dict[str, Any]
OPEN: Schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def closed(schema: Schema) -> Schema:
    """Return ``schema`` as strict field validation reads it: what has no name is refused."""
    result = copy.deepcopy(schema)
    if "properties" in result:
        result["properties"] = {name: closed(part) for name, part in result["properties"].items()}
        result["additionalProperties"] = False
    if "items" in result:
        result["items"] = closed(result["items"])
    return result


CLOSED: Schema = OPEN | {"properties": OPEN["properties"] | {"spec": closed(OPEN["properties"]["spec"])}}


def refused_paths(schema: Schema, manifest: dict[str, Any]) -> set[str]:
    """Return the places that the schema refuses; a missing field is its own place."""
    return {path for error in Draft4Validator(schema).iter_errors(manifest) for path in places(error)}


def places(error: Any) -> Iterator[str]:
    path = written(error.absolute_path)
    match error.validator:
        case "required":
            yield from (
                f"{path}.{name}".removeprefix(".") for name in error.validator_value if name not in error.instance
            )
        case "additionalProperties":
            known = error.schema["properties"]
            yield from (f"{path}.{name}".removeprefix(".") for name in error.instance if name not in known)
        case _:
            yield path


def written(path: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def rows(*admissions: Admission) -> list[Any]:
    found = [row for row in BAD_SPECS if row.admission in admissions and is_for_our_schema(row)]
    return [pytest.param(row, id=row.sentence) for row in found]


def is_for_our_schema(row: BadSpec) -> bool:
    """The API server looks at apiVersion and at labels itself, and JSON has no NaN."""
    return row.path.startswith("spec") and "NaN" not in json.dumps(make_manifest(row.given))


def places_of_rules() -> set[str]:
    """Return every place with a rule in CEL or with keys of its own, without indices."""

    def below(schema: Schema, path: str) -> Iterator[str]:
        if "x-kubernetes-validations" in schema or "x-kubernetes-list-type" in schema:
            yield path
        for name, part in schema.get("properties", {}).items():
            yield from below(part, f"{path}.{name}")
        if "items" in schema:
            yield from below(schema["items"], f"{path}[]")

    return set(below(OPEN["properties"]["spec"], "spec"))


def test_the_table_covers_every_kind_of_refusal() -> None:
    assert len(rows(Admission.SCHEMA)) > 50
    assert len(rows(Admission.RULE)) > 25
    assert rows(Admission.STRICT)
    assert rows(Admission.PASSES)


@pytest.mark.parametrize("row", rows(Admission.SCHEMA))
def test_the_schema_refuses(row: BadSpec) -> None:
    assert row.path in refused_paths(OPEN, make_manifest(row.given))


@pytest.mark.parametrize("row", rows(Admission.STRICT))
def test_strict_field_validation_refuses(row: BadSpec) -> None:
    manifest = make_manifest(row.given)
    assert refused_paths(OPEN, manifest) == set()
    assert refused_paths(CLOSED, manifest) == {row.path}


@pytest.mark.parametrize("row", rows(Admission.RULE))
def test_a_rule_stands_where_one_is_counted_on(row: BadSpec) -> None:
    assert refused_paths(CLOSED, make_manifest(row.given)) <= {row.path, *row.also}
    steps = re.sub(r"\[\d+\]", "[]", row.path)
    assert [place for place in places_of_rules() if steps.startswith(place)]


@pytest.mark.parametrize("row", rows(Admission.PASSES))
def test_the_schema_is_no_stricter_than_it_says(row: BadSpec) -> None:
    assert refused_paths(CLOSED, make_manifest(row.given)) == set()
    # Folders are refused by a rule.
    assert "file://" not in json.dumps(make_manifest(REACHABLE | row.given))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.sentence)
def test_the_schema_refuses_what_leads_out_of_the_own_pod_and_namespace(attack: Attack) -> None:
    refused = refused_paths(CLOSED, make_manifest(attack.given))
    assert any(attack.field in path for path in refused), refused


def test_the_schema_leaves_what_can_be_locked_to_the_administrator() -> None:
    assert refused_paths(CLOSED, make_manifest(FOREIGN)) == set()


def test_the_minimal_manifest_passes() -> None:
    assert refused_paths(CLOSED, make_manifest()) == set()
