"""The report page: what it says, that it loads nothing and that no text can break out of it."""

import html
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from finetune_api.report import (
    Ancestor,
    Artifact,
    ArtifactKind,
    BaseAndTuned,
    BenchmarkReport,
    ColumnData,
    Confusion,
    DataReport,
    Efficiency,
    EvaluationReport,
    FewShotComparison,
    ForgettingReport,
    GateResult,
    HolisticReport,
    LengthCount,
    LossPoint,
    MetricComparison,
    NearToken,
    Overlap,
    PromptChoice,
    Rehearsal,
    Report,
    Retention,
    RetentionResult,
    SampleQuestion,
    SideBySide,
    Span,
    SplitRows,
    SubgroupFigure,
    TaskData,
    TaskShare,
    TextPiece,
    TimeEstimate,
    TradeOff,
    TradeOffPoint,
    TrainingReport,
    VirtualToken,
    WordCount,
)
from finetune_trainer.format_probe import compare_answers
from finetune_trainer.loss_chart import lay_out_loss
from finetune_trainer.report_page import ABSENT, mark_differences, render_page, visible

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>\u202eright to left\u0000 {{ 7*7 }}"
)


def make_accuracy(**changes: object) -> MetricComparison:
    fields: dict[str, object] = {
        "task": "sentiment",
        "metric": "accuracy",
        "base": 0.875,
        "tuned": 0.95,
        "delta": 0.075,
        "low": 0.035,
        "high": 0.115,
        "rows": 297,
        "note": "by label likelihood",
    }
    return MetricComparison.model_validate(fields | changes)


def make_forgetting(source: str = "house rules") -> ForgettingReport:
    """Return what a job finds on the shipped suite and on a file of its own."""
    why = "Whether the model forgot too much cannot be told: accuracy on general tasks changed by -0.012."
    return ForgettingReport(
        verdict=Retention.INCONCLUSIVE,
        results=(
            RetentionResult(source="general", verdict=Retention.PASSED, why="The model kept its ability.", rows=601),
            RetentionResult(source=source, verdict=Retention.INCONCLUSIVE, why=f"{why} {source}", rows=80),
        ),
        tasks=(
            make_accuracy(task="grammar", base=0.9, tuned=0.89, delta=-0.01, low=-0.03, high=0.01, rows=432),
            make_accuracy(task="general prose", metric="bits_per_byte", base=0.91, tuned=0.95, higher_is_better=False),
        ),
        trade_off=make_trade_off(),
        format=compare_answers(["Who?", f"What is {source}?"], ["I.", f"A {source}"], ["positive", ""], ["positive"]),
    )


def make_trade_off() -> TradeOff:
    return TradeOff(
        points=tuple(
            TradeOffPoint(
                scale=scale,
                gain=0.1 * scale,
                gains={"sentiment": 0.1 * scale},
                change=-0.03 * scale,
                low=-0.05 * scale,
                within_budget=scale < 0.5,
            )
            for scale in (0.25, 0.5, 0.75, 1.0)
        ),
        scale=0.25,
        why="scale 0.25 has the best gain",
        max_drop=0.02,
        validation_rows=301,
        general_rows=341,
    )


def test_a_lost_form_of_answers_is_told_at_the_top_and_shown_with_the_answers():
    page = render_page(make_report(evaluation=EvaluationReport(forgetting=make_forgetting())))
    top, _, below = page.partition("<main>")
    assert "1 of 2 are labels of a task (the base: 0)" in top
    assert "What is house rules?" in below and "Tuned: nothing" in below


def test_what_is_forgotten_on_the_way_is_drawn():
    evaluation = EvaluationReport(forgetting=make_forgetting())
    curve = tuple(LossPoint(step=step, general_loss=loss) for step, loss in ((0, 3.0), (20, 3.5)))
    report = make_report(evaluation=evaluation)
    page = render_page(report.model_copy(update={"training": report.training.model_copy(update={"curve": curve})}))
    section = page[page.index("<h3>While it was trained</h3>") :]
    (line,) = re.findall(r'<polyline class="validation" points="([^"]+)"', section[: section.index("</svg>")])
    (_, before), (_, after) = (map(float, point.split(",")) for point in line.split())
    assert after < before, "a higher loss stands higher"


