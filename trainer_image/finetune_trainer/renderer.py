"""The one way from an example to tokens, shared by training, scoring, generation and publication.

Where the prompt ends and the completion begins is decided here, once: generation sees exactly the tokens before that
boundary, and the completion is tokenised on its own so that every candidate label meets the same boundary. Knows no
model and no padding; what is learnt follows from positions, never from token ids.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from finetune_api.spec import LossOn
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.example import Encoded, Example, pack_encoded, unpack_encoded
from finetune_trainer.excerpt import excerpt
from finetune_trainer.labels import with_label
from finetune_trainer.record_file import RecordFile
from finetune_trainer.records import StoredRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TRUNCATED_SHARE = 0.25
"""Above this share of shortened examples a model learns from fragments: an error, not a warning."""

# A tokenizer's threads have heaps of their own, which grow with the rows of a call and are never given back.
_ROWS_AT_ONCE = 128

_ANCHOR = "\n"
_SHOWN_CHARACTERS = 80

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _ChatFrame:
    """What the chat template puts around the assistant's text."""

    header: str
    """What follows the template's own generation prompt; empty for most templates."""
    lead: str
    """Spaces before the assistant's text: they belong to the completion, or its first token would be another one."""
    tail: str
    """All that follows the assistant's text."""
    ending: str
    """The part of ``tail`` that is learnt: up to the end token, without the line end behind it."""
    end_ids: Ids
    """Appended when the template ends the turn without a special token."""
    end_token_id: int


