"""What several stages read: base model and start, rows and their tokens, general rows and benchmarks."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob
from finetune_api.report import TrainingReport
from finetune_api.spec import LossOn, ModelSpec
from finetune_api.spec.compute import is_distributed
from finetune_trainer.benchmark import BenchmarkRun
from finetune_trainer.checkpoint import newest_complete
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.encoder_decoder import decoder_start
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.example import Encoded, Example
from finetune_trainer.fit import find_room, find_row_length
from finetune_trainer.general_source import name_sources, read_general_rows
from finetune_trainer.general_suite import GeneralRow, GeneralSuite, general_rows, general_texts, open_questions
from finetune_trainer.in_context import as_asked
from finetune_trainer.inputs import Inputs, describe_change
from finetune_trainer.layout import Layout
from finetune_trainer.model import ModelFiles, fetch_model, fetch_small_files, read_config
from finetune_trainer.progress import Reporter
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.records import StoredRows
from finetune_trainer.renderer import Renderer, encode_all
from finetune_trainer.run import Run
from finetune_trainer.scoring import Scorer
from finetune_trainer.split import Split
from finetune_trainer.start import fetch_start
from finetune_trainer.task_file import TaskFile, read_task_file
from finetune_trainer.token_cache import TokenCache, token_key


def fetch_base(run: Run) -> ModelFiles:
    """Return the base model's files; of a hub model, the commit that the check saw: a branch may have moved since."""
    return fetch_model(_as_checked(run), run.workspace.models, storage=run.storage)


def fetch_base_to_train(run: Run) -> ModelFiles:
    """Return what this process needs of the base to train, without weights where nodes fetch these for themselves.

    Whether they are those that the check saw, the nodes find then.
    """
    known = run.workspace.recall("inputs", Inputs)
    if known is None or run.shared is None or not is_distributed(run.job.spec.compute):
        return fetch_base(run)
    return ModelFiles(fetch_small_files(_as_checked(run), run.workspace.models, run.storage), known.model)


def _as_checked(run: Run) -> ModelSpec:
    model, known = run.job.spec.model, run.workspace.recall("inputs", Inputs)
    if known is None or not model.source.startswith("hf://"):
        return model
    return model.model_copy(update={"revision": known.model})


def find_start(run: Run) -> PublishedModel | None:
    """Return the published model that the job goes on from; absent where it begins with the bare base."""
    return fetch_start(run.job.spec.model, run.storage, run.workspace.models)


def inputs_of(dataset: Dataset, files: ModelFiles, start: PublishedModel | None) -> Inputs:
    """Return what a run began with, by hash and revision."""
    return Inputs(rows=dataset.hash, model=files.revision, lineage=start.lineage if start else ())


def has_begun(run: Run) -> bool:
    """Whether training has left anything: how it went, or a checkpoint, here or in the output store."""
    workspace, shared = run.workspace, run.shared
    if workspace.recall("training", TrainingReport) is not None or newest_complete(workspace.checkpoints) is not None:
        return True
    # Several workers bring checkpoints to their own nodes alone.
    return shared is not None and bool(shared.complete_steps())


def is_unchanged(run: Run, inputs: Inputs, reporter: Reporter) -> bool:
    """Whether rows and model are those that the run began with; changes before training only mean another check.

    Raises:
        DataError: training began with others.
    """
    workspace = run.workspace
    known = workspace.recall("inputs", Inputs)
    change = "" if known is None else describe_change(known, inputs)
    if not change:
        return known is not None
    if not has_begun(run):
        reporter.say(f"{change} since the check; checking again")
        return False
    remedy = (
        f"delete {workspace.root}, or give another folder with --workspace"
        if run.shared is None
        else "apply the job under another name"
    )
    raise DataError(f"{change} since this run began training. Put them back to go on; to start anew, {remedy}.")