def test_p_of_the_forgetting_table_is_said_to_be_corrected():
    task = make_accuracy(task="grammar", p_value=0.02, adjusted_p_value=0.04)
    forgetting = make_forgetting().model_copy(update={"tasks": (task,)})
    page = render_page(make_report(evaluation=EvaluationReport(forgetting=forgetting)))
    section = page[page.index('aria-labelledby="forgetting"') :]
    assert "p 0.020 · corrected 0.040" in section
    assert "p corrected for the number of figures in this section by Holm" in section


def test_the_trade_off_is_drawn_with_its_choice():
    page = render_page(make_report(evaluation=EvaluationReport(forgetting=make_forgetting())))
    assert "published at 0.25 times the strength" in page and "scale 0.25 has the best gain" in page
    assert page.count('<circle class="scale') == 4
    assert page.count('circle class="scale within chosen"') == 1


def test_going_back_to_a_checkpoint_is_told_with_its_step():
    found = make_trade_off()
    points = tuple(
        one.model_copy(update={"scale": 1.0, "step": step})
        for one, step in zip(found.points, (100, 200, 300, None), strict=True)
    )
    back = found.model_copy(update={"remedy": "earlierCheckpoint", "points": points, "scale": 1.0, "step": 200})
    forgetting = make_forgetting().model_copy(update={"trade_off": back})
    page = render_page(make_report(evaluation=EvaluationReport(forgetting=forgetting)))
    assert "published as it was at step 200" in page and "the model at that step" in page
    assert page.count(' chosen" cx=') == 1
    assert ">end</text>" in page and "the strength it was trained to" not in page


