"""What the administrator locks, judged for what a user wrote. Pure. Admission judges the same rules before.

Profiles and settings are the administrator's own words and are not judged.
"""

import re
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.evaluation import SUITES
from finetune_api.support import Refusal
from finetune_operator import location
from finetune_operator.settings import PolicySettings

_LEADING_ELSEWHERE = (
    # Libraries take these where the spec names no endpoint: the same URI would lead elsewhere.
    *("AWS_ENDPOINT_URL.*", "HF_ENDPOINT"),
    # A proxy may answer in a store's place, and over TLS where an authority of its own vouches for it.
    *("HTTPS?_PROXY", "ALL_PROXY"),
    *("AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "FINETUNE_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_(DIR|FILE)"),
)
ELSEWHERE = f"(?i)^({'|'.join(_LEADING_ELSEWHERE)})$"
"""Variables that decide which store answers, as a pattern for Python and for CEL. Proxies are read in any case."""

_HUB = "hf://"


def violations(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    """Yield every field of ``spec`` that goes beyond what is allowed."""
    yield from _image(spec, policy)
    yield from _storage(spec, policy)
    yield from _endpoint(spec, policy)
    yield from _environment(spec, policy)
    yield from _service_account(spec, policy)
    yield from _pod_fields(spec, policy)


def _image(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    image, allowed = spec.compute.image, policy.image_registries
    if image is not None and allowed and not image.startswith(allowed):
        yield (
            ("spec", "compute", "image"),
            image,
            "is from a registry that the administrator does not allow.",
            f"Leave it out, or take an image that begins with {_listed(allowed)}.",
        )


def _storage(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    allowed = policy.storage_prefixes
    for path, uri in location.uris(spec) if allowed else ():
        # pvc://team-a/../team-b begins with what is allowed and ends up elsewhere.
        climbs = ".." in unquote(uri).split("/")
        if climbs or not uri.startswith(allowed):
            yield (
                path,
                uri,
                "is where the administrator does not allow it.",
                f"Begin it with {_listed(allowed)}.",
            )
    for index, benchmark in enumerate(spec.evaluation.benchmarks if allowed and _HUB not in allowed else ()):
        if benchmark.suite in SUITES:
            yield (
                ("spec", "evaluation", "benchmarks", index, "suite"),
                benchmark.suite,
                f"has its rows from {_HUB}, which the administrator does not allow.",
                "Leave it out, or name a task file of your own with its rows beside it.",
            )


def _endpoint(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    allowed = policy.storage_endpoints
    for path, endpoint in location.endpoints(spec) if allowed else ():
        # An allowed host ends in a slash, which an endpoint may leave out.
        if not f"{endpoint}/".startswith(allowed):
            yield (
                path,
                endpoint,
                "is a server that the administrator does not allow.",
                f"Begin it with {_listed(allowed)}, or do without it.",
            )


def _environment(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    is_locked = bool(policy.storage_prefixes or policy.storage_endpoints)
    for index, variable in enumerate(spec.compute.pod.env if is_locked and spec.compute.pod else ()):
        if re.match(ELSEWHERE, variable.name):
            yield (
                ("spec", "compute", "pod", "env", index, "name"),
                variable.name,
                "may lead to another store, which the administrator does not allow.",
                "Leave it out; spec.output.endpoint names the store, and proxies and certificate authorities are the "
                "administrator's to name.",
            )


def _service_account(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    name = spec.compute.pod.service_account_name if spec.compute.pod else None
    allowed = policy.service_accounts
    if name is not None and allowed and name not in allowed:
        yield (
            ("spec", "compute", "pod", "serviceAccountName"),
            name,
            "is a service account that the administrator does not allow.",
            f"Leave it out, or take {_listed(allowed)}.",
        )


def _pod_fields(spec: FineTuneJobSpec, policy: PolicySettings) -> Iterator[Refusal]:
    # An empty value counts: ``affinity: {}`` would take the place of the profile's.
    compute = spec.compute.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    blocks = {("spec", "compute"): compute, ("spec", "compute", "pod"): compute.get("pod", {})}
    for path, block in blocks.items():
        for name in policy.locked_pod_fields:
            if name in block:
                yield (
                    (*path, name),
                    block[name],
                    "is locked by the administrator.",
                    "Leave it out, or ask the administrator for a profile that sets it.",
                )


def _listed(values: Sequence[str]) -> str:
    return " or ".join(values)
