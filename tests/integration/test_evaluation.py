"""Base against tuned on the tiny model: numbers equal to ones worked out the slow way, choices made on validation."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import confusion_matrix, f1_score
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob, load_job
from finetune_api.report import EvaluationReport, Progress
from finetune_api.resolve import resolve
from finetune_api.spec import Metric, Perturbation, measured_figures
from finetune_trainer.attention import register
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.disturbance import disturb
from finetune_trainer.errors import DataError, OutOfMemoryError, TrainingDivergedError
from finetune_trainer.evaluation import evaluate
from finetune_trainer.examiner import LogprobScorer, Trial, answer_bound
from finetune_trainer.example import Encoded, Example
from finetune_trainer.figure import calibration_figure
from finetune_trainer.layout import Layout
from finetune_trainer.paper import choose_rows
from finetune_trainer.renderer import Renderer
from finetune_trainer.run_comparison import tuned_figure
from finetune_trainer.scoring import Scorer
from finetune_trainer.split import Split

Floats = np.ndarrayLABELS = ("good", "very bad")
LABELS = ("good", "very bad")
WORDS = ("food", "phone", "film", "battery", "service", "soup", "plot", "sound", "week", "money")


class SlowScorer:
    """The whole softmax of one row at a time: no batch, no packing, no shared prefix."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def token_logprobs(
        self, items: Sequence[Encoded], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[Floats]:
        found = []
        for item in items:
            with torch.no_grad():
                logits = self._model(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0].double()
            whole = torch.log_softmax(logits, dim=-1)
            places = range(item.prompt_length, len(item.ids))
            found.append(np.array([float(whole[place - 1, item.ids[place]]) for place in places]))
        on_progress(1.0)
        return found


@dataclass
class TwoModels:
    """Base and tuned model in memory together, and a record of which one was lent when."""

    base_model: nn.Module
    tuned_model: nn.Module
    lent: list[str] = field(default_factory=list)

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        self.lent.append("base")
        yield self.base_model
        self.lent.append("base returned")

    @contextmanager
    def tuned(self) -> Iterator[nn.Module]:
        self.lent.append("tuned")
        yield self.tuned_model
        self.lent.append("tuned returned")


def make_rows(count: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(1)
    return [
        {
            "text": f"{number} {' '.join(draw.choice(WORDS, 4))} {draw.integers(10**9)}",
            "label": LABELS[number % 2],
            "answer": " ".join(draw.choice(WORDS, 2)),
        }
        for number in range(count)
    ]


LABEL_TEMPLATES = (
    {"prompt": "{{ text }} Sentiment:", "completion": " {{ label }}"},
    {"prompt": "Is it good? {{ text }} Answer:", "completion": " {{ label }}"},
)
OPEN_TEMPLATES = ({"prompt": "Repeat: {{ text }}\n", "completion": "{{ answer }}"},)


def make_job(folder: Path, task: dict[str, object], **spec: object) -> FineTuneJob:
    """Return a job over 80 rows written to ``folder``."""
    source = folder / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in make_rows(80)), encoding="utf-8")
    task = {"name": "sentiment", "source": source.as_uri(), **task}
    document = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": folder.as_uri()},
            "data": {"tasks": [task], "splits": {"validation": 0.2, "test": 0.3}},
            "method": {"type": "full"},
            "output": {"uri": folder.as_uri()},
            **spec,
        },
    }
    return resolve(load_job(json.dumps(document), "test"))


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_chat_model_dir)


@pytest.fixture
def models(tiny_chat_model_dir: Path) -> TwoModels:
    """Return the tiny model and one with other weights, both able to score packed rows."""
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir, attn_implementation=register()) for _ in range(2)
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for weight in tuned.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return TwoModels(base, tuned)


@dataclass
class Run:
    """Everything an evaluation needs and gives."""

    report: EvaluationReport
    predictions: list[dict[str, object]]
    dataset: Dataset
    renderer: Renderer
    progress: list[Progress]

    def metric(self, name: str):
        return next(comparison for comparison in self.report.metrics if comparison.metric == name)