def load_rows(run: Run, splits: Collection[Split] = tuple(Split)) -> Dataset:
    """Read the rows of the job's sources, or those that the run was given."""
    if run.dataset is not None:
        return run.dataset
    folder = run.workspace.rows
    return load_dataset(
        run.job.spec.data,
        splits,
        fetch=lambda uri, field, secret_ref, revision: run.storage.fetch_rows(uri, field, secret_ref, folder, revision),
        folder=run.workspace.root,
        subgroup_column=holistic.subgroup_column if (holistic := run.job.spec.evaluation.holistic) else None,
    )


def load_suite(run: Run) -> GeneralSuite | None:
    """Return what general ability is measured on; absent where the job does not ask for it."""
    budget = run.job.spec.evaluation.forgetting
    if budget is None:
        return None
    own: list[GeneralRow] = []
    for index, (uri, name) in enumerate(zip(budget.sources, name_sources(budget.sources), strict=True)):
        field = f"spec.evaluation.forgetting.sources[{index}]"
        own += read_general_rows(run.storage.fetch_rows(uri, field, None, run.workspace.rows), name, field)
    return GeneralSuite((*general_rows(), *own), general_texts(), open_questions())


def load_benchmarks(
    run: Run, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> BenchmarkRun | None:
    """Return what ``spec.evaluation.benchmarks`` asks; absent where the job has none."""
    spec, storage = run.job.spec, run.storage
    if not spec.evaluation.benchmarks:
        return None
    # Imported here: the harness takes seconds to import.
    from finetune_trainer.harness import open_benchmarks

    def read(uri: str, field: str) -> TaskFile:
        content = storage.read_file(uri, field, run.workspace.rows)
        return read_task_file(
            uri, content, field, lambda rows, setting: storage.fetch_rows(rows, setting, None, run.workspace.rows)
        )

    return open_benchmarks(
        spec.evaluation.benchmarks, read, tokenizer, find_room(spec, files), lambda model: Scorer(model, layout)
    )


def make_renderer(job: FineTuneJob, files: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Return what makes tokens of rows, in the job's format."""
    data = job.spec.data
    length = find_row_length(job.spec, files).tokens
    renderer = Renderer(tokenizer, data.format.value, data.system, length, decoder_start(read_config(files)))
    chats = next((index for index, task in enumerate(data.tasks) if task.messages is not None), None)
    if chats is not None and renderer.format == "raw":
        raise SpecError(
            f"spec.data.tasks[{chats}].messages: {job.spec.model.source} has no chat template, so it knows no turns. "
            "Choose an instruct model, or write templates."
        )
    return renderer


def encode_split(
    run: Run, files: ModelFiles, renderer: Renderer, dataset: Dataset, split: Split
) -> StoredRows[Encoded]:
    """Return the tokens of one split's rows."""
    # lossOn is about what is learnt; scores are always of the completion.
    loss_on = run.job.spec.data.loss_on if split is Split.TRAIN else LossOn.COMPLETION
    return encode_rows(run, files, renderer, dataset, as_asked(dataset, split), loss_on)


def encode_rows(
    run: Run, files: ModelFiles, renderer: Renderer, dataset: Dataset, examples: Sequence[Example], loss_on: LossOn
) -> StoredRows[Encoded]:
    """Return the tokens of ``examples``, from the cache where they were tokenised before."""
    workspace = run.workspace

    def tokenise() -> StoredRows[Encoded]:
        encoded, _ = encode_all(renderer, dataset, examples, loss_on, workspace.root)
        return encoded

    goes_with_the_pod = run.shared is not None and workspace.cache is None
    if goes_with_the_pod or not examples:
        return tokenise()
    key = token_key(examples, dataset.specs, renderer, files.revision, loss_on)
    return TokenCache(workspace.tokens).tokens(key, tokenise, workspace.root)


def rows_by_task(dataset: Dataset, split: Split, encoded: Sequence[Encoded]) -> dict[str, Sequence[Encoded]]:
    """Cut the rows of a split into those of its tasks."""
    return {task: encoded[places.start : places.stop] for task, places in dataset.places(split).items()}
