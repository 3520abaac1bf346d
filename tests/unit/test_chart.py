"""The chart: Helm renders what the operator and a careful administrator want, and says which values are bad."""

import copy
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml
from pydantic import BaseModel

from finetune_api.status import Phase, Reason
from finetune_operator.cluster import CLUSTER_ACCESS, JOB_ACCESS, OWN_ACCESS
from finetune_operator.metric import Metrics
from finetune_operator.naming import CHILD_SELECTOR
from finetune_operator.settings import ImageSettings, ProgressSettings, Settings, SettingsError, parse_settings

from .chart import CHART, EVERYTHING, NAMESPACE, HelmError, Manifest, faults, helm, only, render

ROOT = CHART.parents[1]
VALUES: Manifest = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
ALL_VALUES: Manifest = yaml.safe_load(EVERYTHING.read_text(encoding="utf-8"))
CRD_FILE = "finetune.dev_finetunejobs.yaml"

CLUSTER_SCOPED = {
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


@pytest.fixture(scope="module")
def default() -> list[Manifest]:
    return render()


@pytest.fixture(scope="module")
def everything() -> list[Manifest]:
    return render(files=[EVERYTHING])


def settings_of(manifests: list[Manifest]) -> Settings:
    return parse_settings(only(manifests, "ConfigMap", "finetune-operator-settings")["data"]["settings.yaml"])


# --- the chart as a whole


@pytest.mark.parametrize("values", [(), (f"--values={EVERYTHING}",)], ids=["default values", "every value"])
def test_lint_finds_nothing(values: tuple[str, ...]) -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in helm("lint", "--strict", CHART, "--kube-version=1.34.0", *values)


# What kube-score finds and we want so, with the reason.
WANTED_SO = {
    # One operator acts at a time; a second one would wait for its lease.
    "deployment-replicas",
    # It talks to the API server and whatever DNS there is, which a chart cannot name.
    "pod-networkpolicy",
}
WANTED_SO_BY_DEFAULT = {
    # A release's image never changes, and a registry that is away should not keep the operator down.
    "container-image-pull-policy",
}
WANTED_SO_OF_JOBS = {
    # Its pods are made later, by the operator.
    "networkpolicy-targets-pod",
}


def test_kube_score_finds_nothing_else(default: list[Manifest], everything: list[Manifest]) -> None:
    # Without a limit on CPU, as the values explain.
    flags = ("--ignore-container-cpu-limit",)
    assert set(faults(default, *flags)) == WANTED_SO | WANTED_SO_BY_DEFAULT
    assert set(faults(everything, *flags)) == WANTED_SO | WANTED_SO_OF_JOBS


def test_kube_score_is_heard(default: list[Manifest]) -> None:
    broken = copy.deepcopy(default)
    container = only(broken, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    container["securityContext"]["privileged"] = True
    assert "container-security-context-privileged" in faults(broken)
    assert "CPU limit is not set" in str(faults(broken)["container-resources"])


def test_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_an_old_cluster_is_refused() -> None:
    with pytest.raises(HelmError, match=r"requires kubeVersion: >=1\.31.*incompatible with Kubernetes v1\.29"):
        helm("template", CHART, "--kube-version=1.29.0")


def test_every_object_has_its_own_name_and_the_release_s_labels(everything: list[Manifest]) -> None:
    places = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in everything]
    assert len(places) == len(set(places)) > 20
    for one in everything:
        assert (one["kind"] in CLUSTER_SCOPED) == ("namespace" not in one["metadata"]), one["metadata"]["name"]
        if one["kind"] != "CustomResourceDefinition":  # Helm itself marks what it creates
            assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == "finetune-operator"


def test_two_releases_do_not_meet(everything: list[Manifest]) -> None:
    other = render({"crds": {"install": False}}, [EVERYTHING], release="second")
    names = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in other}
    assert not names & {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in everything}


# --- the definition