def make_report(**changes: object) -> Report:
    fields: dict[str, object] = {
        "name": "reviews-lora",
        "namespace": "default",
        "spec_hash": "a" * 64,
        "base_model": "file:///models/SmolLM2-135M-Instruct",
        "base_revision": "b" * 64,
        "data": DataReport(
            rows=SplitRows(train=2402, validation=301, test=297),
            tokens=181_442,
            completion_tokens=4804,
            longest_tokens=143,
            truncated_percent=0.2,
            duplicates=49,
            hash="c" * 64,
            format="chat",
            sample_prompt="<|im_start|>user\nClassify this review.\n\nWow... Loved this place.<|im_end|>\n",
            sample_completion="positive<|im_end|>",
        ),
        "training": TrainingReport(
            method="lora",
            parameters=135_436_608,
            trainable_parameters=921_600,
            steps=300,
            epochs=1.0,
            final_loss=0.0812,
            curve=tuple(
                LossPoint(
                    step=step,
                    loss=0.1 + math.exp(-step / 40) + 0.05 * math.sin(step),
                    validation_loss=0.12 + math.exp(-step / 45) if step % 60 == 0 else None,
                )
                for step in range(5, 301, 5)
            ),
            seconds=118.4,
            rows_per_second=20.3,
            tokens_per_second=1533.0,
            peak_memory_bytes=1_890_000_000,
            precision="frozen weights bf16, trained weights fp32: this CPU multiplies bf16 in hardware",
            layout="packed: the isolation probe passed",
        ),
        "evaluation": EvaluationReport(
            metrics=(
                make_accuracy(
                    base_interval=Span(low=0.834, high=0.911),
                    tuned_interval=Span(low=0.922, high=0.973),
                    few_shot=FewShotComparison(
                        value=0.9, interval=Span(low=0.862, high=0.933), delta=0.05, low=0.01, high=0.09
                    ),
                    majority=0.53,
                    p_value=0.001,
                    adjusted_p_value=0.002,
                    rows_needed=152,
                ),
                make_accuracy(
                    metric="perplexity",
                    base=18.4,
                    tuned=1.09,
                    delta=-17.31,
                    low=-19.4,
                    high=-15.2,
                    higher_is_better=False,
                    note="over completion tokens",
                ),
            ),
            prompt_choices=(
                PromptChoice(
                    task="sentiment",
                    template=1,
                    normaliser="calibrated",
                    validation_accuracy=0.88,
                    candidates={
                        "template 0, sum": 0.61,
                        "template 0, mean": 0.61,
                        "template 0, calibrated": 0.82,
                        "template 1, sum": 0.7,
                        "template 1, mean": 0.72,
                        "template 1, calibrated": 0.88,
                    },
                ),
            ),
            examples=(
                SideBySide(
                    task="sentiment",
                    row=411,
                    prompt="The battery lasts for two days.",
                    reference="positive",
                    base="negative",
                    tuned="positive",
                    metric="accuracy",
                    base_score=0,
                    tuned_score=1,
                ),
                SideBySide(
                    task="sentiment",
                    row=17,
                    prompt="Not bad at all!",
                    reference="positive",
                    base="positive",
                    tuned="negative",
                    metric="accuracy",
                    base_score=1,
                    tuned_score=0,
                ),
            ),
            seconds=34.0,
            few_shot=4,
            forgetting=make_forgetting(),
            holistic=make_holistic(),
            benchmarks=(make_benchmark("mmlu"),),
            confusions=(
                Confusion(
                    task="sentiment",
                    labels=("negative", "positive"),
                    base=((130, 18), (19, 130)),
                    tuned=((141, 7), (8, 141)),
                ),
            ),
        ),
        "artifacts": (
            Artifact(
                kind=ArtifactKind.ADAPTER,
                uri="file:///out/default/reviews-lora-12345678/model",
                sha256="d" * 64,
                bytes=3_702_144,
            ),
        ),
        "published": True,
        "soft_prompt": make_soft_prompt(" movie"),
        "seed": 17,
        "versions": {"torch": "2.15.0", "transformers": "5.23.0", "lm-eval": "0.4.11"},
        "resolved": {
            "data": {
                "tasks": [
                    {
                        "name": "sentiment",
                        "templates": [{"prompt": "Classify {{ text }}"}, {"prompt": "Is it good? {{ text }}"}],
                    }
                ]
            }
        },
    }
    return Report.model_validate(fields | changes)


def make_benchmark(suite: str) -> BenchmarkReport:
    tasks = (suite, f"{suite}_professional_law", f"{suite}_high_school_european_history")
    return BenchmarkReport(
        suite=suite, name=suite, metrics=tuple(make_accuracy(task=task, metric="acc", rows=14042) for task in tasks)
    )


def make_soft_prompt(text: str) -> tuple[VirtualToken, ...]:
    near = tuple(NearToken(id=rank, token=f"{text}{rank}", distance=0.4 + 0.1 * rank) for rank in range(5))
    return (VirtualToken(cosine=near, l2=near),) * 20


def make_holistic(**changes: object) -> HolisticReport:
    fields: dict[str, object] = {
        "metrics": (
            make_accuracy(metric="accuracy_typos", base=-0.08, tuned=-0.02, delta=0.06, low=0.01, high=0.11),
            make_accuracy(metric="subgroup_gap", higher_is_better=False, note="largest difference in accuracy"),
        ),
        "subgroups": (
            SubgroupFigure(task="sentiment", subgroup="books", rows=140, compared=True, base=0.9, tuned=0.96),
            SubgroupFigure(task="sentiment", subgroup="<b>toys</b>", rows=7, compared=False, base=0.5, tuned=0.6),
        ),
        "words": (WordCount(name="insults", words=28, found=BaseAndTuned(base=3, tuned=1)),),
        "openings": 32,
        "efficiency": Efficiency(
            tokens=BaseAndTuned(base=1200, tuned=800),
            tokens_per_second=BaseAndTuned(base=71.26, tuned=64.0),
            peak_bytes=BaseAndTuned(base=1_890_000_000, tuned=1_930_000_000),
        ),
    }
    return HolisticReport.model_validate(fields | changes)


