import dataclasses
import json
import random
from pathlib import Path
from string import ascii_lowercase

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_api.spec import DataSpec, LossOn
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.example import Example
from finetune_trainer.labels import with_label
from finetune_trainer.renderer import Renderer, encode_all
from finetune_trainer.split import Split

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tiny.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
WITHOUT_GENERATION_PROMPT = "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<|end|>\n' }}{% endfor %}"
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML with a system prompt of its own": CHATML,
    "BOS at the start": WITH_BOS,
    "no generation prompt": WITHOUT_GENERATION_PROMPT,
    "spaces around the answer": INSTRUCTION,
    "an empty thought before the answer": THINKING,
    "no end token": WITHOUT_END,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<s>", "</s>"]
TEXTS = [
    "Review: a wonderful film, the best of the year\nSentiment: positive",
    "Review: dull plot and worse acting\nSentiment: negative",
    "system user assistant You are Tiny. INST think neutral mixed",
]


def make_tokenizer(
    chat_template: str | None = None,
    eos: str | None = "</s>",
    bos: bool = False,
    metaspace: bool = False,
    prefix_space: bool = False,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=metaspace))
    if metaspace:  # as in Llama 2: a space is put before every text
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
        alphabet = [*"\nabcdefghijklmnopqrstuvwxyzRSIYT:,.[]/<>#▁0123456789"]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_dataset(
    folder: Path,
    prompt: str = "Review: {{ text }}\nSentiment:",
    completion: str = " {{ label }}",
    labels: tuple[str, ...] = ("negative", "positive", "entirely mixed"),
    words: int = 0,
    few_shot: int | None = None,
) -> Dataset:
    source = folder / "rows.jsonl"
    chooser = random.Random(0)
    more = [" ".join(chooser.choices(ascii_lowercase, k=words)) for _ in range(60)]
    rows = [{"text": f"a wonderful film {n} {more[n]}", "label": labels[n % len(labels)]} for n in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "t", "source": source.as_uri(), "templates": [{"prompt": prompt, "completion": completion}]}
    task |= {"labels": labels} if completion.strip() == "{{ label }}" and len(labels) > 1 else {}
    task |= {"fewShot": few_shot}
    return load_dataset(
        DataSpec.model_validate({"tasks": [task], "splits": {"validation": 0.2, "test": 0.2, "seed": 3}})
    )


def first(dataset: Dataset) -> Example:
    return dataset.examples(Split.TRAIN)[0]


@pytest.mark.parametrize("chat_template, expected", [(None, "raw"), (CHATML, "chat")], ids=["base", "instruct"])
def test_auto_means_chat_for_models_with_a_chat_template(chat_template, expected):
    assert Renderer(make_tokenizer(chat_template), "auto", None, 100).format == expected


def test_raw_leaves_the_chat_template_aside(tmp_path):
    renderer, dataset = Renderer(make_tokenizer(CHATML), "raw", None, 200), make_dataset(tmp_path)
    assert renderer.format == "raw"
    assert renderer.prompt_text(first(dataset)) == first(dataset).prompt


TOKENIZERS = {
    "bytes": {},
    "bytes with BOS": {"bos": True},
    "bytes with a space before every text": {"prefix_space": True},
    "sentencepiece": {"metaspace": True},
    "sentencepiece with BOS": {"metaspace": True, "bos": True},
}
PHRASINGS = {
    "space in the completion": ("{{ text }}:", " {{ label }}"),
    "space in the prompt": ("{{ text }}: ", "{{ label }}"),
    "line end in the prompt": ("{{ text }}:\n\n", "{{ label }}"),
    "line end in the completion": ("{{ text }}:", "\n{{ label }}\n"),
    "no space at all": ("{{ text }}:", "{{ label }}"),
}