def test_definition_is_the_generated_one_and_is_kept(default: list[Manifest]) -> None:
    rendered = only(default, "CustomResourceDefinition")
    expected = yaml.safe_load((ROOT / "crds" / CRD_FILE).read_text(encoding="utf-8"))
    expected["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    assert rendered == expected, "run: make generate"


def test_helm_does_not_interpret_the_definition() -> None:
    file = (CHART / "files" / CRD_FILE).read_text(encoding="utf-8")
    assert "{{" in file, "nothing to misinterpret: this test proves nothing any more"
    assert file in helm("template", CHART, "--kube-version=1.34.0", "--show-only=templates/crd.yaml")


def test_definition_can_be_left_out() -> None:
    assert "CustomResourceDefinition" not in {one["kind"] for one in render({"crds": {"install": False}})}


# --- settings


def test_default_settings_are_those_of_the_operator(default: list[Manifest]) -> None:
    assert settings_of(default) == Settings(
        namespace=NAMESPACE,
        image=ImageSettings(name="finetune-trainer:0.1.0"),
        progress=ProgressSettings(
            url=f"https://finetune-operator.{NAMESPACE}.svc:10443", port=10443, secret="finetune-operator-tls"
        ),
    )


def test_every_setting_arrives(everything: list[Manifest]) -> None:
    arrived = settings_of(everything).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert arrived == {
        **ALL_VALUES["settings"],
        "namespace": NAMESPACE,
        "lease": "finetune-operator",
        "httpPort": 8080,
        "progress": {
            "secondsBetweenWrites": 2.5,
            "port": 10443,
            "secret": "finetune-operator-tls",
            "url": f"https://finetune-operator.{NAMESPACE}.svc:10443",
        },
    }


KNOWN_TO_THE_CHART = {"namespace", "lease", "httpPort", "progress.url", "progress.port", "progress.secret"}


def settings_fields(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        here = f"{path}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and path == "":
            yield from settings_fields(field.annotation, f"{here}.")
        elif here not in KNOWN_TO_THE_CHART:
            yield here


def test_values_explain_every_setting() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    fields = list(settings_fields(Settings))
    assert len(fields) > 18
    for field in fields:
        name = field.rpartition(".")[2]
        assert re.search(rf"^ +(# )?{name}:", text, re.MULTILINE), f"values.yaml does not name settings.{field}"
        value: Any = ALL_VALUES["settings"]
        for part in field.split("."):
            assert part in value, f"{EVERYTHING.name} does not set settings.{field}"
            value = value[part]


def test_an_operator_does_not_start_with_a_lock_that_it_cannot_keep(default: list[Manifest]) -> None:
    content = settings_of(default).model_dump(mode="json", by_alias=True)
    content["policy"]["lockedPodFields"] = ["tolerations", "hostNetwork"]
    with pytest.raises(
        SettingsError, match=r"policy\.lockedPodFields\.1\n.*hostNetwork is no field .*: nodeSelector, "
    ):
        parse_settings(yaml.safe_dump(content))


def test_changed_settings_restart_the_operator(default: list[Manifest]) -> None:
    def checksum(manifests: list[Manifest]) -> str:
        return str(only(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/settings"])

    assert checksum(render({"settings": {"workers": 9}})) != checksum(default)
    assert checksum(render({"resources": {"limits": {"memory": "1Gi"}}})) == checksum(default)


# --- values that are refused

REFUSED: dict[str, tuple[Manifest, str]] = {
    "an unknown value": ({"replicas": 2}, "additional properties 'replicas' not allowed"),
    "an unknown setting": ({"settings": {"worker": 2}}, "at '/settings': additional properties 'worker' not allowed"),
    "a setting that the chart knows": ({"settings": {"progress": {"url": "https://x"}}}, "at '/settings/progress'"),
    "a number out of range": ({"settings": {"workers": 0}}, "at '/settings/workers': minimum: got 0, want 1"),
    "a wrong type": ({"settings": {"pod": {"env": {"A": 1}}}}, "at '/settings/pod/env/A': got number, want string"),
    "a profile with an unknown field": (
        {"settings": {"profiles": {"big": {"pod": {"hostNetwork": True}}}}},
        "at '/settings/profiles/big/pod': additional properties 'hostNetwork' not allowed",
    ),
    "a profile with a bad name": (
        {"settings": {"profiles": {"A100": {}}}},
        "at '/settings/profiles': additional properties 'A100' not allowed",
    ),
    "a prefix that ends within a name": (
        {"settings": {"policy": {"imageRegistries": ["registry.example/team"]}}},
        "at '/settings/policy/imageRegistries/0': 'registry.example/team' does not match",
    ),
    "a bucket without its end": (
        {"settings": {"policy": {"storagePrefixes": ["s3://models"]}}},
        "at '/settings/policy/storagePrefixes/0': 's3://models' does not match",
    ),
    "a locked field that no pod has": (
        {"settings": {"policy": {"lockedPodFields": ["hostNetwork"]}}},
        "at '/settings/policy/lockedPodFields/0': value must be one of 'nodeSelector', 'tolerations', 'affinity'",
    ),
    "a pull policy that does not exist": (
        {"image": {"pullPolicy": "Sometimes"}},
        "at '/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'",
    ),
    "a network policy for nobody knows which jobs": (
        {"networkPolicy": {"jobs": {"enabled": True}}},
        "set networkPolicy.jobs.namespaces or settings.watchNamespaces",
    ),
    "a proxy that would swallow progress": (
        {"settings": {"pod": {"env": {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "localhost"}}}},
        "Add .svc to settings.pod.env.NO_PROXY",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_are_refused_with(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(HelmError, match=re.escape(message)):
        render(values)


def test_a_release_whose_name_no_service_can_have_is_refused() -> None:
    assert render(release="r" * 45)
    with pytest.raises(HelmError, match="more than the 63 characters that Kubernetes takes"):
        render(release="r" * 46)


@pytest.mark.parametrize("field", sorted(KNOWN_TO_THE_CHART))
def test_schema_has_no_value_that_the_chart_would_overwrite(field: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    block = "ProgressSettings" if field.startswith("progress.") else "Settings"
    assert field.rpartition(".")[2] not in schema["definitions"][block]["properties"]


def test_schema_is_generated() -> None:
    done = subprocess.run(
        [sys.executable, CHART.parent / "values_schema.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- the operator's pod


@pytest.mark.parametrize("values", ["default", "everything"])
def test_pod_is_restricted(values: str, request: pytest.FixtureRequest) -> None:
    pod = only(request.getfixturevalue(values), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {"configMap", "emptyDir"}


def test_what_is_put_on_every_pod_is_put_on_the_operator_s(everything: list[Manifest]) -> None:
    template = only(everything, "Deployment")["spec"]["template"]
    assert template["metadata"]["labels"].items() >= {"cost-center": "4711", "team": "platform"}.items()
    assert template["metadata"]["annotations"]["note"] == "{{ braces }}"
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert template["spec"]["priorityClassName"] == "system-cluster-critical"
    assert template["spec"]["containers"][0]["image"] == "registry.example/finetune-operator:1.2"


def test_labels_of_the_release_cannot_be_overwritten() -> None:
    labels = {"app.kubernetes.io/name": "other"}
    deployment = only(render({"podLabels": labels, "settings": {"pod": {"labels": labels}}}), "Deployment")
    selected = deployment["spec"]["selector"]["matchLabels"].items()
    assert selected <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_service_leads_to_the_ports_of_the_pod(default: list[Manifest]) -> None:
    (container,) = only(default, "Deployment")["spec"]["template"]["spec"]["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = only(default, "Service")
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == named
    settings = settings_of(default)
    assert settings.progress.url == f"https://{service['metadata']['name']}.{NAMESPACE}.svc:{named['progress']}"
    assert (settings.progress.port, settings.http_port) == (named["progress"], named["http"])
    assert {container[probe]["httpGet"]["port"] for probe in container if probe.endswith("Probe")} == {"http"}


def test_a_new_pod_comes_before_the_old_one_goes(default: list[Manifest]) -> None:
    strategy = only(default, "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_certificate_s_secret_is_rendered_without_data(default: list[Manifest]) -> None:
    # Data in the template would overwrite what the operator has written at every upgrade.
    secret = only(default, "Secret")
    assert not {"data", "stringData", "immutable"} & set(secret)
    assert secret["metadata"]["name"] == settings_of(default).progress.secret


def test_lease_is_rendered_without_holder(default: list[Manifest]) -> None:
    # A holder in the template would take the lease from the operator at every upgrade.
    lease = only(default, "Lease")
    assert "spec" not in lease
    assert lease["metadata"]["name"] == settings_of(default).lease


# --- rights


def rules(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Yield every rule that the operator has, with its role."""
    for one in manifests:
        if one["kind"] in ("Role", "ClusterRole") and "finetunejobs-" not in one["metadata"]["name"]:
            for rule in one["rules"]:
                yield one, rule


@pytest.mark.parametrize("values", ["default", "everything"])
def test_no_right_is_for_everything(values: str, request: pytest.FixtureRequest) -> None:
    found = list(rules(request.getfixturevalue(values)))
    assert len(found) > 8
    for _, rule in found:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])
        assert not {"pods/exec", "pods/log", "pods/attach", "serviceaccounts/token"} & set(rule["resources"])


@pytest.mark.parametrize("values", ["default", "everything"])
def test_one_secret_and_no_other_can_be_read(values: str, request: pytest.FixtureRequest) -> None:
    about_secrets = [
        (role, rule) for role, rule in rules(request.getfixturevalue(values)) if "secrets" in rule["resources"]
    ]
    ((role, rule),) = about_secrets
    assert (role["kind"], role["metadata"]["namespace"]) == ("Role", NAMESPACE)
    assert (rule["resources"], rule["resourceNames"]) == (["secrets"], ["finetune-operator-tls"])
    assert set(rule["verbs"]) == {"get", "update"}


NOT_CALLED = {("finetune.dev", "finetunejobs/finalizers", "update")}
"""Asked for by the API server itself where OwnerReferencesPermissionEnforcement is on."""


@pytest.mark.parametrize("values", ["default", "everything"])
def test_rights_are_what_the_operator_needs_and_no_more(values: str, request: pytest.FixtureRequest) -> None:
    given: dict[str, set[tuple[str, str, str]]] = {"own": set(), "cluster": set(), "jobs": set()}
    for role, rule in rules(request.getfixturevalue(values)):
        place = "own" if role["metadata"].get("namespace") == NAMESPACE else role["kind"]
        place = {"ClusterRole": "cluster", "Role": "jobs"}.get(place, place)
        given[place] |= set(itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"]))
    job_access = _flat(JOB_ACCESS) | NOT_CALLED
    assert given["own"] == _flat(OWN_ACCESS)
    if values == "everything":
        assert given["jobs"] == job_access
        assert given["cluster"] == _flat(CLUSTER_ACCESS)
    else:
        named = {one for one in _flat(CLUSTER_ACCESS) if one[1] == "namespaces"}  # asked for with a watch list alone
        assert given["cluster"] == job_access | _flat(CLUSTER_ACCESS) - named


def _flat(table: Iterable[tuple[str, str, tuple[str, ...]]]) -> set[tuple[str, str, str]]:
    return {(group, resource, verb) for group, resource, verbs in table for verb in verbs}


def test_lease_and_definition_are_named_in_the_rights(default: list[Manifest]) -> None:
    named = {
        (rule["resources"][0], *rule["verbs"]): rule["resourceNames"]
        for _, rule in rules(default)
        if "resourceNames" in rule
    }
    settings = settings_of(default)
    assert named == {
        ("secrets", "get", "update"): [settings.progress.secret],
        ("leases", "get", "update"): [settings.lease],
        ("customresourcedefinitions", "list", "watch"): ["finetunejobs.finetune.dev"],
    }


def test_a_watch_list_confines_the_rights(everything: list[Manifest]) -> None:
    cluster_wide = [rule["resources"] for role, rule in rules(everything) if role["kind"] == "ClusterRole"]
    assert cluster_wide == [["tokenreviews"], ["customresourcedefinitions"], ["namespaces"]]
    places = {role["metadata"]["namespace"] for role, rule in rules(everything) if "jobs" in rule["resources"]}
    assert places == {"team-a", "team-b"}


@pytest.mark.parametrize("values", ["default", "everything"])
def test_every_role_is_bound_to_the_operator(values: str, request: pytest.FixtureRequest) -> None:
    manifests = request.getfixturevalue(values)
    account = only(manifests, "ServiceAccount")["metadata"]
    assert only(manifests, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == account["name"]
    bound = set()
    for one in manifests:
        if one["kind"].endswith("RoleBinding"):
            assert one["subjects"] == [
                {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
            ]
            bound.add((one["roleRef"]["kind"], one["metadata"].get("namespace"), one["roleRef"]["name"]))
    assert bound == {
        (role["kind"], role["metadata"].get("namespace"), role["metadata"]["name"]) for role, _ in rules(manifests)
    }


def test_people_get_rights_on_jobs_by_the_roles_that_they_have(default: list[Manifest]) -> None:
    roles = {
        label: {verb for rule in one["rules"] for verb in rule["verbs"]}
        for one in default
        for label in one["metadata"].get("labels", {})
        if label.startswith("rbac.authorization.k8s.io/aggregate-to-")
    }
    assert roles == {
        "rbac.authorization.k8s.io/aggregate-to-view": {"get", "list", "watch"},
        "rbac.authorization.k8s.io/aggregate-to-edit": {"create", "update", "patch", "delete", "deletecollection"},
    }
    without = render({"rbac": {"aggregateToUsers": False}})
    assert not [one for one in without if "finetunejobs-" in one["metadata"]["name"]]


# --- what the administrator locks


def test_nothing_locked_means_no_admission_policy(default: list[Manifest]) -> None:
    assert not [one for one in default if one["kind"].startswith("ValidatingAdmission")]
    locked = copy.deepcopy(ALL_VALUES)
    locked["admissionPolicy"]["enabled"] = False
    assert not [one for one in render(locked) if one["kind"].startswith("ValidatingAdmission")]


LOCKS = {
    "imageRegistries": (("refusedImages",), ["registry.example/", "it's-\"a'b\\\\\"\\n☃{{.}}/"]),
    "storagePrefixes": (("refusedUris", "refusedSuites", "refusedVariables"), ["s3://models/", "s3://'\"\\</"]),
    "storageEndpoints": (("refusedEndpoints", "refusedVariables"), ["https://minio.example:9000/"]),
    "serviceAccounts": (("refusedServiceAccounts",), ["trainer"]),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_one_lock_alone_is_judged(lock: str) -> None:
    judging, allowed = LOCKS[lock]
    policy = only(render({"settings": {"policy": {lock: allowed}}}), "ValidatingAdmissionPolicy")["spec"]
    variables = {one["name"]: one["expression"] for one in policy["variables"]}
    assert json.loads(variables[lock]) == allowed, "a text of CEL is a text of JSON"
    assert variables["refused"] == " + ".join(f"variables.{variable}" for variable in judging)
    others = {other for variables, _ in LOCKS.values() for other in variables} | {"refusedPodFields"}
    assert not (others - {*judging}) & set(variables)


def test_locked_pod_fields_are_looked_for_where_they_stand() -> None:
    locked = ["tolerations", "priorityClassName"]
    policy = only(render({"settings": {"policy": {"lockedPodFields": locked}}}), "ValidatingAdmissionPolicy")["spec"]
    refused, whole = policy["variables"]
    assert re.findall(r"(\S+)\.hasValue\(\) \? '(\S+)' : ''", refused["expression"]) == [
        ("object.spec.?compute.?pod.?tolerations", "spec.compute.pod.tolerations"),
        ("object.spec.?compute.?priorityClassName", "spec.compute.priorityClassName"),
    ]
    assert whole["expression"] == f"variables.{refused['name']}"


def test_policy_holds_where_the_operator_looks_after_jobs(everything: list[Manifest]) -> None:
    binding = only(everything, "ValidatingAdmissionPolicyBinding")["spec"]
    assert binding["validationActions"] == ["Deny"]
    assert binding["matchResources"]["namespaceSelector"]["matchExpressions"] == [
        {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["team-a", "team-b"]}
    ]
    everywhere = render({"settings": {"policy": {"serviceAccounts": ["trainer"]}}})
    assert "matchResources" not in only(everywhere, "ValidatingAdmissionPolicyBinding")["spec"]


# --- around it


def test_only_stages_and_monitoring_reach_the_operator(everything: list[Manifest]) -> None:
    policy = only(everything, "NetworkPolicy", "finetune-operator")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    progress, metrics = policy["ingress"]
    assert progress == {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": CHILD_SELECTOR}}],
        "ports": [{"port": "progress"}],
    }
    assert metrics == {"from": ALL_VALUES["networkPolicy"]["metricsFrom"], "ports": [{"port": "http"}]}


def test_stages_are_kept_from_the_metadata_of_the_cloud(everything: list[Manifest]) -> None:
    policy = only(everything, "NetworkPolicy", "finetune-operator-finetune-system-jobs")
    assert policy["metadata"]["namespace"] == "team-a"
    assert policy["spec"] == {
        "podSelector": {"matchLabels": CHILD_SELECTOR},
        "policyTypes": ["Egress"],
        "egress": [
            {"to": [{"namespaceSelector": {}}]},
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}]},
            {"to": [{"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::254/128"]}}]},
        ],
    }


def test_a_node_with_the_only_replica_can_be_drained(everything: list[Manifest]) -> None:
    budget = only(everything, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


def test_prometheus_finds_the_service(everything: list[Manifest]) -> None:
    monitor = only(everything, "ServiceMonitor")["spec"]
    service = only(everything, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}


def test_dashboard_shows_figures_that_the_operator_has(everything: list[Manifest]) -> None:
    dashboard = json.loads(only(everything, "ConfigMap", "finetune-operator-dashboard")["data"]["finetune.json"])
    assert dashboard == json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    choices = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    # Grafana's own function around a selector.
    queries += [re.sub(r"^label_values\((.+), \w+\)$", r"\1", query) for query in choices]
    assert len(figures_of(queries)) >= 10


VARIABLES = {"namespace": ".*", "__rate_interval": "5m"}
"""What Grafana may put in place of those in the dashboard's queries."""
SERIES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
"""How the names of a figure's series end, by its type."""


def figures_of(queries: list[str]) -> set[str]:
    """Return the figures in ``queries``; every one, and every phase and reason, is one that the operator knows."""
    selectors = [selector for query in queries for selector in selectors_of(query)]
    metrics = Metrics()
    metrics.watch(lambda: [("team-a", Phase.TRAINING)], lambda: 0, lambda: 0, lambda: True)
    known = {family.name + end for family in metrics.registry.collect() for end in SERIES[family.type]}
    used = {str(selector.name) for selector in selectors}
    assert used <= known
    for matcher in itertools.chain.from_iterable(selector.matchers.matchers for selector in selectors):
        if matcher.name in ("phase", "reason"):
            assert set(matcher.value.split("|")) <= set({"phase": Phase, "reason": Reason}[matcher.name])
    return used


def selectors_of(query: str) -> list[promql.VectorSelector]:
    """Return every choice of series in ``query``, which must be PromQL once Grafana's variables are filled in."""
    found: list[promql.VectorSelector] = []

    def look(part: promql.Expr) -> None:
        match part:
            case promql.VectorSelector():
                found.append(part)
            case promql.MatrixSelector():
                found.append(part.vector_selector)

    promql.walk(promql.parse(re.sub(r"\$(\w+)", lambda variable: VARIABLES[variable[1]], query)), look)
    return found


def test_alerts_are_about_figures_that_the_operator_has_and_in_the_runbook(everything: list[Manifest]) -> None:
    (group,) = only(everything, "PrometheusRule")["spec"]["groups"]
    assert len(figures_of([rule["expr"] for rule in group["rules"]])) >= 6
    names = [rule["alert"] for rule in group["rules"]]
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Finetune\w+)$", runbook, re.MULTILINE) == names
    assert {rule["labels"]["severity"] for rule in group["rules"]} <= {"critical", "warning", "info"}


def test_the_runbook_says_what_to_do_about_every_reason() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", runbook, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(Reason)


def test_dashboard_leaves_no_figure_out() -> None:
    text = (CHART / "files" / "dashboard.json").read_text(encoding="utf-8")
    own = {family.name for family in Metrics().registry.collect() if family.name.startswith("finetune_")}
    assert len(own) > 5
    assert not {name for name in own if name not in text}


def test_what_is_optional_is_absent_by_default(default: list[Manifest]) -> None:
    kinds = {one["kind"] for one in default}
    assert (
        not {"NetworkPolicy", "ServiceMonitor", "PrometheusRule", "PodDisruptionBudget", "ValidatingAdmissionPolicy"}
        & kinds
    )
    assert [one["metadata"]["name"] for one in default if one["kind"] == "ConfigMap"] == ["finetune-operator-settings"]