def test_what_is_asked_beside_accuracy_has_a_section_of_its_own():
    page = render_page(make_report())
    section = page[page.index('aria-labelledby="holistic"') : page.index('aria-labelledby="forgetting"')]
    for text in (
        "Change of accuracy by typos",
        "Largest gap between subgroups",
        "books",
        "too few rows for the gap",
        "words of the list insults",
        "71.3",
        "1.9 GB",
    ):
        assert text in section
    assert "<b>toys" not in page
    verdict = page[: page.index('aria-labelledby="metrics"')]
    assert "insult" not in verdict and "subgroup" not in verdict
    without = render_page(make_report(evaluation=EvaluationReport(metrics=(make_accuracy(),))))
    assert "Beside accuracy" not in without


def test_figures_beside_accuracy_decide_nothing_but_what_gates_name():
    gates = [
        GateResult(metric=name, passed=False, why="")
        for name in ("sentiment.accuracy", "sentiment.accuracy_typos", "other.subgroup_gap", "other.subgroup_gap")
    ]
    pages = {
        count: render_page(
            make_report(evaluation=EvaluationReport(holistic=make_holistic(), gates=tuple(gates[:count])))
        )
        for count in (0, 1, 4)
    }
    for count in (0, 1):
        assert "nothing here decides" in pages[count] and "gates judge" not in pages[count]
    assert "nothing here decides" not in pages[4]
    # The second one was not measured, and does not pass for that.
    assert "of these figures gates judge sentiment.accuracy_typos, other.subgroup_gap." in pages[4]


def test_the_page_says_what_was_found():
    page = render_page(make_report())
    assert "The tuned model is better: accuracy on sentiment went from 0.875 to 0.950" in page
    assert "0.68 %" in page  # trained weights
    assert "1 min 58 s" in page
    assert "1.9 GB" in page
    assert "2,402" in page
    assert "finetune run reviews-lora.yaml" in page
    assert "<mark>positive&lt;|im_end|&gt;</mark>" in page
    assert "<mark>0.880</mark>" in page
    assert "d" * 64 in page
    assert "\N{MINUS SIGN}17.31" in page


def test_the_image_is_part_of_where_a_model_comes_from():
    image = f"registry.example/trainer@sha256:{'e' * 64}"
    page = render_page(make_report(image=image))
    assert image in page[page.index('id="provenance"') :]
    assert "<dt>Image</dt>" not in render_page(make_report()), "nobody knows it on a laptop"


def test_planned_memory_stands_beside_the_measured():
    assert "planned" not in render_page(make_report())
    assert "1.9 GB <small>planned 1.2 GB of tensors</small>" in render_page(make_report(planned_memory_bytes=1.2e9))


def test_estimated_time_stands_beside_the_measured():
    assert "estimated" not in render_page(make_report())
    training = make_report().training.model_copy(update={"estimate": TimeEstimate(step=6, seconds=110.0)})
    assert "1 min 58 s <small>estimated 1 min 50 s at step 6</small>" in render_page(make_report(training=training))


def test_the_page_shows_how_answers_changed_while_training():
    looks = tuple(LossPoint(step=step, validation_loss=0.5, answers=(f"said <{step}>",)) for step in range(10, 140, 10))
    question = SampleQuestion(task="t", prompt="Is it <b>?", expected="said so", base="base said")
    training = make_report().training.model_copy(update={"samples": (question,), "curve": looks})
    page = render_page(make_report(training=training))
    assert "Answers while training" in page
    shown = re.findall(r'class="who">(Base|Step \d+)<', page[page.index("Answers while training") :])
    assert shown[:6] == ["Base", "Step 10", "Step 40", "Step 70", "Step 100", "Step 130"]
    assert "<del>&lt;130&gt;</del>" in page and "Is it &lt;b&gt;?" in page
    assert "Answers while training" not in render_page(make_report())