class Renderer:
    """Examples to tokens for one tokenizer, one format and one system prompt."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        format: str,
        system: str | None,
        max_length: int,
        decoder_start: int | None = None,
    ) -> None:
        """Settle the format and find out how the chat template frames the assistant's turn.

        Args:
            tokenizer: its chat template decides what ``auto`` means.
            format: ``auto``, ``raw`` or ``chat``.
            system: system prompt for format chat; None leaves it to the template.
            max_length: tokens of prompt, completion and end token together; of an encoder-decoder model, of the prompt
                and of the completion each.
            decoder_start: see `Encoded`; given, prompts and completions are texts of their own.

        Raises:
            SpecError: the tokenizer lacks a chat template or an end token, or the template takes no system prompt.
            DataError: the chat template does not allow the assistant's text to be told from what surrounds it.
        """
        self._tokenizer = tokenizer
        self.system = system
        self.max_length = max_length
        self._decoder_start = decoder_start
        if decoder_start is not None and format == "auto":
            format = "raw"
        self.format: Literal["raw", "chat"] = _resolve_format(tokenizer, format, system)
        self._leading_ids, self._trailing_ids = self._find_surrounding_ids()
        self._anchor_ids = self._find_anchor_ids()
        self._frame = self._find_frame() if self.format == "chat" else None
        self._reserved: dict[tuple[str, str, str], int] = {}

    def raw(self, max_length: int | None = None) -> "Renderer":
        """Return the renderer of the same model's texts without a chat template."""
        return Renderer(self._tokenizer, "raw", None, max_length or self.max_length, self._decoder_start)

    def with_length(self, max_length: int) -> "Renderer":
        """Return the same renderer for longer or shorter texts."""
        return Renderer(self._tokenizer, self.format, self.system, max_length, self._decoder_start)

    @property
    def end_token_ids(self) -> Ids:
        """Tokens that end an answer; the one that is learnt comes first."""
        ends = [self._frame.end_token_id] if self._frame is not None else []
        if self._tokenizer.eos_token_id is not None:
            ends.append(self._tokenizer.eos_token_id)
        return tuple(dict.fromkeys(ends))

    @property
    def end_length(self) -> int:
        """Tokens at the end of every completion that belong to the form and not to the answer."""
        if self._frame is None:
            return 1
        return len(self._tokenise([self._frame.ending])[0]) + len(self._frame.end_ids)

    @property
    def assistant_header(self) -> str:
        """What to append to the chat template's own generation prompt to get the prompt that was trained on."""
        return self._frame.header if self._frame is not None else ""

    def prompt_text(self, example: Example) -> str:
        """Return the prompt as the model sees it, special tokens and the system prompt included; not shortened."""
        prompt, _ = self._texts(example)
        if self._frame is not None:
            return prompt
        return self.decode(self._leading_ids) + prompt + self.decode(self._trailing_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens included, for people."""
        return str(self._tokenizer.decode(list(ids)))

    def encode(self, example: Example, dataset: Dataset) -> Encoded:
        """Return the tokens of prompt, completion and end token.

        When they are too many, rows shown before it are left out, then the prompt's long column is cut.

        Raises:
            DataError: the example does not fit even so.
        """
        prompt, completion = self._texts(example)
        return self._fitted(example, dataset, self._prompt_ids([prompt])[0], self._completion_ids([completion])[0])

    def encode_prompt(self, example: Example, dataset: Dataset) -> Ids:
        """Return what generation sees: exactly the tokens of `encode` before the completion."""
        return self.encode(example, dataset).prompt_ids

    def encode_question(self, question: str) -> Ids:
        """Return what generation sees of a question that belongs to no task, in the format that tasks are asked in."""
        return self.encode_text(question if self._frame is not None else f"Question: {question}\nAnswer:")

    def encode_text(self, text: str) -> Ids:
        """Return what generation sees of ``text`` as the whole prompt: raw as it stands, else as the user's turn."""
        if self._frame is None:
            return self._prompt_ids([text.rstrip()])[0]
        turns = _as_messages([*self._own_system(), ("user", text.strip())])
        return self._prompt_ids([self._chat(turns, generation_prompt=True) + self._frame.header])[0]

    def encode_completion(self, prompt_ids: Ids, example: Example, completion_text: str) -> Ids:
        """Return the tokens, end token included, of ``completion_text`` in the place of the example's completion.

        They are what `encode` gives when the text is the example's own; ``prompt_ids`` from `encode_prompt` go before.
        """
        if not prompt_ids:
            raise ValueError("a completion needs a prompt before it")
        return self._completion_ids([self._completion_text(example, completion_text)])[0]

    def with_completion(self, encoded: Encoded, example: Example, completion_text: str) -> Encoded:
        """Return what `encode` gave for ``example`` with the tokens of another completion behind its prompt."""
        completion = self.encode_completion(encoded.prompt_ids, example, completion_text)
        return replace(encoded, ids=encoded.prompt_ids + completion)

    def encode_turns(self, example: Example, dataset: Dataset) -> Encoded:
        """Return what `encode` gives with every answer of a chat to be learnt, each tokenised as the last one is.

        Raises:
            DataError: the example does not fit, or the chat template writes earlier answers otherwise than the last.
        """
        prompt, completion = self._texts(example)
        fitted, _, last = self._fit(
            example, dataset, self._prompt_ids([prompt])[0], self._completion_ids([completion])[0]
        )
        if self._frame is None or not fitted.earlier:
            return self.encode(example, dataset)
        whole, _ = self._texts(fitted)
        turns = [*self._turns(fitted), ("assistant", "")]
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        at = 0
        for place in (place for place, (role, _) in enumerate(turns) if role == "assistant"):
            before = self._chat(_as_messages(turns[:place]), generation_prompt=True) + self._frame.header
            if not whole.startswith(before):
                raise _other_answer(example)
            ids += self._prompt_ids([before[at:]])[0] if not at else self._tokenise([before[at:]])[0]
            if place == len(turns) - 1:
                break
            answer = self._frame.lead + turns[place][1].strip() + self._frame.ending
            if not whole.startswith(before + answer):
                raise _other_answer(example)
            tokens = self._continuation_ids([answer])[0]
            answers.append((len(ids), len(ids) + len(tokens)))
            ids += tokens
            at = len(before) + len(answer)
        return Encoded((*ids, *last), len(ids), fitted is not example, tuple(answers))

    def encode_many(self, examples: Sequence[Example], dataset: Dataset) -> list[Encoded]:
        """Return what `encode` gives for every example, tokenised in two calls."""
        texts = [self._texts(example) for example in examples]
        prompts = self._prompt_ids([prompt for prompt, _ in texts])
        completions = self._completion_ids([completion for _, completion in texts])
        return [
            self._fitted(example, dataset, prompt, completion)
            for example, prompt, completion in zip(examples, prompts, completions, strict=True)
        ]

    def encode_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Return the tokens of every text and of what goes on from it, as they stand: no format, no end, none cut."""
        prompts = self._prompt_ids([text.rstrip() for text, _ in pairs])
        if self._decoder_start is not None:
            behind = self._tokenise([more.strip() for _, more in pairs])
        else:
            behind = self._continuation_ids([text[len(text.rstrip()) :] + more for text, more in pairs])
        return [
            Encoded(prompt + more, len(prompt), decoder_start=self._decoder_start)
            for prompt, more in zip(prompts, behind, strict=True)
        ]

    def _fitted(self, example: Example, dataset: Dataset, prompt: Ids, completion: Ids) -> Encoded:
        fitted, prompt, completion = self._fit(example, dataset, prompt, completion)
        return Encoded(
            prompt + completion, len(prompt), truncated=fitted is not example, decoder_start=self._decoder_start
        )

    def _fit(self, example: Example, dataset: Dataset, prompt: Ids, completion: Ids) -> tuple[Example, Ids, Ids]:
        """Return the example as long as it may be, and its tokens."""
        # Room for the longest label, not only for the right one: the prompt must not tell how long the answer is.
        reserved = max(len(completion), self._longest_label(example, dataset))
        if self._decoder_start is not None:
            self._check_completion(example, reserved)
            reserved = 0
        shortened = example
        while (excess := len(prompt) + reserved - self.max_length) > 0:
            if not shortened.shown and not dataset.cuttable(shortened):
                raise DataError(
                    f"spec.data.maxLength: row {example.row} (counted from 0) of task {example.task!r} needs "
                    f"{len(prompt)} prompt and {reserved} completion tokens, {self.max_length} are allowed, and it has "
                    f"no text column left to shorten. Raise spec.data.maxLength or drop the row."
                )
            shortened = self._shorter(shortened, dataset, excess)
            prompt = self._prompt_ids([self._texts(shortened)[0]])[0]
        if len(prompt) <= len(self._trailing_ids):
            raise DataError(
                f"spec.data.tasks: the prompt of row {example.row} (counted from 0) of task {example.task!r} is blank; "
                f"the model needs at least one token to go on from. Put words into the prompt template."
            )
        return shortened, prompt, completion

    def _shorter(self, example: Example, dataset: Dataset, excess: int) -> Example:
        """Return the example with one row less shown before it, else with about ``excess`` tokens less in a column."""
        if example.shown:
            return replace(example, shown=example.shown[1:])
        value = dataset.cuttable(example)
        tokens = len(self._tokenise([value])[0])
        keep = len(value) * (tokens - excess) // tokens if tokens > excess else 0
        return dataset.shortened(example, min(keep, len(value) - 1))

    def _check_completion(self, example: Example, tokens: int) -> None:
        if tokens > self.max_length:
            raise DataError(
                f"spec.data.maxLength: row {example.row} (counted from 0) of task {example.task!r} needs {tokens} "
                f"completion tokens, {self.max_length} are allowed, and completions are never shortened. Raise "
                f"spec.data.maxLength or drop the row."
            )

    def _longest_label(self, example: Example, dataset: Dataset) -> int:
        labels = dataset.labels(example.task)
        if not labels:
            return 0
        before, _, after = example.completion.partition(example.completion.strip())
        key = (example.task, before, after)
        if key not in self._reserved:
            texts = [self._completion_text(example, with_label(example.completion, label)) for label in labels]
            self._reserved[key] = max(map(len, self._completion_ids(texts)))
        return self._reserved[key]

    def _texts(self, example: Example) -> tuple[str, str]:
        """Return the texts before and behind the boundary."""
        completion = self._completion_text(example, example.completion)
        if self._frame is None:
            before = "".join(f"{self._answered(row)}\n\n" for row in example.shown)
            before += "".join(f"{text.strip()}\n\n" for _, text in example.earlier)
            return before + example.prompt.rstrip(), completion
        question = _as_messages(self._turns(example))
        answer = {"role": "assistant", "content": example.completion.strip()}
        prompt = self._chat(question, generation_prompt=True) + self._frame.header
        whole = self._chat([*question, answer], generation_prompt=False)
        if whole != prompt + self._frame.lead + answer["content"] + self._frame.tail:
            raise _template_error(
                f"row {example.row} (counted from 0) of task {example.task!r} is framed otherwise than other rows: "
                f"{excerpt(whole[-_SHOWN_CHARACTERS:])}"
            )
        return prompt, completion

    def _answered(self, example: Example) -> str:
        if self._decoder_start is not None:  # the completion is a text of its own, which nothing parts from a prompt
            return f"{example.prompt.rstrip()}\n{example.completion.strip()}"
        return example.prompt + example.completion.rstrip()

    def _completion_text(self, example: Example, completion: str) -> str:
        if self._frame is not None:
            return self._frame.lead + completion.strip() + self._frame.ending
        if self._decoder_start is not None:
            return completion.strip()
        # White space belongs to the word behind it, as tokenizers see it: "a: |b" would meet tokens never trained on.
        return example.prompt[len(example.prompt.rstrip()) :] + completion

    def _prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        tokenised = self._tokenise(texts)
        if self.format == "chat":  # chat templates write their special tokens themselves
            return tokenised
        leading, trailing = self._leading_ids, self._trailing_ids
        return [(ids if leading and ids[: len(leading)] == leading else leading + ids) + trailing for ids in tokenised]

    def _completion_ids(self, texts: Sequence[str]) -> list[Ids]:
        if self._decoder_start is not None:
            return [(*ids, self._tokenizer.eos_token_id) for ids in self._tokenise(texts)]
        ends = self._frame.end_ids if self._frame is not None else (self._tokenizer.eos_token_id,)
        return [ids + ends for ids in self._continuation_ids(texts)]

    def _continuation_ids(self, texts: Sequence[str]) -> list[Ids]:
        if self._anchor_ids is None:
            return self._tokenise(texts)
        anchor = self._anchor_ids
        anchored = self._tokenise([_ANCHOR + text for text in texts])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._tokenise([text])[0]
            for ids, text in zip(anchored, texts, strict=True)
        ]

    def _tokenise(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _find_surrounding_ids(self) -> tuple[Ids, Ids]:
        """Return the special tokens that the tokenizer puts before a text, such as BOS, and behind one for an encoder.

        A text that is gone on from does not end.
        """
        (plain,) = self._tokenise(["a"])
        whole = tuple(self._tokenizer("a")["input_ids"])
        starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        if not starts:
            return (), ()
        return whole[: starts[0]], whole[starts[0] + len(plain) :] if self._decoder_start is not None else ()

    def _find_anchor_ids(self) -> Ids | None:
        """Return the tokens of _ANCHOR when the tokenizer puts a space before every text, which a completion is not."""
        anchor, alone, behind = self._tokenise([_ANCHOR, "a", _ANCHOR + "a"])
        return anchor if behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone else None

    def _find_frame(self) -> _ChatFrame:
        """Compare renderings with two different answers: what they share is the frame."""
        asked, first, second = "Qv7rq", "Xk3wa", "Zj9ub"
        question = _as_messages([*self._own_system(), ("user", asked)])
        generation = self._chat(question, generation_prompt=True)
        answered = [
            self._chat([*question, {"role": "assistant", "content": text}], generation_prompt=False)
            for text in (first, second)
        ]
        if asked not in generation:
            raise _template_error(f"it leaves the user's message out: {excerpt(generation)}")
        if self.system is not None and self.system.strip() not in generation:
            raise SpecError(
                "spec.data.system: the model's chat template leaves the system prompt out. Put its text into the "
                "prompt template, or set spec.data.format: raw."
            )
        head, found, tail = answered[0].partition(first)
        if not found or answered[1] != head + second + tail:
            raise _template_error(f"it changes the assistant's text or prints it twice: {excerpt(answered[0])}")
        if not head.startswith(generation):
            raise _template_error(
                f"a generation prompt ends in {excerpt(generation[-_SHOWN_CHARACTERS:])}, but an assistant's turn "
                f"begins with {excerpt(head[-_SHOWN_CHARACTERS:])}"
            )
        header = head[len(generation) :].rstrip(" ")
        return self._frame_with_end(header, head[len(generation) + len(header) :], tail)

    def _frame_with_end(self, header: str, lead: str, tail: str) -> _ChatFrame:
        special = set(self._tokenizer.all_special_ids)
        special |= {id for id, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        end = next((id for id in self._tokenise([tail])[0] if id in special), None)
        if end is None:  # the template ends a turn without a special token: end it ourselves
            eos = self._tokenizer.eos_token_id
            return _ChatFrame(header, lead, tail, tail.rstrip(), (eos,), eos)
        token = str(self._tokenizer.convert_ids_to_tokens(end))
        return _ChatFrame(header, lead, tail, tail[: tail.index(token) + len(token)], (), end)

    def _turns(self, example: Example) -> list[tuple[str, str]]:
        """Return role and text of all that comes before the answer."""
        shown = [turn for row in example.shown for turn in (("user", row.prompt), ("assistant", row.completion))]
        # A chat's own system prompt takes the place of the job's.
        own = [turn for turn in example.earlier if turn[0] == "system"]
        talk = example.earlier[len(own) :]
        return [*(own or self._own_system()), *shown, *talk, ("user", example.prompt)]

    def _own_system(self) -> list[tuple[str, str]]:
        return [] if self.system is None else [("system", self.system)]

    def _chat(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except (TemplateError, TypeError) as error:
            if self.system is not None:
                raise SpecError(
                    f"spec.data.system: the model's chat template refuses a conversation with a system prompt: "
                    f"{excerpt(str(error))}. Put its text into the prompt template instead."
                ) from error
            raise _template_error(excerpt(str(error))) from error


def _as_messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    # A system prompt stands as it was written.
    return [{"role": role, "content": text if role == "system" else text.strip()} for role, text in turns]


def encode_all(
    renderer: Renderer,
    dataset: Dataset,
    examples: Sequence[Example],
    loss_on: LossOn = LossOn.COMPLETION,
    folder: Path | None = None,
) -> tuple[StoredRows[Encoded], float]:
    """Return the tokens of every example, on the disk of ``folder``, and the share that had to be shortened.

    With ``loss_on`` all every token but the first is learnt: the prompt's length is 0.

    Raises:
        DataError: more than MAX_TRUNCATED_SHARE were shortened, of all or of a task whose rows are shown, or one does
            not fit at all.
    """
    tokens = RecordFile(folder)
    rows, cut = Counter[str](), Counter[str]()
    for start in range(0, len(examples), _ROWS_AT_ONCE):
        some = list(examples[start : start + _ROWS_AT_ONCE])
        for example, item in zip(some, _encode_some(renderer, dataset, some, loss_on), strict=True):
            rows[example.task] += 1
            cut[example.task] += item.truncated
            tokens.append(pack_encoded(item))
    _refuse_shown_without_room(renderer, dataset, rows, cut)
    truncated = cut.total()
    share = truncated / len(examples) if examples else 0.0
    if share > MAX_TRUNCATED_SHARE:
        raise DataError(
            f"spec.data.maxLength: {truncated} of {len(examples)} examples ({share:.0%}) are longer than "
            f"{renderer.max_length} tokens; at most {MAX_TRUNCATED_SHARE:.0%} may be cut. Raise spec.data.maxLength or "
            f"shorten the rows."
        )
    return StoredRows(tokens, unpack_encoded), share


def _refuse_shown_without_room(renderer: Renderer, dataset: Dataset, rows: Counter[str], cut: Counter[str]) -> None:
    for index, task in enumerate(map(dataset.task, dataset.tasks)):
        if task.few_shot is not None and cut[task.name] > MAX_TRUNCATED_SHARE * rows[task.name]:
            raise DataError(
                f"spec.data.tasks[{index}].fewShot ({task.few_shot}): behind so many shown rows {cut[task.name]} of "
                f"{rows[task.name]} rows of task {task.name!r} do not fit into {renderer.max_length} tokens; at most "
                f"{MAX_TRUNCATED_SHARE:.0%} may lose shown rows or be cut. Lower it, or raise spec.data.maxLength."
            )


def _encode_some(renderer: Renderer, dataset: Dataset, examples: Sequence[Example], loss_on: LossOn) -> list[Encoded]:
    if loss_on is LossOn.ASSISTANT:
        return _encode_turns(renderer, dataset, examples)
    encoded = renderer.encode_many(examples, dataset)
    if loss_on is LossOn.ALL:
        return [Encoded(item.ids, 0, item.truncated) for item in encoded]
    return encoded


def _encode_turns(renderer: Renderer, dataset: Dataset, examples: Sequence[Example]) -> list[Encoded]:
    plain = iter(renderer.encode_many([example for example in examples if not example.earlier], dataset))
    return [renderer.encode_turns(example, dataset) if example.earlier else next(plain) for example in examples]


def _resolve_format(tokenizer: "PreTrainedTokenizerBase", format: str, system: str | None) -> Literal["raw", "chat"]:
    if tokenizer.eos_token_id is None:
        raise SpecError("spec.model.source: the tokenizer names no end token (eos_token); set it in its configuration.")
    if format == "chat" and not tokenizer.chat_template:
        raise SpecError(
            "spec.data.format: chat needs a chat template and the model's tokenizer has none; set format: raw, or take "
            "an instruct model."
        )
    resolved: Literal["raw", "chat"] = "raw" if format == "raw" or not tokenizer.chat_template else "chat"
    if resolved == "raw" and system is not None:
        raise SpecError(
            f"spec.data.system: format {format} means raw for this tokenizer, and raw prompts have no system prompt; "
            f"put its text into the prompt template."
        )
    return resolved


def _other_answer(example: Example) -> DataError:
    return DataError(
        f"spec.data.lossOn: assistant cannot be had with this model: its chat template writes an earlier answer "
        f"otherwise than the last one, first in row {example.row} (counted from 0) of task {example.task!r}. Set "
        f"lossOn: completion."
    )


def _template_error(problem: str) -> DataError:
    return DataError(
        f"spec.data.format: the model's chat template cannot be trained on: {problem}. Set spec.data.format: raw, or "
        f"correct chat_template in the model's folder."
    )
