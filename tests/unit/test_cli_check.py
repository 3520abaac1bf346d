"""`finetune check` with a check that is a stand-in: what is printed, and the exit code."""

import json
from pathlib import Path

import pytest

from finetune_api.job import FineTuneJob, load_job
from finetune_api.report import (
    DataReport,
    ExitCode,
    LengthCount,
    Overlap,
    PersonalData,
    Progress,
    Rehearsal,
    SplitRows,
    Stage,
    TaskData,
    TextPiece,
)
from finetune_cli.check import check
from finetune_trainer.errors import DataError
from finetune_trainer.progress import Sink

from .builders import make_manifest

REPORT = DataReport(
    rows=SplitRows(train=2400, validation=300, test=300),
    tokens=120_000,
    completion_tokens=9000,
    longest_tokens=210,
    max_length=1024,
    truncated_percent=1.25,
    duplicates=49,
    exact_duplicates=12,
    personal_data=PersonalData(emails=2, phones=1),
    layout="packed: packed examples stay apart",
    rehearsal=Rehearsal(steps=2, seconds=4.2),
    hash="a" * 64,
    format="chat",
    tasks=(
        TaskData(
            task="sentiment",
            rows=SplitRows(train=2400, validation=300, test=300),
            lengths=(LengthCount(up_to=64, rows=2000), LengthCount(up_to=128, rows=1000)),
            unused="id, u\x1brl and 7 more",
            labels={"negative": 1199, "positive": 1201},
            sample=(TextPiece(text="Good\x1b[2J?\nSentiment:", learnt=False), TextPiece(text=" positive", learnt=True)),
        ),
    ),
    warnings=("2 rows hold an e-mail address.",),
)


def run(folder: Path, report: DataReport, output: str = "text", preflight: str = "enforce") -> ExitCode:
    def stand_in(job: FineTuneJob, workspace: Path, sink: Sink) -> DataReport:
        assert workspace == folder / "workspace"
        assert job.spec.training.learning_rate is not None
        sink.report(Progress(stage=Stage.CHECK, message="reading"))
        return report

    manifest = make_manifest({"spec.runPolicy.preflight": preflight})
    return check(load_job(json.dumps(manifest), "job.yaml"), folder / "workspace", output, stand_in)


def test_what_was_found_is_printed_for_people(tmp_path, capsys):
    assert run(tmp_path, REPORT) is ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rows        2,400 training, 300 validation, 300 test"
    for line in (
        "duplicates  49 rows nearly equal another one, 12 exactly",
        "leakage     0",
        "personal    2 e-mail, 1 telephone, 0 secret keys",
        f"  up to     64 tokens      2,000  {'#' * 40}",
        f"  up to    128 tokens      1,000  {'#' * 20}",
        "  columns not used: id, u rl and 7 more",
        "  label positive: 1,201 training rows",
        "  | Good [2J?",
        "  | Sentiment:>> positive<<",
        "layout      packed: packed examples stay apart",
        "rehearsed   yes: train, resume, evaluate and publish in small, in 4 s",
        "note: 2 rows hold an e-mail address.",
    ):
        assert line in lines


def test_programs_get_one_object_on_standard_output(tmp_path, capsys):
    assert run(tmp_path, REPORT, output="json") is ExitCode.OK
    data = json.loads(capsys.readouterr().out)["data"]
    assert DataReport.model_validate(data) == REPORT


@pytest.mark.parametrize(
    "rehearsal, said",
    [
        (None, "no: nothing is trained, the model is tiny itself, or spec.runPolicy.preflight is skip"),
        (Rehearsal(why_not="no tiny\x1b llama"), "no: no tiny llama"),
    ],
)
def test_why_there_was_no_rehearsal_is_told(tmp_path, capsys, rehearsal, said):
    run(tmp_path, REPORT.model_copy(update={"rehearsal": rehearsal}))
    assert f"rehearsed   {said}" in capsys.readouterr().out.splitlines()


SHARED = Overlap(source="arc", questions=9, overlapping=3)


@pytest.mark.parametrize(
    "leak, line",
    [
        ({"leakage": 3}, "leakage     3"),
        (
            {"overlaps": (SHARED.model_copy(update={"given_away": 2}),)},
            "overlap     3 of 9 questions of arc, 2 as a whole",
        ),
    ],
)
def test_leakage_is_an_error_behind_what_was_found_unless_it_is_only_to_be_told(tmp_path, capsys, leak, line):
    report = REPORT.model_copy(update=leak)
    with pytest.raises(DataError, match=r"Drop .*\. Or set spec\.runPolicy\.preflight: warn to go on all the same\.$"):
        run(tmp_path, report, preflight="enforce")
    assert line in capsys.readouterr().out
    assert run(tmp_path, report, preflight="warn") is ExitCode.OK
    assert line in capsys.readouterr().out


def test_words_that_a_question_shares_with_rows_are_no_leak(tmp_path):
    assert run(tmp_path, REPORT.model_copy(update={"overlaps": (SHARED,)})) is ExitCode.OK
