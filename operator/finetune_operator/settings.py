"""What the administrator decides, read once from the file that the chart writes."""

from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, ValidationError

from finetune_api.model import ApiModel
from finetune_api.spec import ComputeSpec
from finetune_api.spec.compute import PodSpec, ResourcesSpec
from finetune_api.spec.field import Annotations, Labels, Name, ObjectName

RegistryPrefix = Annotated[str, Field(pattern=r"^[a-z0-9]\S*[/:@]$")]
"""Ends where a name ends: ``registry.example/team`` would allow ``registry.example/team-of-others`` as well."""

StoragePrefix = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+://(\S*/)?$")]
"""As a `RegistryPrefix`: ``s3://models/``, or ``hf://`` for everything of one kind."""

EndpointPrefix = Annotated[str, Field(pattern=r"^https?://[^/\s]+/(\S*/)?$")]
"""As a `RegistryPrefix`, with the whole host: ``https://minio.example:9000/``."""


LOCKABLE = (*(field.alias or name for name, field in PodSpec.model_fields.items()), "priorityClassName", "cacheVolume")
"""Fields of ``spec.compute.pod``, and two of ``spec.compute`` that end up in its pods as these do."""


def _lockable(name: str) -> str:
    if name not in LOCKABLE:
        raise ValueError(f"{name} is no field that can be locked; these can: {', '.join(LOCKABLE)}")
    return name


LockedField = Annotated[str, AfterValidator(_lockable), Field(json_schema_extra={"enum": [*LOCKABLE]})]
"""One of `LOCKABLE`."""


class SettingsError(Exception):
    """The settings file is not usable; the message says where and why."""


class ImageSettings(ApiModel):
    """The trainer's image."""

    name: str
    """Reference of the image that jobs use unless they name another one."""
    pull_policy: str = "IfNotPresent"
    """As in Kubernetes."""
    pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets of every job's namespace; a job may name more."""


class PolicySettings(ApiModel):
    """What the administrator locks; empty lists lock nothing. Enforced at admission and again here."""

    image_registries: tuple[RegistryPrefix, ...] = ()
    """Prefixes that ``compute.image`` must begin with: ``registry.example/team/``."""
    storage_prefixes: tuple[StoragePrefix, ...] = ()
    """Prefixes that ``output.uri`` and every source must begin with: ``s3://models/``. What lies behind them depends on
    the endpoint: lock ``storage_endpoints`` as well. Suites that are known by name need ``hf://``."""
    storage_endpoints: tuple[EndpointPrefix, ...] = ()
    """Prefixes that ``output.endpoint`` and the addresses in ``training.reportTo`` must begin with; a job that names no
    endpoint takes the environment's."""
    service_accounts: tuple[ObjectName, ...] = ()
    """Service accounts that ``compute.pod.serviceAccountName`` may name."""
    locked_pod_fields: tuple[LockedField, ...] = ()
    """Fields of ``compute.pod``, ``priorityClassName`` and ``cacheVolume`` that no job may set; profiles may. With
    ``labels`` those of the job's metadata do not reach its pods either."""
    max_running_jobs: Annotated[int, Field(ge=1)] | None = None
    """Jobs of one namespace that may have a pod at the same time, for clusters without Kueue. Absent: no limit."""


class ProgressSettings(ApiModel):
    """The endpoint that trainers report to."""

    url: str
    """Base address as pods see it: ``https://finetune-operator.finetune-system.svc:10443``."""
    port: int = 10443
    """Port it listens on; 0 takes a free one."""
    secret: ObjectName = "finetune-operator-tls"
    """Secret of the operator's namespace with its certificate authority and certificate."""
    seconds_between_writes: Annotated[float, Field(ge=0)] = 5.0
    """Shortest time between two writes of one job's progress."""


class PodSettings(ApiModel):
    """What is put on every stage's pod."""

    labels: Labels = Field(default_factory=dict)
    """Cost centre and the like, on every Job as well; a job cannot change them."""
    annotations: Annotations = Field(default_factory=dict)
    """As the labels."""
    priority_class_name: ObjectName | None = None
    """Unless the job names one."""
    env: dict[str, str] = Field(default_factory=dict)
    """Proxy settings: HTTPS_PROXY, NO_PROXY."""
    ca_bundle: str = ""
    """PEM of private certificate authorities, added to the public ones."""
    check_resources: ResourcesSpec = ResourcesSpec()
    """Size of pods that train nothing: the check stage's, and Ray's head; absent, ``default_resources``."""
    default_resources: ResourcesSpec = ResourcesSpec()
    """Size of a pod whose job and profile name none."""


class Settings(ApiModel):
    """Everything the administrator decides."""

    namespace: ObjectName = "finetune-system"
    """Where the operator itself runs."""
    lease: ObjectName = "finetune-operator"
    """Lease of that namespace that lets one replica act at a time."""
    http_port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """Port of /healthz, /readyz and /metrics."""
    watch_namespaces: tuple[ObjectName, ...] = ()
    """Namespaces whose jobs are looked after; none means all."""
    image: ImageSettings
    """The trainer's image."""
    progress: ProgressSettings
    """The endpoint that trainers report to."""
    policy: PolicySettings = PolicySettings()
    """What is locked."""
    pod: PodSettings = PodSettings()
    """What is put on every pod."""
    profiles: dict[Name, ComputeSpec] = Field(default_factory=dict)
    """Named presets for ``compute.profile``; what a job sets itself wins."""
    backoff_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Pause before the second attempt; doubles up to ``longest_backoff_seconds``."""
    longest_backoff_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Longest pause between attempts."""
    workers: Annotated[int, Field(ge=1, le=64)] = 32
    """Jobs that are reconciled at the same time; nearly all that each does is wait for the API server."""


def parse_settings(text: str) -> Settings:
    """Return the settings in ``text``, YAML.

    Raises:
        SettingsError: all that is wrong with them.
    """
    try:
        return Settings.model_validate(yaml.safe_load(text) or {}, by_alias=True, by_name=False)
    except (yaml.YAMLError, ValidationError) as error:
        raise SettingsError(f"the operator's settings are not usable: {error}") from error
