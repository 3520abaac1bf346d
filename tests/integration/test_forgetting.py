"""The forgetting test on the tiny model: chosen as the slow way chooses, and a model that forgot is kept back."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import Report, Retention, Stage, TradeOff
from finetune_trainer import stages
from finetune_trainer.adapter_scale import scaled, weaken
from finetune_trainer.attention import register
from finetune_trainer.checkpoint import kept_weights
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.errors import DataError
from finetune_trainer.evaluation import evaluate
from finetune_trainer.examiner import Pair, Trial
from finetune_trainer.general_suite import GeneralRow, GeneralSuite, general_rows, general_texts, open_questions
from finetune_trainer.layout import Layout
from finetune_trainer.model import ModelFiles
from finetune_trainer.pair import open_pair
from finetune_trainer.remedy import weigh_candidates
from finetune_trainer.renderer import Renderer
from finetune_trainer.scoring import Scorer
from finetune_trainer.split import Split
from finetune_trainer.trade_off import Candidate
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_job
from .test_evaluation import (  # noqa: F401 - fixtures
    LABEL_TEMPLATES,
    LABELS,
    TwoModels,
    likelihood,
    make_job,
    models,
    tokenizer,
)


def likeliest(model: nn.Module, tokenizer: PreTrainedTokenizerBase, row: GeneralRow) -> int:  # noqa: F811
    """Return the choice with the highest sum of log-probabilities: whole softmax, one choice at a time."""
    before = tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
    sums = []
    for choice in row.choices:
        after = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        sums.append(sum(float(logprobs[len(before) - 1 + n, token]) for n, token in enumerate(after)))
    return int(np.argmax(sums))


def run(models: TwoModels, tokenizer: PreTrainedTokenizerBase, job: FineTuneJob, suite: GeneralSuite, format="raw"):  # noqa: F811
    renderer = Renderer(tokenizer, format, None, 256)
    return evaluate(trial(models, tokenizer, renderer, load_dataset(job.spec.data), job), suite)[0]


def trial(models: Pair, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, dataset: Dataset, job: FineTuneJob):  # noqa: F811
    return Trial(
        models, tokenizer, renderer, dataset, job, lambda lent: Scorer(lent, Layout.PACKED), lambda progress: None
    )


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_general_rows_are_answered_as_they_stand(models, tokenizer, tiny_model_dir, tmp_path, format):  # noqa: F811
    rows = general_rows()[::9]
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": {}})
    report = run(models, tokenizer, job, GeneralSuite(rows, general_texts()[:3]), format)
    assert report.forgetting is not None
    for side, model in (("base", models.base_model), ("tuned", models.tuned_model)):
        for task in ("knowledge", "grammar", "counting"):
            right = [likeliest(model, tokenizer, row) == row.right for row in rows if row.task == task]
            (found,) = (one for one in report.forgetting.tasks if one.task == task)
            assert getattr(found, side) == pytest.approx(np.mean(right))


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_questions_of_no_task_are_asked_in_the_jobs_format(models, tokenizer, tiny_model_dir, tmp_path, format):  # noqa: F811
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": {}})
    question = "Name three colors."
    report = run(models, tokenizer, job, GeneralSuite(general_rows()[::60], general_texts()[:1], (question,)), format)
    assert report.forgetting is not None and report.forgetting.format is not None
    (answer,) = report.forgetting.format.answers
    asked = {
        "raw": f"Question: {question}\nAnswer:",
        "chat": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    }
    ids = tokenizer(asked[format], add_special_tokens=False, return_tensors="pt")["input_ids"]
    for said, model in ((answer.base, models.base_model), (answer.tuned, models.tuned_model)):
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids))
        assert said == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_model_that_lost_what_its_base_knew_fails(models, tokenizer, tiny_model_dir, tmp_path):  # noqa: F811
    known = [
        GeneralRow(row.task, row.prompt, row.prompt, row.choices, likeliest(models.base_model, tokenizer, row))
        for row in general_rows()[::4]
    ]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        for weight in models.tuned_model.parameters():
            weight.copy_(0.1 * torch.randn_like(weight))
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": {}})
    report = run(models, tokenizer, job, GeneralSuite(tuple(known), general_texts()[:2]))
    assert report.forgetting is not None
    assert report.forgetting.verdict is Retention.FAILED
    assert [(gate.metric, gate.passed) for gate in report.gates] == [("forgetting", False)]
    itself = run(
        TwoModels(models.base_model, models.base_model), tokenizer, job, GeneralSuite(tuple(known), general_texts()[:2])
    )
    assert itself.forgetting is not None
    assert itself.forgetting.verdict is Retention.PASSED


def write_own(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / "house-rules.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.as_uri()


OWN = [
    {"prompt": f"Room {n} is", "completion": " open" if n % 2 else " shut", "labels": ["open", "shut"]}
    for n in range(40)
]


def test_a_job_measures_it_on_the_suite_and_on_its_own_rows(tiny_model_dir: Path, tmp_path: Path):
    budget = {"sources": [write_own(tmp_path, OWN)], "maxDrop": 0}
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": budget}, training__learningRate=0.05)
    folder = tmp_path / "workspace"
    report = stages.run(job, folder, Silence())
    assert report.evaluation is not None and report.evaluation.forgetting is not None
    found = report.evaluation.forgetting
    assert [(result.source, result.rows) for result in found.results] == [
        ("general", len(general_rows())),
        ("house-rules", 40),
    ]
    assert [task.task for task in found.tasks] == ["knowledge", "grammar", "counting", "house-rules", "general prose"]
    assert found.format is not None
    assert [one.question for one in found.format.answers] == list(open_questions())
    (gate,) = report.evaluation.gates
    assert report.published == gate.passed == (found.verdict is Retention.PASSED)
    assert gate.passed or "the gate on forgetting did not pass: " in report.why_not_published
    page = (Workspace(folder).report / "report.html").read_text()
    assert "What it may have forgotten" in page and "house-rules" in page and "While it was trained" in page
    looks = [point.general_loss for point in report.training.curve if point.general_loss is not None]
    prose = found.tasks[-1]
    assert prose.base is not None and len(looks) > 2
    # The same texts, in bits a byte there and in nats a token here.
    assert looks[-1] / looks[0] == pytest.approx(prose.tuned / prose.base, rel=1e-3)
    result = stages.run_one(Stage.EVALUATE, job, folder, Silence())
    assert result.evaluation is not None
    assert [task.name for task in result.evaluation.forgetting] == [task.task for task in found.tasks]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "completion": "y"}, r"forgetting\.sources\[0\], row 0 .*no value in labels"),
        ({**OWN[0], "prompt": "many words " * 300}, r"'many words .* tokens, and the model has places for 512"),
    ],
)
def test_own_rows_that_cannot_be_used_are_found_in_check(tiny_model_dir, tmp_path, row, message):
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": {"sources": [write_own(tmp_path, [row])]}})
    result = stages.run_one(Stage.CHECK, job, tmp_path / "workspace", Silence())
    assert result.exit_code == DataError("").exit_code
    assert re.search(message, result.message)


def test_training_rows_that_give_the_test_away_stop_the_job(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path, evaluation={"forgetting": {"sources": [f"file://{tmp_path}/own.jsonl"]}})
    rows = load_dataset(job.spec.data).examples(Split.TRAIN)
    lines = [
        {"prompt": rows[0].prompt, "completion": rows[0].completion, "labels": [" positive", " negative"]},
        {"prompt": "What stands in no training row, not one of them:", "completion": " yes", "labels": [" yes", " no"]},
    ]
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    report = stages.check(job, tmp_path / "workspace", Silence())
    counts = {one.source: (one.overlapping, one.questions) for one in report.overlaps}
    assert counts["own"] == (1, 2)
    assert counts["general"] == (0, len(general_rows()) + len(general_texts()) + len(open_questions()))
    leak = "1 of 2 questions of own stand in a training row as a whole, first "
    assert any(leak in warning for warning in report.warnings)
    with pytest.raises(DataError, match=f"spec.evaluation: {leak}.*Or set spec.runPolicy.preflight: warn"):
        stages.run(job, tmp_path / "workspace", Silence())


def run_remedy(remedy: str, model: Path, folder: Path, **changes: Any) -> tuple[Report, TradeOff]:
    """Run a job that forgets; a run that finds its evaluation done publishes the same weights."""
    forgetting = {"sources": [write_own(folder, OWN * 2)], "maxDrop": 0.5, "remedy": remedy}
    job = tiny_job(
        model,
        folder,
        evaluation={"forgetting": forgetting},
        training__learningRate=0.02,
        output__publishOn="always",
        **changes,
    )
    report, again = (stages.run(job, folder / "workspace", Silence()) for _ in range(2))
    assert [artifact.sha256 for artifact in again.artifacts] == [artifact.sha256 for artifact in report.artifacts]
    assert report.evaluation is not None and report.evaluation.forgetting is not None
    assert report.evaluation.forgetting.trade_off is not None
    return report, report.evaluation.forgetting.trade_off


def test_the_strength_of_the_adapter_is_chosen_and_published(tiny_model_dir: Path, tmp_path: Path):
    """What is published loads unchanged and is what was evaluated."""
    report, found = run_remedy("loraScale", tiny_model_dir, tmp_path)
    folder = tmp_path / "workspace"
    assert [point.scale for point in found.points] == [0.25, 0.5, 0.75, 1.0]
    within = [point for point in found.points if point.within_budget]
    assert found.scale == max(within, key=lambda point: point.gain).scale < 1
    # The verdict rests on the rows that the choice has not seen.
    deciding = sum(result.rows for result in report.evaluation.forgetting.results)
    assert found.general_rows + deciding == len(general_rows()) + 2 * len(OWN)
    assert abs(found.general_rows - deciding) <= 10

    trained, published = (
        load_file(at / "adapter_model.safetensors")
        for at in (Workspace(folder).tuned, Workspace(folder).export / "model")
    )
    assert trained.keys() == published.keys()
    for name, weight in published.items():
        torch.testing.assert_close(weight, trained[name] * (found.scale if "lora_B" in name else 1.0))
    (parity,) = report.parity
    assert parity.difference <= parity.allowed
    card = (Workspace(folder).export / "model" / "README.md").read_text()
    assert f"{found.scale:g} (chosen)" in card


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_earlier_checkpoint_is_chosen_and_published(method: str, tiny_model_dir: Path, tmp_path: Path):
    """What is published is what the checkpoint held, and what was evaluated."""
    report, found = run_remedy("earlierCheckpoint", tiny_model_dir, tmp_path, method={"type": method})
    folder = tmp_path / "workspace"
    assert [point.step for point in found.points] == [3, 6, None]
    within = [point for point in found.points if point.within_budget] or [found.points[-1]]
    assert found.step == max(within, key=lambda point: point.gain).step

    tuned, published = Workspace(folder).tuned, Workspace(folder).export / "model"
    chosen = tuned if found.step is None else kept_weights(tuned)[found.step]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected, weights = load_file(chosen / name), load_file(published / name)
    assert expected.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key])
    steps = [load_file(at / name) for at in (*kept_weights(tuned).values(), tuned)]
    assert any(not torch.equal(steps[0][key], steps[1][key]) for key in expected)
    assert any(not torch.equal(steps[1][key], steps[2][key]) for key in expected)
    (parity,) = report.parity
    assert parity.difference <= parity.allowed


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"),
    "promptTuning": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefixTuning": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_earlier_adapter_is_lent_and_given_back(method: str, tiny_model_dir: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapter = get_peft_model(base, ADAPTERS[method]).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    outputs = {}
    for name in ("earlier", "tuned"):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(len(name))
            for weight in adapter.parameters():
                if weight.requires_grad:
                    weight.normal_()
            outputs[name] = adapter(input_ids=ids).logits
        adapter.save_pretrained(str(tmp_path / name))
    job = tiny_job(tiny_model_dir, tmp_path, method={"type": method})
    pair = open_pair(job, ModelFiles(tiny_model_dir, "0"), tmp_path / "tuned")

    def now(lent: AbstractContextManager[PreTrainedModel]) -> torch.Tensor:
        with lent as model, torch.no_grad():
            return model(input_ids=ids).logits

    assert not torch.allclose(outputs["earlier"], outputs["tuned"])
    torch.testing.assert_close(now(pair.earlier(tmp_path / "earlier")), outputs["earlier"])
    torch.testing.assert_close(now(pair.tuned()), outputs["tuned"])
    pair.go_back(tmp_path / "earlier")
    torch.testing.assert_close(now(pair.tuned()), outputs["earlier"])


def test_an_adapter_is_weakened_in_its_weights_as_by_its_scale(tiny_model_dir: Path):
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=False))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with model.disable_adapter():
            untuned = model(input_ids=ids).logits
        with scaled(nullcontext(model), 0.25) as lent:
            expected = lent(input_ids=ids).logits
        whole = model(input_ids=ids).logits
        weaken(model, 0.25)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert not torch.allclose(expected, whole)
        weaken(model, 0.0)
        torch.testing.assert_close(model(input_ids=ids).logits, untuned)


def test_what_a_strength_gains_and_loses_is_that_of_a_direct_computation(tiny_chat_model_dir, tokenizer, tmp_path):  # noqa: F811
    job = make_job(
        tmp_path,
        {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]},
        method={"type": "lora"},
        evaluation={"forgetting": {"remedy": "loraScale"}},
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir, attn_implementation=register())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    tuned = Switched(model)
    suite = GeneralSuite(general_rows()[::6], ())
    dataset = load_dataset(job.spec.data)
    found = weigh_candidates(
        trial(tuned, tokenizer, Renderer(tokenizer, "raw", None, 256), dataset, job),
        [Candidate(scale, lambda scale=scale: scaled(tuned.tuned(), scale)) for scale in (0.5, 1.0)],
        suite,
    )
    validation = dataset.examples(Split.VALIDATION)
    assert (found.validation_rows, found.general_rows) == (len(validation), len(suite.rows))

    def accuracies() -> tuple[float, float]:
        right = [
            max(LABELS, key=lambda label: likelihood(model, tokenizer, f"{row.prompt}", f" {label}").sum())
            == row.completion.strip()
            for row in validation
        ]
        known = [likeliest(model, tokenizer, row) == row.right for row in suite.rows]
        return float(np.mean(right)), float(np.mean(known))

    with model.disable_adapter():
        before = accuracies()
    for point in found.points:
        with rescale_adapter_scale(model, point.scale):
            after = accuracies()
        assert (point.gain, point.change) == pytest.approx((after[0] - before[0], after[1] - before[1]))
    assert found.points[0].change != found.points[1].change


@dataclass
class Switched:
    """An adapter that is switched off and on."""

    model: PeftModel

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        with self.model.disable_adapter():
            yield self.model

    @contextmanager
    def tuned(self) -> Iterator[nn.Module]:
        yield self.model
