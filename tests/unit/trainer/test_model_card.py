"""The card of a published model: it has the command line of vLLM where vLLM loads what is published."""

import re
import shlex

import pytest

from finetune_api.report import ArtifactKind, DataReport, Report, SplitRows, TaskData, TrainingReport
from finetune_api.spec import LoraSpec, MethodType, ModelTask
from finetune_cli.cluster_job import cluster_job
from finetune_cli.serving import VLLM_IMAGE, serving_manifests
from finetune_trainer.model_card import BaseReference, CardFacts, render_card
from finetune_trainer.prompt_file import PromptFile, PromptTask

from ..test_cli_serving import COMMIT, pod_of, published

HUB = BaseReference("acme/tiny", COMMIT, on_hub=True)
LORA = LoraSpec(rank=33)


def card(
    method: MethodType,
    kind: ArtifactKind = ArtifactKind.ADAPTER,
    task: ModelTask = ModelTask.CAUSAL_LM,
    base: BaseReference = HUB,
    lora: LoraSpec | None = None,
    few_shot: int | None = None,
    tasks: tuple[TaskData, ...] = (),
) -> str:
    prompt = PromptFile(
        model_task=task,
        format="raw",
        system=None,
        assistant_header="",
        max_length=64,
        end_token_ids=(2,),
        end_tokens=("</s>",),
        tasks=(PromptTask(name="t", templates=(), few_shot=few_shot),),
    )
    training = TrainingReport(method=method, parameters=100, trainable_parameters=10, steps=1, epochs=1)
    data = DataReport(rows=SplitRows(train=8, validation=1, test=1), hash="cd", format="raw", tasks=tasks)
    report = Report(
        name="reviews", namespace="default", spec_hash="ab", base_model=base.name, data=data, training=training, seed=1
    )
    return render_card(report, CardFacts(kind, base, "bfloat16", prompt, lora=lora))


def command(text: str) -> list[str]:
    """Return the words of the command; none where the card has no command."""
    found = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    assert len(found) == ("vLLM" in text) == ("NOT run on a GPU" in text)
    return shlex.split(found[0]) if found else []


@pytest.mark.parametrize("method", [MethodType.LORA, MethodType.QLORA])
def test_the_command_for_an_adapter_is_the_one_that_a_deployment_gets(method: MethodType):
    lora = {"type": method.value, "lora": {"rank": LORA.rank}}
    (server,) = pod_of(serving_manifests([cluster_job(published("reviews", method=lora))], VLLM_IMAGE))["containers"]
    words = command(card(method, lora=LORA))
    assert words[-1] == "reviews=."
    in_the_pod = [word for word in server["args"] if word not in ("--port", "8000")]
    assert [*server["command"], *in_the_pod] == [*words[:-1], "reviews=/models/reviews"]
    assert words[words.index("--max-lora-rank") + 1] == "64"


WEIGHTS = [
    (MethodType.FULL, ArtifactKind.WEIGHTS),
    (MethodType.SELECTIVE, ArtifactKind.WEIGHTS),
    (MethodType.LORA, ArtifactKind.MERGED),
]


@pytest.mark.parametrize(("method", "kind"), WEIGHTS)
def test_whole_weights_are_served_from_their_folder(method: MethodType, kind: ArtifactKind):
    assert command(card(method, kind)) == ["vllm", "serve", ".", "--served-model-name", "reviews"]


def test_a_base_with_spaces_in_its_path_is_one_word_and_one_in_a_bucket_is_fetched_first():
    local = BaseReference("/my models/tiny", None, on_hub=False)
    words = command(card(MethodType.LORA, base=local, lora=LORA))
    assert words[:5] == ["vllm", "serve", local.name, "--served-model-name", local.name]
    text = card(MethodType.LORA, base=BaseReference("s3://models/tiny", None, on_hub=False), lora=LORA)
    assert command(text)[:5] == ["vllm", "serve", "base", "--served-model-name", "models/tiny"]
    assert "`base` stands for a folder with the files of `s3://models/tiny`" in text


NOT_LOADED = {
    **{
        method.value: (method, ArtifactKind.ADAPTER, None)
        for method in (MethodType.PROMPT_TUNING, MethodType.PREFIX_TUNING, MethodType.IA3, MethodType.ADAPTER)
    },
    "dora": (MethodType.LORA, ArtifactKind.ADAPTER, LoraSpec(use_dora=True)),
    "a rank that vLLM does not take": (MethodType.LORA, ArtifactKind.ADAPTER, LoraSpec(rank=513)),
}


@pytest.mark.parametrize(("method", "kind", "lora"), NOT_LOADED.values(), ids=NOT_LOADED)
def test_nothing_is_said_about_what_vllm_does_not_load(method: MethodType, kind: ArtifactKind, lora: LoraSpec | None):
    assert not command(card(method, kind, lora=lora))


@pytest.mark.parametrize(
    ("method", "kind"), [(MethodType.LORA, ArtifactKind.ADAPTER), (MethodType.FULL, ArtifactKind.WEIGHTS)]
)
def test_nothing_is_said_about_an_encoder_decoder(method: MethodType, kind: ArtifactKind):
    assert not command(card(method, kind, ModelTask.SEQ2SEQ_LM, lora=LORA))


def test_every_method_is_among_those_that_are_served_or_not():
    served = {MethodType.LORA, MethodType.QLORA, *(method for method, _ in WEIGHTS)}
    assert served | {method for method, _, _ in NOT_LOADED.values()} == set(MethodType)


def test_who_asks_is_told_that_the_model_was_trained_with_examples_before_the_question():
    told = "Task t was trained and measured with 4 rows and their answers before every question"
    assert told in card(MethodType.LORA, few_shot=4)
    assert "before every question" not in card(MethodType.LORA)


def test_the_librarys_entry_is_named_where_a_task_has_its_phrasings():
    own = TaskData(task="topics", rows=SplitRows(train=8, validation=1, test=1))
    text = card(MethodType.LORA, lora=LORA, tasks=(own, own.model_copy(update={"library": "topic 1"})))
    assert text.count("| templates of topics | entry topic 1 of the template library |\n") == 1
