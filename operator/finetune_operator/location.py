"""What a spec refers to outside itself: URIs, claims, ConfigMaps, Secrets, with the fields that name them. Pure."""

from collections.abc import Iterator

from finetune_api.problem import Path
from finetune_api.spec import FineTuneJobSpec, SecretRef

Place = tuple[Path, str]
"""A field's path below the manifest, and what stands there."""


def uris(spec: FineTuneJobSpec) -> Iterator[Place]:
    """Yield every URI that the job reads or writes."""
    yield ("spec", "model", "source"), spec.model.source
    if spec.model.start_from is not None and spec.model.start_from.source is not None:
        yield ("spec", "model", "startFrom", "source"), spec.model.start_from.source
    for index, task in enumerate(spec.data.tasks):
        sources = {
            "source": task.source,
            "validationSource": task.validation_source,
            "testSource": task.test_source,
        }
        for field, uri in sources.items():
            if uri is not None:
                yield ("spec", "data", "tasks", index, field), uri
    if spec.data.replay is not None:
        yield ("spec", "data", "replay", "source"), spec.data.replay.source
    for index, uri in enumerate(spec.evaluation.forgetting.sources if spec.evaluation.forgetting else ()):
        yield ("spec", "evaluation", "forgetting", "sources", index), uri
    for index, benchmark in enumerate(spec.evaluation.benchmarks):
        if "://" in benchmark.suite:
            yield ("spec", "evaluation", "benchmarks", index, "suite"), benchmark.suite
    yield ("spec", "output", "uri"), spec.output.uri


def claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """Return the PersistentVolumeClaims that URIs name, and whether the job may only read them."""
    found: dict[str, bool] = {}
    for path, uri in uris(spec):
        if claim := authority(uri, "pvc"):
            found[claim] = found.get(claim, True) and path[1] != "output"
    return found


def config_maps(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the ConfigMaps that URIs name, each once."""
    return tuple(dict.fromkeys(name for _, uri in uris(spec) if (name := authority(uri, "configMap"))))


def secrets(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the Secrets that ``secretRef`` fields name, each once."""
    refs = [
        spec.model.secret_ref,
        *(task.secret_ref for task in spec.data.tasks),
        spec.data.replay.secret_ref if spec.data.replay else None,
        spec.output.secret_ref,
        *(secret for _, secret in _trackers(spec)),
    ]
    return tuple(dict.fromkeys(ref.name for ref in refs if ref is not None))


def endpoints(spec: FineTuneJobSpec) -> Iterator[Place]:
    """Yield every address that the job names."""
    if spec.output.endpoint is not None:
        yield ("spec", "output", "endpoint"), spec.output.endpoint
    yield from (place for place, _ in _trackers(spec))


def _trackers(spec: FineTuneJobSpec) -> Iterator[tuple[Place, SecretRef | None]]:
    """Yield the address of every tracker that is a server, and what opens it."""
    wanted = spec.training.report_to
    if wanted is None:
        return
    block = ("spec", "training", "reportTo")
    if (mlflow := wanted.mlflow) is not None:
        yield ((*block, "mlflow", "trackingUri"), mlflow.tracking_uri), mlflow.secret_ref
    if (wandb := wanted.wandb) is not None:
        yield ((*block, "wandb", "baseUrl"), wandb.base_url), wandb.secret_ref


def authority(uri: str, scheme: str) -> str:
    """Return ``claim`` of ``pvc://claim/path``; empty for another scheme."""
    found, _, rest = uri.partition("://")
    return rest.partition("/")[0] if found == scheme else ""
