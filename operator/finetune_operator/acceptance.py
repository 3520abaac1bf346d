"""Whether a job can be done here, and what exactly is to be done: profile and defaults filled in. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api.explanation import field_errors
from finetune_api.job import API_VERSION, KIND, FineTuneJob, spec_hash
from finetune_api.problem import FieldError, shown, written
from finetune_api.report import ArtifactKind
from finetune_api.resolve import resolve
from finetune_api.spec import ComputeSpec, FineTuneJobSpec, StartFrom
from finetune_api.status import Attempt, ConditionType, PublishedArtifact, Reason
from finetune_api.support import Place, Refusal, unreachable_fields, unsupported_fields
from finetune_operator import policy
from finetune_operator.condition import ending, headline, holds
from finetune_operator.manifest import image_of, job_file, output_path
from finetune_operator.observed import JobView
from finetune_operator.pod import RESERVED, Run, mount_paths
from finetune_operator.settings import Settings

LARGEST_FILE = 1_000_000
"""Bytes of the resolved job; a ConfigMap holds 1 MiB."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that can be done."""

    job: FineTuneJob
    """Resolved."""
    spec_hash: str
    image: str
    output_path: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that cannot be done, or not now."""

    reason: Reason
    message: str
    is_final: bool
    """Whether nothing but another job can help: the spec cannot be changed."""


def judge(job: JobView, settings: Settings, starts: Sequence[JobView] = ()) -> Accepted | Refused:
    """Return what is to be done for ``job``, or all that speaks against it.

    ``starts`` is `Observed.starts`.
    """
    written_job, errors = _parsed(job, job.spec)
    if errors or written_job is None:
        return _refused(Reason.SPEC_INVALID, errors, is_final=True)
    if refusals := [*unsupported_fields(job.spec), *unreachable_fields(job.spec, Place.CLUSTER)]:
        return _refused(Reason.NOT_SUPPORTED, _as_errors(refusals), is_final=True)
    if refusals := [*policy.violations(written_job.spec, settings.policy)]:
        return _refused(Reason.POLICY_VIOLATED, _as_errors(refusals), is_final=False)
    profile = written_job.spec.compute.profile
    if profile is not None and profile not in settings.profiles:
        return _unknown_profile(profile, settings)
    return _resolved(job, written_job, settings, starts)


def _parsed(job: JobView, spec: Mapping[str, Any]) -> tuple[FineTuneJob | None, list[FieldError]]:
    # Annotations stay out: kubectl keeps the whole manifest in one of them.
    metadata = {"name": job.name, "namespace": job.namespace, "uid": job.uid, "labels": dict(job.labels)}
    document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": dict(spec)}
    try:
        return FineTuneJob.model_validate(document, by_alias=True, by_name=False), []
    except ValidationError as error:
        return None, list(field_errors(FineTuneJob, error, {}))


def _as_errors(refusals: Iterable[Refusal]) -> list[FieldError]:
    return [FieldError(written(path), shown(value), problem, remedy) for path, value, problem, remedy in refusals]


def _refused(reason: Reason, errors: list[FieldError], is_final: bool, preamble: str = "") -> Refused:
    return Refused(reason, preamble + "\n".join(map(str, errors)), is_final)


def _unknown_profile(profile: str, settings: Settings) -> Refused:
    known = ", ".join(sorted(settings.profiles)) or "none yet"
    remedy = f"The administrator keeps: {known}. The job starts when this one is among them."
    error = FieldError("spec.compute.profile", shown(profile), "is no profile here.", remedy)
    return _refused(Reason.PROFILE_NOT_FOUND, [error], is_final=False)


def _resolved(
    job: JobView, written_job: FineTuneJob, settings: Settings, starts: Sequence[JobView]
) -> Accepted | Refused:
    merged = written_job
    errors: list[FieldError] = []
    profile = written_job.spec.compute.profile
    preamble = f"with profile {profile}: " if profile else ""
    if profile is not None:
        compute = with_profile(job.spec.get("compute") or {}, settings.profiles[profile])
        parsed, errors = _parsed(job, {**job.spec, "compute": compute})
        merged = parsed or written_job
        errors += _as_errors(unsupported_fields({"compute": compute}))
    if errors:
        # The profile may be mended, so this is not the end.
        return _refused(Reason.SPEC_INVALID, errors, is_final=False, preamble=preamble)
    resolved = resolve(merged)
    if job.start_job is not None:
        start = find_start(job, job.start_job, starts)
        if isinstance(start, Refused):
            return start
        resolved = resolved.model_copy(update={"spec": _beginning_with(resolved.spec, start)})
        # Not the resolved one: what a profile sets is the administrator's.
        if refusals := [*policy.violations(_beginning_with(written_job.spec, start), settings.policy)]:
            return _refused(Reason.POLICY_VIOLATED, _as_errors(refusals), is_final=False)
    accepted = Accepted(resolved, spec_hash(resolved.spec), image_of(resolved, settings), output_path(resolved))
    errors = [*_taken_places(accepted, settings), *_too_large(resolved)]
    return _refused(Reason.SPEC_INVALID, errors, is_final=profile is None) if errors else accepted


def _beginning_with(spec: FineTuneJobSpec, start: StartFrom) -> FineTuneJobSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"start_from": start})})


def _too_large(job: FineTuneJob) -> Iterable[FieldError]:
    size = len(job_file(job).encode())
    if size > LARGEST_FILE:
        yield FieldError(
            "spec", "", f"has {size} bytes, and {LARGEST_FILE} fit.", "Shorten the templates, or use fewer of them."
        )


def _taken_places(accepted: Accepted, settings: Settings) -> Iterable[FieldError]:
    """Yield what profile and user put where our own volumes are."""
    extra = accepted.job.spec.compute.pod
    if extra is None:
        return
    run = Run(accepted.job, Attempt(number=1, child=accepted.job.metadata.name), accepted.image, "", settings)
    for index, volume in enumerate(extra.volumes):
        if volume.name.startswith(RESERVED):
            path = f"spec.compute.pod.volumes[{index}].name"
            yield FieldError(path, shown(volume.name), f"begins with {RESERVED}, as our own do.", "Rename it.")
    for index, mount in enumerate(extra.volume_mounts):
        if mount.mount_path.rstrip("/") in mount_paths(run):
            path = f"spec.compute.pod.volumeMounts[{index}].mountPath"
            yield FieldError(path, shown(mount.mount_path), "is a folder of the trainer.", "Take another one.")


# --- what it goes on from


def find_start(job: JobView, name: str, starts: Sequence[JobView]) -> StartFrom | Refused:
    """Return what the job called ``name`` has published, pinned; or why there is nothing to go on from."""
    field = f"spec.model.startFrom.job: {name}"
    earlier = next((one for one in starts if one.name == name), None)
    artifact = _published(earlier) if earlier else None
    if artifact is not None:
        return StartFrom(source=artifact.uri, sha256=artifact.sha256)
    if name == job.name or job.name in {one.name for one in starts}:
        circle = " goes on from ".join([job.name, *(one.name for one in starts if one.name != job.name), job.name])
        return Refused(Reason.SPEC_INVALID, f"{field} ends in a circle: {circle}. None of them can begin.", True)
    if earlier is None:
        return _waiting(f"{field} is not there; this job begins when a job of that name has published")
    if over := ending(earlier.status):
        why = over.message or over.reason.value
        return _waiting(f"{field} has ended and published nothing: {why}. Mend it and apply it again under its name")
    return _waiting(f"{field} has not published yet ({headline(earlier.status) or 'not looked at'})")


def _published(earlier: JobView) -> PublishedArtifact | None:
    """Return the model itself: beside an adapter there may be merged weights."""
    if not holds(earlier.status, ConditionType.PUBLISHED):
        return None
    kinds = (ArtifactKind.ADAPTER, ArtifactKind.WEIGHTS)
    return next((artifact for artifact in earlier.status.artifacts if artifact.kind in kinds), None)


def _waiting(message: str) -> Refused:
    return Refused(Reason.WAITING_FOR_JOB, message, is_final=False)


# --- profiles


_KEYS = {"env": "name", "volumes": "name", "volumeMounts": "mountPath"}
"""Lists whose entries are merged by a key; the user's entry wins as a whole."""
_BOTH = ("tolerations", "imagePullSecrets")
"""Lists of which all entries are meant."""


def with_profile(own: Mapping[str, Any], profile: ComputeSpec) -> dict[str, Any]:
    """Return ``compute`` as written by the user over that of the profile.

    Args:
        own: the user's block, as plain values.
        profile: the administrator's; only what is set in it counts.
    """
    preset = profile.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    return _over(preset, own)


def _over(preset: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(preset)
    for name, value in own.items():
        before = merged.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and name != "affinity":
            merged[name] = _over(before, value)
        elif isinstance(value, list) and isinstance(before, list) and name in _KEYS:
            key = _KEYS[name]
            merged[name] = list({entry[key]: entry for entry in (*before, *value)}.values())
        elif isinstance(value, list) and isinstance(before, list) and name in _BOTH:
            merged[name] = [*before, *(entry for entry in value if entry not in before)]
        else:
            merged[name] = value
    return merged