def test_the_page_says_what_was_seen_of_each_task():
    training = make_report().training.model_copy(
        update={
            "mixture": (
                TaskShare(task="senti<b>ment", rows=900, share=0.75, expected=750.5, drawn=751),
                TaskShare(task="replay", rows=40, share=0.25, expected=250.1, drawn=250),
            ),
            "curve": (LossPoint(step=1, validation_loss=0.5, validation_losses={"senti<b>ment": 0.4321}),),
        }
    )
    page = render_page(make_report(training=training))
    assert "What was seen of each task" in page
    assert "senti&lt;b&gt;ment" in page and "senti<b>ment" not in page
    for cell in ("75 %", "750.5", ">751<", "0.4321", "250.1", f">{ABSENT}<"):
        assert cell in page
    assert "What was seen of each task" not in render_page(make_report())


def test_the_page_says_what_the_check_found_in_the_rows():
    task = TaskData(
        task="t", rows=SplitRows(train=1, validation=0, test=0), languages={"en": 0.75, "<b>": 0.25}, labels={}
    )
    overlaps = (Overlap(source="general", questions=90, overlapping=2, first="x"),)
    rehearsal = Rehearsal(steps=2, seconds=4.2)
    data = make_report().data.model_copy(update={"tasks": (task,), "overlaps": overlaps, "rehearsal": rehearsal})
    page = render_page(make_report(data=data))
    assert "en 75 %, &lt;b&gt; 25 %" in page
    assert "2 of 90" in page
    assert "the whole pipeline with a tiny random model" in page


def test_the_page_names_the_librarys_entry_where_a_task_has_its_phrasings():
    own = TaskData(task="topics", rows=SplitRows(train=1, validation=0, test=0))
    data = make_report().data.model_copy(update={"tasks": (own, own.model_copy(update={"library": "topic 1"}))})
    assert render_page(make_report(data=data)).count("of topics: entry topic 1 of the template library") == 1


def test_the_improved_row_comes_before_the_worsened_one():
    page = render_page(make_report())
    assert (
        page.index("Most improved") < page.index("battery lasts") < page.index("Most worsened") < page.index("Not bad")
    )


def test_a_run_without_evaluation_still_has_a_page():
    page = render_page(make_report(evaluation=None, artifacts=(), published=False))
    assert "not evaluated" in page
    assert "Nothing was published" in page


def test_a_run_with_hardly_any_numbers_still_has_a_page():
    training = TrainingReport(method="full", parameters=0, trainable_parameters=0, steps=0, epochs=0.0)
    data = DataReport(rows=SplitRows(train=1, validation=1, test=1), hash="", format="raw")
    page = render_page(make_report(training=training, data=data, evaluation=EvaluationReport(), resolved={}))
    assert "Nothing was measured" in page
    assert "polyline class" not in page


def hostile_report() -> Report:
    """Return a report whose every free text is hostile."""
    example = SideBySide(
        task=HOSTILE,
        row=1,
        prompt=HOSTILE,
        reference=HOSTILE,
        base=HOSTILE * 2,
        tuned=HOSTILE,
        metric=HOSTILE,
        base_score=0.5,
        tuned_score=0.7,
    )
    report = make_report(
        name=HOSTILE,
        namespace=HOSTILE,
        spec_hash=HOSTILE,
        base_model=HOSTILE,
        base_revision=HOSTILE,
        versions={HOSTILE: HOSTILE, "finetune": HOSTILE, "lm-eval": HOSTILE},
        image=HOSTILE,
        soft_prompt=make_soft_prompt(HOSTILE)[:3],
        resolved={"data": {"tasks": [{"name": HOSTILE, "templates": [{"prompt": HOSTILE}]}]}, HOSTILE: HOSTILE},
        evaluation=EvaluationReport(
            metrics=(make_accuracy(task=HOSTILE, note=HOSTILE, metric="accuracy"), make_accuracy(metric=HOSTILE)),
            prompt_choices=(
                PromptChoice(
                    task=HOSTILE, template=0, normaliser="sum", validation_accuracy=1, candidates={"template 0, sum": 1}
                ),
            ),
            examples=(example,),
            forgetting=make_forgetting(HOSTILE),
            benchmarks=(make_benchmark(HOSTILE),),
            confusions=(Confusion(task=HOSTILE, labels=(HOSTILE, "b"), base=((1, 2), (3, 4)), tuned=((1, 2), (3, 4))),),
        ),
        artifacts=(Artifact(kind=ArtifactKind.ADAPTER, uri=HOSTILE, sha256=HOSTILE, bytes=1),),
    )
    return report.model_copy(
        update={
            "data": report.data.model_copy(
                update={"hash": HOSTILE, "format": HOSTILE, "sample_prompt": HOSTILE, "sample_completion": HOSTILE}
            ),
            "training": report.training.model_copy(update={"method": HOSTILE, "precision": HOSTILE, "layout": HOSTILE}),
        }
    )