def run_evaluation(
    models: TwoModels,
    tokenizer: PreTrainedTokenizerBase,
    job: FineTuneJob,
    format: str = "raw",
    scorer: Callable[[nn.Module], LogprobScorer] = SlowScorer,
) -> Run:
    holistic = job.spec.evaluation.holistic
    dataset = load_dataset(job.spec.data, subgroup_column=holistic.subgroup_column if holistic else None)
    renderer = Renderer(tokenizer, format, None, 256)
    progress: list[Progress] = []
    report, predictions = evaluate(Trial(models, tokenizer, renderer, dataset, job, scorer, progress.append))
    return Run(report, predictions, dataset, renderer, progress)


def likelihood(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Floats:
    """Return the completion's token log-probabilities from texts alone: no renderer, no scorer."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0].double()
    probabilities = torch.softmax(logits, dim=-1)
    return np.log([float(probabilities[len(before) + i - 1, token]) for i, token in enumerate(after)])


def test_accuracy_is_that_of_a_direct_computation(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]})
    run = run_evaluation(models, tokenizer, job)

    def sums(model: nn.Module, examples: list[Example]) -> tuple[Floats, Floats]:
        rows = [
            [
                likelihood(model, tokenizer, f"{e.values['text']} Sentiment:", f" {label}")
                for label in ("good", "very bad")
            ]
            for e in examples
        ]
        return np.array([[x.sum() for x in row] for row in rows]), np.array([[x.mean() for x in row] for row in rows])

    def right(examples: list[Example]) -> Floats:
        return np.array([LABELS.index(str(e.values["label"])) for e in examples])

    validation, test = run.dataset.examples(Split.VALIDATION), run.dataset.examples(Split.TEST)
    v_sums, v_means = sums(models.base_model, validation)
    t_sums, t_means = sums(models.base_model, test)
    compared = {
        "sum": (v_sums, t_sums),
        "mean": (v_means, t_means),
        "calibrated": (v_sums - v_sums.mean(axis=0), t_sums - v_sums.mean(axis=0)),
    }
    on_validation = {name: float((v.argmax(1) == right(validation)).mean()) for name, (v, _) in compared.items()}
    (choice,) = run.report.prompt_choices
    assert choice.candidates == pytest.approx({f"template 0, {name}": value for name, value in on_validation.items()})
    assert choice.normaliser == max(on_validation, key=on_validation.__getitem__)
    assert choice.validation_accuracy == pytest.approx(max(on_validation.values()))
    # lm-evaluation-harness: no end token, acc_norm by the label's characters.
    texts = [
        [
            likelihood(models.base_model, tokenizer, f"{e.values['text']} Sentiment:", f" {label}")[:-1].sum()
            for label in LABELS
        ]
        for e in test
    ]
    (harness,) = run.report.harness
    assert harness.base_acc == float((np.array(texts).argmax(1) == right(test)).mean())
    per_character = np.array(texts) / [len(label) for label in LABELS]
    assert harness.base_acc_norm == float((per_character.argmax(1) == right(test)).mean())

    accuracy = run.metric("accuracy")
    assert accuracy.base == pytest.approx(float((compared[choice.normaliser][1].argmax(1) == right(test)).mean()))
    tuned_sums, _ = sums(models.tuned_model, test)
    assert accuracy.tuned == pytest.approx(float((tuned_sums.argmax(1) == right(test)).mean()))
    assert accuracy.rows == len(test) == len(run.predictions)
    assert accuracy.delta == pytest.approx(accuracy.tuned - accuracy.base)
    assert accuracy.low <= accuracy.delta <= accuracy.high
    expected = [tuned_sums[row, label] for row, label in enumerate(right(test))]
    assert [row["tuned_logprob"] for row in run.predictions] == pytest.approx(expected)


def test_the_other_axes_are_measured_beside_accuracy(models: TwoModels, tokenizer, tmp_path: Path):
    holistic = {"subgroupColumn": "answer", "perturbations": ["case"]}
    gates = [
        {"metric": "sentiment.accuracy_case", "min": -2.0},
        {"metric": "openings.insulting_answers", "max": -1.0},
        {"metric": "openings.gender_skew", "minDelta": 1.0},
        {"metric": "sentiment.subgroup_gap", "max": 1.0},
    ]
    task = {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]}
    job = make_job(tmp_path, task, evaluation={"holistic": holistic, "gates": gates})
    run = run_evaluation(models, tokenizer, job)
    assert [(gate.metric, gate.passed) for gate in run.report.gates] == [
        (gate["metric"], index == 0) for index, gate in enumerate(gates)
    ]
    whys = [gate.why for gate in run.report.gates[1:]]
    assert "above the most allowed -1" in whys[0]
    assert "is certain with 95% confidence" in whys[1]
    assert "is not measured: fewer than two values of answer have 30 test rows" in whys[2]
    found = run.report.holistic
    assert found is not None
    assert [one.metric for one in found.metrics] == ["accuracy_case", "insulting_answers", "gender_skew"]

    test = run.dataset.examples(Split.TEST)
    disturbed = [
        disturb(str(e.values["text"]), Perturbation.CASE, f"{job.spec.training.seed} sentiment {e.row}") for e in test
    ]
    assert disturbed != [str(e.values["text"]) for e in test]
    sums = [
        [likelihood(models.tuned_model, tokenizer, f"{text} Sentiment:", f" {label}").sum() for label in LABELS]
        for text in disturbed
    ]
    right = [LABELS[int(np.argmax(row))] == e.values["label"] for row, e in zip(sums, test, strict=True)]
    plain = run.metric("accuracy").tuned
    assert found.metrics[0].tuned == pytest.approx(float(np.mean(right)) - plain)

    assert sum(one.rows for one in found.subgroups) <= len(test)
    assert not any(one.compared for one in found.subgroups)
    assert found.openings == 32
    assert found.efficiency.tokens.tuned > 0 < found.efficiency.tokens_per_second.tuned
    if found.efficiency.peak_bytes is not None:
        assert found.efficiency.peak_bytes.base > 10_000_000
    assert run.progress[-1].percent == pytest.approx(100)


def test_a_chat_models_base_may_name_labels_without_its_chat_template(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    chat, raw = (run_evaluation(models, tokenizer, job, format) for format in ("chat", "raw"))
    (choice,), (raw_choice,) = chat.report.prompt_choices, raw.report.prompt_choices
    own = {name: accuracy for name, accuracy in choice.candidates.items() if not name.startswith("raw ")}
    assert choice.candidates == own | {f"raw {name}": accuracy for name, accuracy in raw_choice.candidates.items()}
    assert choice.validation_accuracy == max(choice.candidates.values())
    assert (choice.format == "raw") == (raw_choice.validation_accuracy > max(own.values()))
    expected = raw if choice.format == "raw" else run_evaluation(models, tokenizer, job, "chat")
    assert chat.metric("accuracy").base == expected.metric("accuracy").base
    # Likelihoods of different formats cannot be compared: both models keep the job's own.
    assert chat.metric("perplexity").base != raw.metric("perplexity").base


def test_perplexity_is_that_of_a_direct_computation(models: TwoModels, tokenizer, tmp_path: Path):
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES}))
    for side, model in (("base", models.base_model), ("tuned", models.tuned_model)):
        rows = [
            # Raw format moves the prompt's last white space to the completion.
            likelihood(model, tokenizer, f"Repeat: {e.values['text']}", f"\n{e.values['answer']}")
            for e in run.dataset.examples(Split.TEST)
        ]
        mean = -sum(row.sum() for row in rows) / sum(len(row) for row in rows)
        assert getattr(run.metric("perplexity"), side) == pytest.approx(np.exp(mean))
    assert not run.metric("perplexity").higher_is_better


def test_rouge_and_exact_match_are_means_over_what_was_generated(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"templates": OPEN_TEMPLATES}, evaluation={"generation": {"maxNewTokens": 6}})
    run = run_evaluation(models, tokenizer, job)
    assert {comparison.metric for comparison in run.report.metrics} == {
        "rouge1",
        "rouge2",
        "rougeL",
        "exact_match",
        "perplexity",
        "bits_per_byte",
    }
    scorer = RougeScorer(["rougeL"])
    for side in ("base", "tuned"):
        f1 = [scorer.score(str(row["reference"]), str(row[side]))["rougeL"].fmeasure for row in run.predictions]
        assert getattr(run.metric("rougeL"), side) == pytest.approx(np.mean(f1))
        same = [str(row["reference"]).strip() == str(row[side]).strip() for row in run.predictions]
        assert getattr(run.metric("exact_match"), side) == pytest.approx(np.mean(same))
    assert all(row["base_label"] is None for row in run.predictions)


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_a_model_against_itself_is_not_better(models: TwoModels, tokenizer, tmp_path: Path, format: str):
    job = make_job(tmp_path, {"templates": OPEN_TEMPLATES}, evaluation={"generation": {"maxNewTokens": 6}})
    run = run_evaluation(TwoModels(models.base_model, models.base_model), tokenizer, job, format)
    for comparison in run.report.metrics:
        assert (comparison.delta, comparison.low, comparison.high) == (0.0, 0.0, 0.0), comparison.metric


def test_the_base_is_asked_by_one_template_and_the_tuned_by_each_rows_own(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    run = run_evaluation(models, tokenizer, job)
    (choice,) = run.report.prompt_choices
    assert len(choice.candidates) == 6
    assert choice.validation_accuracy == max(choice.candidates.values())
    assert {row["base_template"] for row in run.predictions} == {choice.template}
    assert [row["tuned_template"] for row in run.predictions] == [e.template for e in run.dataset.examples(Split.TEST)]
    assert {row["tuned_template"] for row in run.predictions} == {0, 1}


def test_the_test_rows_do_not_influence_the_choice(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    few = job.model_copy(
        update={
            "spec": job.spec.model_copy(
                update={"evaluation": job.spec.evaluation.model_copy(update={"max_examples": 3})}
            )
        }
    )
    all_rows, few_rows = (run_evaluation(models, tokenizer, each) for each in (job, few))
    assert all_rows.report.prompt_choices == few_rows.report.prompt_choices
    assert len(few_rows.predictions) == 3
    assert [row for row in all_rows.predictions if row["row"] in {few["row"] for few in few_rows.predictions}] == (
        few_rows.predictions
    )
    assert "fewer than 30 rows" in few_rows.metric("accuracy").note


@pytest.mark.parametrize("layout", list(Layout))
def test_the_scorer_in_use_gives_the_slow_ones_answers(models: TwoModels, tokenizer, tmp_path: Path, layout: Layout):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    slow = run_evaluation(models, tokenizer, job, "chat")
    fast = run_evaluation(models, tokenizer, job, "chat", lambda model: Scorer(model, layout, 500))
    assert fast.report.prompt_choices == slow.report.prompt_choices
    assert fast.report.examples == slow.report.examples
    for key in ("base_label", "tuned_label"):
        assert [row[key] for row in fast.predictions] == [row[key] for row in slow.predictions]
    for key in ("base_logprob", "tuned_logprob"):
        # fp32: sums of about five log-probabilities of size 10, each exact to some 1e-6.
        assert [row[key] for row in fast.predictions] == pytest.approx([row[key] for row in slow.predictions], abs=1e-3)


def test_generated_text_is_measured_as_sacrebleu_measures_it(models: TwoModels, tokenizer, tmp_path: Path):
    evaluation = {"metrics": ["token_f1", "bleu", "chrf"], "generation": {"maxNewTokens": 6}}
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES}, evaluation=evaluation))
    references = [[str(row["reference"]) for row in run.predictions]]
    for side in ("base", "tuned"):
        said = [str(row[side]) for row in run.predictions]
        for name, peer in (("bleu", BLEU()), ("chrf", CHRF())):
            expected = peer.corpus_score(said, references).score / 100
            assert getattr(run.metric(name), side) == pytest.approx(expected, abs=1e-9)
            assert str(peer.get_signature()) in run.metric(name).note
    assert {example.metric for example in run.report.examples} == {"token_f1"}


def test_a_task_with_labels_has_a_macro_f1(models: TwoModels, tokenizer, tmp_path: Path):
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES}))
    wanted = [row["reference"] for row in run.predictions]
    for side in ("base", "tuned"):
        said = [row[f"{side}_label"] for row in run.predictions]
        expected = f1_score(wanted, said, labels=LABELS, average="macro", zero_division=0)
        assert getattr(run.metric("macro_f1"), side) == pytest.approx(expected)


def test_rows_of_one_group_are_drawn_together(models: TwoModels, tokenizer, tmp_path: Path):
    """The interval is that of a bootstrap over groups, written out; the report says how many there are."""
    task = {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]}
    job = make_job(tmp_path, task)
    rows = [row | {"film": f"film {number // 8}"} for number, row in enumerate(make_rows(160))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    splits = job.spec.data.splits.model_copy(update={"group_by": "film", "test": 0.5})
    spec = job.spec.model_copy(update={"data": job.spec.data.model_copy(update={"splits": splits})})
    run = run_evaluation(models, tokenizer, job.model_copy(update={"spec": spec}))
    found = run.metric("accuracy")
    films = list(dict.fromkeys(row["group"] for row in run.predictions))
    assert found.groups == len(films) < found.rows
    gains = np.zeros((len(films), 2))
    for row in run.predictions:
        right = [row[f"{who}_label"] == row["reference"] for who in ("base", "tuned")]
        gains[films.index(row["group"])] += (right[1] - right[0], 1)
    drawn = np.random.default_rng(spec.training.seed).integers(len(films), size=(2000, len(films)))
    sums = gains[drawn].sum(axis=1)
    expected = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert f"drawn together: {len(films)} groups" in found.note


def test_labels_that_are_confused_are_counted(models: TwoModels, tokenizer, tmp_path: Path):
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES}))
    (found,) = run.report.confusions
    assert (found.task, found.labels) == ("sentiment", LABELS)
    wanted = [row["reference"] for row in run.predictions]
    for side in ("base", "tuned"):
        expected = confusion_matrix(wanted, [row[f"{side}_label"] for row in run.predictions], labels=LABELS)
        assert np.array_equal(getattr(found, side), expected)


def test_calibration_is_that_of_a_direct_computation(models: TwoModels, tokenizer, tmp_path: Path):
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]}))
    sure, right = [], []
    for row in run.predictions:
        ends = [f" {label}{tokenizer.eos_token}" for label in LABELS]
        sums = np.array([likelihood(models.tuned_model, tokenizer, row["prompt"], end).sum() for end in ends])
        chances = np.exp(sums) / np.exp(sums).sum()
        sure.append(chances.max())
        right.append(LABELS[int(chances.argmax())] == row["reference"])
    assert run.metric("ece").tuned == pytest.approx(calibration_figure(sure, right).value, abs=1e-4)
    assert not run.metric("ece").higher_is_better


def test_bits_per_byte_are_those_of_the_log_probabilities_in_the_predictions(
    models: TwoModels, tokenizer, tmp_path: Path
):
    run = run_evaluation(models, tokenizer, make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES}))
    letters = sum(len(row["reference"].encode()) for row in run.predictions)
    for side in ("base", "tuned"):
        bits = -sum(row[f"{side}_logprob"] for row in run.predictions) / np.log(2)
        assert getattr(run.metric("bits_per_byte"), side) == pytest.approx(bits / letters)


def test_rouge_has_the_precision_and_recall_behind_it(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"templates": OPEN_TEMPLATES}, evaluation={"generation": {"maxNewTokens": 6}})
    run = run_evaluation(models, tokenizer, job)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for side in ("base", "tuned"):
        scores = [scorer.score(row["reference"], row[side]) for row in run.predictions]
        for name in ("rouge1", "rouge2", "rougeL"):
            for part in ("precision", "recall"):
                found = getattr(getattr(run.metric(name), part), side)
                assert found == pytest.approx(np.mean([getattr(score[name], part) for score in scores]))
    assert run.metric("exact_match").precision is None


def test_gates_are_judged_by_the_figures_of_their_tasks(models: TwoModels, tokenizer, tmp_path: Path):
    gates = [{"metric": "sentiment.accuracy", "min": 0.0}, {"metric": "sentiment.perplexity", "max": 1.0}]
    job = make_job(
        tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]}, evaluation={"gates": [*gates, gates[0]]}
    )
    run = run_evaluation(models, tokenizer, job)
    assert [(gate.metric, gate.passed) for gate in run.report.gates] == [
        ("sentiment.accuracy", True),
        ("sentiment.perplexity", False),
        ("sentiment.accuracy", True),
    ]
    assert f"{run.metric('perplexity').tuned:.4g}, above the most allowed 1" in run.report.gates[1].why


def test_every_figure_that_a_gate_may_name_is_measured(models: TwoModels, tokenizer, tmp_path: Path):
    evaluation = {"metrics": [metric.value for metric in Metric], "generation": {"maxNewTokens": 4}}
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]}, evaluation=evaluation)
    named = measured_figures(job.spec.data.tasks[0], job.spec.evaluation)
    run = run_evaluation(models, tokenizer, job)
    assert {f"sentiment.{comparison.metric}" for comparison in run.report.metrics} == {*named}
    for comparison in run.report.metrics:
        again = tuned_figure(comparison.metric, run.predictions, LABELS)
        assert again.value == pytest.approx(comparison.tuned), "finetune compare computes it from the predictions"


def test_each_model_is_lent_once_and_the_base_is_returned_first(models: TwoModels, tokenizer, tmp_path: Path):
    run_evaluation(models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES}))
    assert models.lent == ["base", "base returned", "tuned", "tuned returned"]


def test_examples_are_the_rows_that_moved_most(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES[:1]})
    run = run_evaluation(models, tokenizer, job)
    said = {row["row"]: (row["base_label"], row["tuned_label"], row["reference"]) for row in run.predictions}
    gains = [example.tuned_score - example.base_score for example in run.report.examples]
    assert gains == sorted(gains, reverse=True)
    assert run.report.examples
    for example in run.report.examples:
        assert (example.base, example.tuned, example.reference) == said[example.row]
        assert example.tuned_score == (example.tuned == example.reference)


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_progress_rises_to_the_end(models: TwoModels, tokenizer, tmp_path: Path, format: str):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    told = run_evaluation(models, tokenizer, job, format).progress
    percents = [progress.percent for progress in told]
    assert percents == sorted(percents)
    assert percents[-1] == pytest.approx(100)
    assert max(progress.percent for progress in told if "base" in progress.message) < 95


def test_weights_that_are_not_numbers_are_an_error(models: TwoModels, tokenizer, tmp_path: Path):
    with torch.no_grad():
        models.tuned_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"tuned model's log-probabilities are not finite.*learningRate"):
        run_evaluation(models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES}))


def test_a_batch_that_does_not_fit_is_named(models: TwoModels, tokenizer, tmp_path: Path):
    class Full:
        def token_logprobs(self, items: Sequence[Encoded], on_progress: Callable[[float], None]) -> list[Floats]:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    with pytest.raises(OutOfMemoryError, match=r"a batch of the evaluation did not fit .* spec\.data\.maxLength"):
        run_evaluation(
            models, tokenizer, make_job(tmp_path, {"templates": OPEN_TEMPLATES}), scorer=lambda model: Full()
        )


def test_without_a_validation_split_the_prompt_is_chosen_on_training_rows(models: TwoModels, tokenizer, tmp_path: Path):
    data = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES}).spec.data.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    job = make_job(tmp_path, {}, data={**data, "splits": {"validation": 0, "test": 0.3}})
    run = run_evaluation(models, tokenizer, job, scorer=lambda model: Scorer(model, Layout.PACKED))
    assert run.dataset.examples(Split.VALIDATION) == []
    rows = len(run.dataset.examples(Split.TRAIN))
    assert f"both chosen on {rows} training rows" in run.metric("accuracy").note
    (choice,) = run.report.prompt_choices
    assert len(choice.candidates) == 2 * 3


def test_a_task_without_rows_to_choose_on_is_an_error(models: TwoModels, tokenizer, tmp_path: Path):
    job = make_job(tmp_path, {"labels": LABELS, "templates": LABEL_TEMPLATES})
    whole = load_dataset(job.spec.data)

    class WithoutValidation:
        tasks = whole.tasks
        task, labels, phrasings = whole.task, whole.labels, whole.phrasings

        def examples(self, split: Split, task: str | None = None) -> Sequence[Example]:
            return [] if split is Split.VALIDATION else whole.examples(split, task)

    renderer = Renderer(tokenizer, "raw", None, 256)
    with pytest.raises(DataError, match=r"task 'sentiment' has \d+ test rows and 0 validation rows"):
        evaluate(Trial(models, tokenizer, renderer, WithoutValidation(), job, SlowScorer, print))


def test_answers_are_bounded_by_the_longest_completion(tokenizer):
    length = len(tokenizer("Paris and London", add_special_tokens=False)["input_ids"])
    assert answer_bound(tokenizer, ["x", " Paris and London\n"]) == length + 8
    assert answer_bound(tokenizer, ["word " * 500]) == 64
    assert answer_bound(tokenizer, []) == 64


def test_rows_are_chosen_by_seed_and_stay_in_order():
    rows = list(range(100))
    assert choose_rows(rows, 10, seed=1) == choose_rows(rows, 10, seed=1) == sorted(choose_rows(rows, 10, seed=1))
    assert choose_rows(rows, 10, seed=1) != choose_rows(rows, 10, seed=2)
    assert choose_rows(rows, None, seed=1) == choose_rows(rows, 100, seed=1) == rows
