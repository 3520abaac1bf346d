"""Which specs were published already: a job that is restored from a backup, or applied again, must not train again.

Beside the jobs' own folders,
``<namespace>/<name>.published/<hash of the spec>.json`` holds what the evaluate stage said
when it had published. No job's folder is called so: names have no dot.
"""

import logging

from pydantic import ValidationError

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import Stage
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
    if not store.exists(key):
        return None
    try:
        result = StageResult.model_validate_json(store.get_bytes(key))
    except ValidationError:
        logger.warning("record of a publication is damaged or of another version key=%s", key)
        return None
    places = [artifact.uri.removeprefix(f"{store.uri}/") for artifact in result.artifacts]
    if not result.published or not places or not all(store.exists(f"{place}/{COMPLETE_NAME}") for place in places):
        return None
    return result.model_copy(update={"stage": Stage.CHECK})


def _key(job: FineTuneJob) -> str:
    return f"{job.metadata.namespace}/{job.metadata.name}.published/{spec_hash(job.spec)}.json"
