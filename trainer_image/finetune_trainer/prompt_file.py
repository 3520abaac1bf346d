"""``prompt.json`` of a published model: how to ask it as it was trained. Pure."""

from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.model import ApiModel
from finetune_api.spec import ModelTask


class RendererInfo(Protocol):
    """What publication needs to know of `finetune_trainer.renderer.Renderer`."""

    system: str | None
    max_length: int

    @property
    def format(self) -> Literal["raw", "chat"]:
        """How prompts are wrapped."""
        ...

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    @property
    def assistant_header(self) -> str:
        """What follows the chat template's own generation prompt."""
        ...


class PromptTemplate(ApiModel):
    """One phrasing of a task; both are Jinja templates over a row's columns."""

    prompt: str
    completion: str


class PromptTask(ApiModel):
    """One task that the model was tuned for."""

    name: str
    templates: tuple[PromptTemplate, ...]
    """Empty for a task of chats: its questions go in as they are, behind the turns before them."""
    few_shot: int | None = None
    """How many rows with their answers it saw before every question; null where it saw the question alone."""
    labels: tuple[str, ...] = ()
    """Closed set of answers; empty when answers are free text."""


class PromptFile(ApiModel):
    """``prompt.json``: how to ask the model as it was trained.

    Render ``tasks[].templates[].prompt`` with a row. Format raw: strip white space at its end and tokenise with the
    tokenizer's own special tokens. Format chat: strip it on both ends, make it the user message behind ``system``
    (when not null), apply the chat template with a generation prompt, append ``assistantHeader``, and tokenise without
    special tokens. Where a task has ``fewShot``, so many rows of yours go before the question: in format raw each
    prompt with its completion (of a seq2seq-lm on a line of its own) and an empty line behind it, in format chat each
    as a user and an assistant message. Generate until one of ``endTokenIds``; strip white space around the answer.
    """

    version: Literal[1] = 1
    model_task: ModelTask = ModelTask.CAUSAL_LM
    """Of a seq2seq-lm the encoder reads the prompt, and what the decoder writes is the answer, all of it."""
    format: Literal["raw", "chat"]
    system: str | None
    assistant_header: str
    max_length: int
    """Longest prompt and answer together that was trained on, in tokens; of a seq2seq-lm, longest of each."""
    end_token_ids: tuple[int, ...]
    end_tokens: tuple[str, ...]
    tasks: tuple[PromptTask, ...]


def make_prompt_file(renderer: RendererInfo, job: FineTuneJob, tokenizer: PreTrainedTokenizerBase) -> PromptFile:
    """Return what ``prompt.json`` of this job's model says."""
    return PromptFile(
        model_task=job.spec.model.task,
        format=renderer.format,
        system=renderer.system,
        assistant_header=renderer.assistant_header,
        max_length=renderer.max_length,
        end_token_ids=renderer.end_token_ids,
        end_tokens=tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in renderer.end_token_ids),
        tasks=tuple(
            PromptTask(
                name=task.name,
                templates=tuple(
                    PromptTemplate(prompt=template.prompt, completion=template.completion)
                    for template in task.templates
                ),
                few_shot=task.few_shot,
                labels=tuple(task.labels or ()),
            )
            for task in job.spec.data.tasks
        ),
    )
