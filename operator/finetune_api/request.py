"""What a job asks for beyond the defaults, whether constant or derived: the same under releases that differ in them."""

from typing import TypeVar

from finetune_api.job import NO_PART_OF_THE_RESULT, content_hash
from finetune_api.model import ApiModel
from finetune_api.resolve import resolve_spec
from finetune_api.spec import FineTuneJobSpec

_Block = TypeVar("_Block", bound=ApiModel)

_FILLED_IN = (
    ("training", "learning_rate"),
    ("training", "gradient_checkpointing"),
    ("method", "lora"),
    ("method", "prompt_tuning"),
    ("method", "prefix_tuning"),
    ("method", "ia3"),
    ("method", "adapter"),
    ("method", "selective", "last_layers"),
    ("method", "selective"),
    ("data", "mixing", "temperature"),
)
"""Fields that `finetune_api.resolve` may fill in. A block comes behind its fields.

Not the phrasings of the template library: a model that was trained on others is not the one that is asked for.
"""


def request_hash(spec: FineTuneJobSpec) -> str:
    """Return the sha256 of what ``spec``, resolved or not, asks for beyond the defaults, in which releases may differ.

    Unlike `finetune_api.job.spec_hash` it stays as it is when a later release adds a field with a default or changes a
    default. Whether a default was written out, by the user or by an API server, makes no difference.
    """
    asked = _asked(spec)
    for block, names in NO_PART_OF_THE_RESULT.items():
        for name in names:
            # Not by exclude: a block of nothing but defaults would stay, as an empty one.
            asked = _without(asked, (block, name))
    return content_hash(asked.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True))


def _asked(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """Return ``spec`` without the values that resolving it would bring back."""
    resolved = resolve_spec(spec)
    asked = resolved
    for path in _FILLED_IN:
        bare = _without(asked, path)
        if resolve_spec(bare) == resolved:
            asked = bare
    return asked


def _without(block: _Block, path: tuple[str, ...]) -> _Block:
    name, *rest = path
    inner = getattr(block, name)
    if inner is None:
        return block
    value = _without(inner, tuple(rest)) if rest else type(block).model_fields[name].get_default()
    return block.model_copy(update={name: value})