@pytest.mark.parametrize("settings", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("prompt, completion", PHRASINGS.values(), ids=PHRASINGS.keys())
def test_raw_tokens_are_the_text_with_one_bos_and_one_end_token(tmp_path, settings, prompt, completion):
    tokenizer = make_tokenizer(**settings)
    renderer, dataset = Renderer(tokenizer, "raw", None, 200), make_dataset(tmp_path, prompt, completion)
    for example in dataset.examples(Split.TRAIN):
        encoded = renderer.encode(example, dataset)
        plain = tokenizer.encode(example.prompt + example.completion)
        assert tokenizer.decode(encoded.ids) == tokenizer.decode([*plain, tokenizer.eos_token_id])
        assert encoded.ids[-1] == tokenizer.eos_token_id
        assert encoded.ids.count(tokenizer.bos_token_id) == bool(settings.get("bos"))
        assert encoded.completion_ids[-1] == tokenizer.eos_token_id
        assert not encoded.truncated


@pytest.mark.parametrize("settings", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("prompt, completion", list(PHRASINGS.values())[:4], ids=list(PHRASINGS)[:4])
def test_raw_tokens_are_those_of_the_whole_text(tmp_path, settings, prompt, completion):
    tokenizer = make_tokenizer(**settings)
    renderer, dataset = Renderer(tokenizer, "raw", None, 200), make_dataset(tmp_path, prompt, completion)
    for example in dataset.examples(Split.TRAIN):
        plain = tokenizer.encode(example.prompt + example.completion)
        assert renderer.encode(example, dataset).ids == (*plain, tokenizer.eos_token_id)


def make_renderer(format: str, chat_template: str | None, max_length: int = 200) -> Renderer:
    end = "<|im_end|>" if chat_template in (CHATML, THINKING) else "<|end|>" if chat_template == WITH_BOS else "</s>"
    return Renderer(make_tokenizer(chat_template, eos=end), format, None, max_length)


FORMATS = {"raw": ("raw", None), **{name: ("chat", template) for name, template in TEMPLATES.items()}}


def behind_shown(dataset: Dataset) -> list[Example]:
    shown = tuple(dataset.examples(Split.TRAIN)[:2])
    return [dataclasses.replace(row, shown=shown) for row in dataset.examples(Split.TEST)]


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_shown_rows_are_left_out_before_the_question_is_cut(tmp_path, format, chat_template):
    dataset = make_dataset(tmp_path, labels=("negative", "positive"))
    asked, roomy = behind_shown(dataset)[0], make_renderer(format, chat_template, 500)
    whole, less = (roomy.encode(row, dataset) for row in (asked, dataclasses.replace(asked, shown=asked.shown[1:])))
    fitted = make_renderer(format, chat_template, len(whole.ids) - 1).encode(asked, dataset)
    assert fitted == dataclasses.replace(less, truncated=True)


def test_shown_rows_that_leave_no_room_are_told_with_their_task(tmp_path):
    dataset = make_dataset(tmp_path, few_shot=2)
    asked = behind_shown(dataset)
    problem = rf"spec.data.tasks\[0\].fewShot \(2\): behind so many shown rows {len(asked)} of {len(asked)} rows"
    with pytest.raises(DataError, match=problem):
        encode_all(make_renderer("raw", None, 30), dataset, asked)


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_generation_sees_exactly_what_comes_before_the_completion(tmp_path, format, chat_template):
    renderer, dataset = make_renderer(format, chat_template), make_dataset(tmp_path, "{{ text }}: ", "{{ label }}")
    for example in dataset.examples(Split.TRAIN):
        encoded, prompt = renderer.encode(example, dataset), renderer.encode_prompt(example, dataset)
        assert encoded.ids[: len(prompt)] == prompt
        assert 0 < len(prompt) == encoded.prompt_length < len(encoded.ids)
        assert prompt + renderer.encode_completion(prompt, example, example.completion) == encoded.ids


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_every_label_meets_the_boundary_it_would_meet_as_the_right_one(tmp_path, format, chat_template):
    renderer, dataset = make_renderer(format, chat_template), make_dataset(tmp_path, "{{ text }}: ", "{{ label }}")
    for example in dataset.examples(Split.TRAIN):
        for label in dataset.labels("t"):
            other = make_example_with(dataset, example, label)
            text = with_label(example.completion, label)
            prompt = renderer.encode_prompt(example, dataset)
            assert prompt + renderer.encode_completion(prompt, example, text) == renderer.encode(other, dataset).ids


def make_example_with(dataset: Dataset, example: Example, label: str) -> Example:
    values = {**example.values, "label": label}
    return dataset.rendered(
        Example(example.task, example.row, "", "", example.template, example.key, values), example.template
    )


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_many_examples_are_encoded_as_one_by_one(tmp_path, format, chat_template):
    renderer, dataset = make_renderer(format, chat_template, 60), make_dataset(tmp_path, words=20)
    examples = dataset.examples(Split.TRAIN)
    assert renderer.encode_many(examples, dataset) == [renderer.encode(example, dataset) for example in examples]


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_the_end_token_is_learnt_though_it_is_the_padding_too(tmp_path, format, chat_template):
    renderer, dataset = make_renderer(format, chat_template), make_dataset(tmp_path)
    encoded = renderer.encode(first(dataset), dataset)
    assert encoded.completion_ids[-1] == renderer.end_token_ids[0]
    assert encoded.completion_ids.count(renderer.end_token_ids[0]) == 1


COMPLETIONS = {
    CHATML: "negative<|im_end|>",
    WITH_BOS: "negative<|end|>",
    WITHOUT_GENERATION_PROMPT: "negative<|end|>",
    INSTRUCTION: " negative </s>",
    THINKING: "negative<|im_end|>",
    WITHOUT_END: "negative</s>",
}


@pytest.mark.parametrize("chat_template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_completion_stops_at_its_end_token(tmp_path, chat_template):
    renderer, dataset = make_renderer("chat", chat_template), make_dataset(tmp_path, labels=("negative",))
    encoded = renderer.encode(first(dataset), dataset)
    assert renderer.decode(encoded.completion_ids) == COMPLETIONS[chat_template]


@pytest.mark.parametrize("chat_template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chat_tokens_are_those_of_the_chat_template(tmp_path, chat_template):
    renderer, dataset = make_renderer("chat", chat_template), make_dataset(tmp_path)
    tokenizer = renderer._tokenizer
    for example in dataset.examples(Split.TRAIN):
        ids = renderer.encode(example, dataset).ids
        messages = [
            {"role": "user", "content": example.prompt.strip()},
            {"role": "assistant", "content": example.completion.strip()},
        ]
        whole = tuple(tokenizer.apply_chat_template(messages, return_dict=False))
        compared = len(ids) - (chat_template == WITHOUT_END)  # our end token stands where the template has none
        assert ids[:compared] == whole[:compared]
        generation = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        assert renderer.prompt_text(example) == generation + renderer.assistant_header


def test_the_assistant_header_is_what_the_generation_prompt_lacks():
    headers = {name: make_renderer("chat", template).assistant_header for name, template in TEMPLATES.items()}
    assert {name: header for name, header in headers.items() if header} == {
        "no generation prompt": "<assistant>\n",
        "an empty thought before the answer": "<think>\n\n</think>\n\n",
    }


def test_bos_of_the_chat_template_is_not_doubled_by_the_tokenizer(tmp_path):
    renderer = Renderer(make_tokenizer(WITH_BOS, bos=True), "chat", None, 200)
    dataset = make_dataset(tmp_path)
    assert renderer.encode(first(dataset), dataset).ids.count(3) == 1


def test_bos_written_into_a_raw_prompt_is_not_doubled(tmp_path):
    renderer, dataset = Renderer(make_tokenizer(bos=True), "raw", None, 200), make_dataset(tmp_path, "<s>{{ text }}:")
    assert renderer.encode(first(dataset), dataset).ids.count(3) == 1


def test_the_raw_prompt_text_shows_bos(tmp_path):
    renderer, dataset = Renderer(make_tokenizer(bos=True), "raw", None, 200), make_dataset(tmp_path)
    assert renderer.prompt_text(first(dataset)) == "<s>" + first(dataset).prompt


def test_the_templates_own_system_prompt_is_visible(tmp_path):
    dataset = make_dataset(tmp_path)
    assert "You are Tiny." in make_renderer("auto", CHATML).prompt_text(first(dataset))


def test_a_given_system_prompt_takes_its_place(tmp_path):
    renderer, dataset = Renderer(make_tokenizer(CHATML), "auto", "Be brief.", 200), make_dataset(tmp_path)
    text = renderer.prompt_text(first(dataset))
    assert "Be brief." in text
    assert "Tiny" not in text


def test_an_end_token_inside_a_completion_does_not_cut_it(tmp_path):
    renderer, dataset = make_renderer("chat", CHATML), make_dataset(tmp_path, completion="say <|im_end|> {{ label }}")
    decoded = renderer.decode(renderer.encode(first(dataset), dataset).completion_ids)
    assert decoded == first(dataset).completion + "<|im_end|>"


@pytest.mark.parametrize("format, chat_template", FORMATS.values(), ids=FORMATS.keys())
def test_a_long_row_loses_the_end_of_its_text_and_nothing_else(tmp_path, format, chat_template):
    dataset = make_dataset(tmp_path, labels=("negative",), words=300)
    renderer = make_renderer(format, chat_template, max_length=120)
    encoded = renderer.encode(first(dataset), dataset)
    text = renderer.decode(encoded.ids)
    assert encoded.truncated
    assert 100 <= len(encoded.ids) <= 120
    assert "Review: a wonderful film " in text
    assert "Sentiment:" in text
    short = make_dataset(tmp_path, labels=("negative",))
    assert encoded.completion_ids == renderer.encode(first(short), short).completion_ids
    assert renderer.encode_prompt(first(dataset), dataset) == encoded.ids[: encoded.prompt_length]


def test_a_shortened_prompt_does_not_tell_the_label(tmp_path):
    dataset = make_dataset(tmp_path, words=300)
    renderer = make_renderer("raw", None, max_length=80)
    example = first(dataset)
    prompts = {
        renderer.encode_prompt(make_example_with(dataset, example, label), dataset) for label in dataset.labels("t")
    }
    assert len(prompts) == 1


def test_a_row_that_fits_to_the_token_is_not_cut(tmp_path):
    dataset = make_dataset(tmp_path, labels=("negative",))
    length = len(make_renderer("raw", None).encode(first(dataset), dataset).ids)
    assert not make_renderer("raw", None, max_length=length).encode(first(dataset), dataset).truncated
    assert make_renderer("raw", None, max_length=length - 1).encode(first(dataset), dataset).truncated


def test_a_row_that_does_not_fit_at_all_is_a_data_error(tmp_path):
    dataset = make_dataset(tmp_path)
    with pytest.raises(DataError, match=r"spec\.data\.maxLength: row \d+ .*4 are allowed.*Raise"):
        make_renderer("raw", None, max_length=4).encode(first(dataset), dataset)


def test_a_blank_prompt_is_a_data_error(tmp_path):
    dataset = make_dataset(tmp_path, prompt="{{ text[:0] }} ")
    with pytest.raises(DataError, match=r"prompt of row .* is blank"):
        make_renderer("raw", None).encode(first(dataset), dataset)


def test_all_examples_are_encoded_with_the_share_cut(tmp_path):
    dataset = make_dataset(tmp_path)
    encoded, share = encode_all(make_renderer("raw", None), dataset, dataset.examples(Split.TRAIN))
    assert len(encoded) == dataset.sizes[Split.TRAIN]
    assert share == 0.0


def test_no_examples_encode_to_nothing(tmp_path):
    assert encode_all(make_renderer("raw", None), make_dataset(tmp_path), []) == ([], 0.0)


def test_too_many_cut_examples_are_a_data_error(tmp_path):
    dataset = make_dataset(tmp_path, words=300)
    with pytest.raises(DataError, match=r"spec\.data\.maxLength: (\d+) of \1 examples \(100%\).*80 tokens.*Raise"):
        encode_all(make_renderer("raw", None, max_length=80), dataset, dataset.examples(Split.TRAIN))


def test_loss_on_all_learns_the_prompt_too(tmp_path):
    dataset = make_dataset(tmp_path)
    examples = dataset.examples(Split.TRAIN)
    usual, _ = encode_all(make_renderer("raw", None), dataset, examples)
    everything, _ = encode_all(make_renderer("raw", None), dataset, examples, LossOn.ALL)
    assert [item.ids for item in everything] == [item.ids for item in usual]
    assert all(item.prompt_length == 0 for item in everything)
    assert everything[0].completion_ids == usual[0].ids


def make_chats(folder: Path, turns: int = 3, words: int = 5, **task: object) -> Dataset:
    generator = random.Random(3)
    rows = []
    for number in range(40):
        talk = [{"role": "system", "content": "Be kind."}] if number % 2 else []
        for turn in range(turns):
            said = " ".join("".join(generator.choices(ascii_lowercase, k=4)) for _ in range(words))
            talk.append({"role": "user", "content": f"{said} {number} {turn}?"})
            talk.append({"role": "assistant", "content": f"yes {said}"})
        rows.append({"turns": talk})
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": "chat", "source": source.as_uri(), "messages": "turns", **task}]
    return load_dataset(DataSpec.model_validate({"tasks": tasks, "splits": {"validation": 0.2, "test": 0.2}}))


def spoken(row: Example) -> list[str]:
    return [text for role, text in row.earlier if role == "assistant"] + [row.completion]


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, INSTRUCTION, THINKING], ids=lambda text: text[:30])
def test_every_answer_of_a_chat_is_learnt_as_the_last_one_is(tmp_path, template):
    dataset = make_chats(tmp_path)
    renderer = make_renderer("chat", template, max_length=400)
    examples = [row for row in dataset.examples(Split.TRAIN) if template != INSTRUCTION or row.earlier[0][0] == "user"]
    last, _ = encode_all(renderer, dataset, examples)
    every, _ = encode_all(renderer, dataset, examples, LossOn.ASSISTANT)
    for row, one, all_turns in zip(examples, last, every, strict=True):
        assert all_turns.completion_ids == one.completion_ids
        assert renderer.decode(all_turns.ids) == renderer.decode(one.ids)
        learnt = [renderer.decode(all_turns.ids[start:end]) for start, end in all_turns.answers]
        learnt.append(renderer.decode(all_turns.completion_ids))
        assert len(learnt) == 3
        ending = learnt[-1].removeprefix(learnt[-1].partition(row.completion)[0] + row.completion)
        assert ending
        assert [text.strip() for text in learnt] == [f"{text}{ending}".strip() for text in spoken(row)]
        assert len(all_turns.learnt) == sum(end - start for start, end in all_turns.answers) + len(one.completion_ids)
        # An earlier answer has the tokens that it would have as the last one.
        first = next(place for place, turn in enumerate(row.earlier) if turn[0] == "assistant")
        cut = dataclasses.replace(
            row, earlier=row.earlier[: first - 1], prompt=row.earlier[first - 1][1], completion=row.earlier[first][1]
        )
        start, end = all_turns.answers[0]
        alone = renderer.encode(cut, dataset)
        assert alone.ids == all_turns.ids[:end]
        assert alone.prompt_length == start


def test_a_chat_that_is_too_long_loses_its_oldest_turns(tmp_path):
    dataset = make_chats(tmp_path, turns=6)
    renderer = make_renderer("chat", CHATML, max_length=250)
    row = dataset.examples(Split.TRAIN)[1]
    encoded = renderer.encode_turns(row, dataset)
    assert encoded.truncated
    assert len(encoded.ids) <= 250
    assert 0 < len(encoded.answers) < 5
    text = renderer.decode(encoded.ids)
    assert spoken(row)[-1] in text and spoken(row)[-2] in text and spoken(row)[0] not in text
    assert ("Be kind." in text) == (row.earlier[0][0] == "system")


def test_a_system_prompt_of_the_chat_takes_the_place_of_the_jobs(tmp_path):
    dataset = make_chats(tmp_path)
    renderer = Renderer(make_tokenizer(CHATML), "chat", "Be brief.", 400)
    texts = [renderer.prompt_text(row) for row in dataset.examples(Split.TRAIN)]
    assert all(("Be kind." in text) != ("Be brief." in text) for text in texts)
    assert any("Be kind." in text for text in texts) and any("Be brief." in text for text in texts)


def test_a_template_that_rewrites_earlier_answers_cannot_learn_them(tmp_path):
    forgetful = CHATML.replace("m.content +", "(m.content if loop.last or m.role != 'assistant' else '…') +")
    dataset = make_chats(tmp_path)
    renderer = make_renderer("chat", forgetful, max_length=400)
    with pytest.raises(DataError, match=r"lossOn: assistant cannot be had .* of task 'chat'. Set lossOn: completion"):
        encode_all(renderer, dataset, dataset.examples(Split.TRAIN), LossOn.ASSISTANT)
    encode_all(renderer, dataset, dataset.examples(Split.TRAIN))


REFUSED = {
    "chat without a chat template": (SpecError, None, "chat", None, r"spec\.data\.format: chat needs a chat template"),
    "a system prompt for raw": (SpecError, None, "auto", "Be brief.", r"spec\.data\.system.*raw"),
    "a template that refuses a system prompt": (
        SpecError, "{{ raise_exception('no system role') if messages[0].role == 'system' }}", "chat", "x",
        "no system role"),
    "a template that drops the system prompt": (
        SpecError, "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}", "chat", "Be brief.",
        "leaves the system prompt out"),
    "a template that drops the user": (
        DataError, "{% for m in messages if m.role != 'user' %}{{ m.content }}</s>{% endfor %}", "chat", None,
        "leaves the user's message out"),
    "a template that drops the answer": (
        DataError, "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}", "chat", None,
        "changes the assistant's text"),
    "a template that repeats the answer": (
        DataError, "{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}", "chat", None,
        "prints it twice"),
    "a template whose generation prompt is no beginning of an answer": (
        DataError, CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"), "chat", None,
        "generation prompt ends in .*<think>"),
    "a template that fails": (DataError, "{{ messages[0].content + 1 }}", "chat", None, "cannot be trained on"),
    "a template that is none": (DataError, "{% for", "chat", None, "cannot be trained on"),
}  # fmt: skip


@pytest.mark.parametrize("error, chat_template, format, system, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rendered_is_refused_at_once(error, chat_template, format, system, message):
    with pytest.raises(error, match=message):
        Renderer(make_tokenizer(chat_template), format, system, 100)


def test_a_template_that_treats_one_answer_otherwise_is_a_data_error(tmp_path):
    template = CHATML.replace("m.content", "m.content.replace('mixed', 'MIXED')")
    renderer, dataset = make_renderer("chat", template), make_dataset(tmp_path)
    with pytest.raises(DataError, match=r"framed otherwise.*MIXED.*format: raw"):
        renderer.encode_many(dataset.examples(Split.TRAIN), dataset)


def test_a_tokenizer_without_end_token_is_a_spec_error():
    with pytest.raises(SpecError, match="names no end token"):
        Renderer(make_tokenizer(eos=None), "raw", None, 100)


def test_ends_of_an_answer_are_the_turns_end_and_the_texts_end():
    renderer = Renderer(make_tokenizer(CHATML, eos="</s>"), "chat", None, 100)
    assert renderer.end_token_ids == (1, 4)
    assert Renderer(make_tokenizer(CHATML, eos="</s>"), "raw", None, 100).end_token_ids == (4,)
