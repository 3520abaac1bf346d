"""Which specs were published already: a job that is restored from a backup, or applied again, must not train again.

Beside the jobs' own folders, ``<namespace>/<name>.published/<hash of the request>.json`` holds what the evaluate stage
said when it had published. No job's folder is called so: names have no dot. Earlier releases named the file by a hash
that defaults were part of, all of them or the derived ones; the report that it leads to tells what was asked for.
"""

import logging
from collections.abc import Iterator

from pydantic import ValidationError

from finetune_api.job import FineTuneJob
from finetune_api.report import ArtifactKind, Report, Stage
from finetune_api.request import request_hash
from finetune_api.spec import FineTuneJobSpec
from finetune_api.stage_result import StageResult
from finetune_trainer.manifest import COMPLETE_NAME
from finetune_trainer.store import Store

logger = logging.getLogger(__name__)


def record_publication(store: Store, job: FineTuneJob, result: StageResult) -> None:
    """Remember that the spec of ``job`` has led to ``result``, which was published into ``store``."""
    store.put_bytes(_key(job), result.model_dump_json(by_alias=True, exclude_none=True).encode())


def find_publication(store: Store, job: FineTuneJob) -> StageResult | None:
    """Return, as the check stage's result, what a job of this name and spec has published; absent if that is gone.

    Raises:
        StorageError: the store does not answer.
    """
    key = _key(job)
    result = _read(store, key) if store.exists(key) else next(_named_otherwise(store, job), None)
    return None if result is None else result.model_copy(update={"stage": Stage.CHECK})


def _named_otherwise(store: Store, job: FineTuneJob) -> Iterator[StageResult]:
    asked = request_hash(job.spec)
    for key in store.list(_folder(job)):
        result = _read(store, key)
        if result is not None and _request_of(store, result) == asked:
            yield result


def _read(store: Store, key: str) -> StageResult | None:
    """Return what was published, if all of it is there."""
    try:
        result = StageResult.model_validate_json(store.get_bytes(key))
    except ValidationError:
        logger.warning("record of a publication is damaged or of another version key=%s", key)
        return None
    places = [_place(store, artifact.uri) for artifact in result.artifacts]
    is_there = all(store.exists(f"{place}/{COMPLETE_NAME}") for place in places)
    return result if result.published and places and is_there else None


def _request_of(store: Store, result: StageResult) -> str | None:
    """Return the hash of what was asked for, as the published report says; absent where that is not to be read."""
    for artifact in result.artifacts:
        if artifact.kind is ArtifactKind.REPORT:
            key = f"{_place(store, artifact.uri)}/report.json"
            try:
                report = Report.model_validate_json(store.get_bytes(key))
                return request_hash(FineTuneJobSpec.model_validate(report.resolved))
            except ValidationError:
                logger.warning("published report is of another version key=%s", key)
    return None


def _place(store: Store, uri: str) -> str:
    return uri.removeprefix(f"{store.uri}/")


def _folder(job: FineTuneJob) -> str:
    return f"{job.metadata.namespace}/{job.metadata.name}.published"


def _key(job: FineTuneJob) -> str:
    return f"{_folder(job)}/{request_hash(job.spec)}.json"
