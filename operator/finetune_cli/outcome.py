"""Say in sentences how a run ended and where its results are. Pure."""

from pathlib import Path

from finetune_api.plain_text import one_line
from finetune_api.report import ArtifactKind, EvaluationReport, Report
from finetune_trainer.verdict import judge, judge_in_context


def describe_outcome(report: Report, workspace: Path) -> list[str]:
    """Return the verdict, where the model is and where the report is, one line each."""
    sentences = [] if report.evaluation is None else _verdicts(report.evaluation)
    models = [artifact for artifact in report.artifacts if artifact.kind is not ArtifactKind.REPORT]
    sentences += [f"{_name(artifact.kind)}: {_place(artifact.uri)}" for artifact in models]
    if not models:
        why = f": {report.why_not_published}" if report.why_not_published else ""
        sentences.append(f"The model is not published{why}; it stays in {workspace / 'tuned'}")
    return [one_line(sentence) for sentence in [*sentences, f"Report: {_report_place(report, workspace)}"]]


def _verdicts(evaluation: EvaluationReport) -> list[str]:
    in_context, forgetting = judge_in_context(evaluation), evaluation.forgetting
    return [
        judge(evaluation).sentence,
        *([] if in_context is None else [in_context.sentence]),
        *([] if forgetting is None else [f"{result.source}: {result.why}" for result in forgetting.results]),
    ]


def _name(kind: ArtifactKind) -> str:
    return "Merged model" if kind is ArtifactKind.MERGED else f"Model ({kind.value})"


def _report_place(report: Report, workspace: Path) -> str:
    """Return the published page, which lies beside the model; without a model, the workspace's own copy."""
    if report.artifacts:
        return _place(f"{report.artifacts[0].uri.rpartition('/')[0]}/report/report.html")
    return str(workspace / "report" / "report.html")


def _place(uri: str) -> str:
    # A plain path can be clicked and pasted.
    return uri.removeprefix("file://")
