"""Whether what the spec asks for fits the base model: found before a row is tokenised or a weight is loaded."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from finetune_api.spec import BLOCK_OF, DEFAULT_MAX_LENGTH, FineTuneJobSpec, MethodSpec, ModelSpec, ModelTask
from finetune_trainer.errors import SpecError
from finetune_trainer.methods import check_method
from finetune_trainer.model import ModelFiles, outline_model, position_limit, read_config

SHORTEST_ROW = 16
"""Tokens; as the least that ``spec.data.maxLength`` may say."""

LONGEST_TEXT = 1_048_576
"""Tokens; as the most that ``spec.data.maxLength`` may say."""


@dataclass(frozen=True, slots=True)
class RowLength:
    """How many tokens prompt and completion may have together; of an encoder-decoder model, each."""

    tokens: int
    note: str = ""
    """Why these are fewer than usual, for people."""


def check_fit(spec: FineTuneJobSpec, files: ModelFiles) -> None:
    """Find what of the spec or of the weights does not go with the model's architecture.

    Raises:
        SpecError: layers that the model does not have, or more tokens than it has places for.
        DataError: the weights are of another model than config.json.
    """
    check_task(spec.model, read_config(files))
    find_row_length(spec, files)
    check_method(outline_model(files), spec.method)


def check_task(model: ModelSpec, config: PretrainedConfig) -> None:
    """Find out whether the model is of the kind that the job says.

    Raises:
        SpecError: it is of the other.
    """
    kind, what = (
        (ModelTask.SEQ2SEQ_LM, "an encoder and a decoder")
        if config.is_encoder_decoder
        else (ModelTask.CAUSAL_LM, "a decoder alone")
    )
    if model.task is not kind:
        raise SpecError(
            f"spec.model.task ({model.task.value}): {model.source} ({config.model_type}) has {what}. "
            f"Set spec.model.task: {kind.value}, or choose another model in spec.model.source."
        )


def find_row_length(spec: FineTuneJobSpec, files: ModelFiles) -> RowLength:
    """Return what `row_length` gives for the model in ``files``."""
    return row_length(spec, position_limit(read_config(files)))


def find_room(spec: FineTuneJobSpec, files: ModelFiles) -> int:
    """Return how many tokens the model has places for, whatever rows the job allows."""
    limit = position_limit(read_config(files)) or LONGEST_TEXT
    return limit - _virtual_tokens(spec.method)


def _virtual_tokens(method: MethodSpec) -> int:
    """Return how many places the method takes before every row."""
    learnt = method.prompt_tuning or method.prefix_tuning
    return 0 if learnt is None else learnt.virtual_tokens


def row_length(spec: FineTuneJobSpec, limit: int | None) -> RowLength:
    """Return the length that ``spec.data.maxLength`` means for a model that can tell ``limit`` places apart.

    Raises:
        SpecError: what is written there, or the tokens that come before or behind a row, go beyond the limit.
    """
    asked = spec.data.max_length
    if limit is None:
        return RowLength(asked or DEFAULT_MAX_LENGTH)
    virtual = _virtual_tokens(spec.method)
    field = f"spec.method.{BLOCK_OF[spec.method.type]}.virtualTokens"
    room = limit - virtual
    places = f"the model has places for {limit:,} tokens (max_position_embeddings in its config.json)"
    if virtual:
        places += f", of which {field} takes {virtual:,}"
    if room < SHORTEST_ROW:
        raise SpecError(
            f"{field} ({virtual}): {places}; {max(room, 0)} are left for a row, and "
            f"{SHORTEST_ROW} are needed. Lower it to {limit - SHORTEST_ROW} or less."
        )
    if asked is not None and asked > room:
        raise SpecError(f"spec.data.maxLength ({asked}): {places}. Set it to {room} or less, or leave it out.")
    answer = spec.evaluation.generation.max_new_tokens
    if answer is not None and answer >= room:
        raise SpecError(
            f"spec.evaluation.generation.maxNewTokens ({answer}): {places}; none is left for the prompt. "
            f"Set it well below {room}, or leave it out."
        )
    if asked is None and room < DEFAULT_MAX_LENGTH:
        return RowLength(room, f"rows may have {room:,} tokens: {places}")
    return RowLength(asked or DEFAULT_MAX_LENGTH)
