"""What follows an evaluation: the report put together, the model written, held against the evaluated one, published."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_api import __version__
from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import (
    Artifact,
    ArtifactKind,
    DataReport,
    EvaluationReport,
    ParityReport,
    Report,
    Stage,
    TrainingReport,
    VirtualToken,
)
from finetune_api.spec import MethodType
from finetune_api.status import PlanStatus
from finetune_trainer.durable import write_file
from finetune_trainer.errors import SpecError
from finetune_trainer.inputs import Inputs
from finetune_trainer.manifest import read_manifest, write_manifest
from finetune_trainer.model import ModelFiles
from finetune_trainer.pair import ModelPair, load_published
from finetune_trainer.parity import Evaluated, check_parity, choose_probes, encode_probes, probe_logits
from finetune_trainer.progress import Reporter
from finetune_trainer.publish import export_model, publish
from finetune_trainer.quantization import PACKAGE
from finetune_trainer.renderer import Renderer
from finetune_trainer.report_page import render_page
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.soft_prompt import describe_soft_prompt
from finetune_trainer.tracker import put_event_files

_NUMBERS_DEPEND_ON = ("torch", "transformers", "peft", "ray", "tokenizers", "rouge-score", "sacrebleu", "lm-eval")


def assemble_report(run: Run, files: ModelFiles, evaluation: EvaluationReport) -> Report:
    """Put together what the stages have left in the workspace."""
    job, workspace = run.job, run.workspace
    data, training = workspace.recall("data", DataReport), workspace.recall("training", TrainingReport)
    if data is None or training is None:
        raise SpecError(
            f"workspace {workspace.root} holds no finished {'check' if data is None else 'train'} stage; run it first."
        )
    plan, inputs = workspace.recall("plan", PlanStatus), workspace.recall("inputs", Inputs)
    libraries = (*_NUMBERS_DEPEND_ON, PACKAGE) if job.spec.method.type is MethodType.QLORA else _NUMBERS_DEPEND_ON
    return Report(
        planned_memory_bytes=plan and plan.memory_bytes_per_gpu,
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        spec_hash=spec_hash(job.spec),
        base_model=job.spec.model.source,
        base_revision=files.revision,
        lineage=inputs.lineage if inputs else (),
        data=data,
        training=training,
        evaluation=evaluation,
        seed=job.spec.training.seed,
        versions={name: importlib.metadata.version(name) for name in libraries} | {"finetune": __version__},
        image=run.image,
        resolved=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    )


def virtual_tokens(job: FineTuneJob, pair: ModelPair, tokenizer: PreTrainedTokenizerBase) -> tuple[VirtualToken, ...]:
    """Return the tokens of prompt tuning; none of another method."""
    if job.spec.method.type is not MethodType.PROMPT_TUNING:
        return ()
    with pair.tuned() as model:
        assert isinstance(model, PeftModel)
        return describe_soft_prompt(model, tokenizer)


def write_exports(
    run: Run,
    report: Report,
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    licence: str | None,
) -> tuple[list[Path], Evaluated]:
    """Write what will be published; return the folders, and what the evaluated model says to the probes."""
    job, folder = run.job, run.workspace.export
    reporter = Reporter(run.sink, Stage.PUBLISH)
    folders = [folder / name for name in (("model", "merged") if job.spec.output.merge else ("model",))]
    rows = pq.read_table(run.workspace.predictions, columns=["prompt", "reference"]).to_pylist()
    texts = choose_probes((row["prompt"], row["reference"]) for row in rows)
    ids = encode_probes(tokenizer, texts)
    with pair.tuned() as model:
        logits = probe_logits(model, ids)
        folder.mkdir(exist_ok=True)
        for one in folders:
            reporter.say(f"writing {one.name}")
            merge = one.name == "merged"
            export_model(model, tokenizer, renderer, job, report, one, merge=merge, licence=licence)
        probe = report.evaluation and report.evaluation.probe
        return folders, Evaluated(texts, ids, logits, model.dtype, probe.effect if probe else None)


def check_export(run: Run, files: ModelFiles, folder: Path, evaluated: Evaluated) -> ParityReport:
    """Load what will be published from its folder and hold it against the evaluated model."""
    Reporter(run.sink, Stage.PUBLISH).say(f"holding {folder.name}, loaded afresh, against the evaluated model")
    kind = ArtifactKind(read_manifest(folder).about["kind"])
    model = load_published(run.job, files, folder, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return check_parity(evaluated, model, tokenizer, kind)


def publish_run(run: Run, report: Report, exports: Sequence[Path]) -> Report:
    """Publish the exported folders, none where the model is kept back; then the report, which names them."""
    job, workspace = run.job, run.workspace
    reporter = Reporter(run.sink, Stage.PUBLISH)
    store = run.storage.open_output()
    prefix = output_prefix(job)
    artifacts: list[Artifact] = []
    for folder in exports:
        reporter.say(f"publishing {folder.name} to {store.uri}/{prefix}/{folder.name}")
        artifacts.append(publish(folder, store, f"{prefix}/{folder.name}"))
    report = report.model_copy(update={"artifacts": tuple(artifacts), "published": bool(artifacts)})
    reporter.say(f"publishing report to {store.uri}/{prefix}/report")
    _write_report(report, workspace.report, workspace.tuned)
    publish(workspace.report, store, f"{prefix}/report")
    reporter.share("published", 1.0)
    return report


def _write_report(report: Report, folder: Path, tuned: Path) -> None:
    write_file(folder / "report.json", report.model_dump_json(by_alias=True, indent=1).encode())
    write_file(folder / "report.html", render_page(report).encode())
    curve = (point.model_dump_json(by_alias=True, exclude_defaults=True) for point in report.training.curve)
    write_file(folder / "training.jsonl", "".join(f"{line}\n" for line in curve).encode())
    put_event_files(tuned, folder)
    write_manifest(folder, {"kind": ArtifactKind.REPORT.value, "specHash": report.spec_hash})
