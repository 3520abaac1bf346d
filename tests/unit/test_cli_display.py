"""What a run looks like on a terminal and in a pipe, without a run."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from finetune_api.report import EvaluationReport, MetricComparison, Progress, Stage
from finetune_cli.display import open_display
from finetune_cli.lines import JsonDisplay, LineDisplay
from finetune_cli.terminal import LiveDisplay, _comparison_table
from finetune_cli.wording import aligned, comparison_table, duration, numbers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def training(step: int, **fields: object) -> Progress:
    return Progress.model_validate(
        {"stage": "train", "message": "training", "percent": step, "step": step, "total_steps": 100, **fields}
    )


# --- terminal


def make_live(width: int = 100) -> tuple[LiveDisplay, Console, Clock]:
    console, clock = Console(file=Terminal(), width=width, force_terminal=True, record=True), Clock()
    return LiveDisplay(console, clock), console, clock


def shown(display: LiveDisplay, console: Console) -> list[str]:
    """Return what is drawn now, bars as spaces, so that words and numbers stand out."""
    console.export_text(clear=True)
    console.print(display.render())
    text = console.export_text(clear=True).translate({ord(mark): " " for mark in "━╸╺"})
    return [" ".join(line.split()) for line in text.splitlines()]


def test_stages_that_have_not_begun_are_listed():
    display, console, _ = make_live()
    assert shown(display, console) == ["· check", "· train", "· evaluate", "· publish"]


def test_a_running_stage_shows_step_loss_time_left_and_speed():
    display, console, clock = make_live()
    display.report(Progress(stage=Stage.CHECK, message="checked", percent=100))
    clock.now += 3
    display.report(training(45, loss=0.4123, eta_seconds=75, rows_per_second=21.31))
    clock.now += 61
    assert shown(display, console) == [
        "✓ check 100 % 0:03",
        "▸ train 45 % step 45/100 · loss 0.412 · 1:15 left · 21.3 rows/s · 1:01",
        "· evaluate",
        "· publish",
    ]


def test_a_message_without_numbers_keeps_what_is_known():
    display, console, _ = make_live()
    display.report(training(45, loss=0.5, eta_seconds=75))
    display.report(Progress(stage=Stage.TRAIN, message="saving"))
    assert shown(display, console)[1] == "▸ train 45 % saving · step 45/100 · loss 0.500 · 0:00"


def test_a_stage_that_an_earlier_run_finished_is_said_to_be_done():
    display, console, _ = make_live()
    display.report(Progress(stage=Stage.EVALUATE, message="loading the models"))
    assert shown(display, console)[:3] == [
        "✓ check done before",
        "✓ train done before",
        "▸ evaluate loading the models · 0:00",
    ]


def test_a_stage_that_fails_is_marked():
    display, console, _ = make_live()
    with pytest.raises(ValueError, match="boom"), display:
        display.report(training(45))
        raise ValueError("boom")
    assert shown(display, console)[1].startswith("✗ train 45 %")


def test_a_notice_stands_below_the_stages_until_the_next_begins():
    display, console, _ = make_live()
    display.notice("loading [bold]libraries[/bold]\x1b[2J")
    assert shown(display, console)[-1] == "loading [bold]libraries[/bold] [2J"
    display.report(training(1))
    assert len(shown(display, console)) == 4


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_stage_takes_more_than_one_line(width):
    display, console, _ = make_live(width)
    display.report(training(45, loss=0.4, eta_seconds=75, rows_per_second=21.3, validation_loss=0.5))
    display.report(Progress(stage=Stage.EVALUATE, message="x" * 300))
    assert len(shown(display, console)) == 4


def test_what_is_no_markup_is_not_read_as_markup():
    display, console, _ = make_live()
    display.report(Progress(stage=Stage.CHECK, message="reading [red]/data[/red]"))
    assert "reading [red]/data[/red]" in shown(display, console)[0]


def test_the_table_colours_what_is_certain_alone():
    def metric(name: str, low: float, high: float) -> MetricComparison:
        return MetricComparison(task="t", metric=name, base=0.5, tuned=0.6, delta=0.1, low=low, high=high, rows=200)

    table = _comparison_table(
        EvaluationReport(
            metrics=(metric("accuracy", 0.05, 0.15), metric("rougeL", -0.1, 0.3), metric("rouge1", -2, -1))
        )
    )
    [*_, delta, _interval] = table.columns
    assert [[str(span.style) for span in cell.spans] for cell in delta.cells] == [["green"], [], ["red"]]  # type: ignore[union-attr]


# --- lines


def make_lines() -> tuple[LineDisplay, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return LineDisplay(stream, clock), stream, clock


def test_lines_come_every_five_seconds_and_at_the_end_of_a_stage():
    display, stream, clock = make_lines()
    for step in range(1, 101):
        display.report(training(step))
        clock.now += 0.25
    steps = [line.split("step ")[1] for line in stream.getvalue().splitlines()]
    assert steps == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]


def test_every_new_message_is_a_line():
    display, stream, _ = make_lines()
    for message in ("reading", "reading", "rendering"):
        display.report(Progress(stage=Stage.CHECK, message=message))
    assert stream.getvalue().splitlines() == ["check            reading", "check            rendering"]


def test_a_line_has_no_control_characters():
    display, stream, _ = make_lines()
    display.report(Progress(stage=Stage.CHECK, message="a\x1b[2Jb\r\nc"))
    display.notice("x\ty")
    assert stream.getvalue() == "check            a [2Jb c\nx y\n"


@pytest.mark.parametrize("kind", [LineDisplay, JsonDisplay])
def test_a_run_outlives_its_reader(kind):
    display = kind(ClosedPipe())
    display.report(training(1))
    display.notice("still here")


# --- which display


CHOICES = {
    "a pipe gets lines": ("auto", io.StringIO, "xterm", LineDisplay),
    "a terminal is drawn on": ("auto", Terminal, "xterm", LiveDisplay),
    "a terminal that cannot be drawn on gets lines": ("auto", Terminal, "dumb", LineDisplay),
    "text is lines, on a terminal too": ("text", Terminal, "xterm", LineDisplay),
    "json is json, on a terminal too": ("json", Terminal, "xterm", JsonDisplay),
}


@pytest.mark.parametrize("output, stream, term, expected", CHOICES.values(), ids=CHOICES.keys())
def test_the_display_suits_the_output(output, stream, term, expected, monkeypatch):
    monkeypatch.setenv("TERM", term)
    assert isinstance(open_display(output, stream()), expected)


# --- wording


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (-1, "0:00")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_a_loss_that_is_no_number_is_shown_as_such():
    assert numbers(training(1, loss=float("nan"))) == ["step 1/100", "loss nan"]


def test_what_was_not_measured_is_a_dash():
    metric = MetricComparison(task="t", metric="perplexity", tuned=2345.6, rows=3, higher_is_better=False)
    _, row = comparison_table(EvaluationReport(metrics=(metric,)))
    assert row == ("t", "perplexity", "-", "2,346", "-", "-")


def test_chance_and_the_rows_that_would_tell_have_columns_where_they_are_known():
    plain = MetricComparison(task="t", metric="accuracy", tuned=0.5, rows=300)
    known = plain.model_copy(update={"p_value": 0.0001, "adjusted_p_value": 0.0004, "rows_needed": 1234})
    assert [row[6:] for row in comparison_table(EvaluationReport(metrics=(plain, known)))] == [
        ("p", "rows needed"),
        ("-", "-"),
        ("<0.001", "1,234"),
    ]
    assert comparison_table(EvaluationReport(metrics=(plain,)))[0][-1] == "95 % interval"


def test_columns_line_up():
    assert aligned([("a", "b", "1"), ("aaa", "b", "100")]) == ["a    b    1", "aaa  b  100"]


def test_the_package_carries_its_files():
    import finetune_cli

    folder = Path(str(finetune_cli.__file__)).parent
    assert len(list(folder.glob("starter*.yaml"))) == 4
    assert (folder / "py.typed").is_file()