def full_report(text: str = "Wow... Loved this place.") -> Report:
    """Return a report of two tasks with everything that is told of rows and training, ``text`` in every free place."""
    report = make_report(lineage=(Ancestor(uri=text, kind=ArtifactKind.ADAPTER, sha256="e" * 64, spec_hash="f" * 64),))
    task = TaskData(
        task=text,
        rows=SplitRows(train=1201, validation=150, test=148),
        lengths=tuple(LengthCount(up_to=2**power, rows=10**power % 9973) for power in range(4, 14)),
        labels={text: 600, "negative": 601},
        columns=(
            ColumnData(name=text, kinds={"text": 1201}),
            ColumnData(name="stars", kinds={"number": 3}, distinct=5),
        ),
        languages={"en": 0.98, "de": 0.02},
        library=text,
        sample=(TextPiece(text=text, learnt=False), TextPiece(text=text, learnt=True)),
    )
    tasks = (task, task.model_copy(update={"task": "topics of customers who write to us"}))
    data = report.data.model_copy(update={"tasks": tasks, "rehearsal": Rehearsal(why_not=text)})
    shares = tuple(
        TaskShare(task=one.task, rows=1_201_000, share=0.5, expected=24_000.5, drawn=24_001) for one in tasks
    )
    question = SampleQuestion(task=text, prompt=text, expected=text, base=text)
    losses = {one.task: 0.25 for one in tasks}
    curve = tuple(
        point.model_copy(update={"answers": (text,), "validation_losses": losses}) if point.validation_loss else point
        for point in report.training.curve
    )
    training = report.training.model_copy(update={"mixture": shares, "samples": (question,), "curve": curve})
    return report.model_copy(update={"data": data, "training": training})


def hostile_full_report() -> Report:
    return full_report(HOSTILE)


REPORTS = (make_report, hostile_report, full_report, hostile_full_report)
"""What every page must be like whatever the report holds."""


