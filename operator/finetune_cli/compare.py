"""``finetune compare``: the reports of several jobs side by side, as a table or for programs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from finetune_api.plain_text import one_line
from finetune_api.report import CONTRACT_VERSION, ExitCode, Report
from finetune_cli.wording import aligned, duration, p_value
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.run_comparison import FinishedRun, RunFigure, RunRetention, compare_runs, retained_abilities

REPORT = "report.json"
PREDICTIONS = "predictions.parquet"

_ABSENT = "-"
_RUN_COLUMNS = ("run", "job", "method", "base model", "trained", "training", "published", "report")
_FIGURE_COLUMNS = ("task", "metric", "run", "tuned", "over base", "over run 1", "95 % interval", "p")
_RETENTION_COLUMNS = ("general rows", "run", "forgetting", "over base", "rows")


def compare(places: Sequence[Path], as_json: bool) -> ExitCode:
    """Print the runs and their figures.

    Args:
        places: report.json files, or folders that hold one, by themselves or in a folder ``report``; two at least.
        as_json: one object for programs instead of tables.

    Raises:
        SpecError: there is no report at a place, or only one place.
        DataError: what is there is no report of this version.
    """
    if len(places) < 2:
        raise SpecError("compare needs two reports at least. Name another one.")
    files = [find_report(place) for place in places]
    runs = [read_run(file) for file in files]
    figures, retained = compare_runs(runs), retained_abilities(runs)
    if as_json:
        sys.stdout.write(json.dumps(_document(files, runs, figures, retained)) + "\n")
    else:
        for line in describe_runs(files, runs, figures, retained):
            sys.stdout.write(line + "\n")
    return ExitCode.OK


def find_report(place: Path) -> Path:
    """Return the report.json at ``place``."""
    candidates = [place / REPORT, place / "report" / REPORT] if place.is_dir() else [place]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = " or ".join(map(str, candidates))
    raise SpecError(f"{place}: no report there; looked for {wanted}. finetune report JOB fetches one from a cluster.")


def read_run(file: Path) -> FinishedRun:
    """Return the report in ``file`` and the predictions beside it."""
    try:
        report = Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{file} is no report of this version of finetune: {error.error_count()} fields are not as they should "
            "be. Name a report.json that evaluation wrote."
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}.") from error
    if report.contract_version != CONTRACT_VERSION:
        raise DataError(
            f"{file} has contract version {report.contract_version}, this finetune knows {CONTRACT_VERSION}. "
            "Compare with the version that wrote it."
        )
    predictions = file.with_name(PREDICTIONS)
    if not predictions.is_file():
        return FinishedRun(report, ())
    try:
        return FinishedRun(report, pq.read_table(predictions).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{predictions} cannot be read: {one_line(str(error))}. Fetch the report again.") from error


def describe_runs(
    files: Sequence[Path],
    runs: Sequence[FinishedRun],
    figures: Sequence[RunFigure],
    retained: Sequence[RunRetention],
) -> list[str]:
    """Return the lines for people: what the runs are, each figure of each run, then what each has forgotten."""
    about = [_run_row(number, file, run.report) for number, (file, run) in enumerate(zip(files, runs, strict=True), 1)]
    lines = aligned([_RUN_COLUMNS, *about], texts=len(_RUN_COLUMNS))
    if not figures and not retained:
        return [*lines, "", "Nothing was measured in any of them."]
    if figures:
        lines += ["", *aligned([_FIGURE_COLUMNS, *(_figure_row(figure) for figure in figures)], texts=3)]
    if retained:
        lines += ["", *aligned([_RETENTION_COLUMNS, *(_retention_row(one) for one in retained)], texts=3)]
    reasons = dict.fromkeys((figure.run, figure.why_not) for figure in figures if figure.why_not)
    if any(figure.against_first for figure in figures):
        lines += [
            "",
            "over run 1: on the same test rows, paired bootstrap; p corrected by Holm's method for all of them.",
        ]
    return [
        *lines,
        *(f"run {run + 1} against run 1, where there is no difference: {one_line(why)}." for run, why in reasons),
    ]


def _run_row(number: int, file: Path, report: Report) -> tuple[str, ...]:
    training = report.training
    share = 100 * training.trainable_parameters / training.parameters if training.parameters else 0.0
    return (
        str(number),
        one_line(report.name),
        one_line(training.method),
        one_line(report.base_model),
        f"{share:.3g} %",
        duration(training.seconds),
        "yes" if report.published else "no",
        one_line(str(file)),
    )


def _figure_row(figure: RunFigure) -> tuple[str, ...]:
    paired = figure.against_first
    return (
        one_line(_subject(figure)),
        one_line(figure.metric),
        str(figure.run + 1),
        f"{figure.tuned:.3f}",
        _ABSENT if figure.over_base is None else f"{figure.over_base:+.3f}",
        _ABSENT if paired is None else f"{paired.delta:+.3f}",
        _ABSENT if paired is None else f"{paired.low:+.3f} to {paired.high:+.3f}",
        p_value(None if paired is None else paired.adjusted_p_value),
    )


def _subject(figure: RunFigure) -> str:
    """Return the task; of a benchmark its name, and which of its tasks where it has several."""
    if figure.benchmark in (None, figure.task):
        return figure.task
    return f"{figure.benchmark}: {figure.task}"


def _retention_row(one: RunRetention) -> tuple[str, ...]:
    change = _ABSENT if one.change is None else f"{one.change:+.3f}"
    return one_line(one.source), str(one.run + 1), one.verdict.value, change, f"{one.rows:,}"


def _document(
    files: Sequence[Path],
    runs: Sequence[FinishedRun],
    figures: Sequence[RunFigure],
    retained: Sequence[RunRetention],
) -> dict[str, object]:
    return {
        "runs": [
            {
                "report": str(file),
                "name": run.report.name,
                "namespace": run.report.namespace,
                "method": run.report.training.method,
                "baseModel": run.report.base_model,
                "specHash": run.report.spec_hash,
                "parameters": run.report.training.parameters,
                "trainableParameters": run.report.training.trainable_parameters,
                "trainingSeconds": run.report.training.seconds,
                "peakMemoryBytes": run.report.training.peak_memory_bytes,
                "published": run.report.published,
            }
            for file, run in zip(files, runs, strict=True)
        ],
        "figures": [figure.model_dump(mode="json", by_alias=True) for figure in figures],
        "forgetting": [one.model_dump(mode="json", by_alias=True) for one in retained],
    }
