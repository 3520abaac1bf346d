"""Write what the chart has of the operator, or say that it has drifted: ``python charts/values_schema.py [--check]``.

values.schema.json: the block ``settings`` follows from the operator's own settings, so that Helm refuses what the
operator would refuse. files/elsewhere.json: the variables that the admission policy refuses as the operator does.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from finetune_api.model import ApiModel
from finetune_api.spec.field import Annotations, Labels, Name, SecretRef
from finetune_operator.policy import ELSEWHERE
from finetune_operator.settings import Settings

CHART = Path(__file__).resolve().parent / "finetune-operator"

KNOWN_TO_THE_CHART = {
    "Settings": ("namespace", "lease", "httpPort"),
    "ProgressSettings": ("url", "port", "secret"),
}
"""Settings that follow from the release and are no values."""

Schema = dict[str, Any]
KubernetesObject = dict[str, Any]
"""Passed on as it is; the API server knows what it may hold."""
PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Block(ApiModel):
    """Part of the values. Nothing is required: values.yaml holds every default."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))


class Image(Block):
    """The operator's own image."""

    repository: Annotated[str, Field(min_length=1)]
    tag: str
    pull_policy: PullPolicy


class Definition(Block):
    """The CustomResourceDefinition."""

    install: bool


class UserRoles(Block):
    """Roles for people."""

    aggregate_to_users: bool


class Switch(Block):
    """Something that may be left out."""

    enabled: bool


class JobNetworkPolicy(Switch):
    """What stages' pods may not reach."""

    namespaces: tuple[Name, ...]
    blocked_addresses: tuple[Annotated[str, Field(pattern="^[0-9a-f.:]+/[0-9]+$")], ...]


class NetworkPolicy(Switch):
    """Who may reach whom."""

    metrics_from: tuple[KubernetesObject, ...]
    jobs: JobNetworkPolicy


class ServiceMonitor(Switch):
    """What the Prometheus operator is told."""

    labels: Labels
    interval: Annotated[str, Field(pattern="^[0-9]+(ms|s|m)$")]


class Alerts(Switch):
    """What Prometheus warns of."""

    labels: Labels


class Dashboard(Switch):
    """What Grafana shows."""

    labels: Labels


class Values(Block):
    """Everything in values.yaml, which explains it."""

    # Helm hands it to every chart that is part of another one.
    global_: Annotated[KubernetesObject, Field(alias="global")]
    image: Image
    image_pull_secrets: tuple[SecretRef, ...]
    crds: Definition
    rbac: UserRoles
    admission_policy: Switch
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    resources: KubernetesObject
    pod_labels: Labels
    pod_annotations: Annotations
    priority_class_name: Annotated[str, Field(pattern="^[-a-z0-9.]*$")]
    node_selector: Labels
    tolerations: tuple[KubernetesObject, ...]
    affinity: KubernetesObject
    pod_disruption_budget: Switch
    network_policy: NetworkPolicy
    service_monitor: ServiceMonitor
    alerts: Alerts
    dashboard: Dashboard
    settings: Settings


def values_schema() -> str:
    """Return the schema as JSON, in the draft that every Helm 3 reads."""
    schema = Values.model_json_schema(by_alias=True, ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    for model, fields in KNOWN_TO_THE_CHART.items():
        for field in fields:
            del definitions[model]["properties"][field]
    # The chart fills in what is not given.
    for model in ("Settings", *KNOWN_TO_THE_CHART, "ImageSettings"):
        definitions[model].pop("required", None)
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "definitions": definitions}
    return json.dumps(_plain(whole), indent=1) + "\n"


def _plain(schema: Schema) -> Schema:
    """Return ``schema`` without what Helm's messages gain nothing from; values.yaml and docs/spec.md explain."""
    result = {key: value for key, value in schema.items() if key not in ("title", "description", "default")}
    for key in ("properties", "definitions", "patternProperties"):
        if key in result:
            result[key] = {name: _plain(one) for name, one in result[key].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = _plain(result[key])
    if "patternProperties" in result:
        result["additionalProperties"] = False
    if "anyOf" in result:
        choices = [_plain(choice) for choice in result.pop("anyOf") if choice != {"type": "null"}]
        result = {**result, **choices[0]} if len(choices) == 1 else {**result, "anyOf": choices}
    return result


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say what has drifted")
    files = {
        CHART / "values.schema.json": values_schema(),
        CHART / "files/elsewhere.json": f"{json.dumps(ELSEWHERE)}\n",
    }
    if not parser.parse_args().check:
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
        return 0
    drifted = [file.name for file, text in files.items() if not file.is_file() or file.read_text("utf-8") != text]
    for name in drifted:
        sys.stderr.write(f"{name} is not what the operator says now; run: make generate\n")
    return int(bool(drifted))


if __name__ == "__main__":
    sys.exit(main())