class Tags(HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("make", REPORTS)
def test_the_page_has_no_scripts_and_refers_to_nothing_outside(make: Callable[[], Report]):
    page = render_page(make())
    tags = Tags()
    tags.feed(page)
    assert len(tags.found) > 100
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base", "a"}
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")]
        assert (attributes.get("href") or "data:,") == "data:,"
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_hostile_text_is_shown_and_not_obeyed():
    page = render_page(hostile_report()) + render_page(hostile_full_report())
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "⟨U+202E⟩" in page
    assert not {"\u202e", "\u0000"} & set(page)


def test_half_a_surrogate_pair_can_be_written_to_a_file():
    assert visible("\ud800 half") == "⟨U+D800⟩ half"
    render_page(make_report(base_model="\ud800")).encode("utf-8")


def test_a_huge_text_is_cut_and_says_by_how_much():
    example = SideBySide(task="t", row=0, prompt="w" * 1_000_000, reference="r", base="b " * 300_000, tuned="")
    page = render_page(make_report(evaluation=EvaluationReport(examples=(example,))))
    assert "(999,300 more characters)" in page
    assert "<i>nothing</i>" in page
    assert len(page) < 60_000


def test_words_that_the_expected_answer_lacks_are_marked():
    pieces = mark_differences("It is very cold inside", "It is cold outside")
    assert [(piece.text, piece.differs) for piece in pieces] == [
        ("It is ", False),
        ("very", True),
        (" cold ", False),
        ("inside", True),
    ]


def test_an_answer_that_is_right_has_no_marks():
    assert [piece.differs for piece in mark_differences("It is  cold\noutside", "It is cold outside")] == [False]


def test_the_chart_spans_the_whole_curve():
    chart = lay_out_loss([LossPoint(step=1, loss=2.0), LossPoint(step=100, loss=0.5, validation_loss=0.6)])
    assert chart is not None
    assert chart.training.startswith(f"{chart.left},")
    assert chart.training.split()[-1].startswith(f"{chart.right},")
    assert [tick.label for tick in chart.losses] == ["0.5", "1.0", "1.5", "2.0"]


@pytest.mark.parametrize(
    "curve",
    [
        [],
        [LossPoint(step=1, loss=1.0)],
        [LossPoint(step=1, loss=math.nan), LossPoint(step=2, loss=math.inf), LossPoint(step=3, loss=1.0)],
    ],
    ids=["no points", "one point", "one finite point"],
)
def test_there_is_no_chart_without_two_finite_points(curve: list[LossPoint]):
    assert lay_out_loss(curve) is None


def test_a_flat_loss_has_a_chart():
    chart = lay_out_loss([LossPoint(step=step, loss=0.0) for step in range(3)])
    assert chart is not None
    assert len(chart.losses) >= 2


def test_a_long_curve_is_thinned():
    chart = lay_out_loss([LossPoint(step=step, loss=1 / (step + 1)) for step in range(100_000)])
    assert chart is not None
    assert len(chart.training.split()) <= 400


def test_a_soft_prompts_nearest_tokens_are_shown_and_escaped():
    near = NearToken(id=1, token=HOSTILE, distance=0.25)
    page = render_page(make_report(soft_prompt=(VirtualToken(cosine=(near,), l2=(near,)),)))
    assert "0.250" in page
    assert "<img" not in page
    assert "near to" not in render_page(make_report(soft_prompt=()))


def test_chance_and_rows_needed_are_shown_beside_the_interval():
    found = make_accuracy(p_value=0.0004, adjusted_p_value=0.0213, rows_needed=1200)
    page = render_page(make_report(evaluation=EvaluationReport(metrics=(found,))))
    assert "p < 0.001 · corrected 0.021 · 1,200 rows needed" in html.unescape(page)
    assert "rows needed" not in render_page(make_report(evaluation=EvaluationReport(metrics=(make_accuracy(),))))


def test_a_models_figure_has_its_own_interval_where_the_report_knows_one():
    perplexity = make_accuracy(metric="perplexity", base=1234.5, base_interval=Span(low=998.25, high=1400.0), tuned=6.2)
    page = render_page(make_report(evaluation=EvaluationReport(metrics=(perplexity,))))
    assert '<td class="number" data-label="Base">1,234<small>998.25 to 1,400</small></td>' in page
    assert '<td class="number strong" data-label="Tuned">6.20</td>' in page
    assert "<small>0.862 to 0.933</small>" in render_page(make_report()), "of the base with examples"


def test_confused_labels_and_the_parts_of_rouge_are_shown():
    confusion = Confusion(task="sentiment", labels=("bad", "good"), base=((3, 1001), (2, 5)), tuned=((9, 1), (0, 7)))
    rouge = make_accuracy(metric="rouge1", precision=BaseAndTuned(base=0.25, tuned=0.5))
    page = render_page(make_report(evaluation=EvaluationReport(metrics=(rouge,), confusions=(confusion,))))
    assert "precision 0.250 to 0.500" in page
    cells = re.findall(r'<td class="number">(?:<mark>)?([\d,]+)', page[page.index('id="confusions"') :])
    assert cells == ["3", "1,001", "2", "5", "9", "1", "0", "7"]
    assert re.findall(r"<mark>(\d)</mark>", page) == ["3", "5", "9", "7"]
