"""The kinds of values that the spec is made of. Everything is bounded: admission prices a rule by what it may meet."""

from decimal import Decimal
from typing import Annotated

from pydantic import AllowInfNan, Field, Strict

from finetune_api.model import ApiModel

Int = Annotated[int, Strict()]
"""A whole number; ``"3"`` and ``3.0`` are refused, as the API server does."""

Number = Annotated[float, Strict(), AllowInfNan(False)]
"""A finite number."""

Flag = Annotated[bool, Strict()]
"""true or false; ``"yes"`` and ``1`` are refused."""

Share = Annotated[Number, Field(ge=0, lt=1)]
"""A part of a whole, below all of it."""

Confidence = Annotated[Number, Field(ge=0.5, lt=1)]
"""How sure a decision must be."""

Seed = Annotated[Int, Field(ge=0, le=2**31 - 1)]
Seconds = Annotated[Int, Field(ge=1, le=31_536_000)]
"""A duration of at most a year."""

MODEL_URI = r"^((hf|s3|pvc)://[A-Za-z0-9][A-Za-z0-9._-]*(/[^\s@\x00-\x1f]*)?|file://(/|\.\.?/)[^\s\x00-\x1f]*)$"
DATA_URI = (
    r"^((hf|s3|pvc|configMap)://[A-Za-z0-9][A-Za-z0-9._-]*(/[^\s@\x00-\x1f]*)?|file://(/|\.\.?/)[^\s\x00-\x1f]*)$"
)
OUTPUT_URI = r"^((s3|pvc)://[A-Za-z0-9][A-Za-z0-9._-]*(/[^\s@\x00-\x1f]*)?|file://(/|\.\.?/)[^\s\x00-\x1f]*)$"
ENDPOINT = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"
DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
RESOURCE = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
DEVICE = (
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
IMAGE = r"^[a-z0-9][^\s]*$"
PATH = r"^/[^\s:]*$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
COLUMN = r"^[^\x00-\x1f]+$"
WANDB_NAME = r"^[^/\\#?%:\x00-\x1f]+$"
TASK_NAME = r"^[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?$"
GATE_METRIC = r"^[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?\.[A-Za-z0-9_]+$"

SHA256 = r"^[0-9a-f]{64}$"

PATTERN_MEANINGS = {
    MODEL_URI: "hf://organisation/name, s3://bucket/path, pvc://claim/path, file:///absolute or file://./relative",
    DATA_URI: "file:///absolute, file://./relative, s3://bucket/path, pvc://claim/path, configMap://name/key or hf://datasets/organisation/name",
    OUTPUT_URI: "s3://bucket/path, pvc://claim/path, file:///absolute or file://./relative",
    ENDPOINT: "http://host:port or https://host, without user, password or query",
    WANDB_NAME: "a name without / \\ # ? % : and control characters",
    TASK_NAME: "letters, digits, '-' and '_': sentiment",
    DNS_LABEL: "lower-case letters, digits and '-', beginning with a letter: reviews-lora",
    DNS_NAME: "lower-case letters, digits, '-' and '.': team-a",
    QUANTITY: 'a Kubernetes quantity in quotes: "4", 500m, 32Gi',
    RESOURCE: "a Kubernetes resource or label name: nvidia.com/gpu",
    DEVICE: "the device's name with the domain of its plugin: vpc.amazonaws.com/efa",
    ENV_NAME: "letters, digits and '_', not beginning with a digit: HF_HOME",
    IMAGE: "an image reference: registry.example/trainer:1.0",
    PATH: "an absolute path: /cache",
    VARIABLE: "a name as templates use it: letters, digits and '_', not beginning with a digit",
    COLUMN: "a name without control characters",
    SHA256: "64 hexadecimal digits, lower case",
    GATE_METRIC: "<task>.<metric>: sentiment.accuracy",
}
"""What to write where a pattern is asked for; ends up in error messages."""

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
"""The name of a part of the pods or of the cluster's settings."""

TaskName = Annotated[str, Field(min_length=1, max_length=64, pattern=TASK_NAME)]
"""The name of a task; no dots, because figures are called ``<task>.<figure>``."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_NAME)]
"""The name of a Kubernetes object."""

Column = Annotated[str, Field(min_length=1, max_length=128, pattern=COLUMN)]
"""The name of a column of the rows."""

Variable = Annotated[str, Field(min_length=1, max_length=64, pattern=VARIABLE)]
"""The name that a template gives to a column."""

ModelUri = Annotated[str, Field(min_length=1, max_length=1024, pattern=MODEL_URI)]
DataUri = Annotated[str, Field(min_length=1, max_length=1024, pattern=DATA_URI)]
OutputUri = Annotated[str, Field(min_length=1, max_length=1024, pattern=OUTPUT_URI)]
Endpoint = Annotated[str, Field(min_length=1, max_length=512, pattern=ENDPOINT)]
Sha256 = Annotated[str, Field(min_length=64, max_length=64, pattern=SHA256)]
Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=QUANTITY)]
ResourceName = Annotated[str, Field(min_length=1, max_length=253, pattern=RESOURCE)]
MountPath = Annotated[str, Field(min_length=1, max_length=1024, pattern=PATH)]
Prose = Annotated[str, Field(min_length=1, max_length=16384)]
"""Text for a model: a template, a system prompt. At most 16 KiB of ASCII."""

Revision = Annotated[str, Field(min_length=1, max_length=128)]
"""What a hub calls a state of a repository: a branch, a tag or a commit."""

LabelKey = Annotated[str, Field(min_length=1, max_length=317, pattern=RESOURCE)]
LabelValue = Annotated[str, Field(max_length=63)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=64)]
Annotations = Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]
# Before its slash a name has 253 characters at most, also with the requests. that a quota puts before it.
DeviceName = Annotated[str, Field(min_length=1, max_length=244, pattern=DEVICE)]
Devices = Annotated[dict[DeviceName, Annotated[Int, Field(ge=1, le=64)]], Field(max_length=8)]
"""How many of each device, by the name of its extended resource."""


class SecretRef(ApiModel):
    """A Secret in the job's namespace. Its values are read by the pods alone and appear nowhere else."""

    name: ObjectName
    """Name of the Secret."""


def amount(quantity: str) -> Decimal:
    """Return the number that a `Quantity` stands for: cores, or bytes."""
    number = quantity.rstrip("mkKMGTi")
    return Decimal(number) * _UNITS[quantity[len(number) :]]


_UNITS = {"": Decimal(1), "m": Decimal(1) / 1000, "k": Decimal(1000)} | {
    name: Decimal(base**power)
    for power, letter in enumerate("KMGT", start=1)
    for name, base in ((letter, 1000), (f"{letter}i", 1024))
}
