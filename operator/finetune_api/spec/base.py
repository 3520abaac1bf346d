"""``spec.model``: the model to start from."""

from collections.abc import Iterator
from enum import StrEnum

from finetune_api.block import Block, Problem
from finetune_api.spec.field import DataUri, Flag, ModelUri, Name, Revision, SecretRef, Sha256


class ModelTask(StrEnum):
    """What kind of model it is."""

    CAUSAL_LM = "causal-lm"
    SEQ2SEQ_LM = "seq2seq-lm"


class DType(StrEnum):
    """Number format of frozen weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def _one_origin(job: str | None, source: str | None) -> Iterator[Problem]:
    if (job is None) == (source is None):
        yield Problem((), None, "needs exactly one of job and source", "Name the job to go on from, or a source.")


def _hash_belongs_to_source(job: str | None, sha256: str | None) -> Iterator[Problem]:
    if job is not None and sha256 is not None:
        yield Problem(
            ("sha256",), sha256, "belongs to source; what a job has published is pinned by itself", "Leave it out."
        )


class StartFrom(Block):
    """What another job has published, to go on from: an adapter, or full weights.

    It must have been tuned from spec.model.source, the same files of it, and is verified against its MANIFEST.json. An
    adapter is trained on in its own form, by the method and with the settings of the job that made it; full and merged
    weights by method full or selective. To put an adapter on full weights, name those in spec.model.source instead.
    Figures compare with the base model; the report and the model card say what it was tuned on from.
    """

    rules = (_one_origin, _hash_belongs_to_source)

    job: Name | None = None
    """Name of a FineTuneJob in the same namespace of a cluster. Nothing begins before it has published; what it has
    published, its adapter or full weights, is pinned then, as source and sha256."""
    source: DataUri | None = None
    """The folder ``model`` or ``merged`` that a job has published: file:///path, s3://bucket/path, read with the
    endpoint and the Secret of spec.output, or pvc://claim/path."""
    sha256: Sha256 | None = None
    """Of the MANIFEST.json in ``source``: a job does not begin with another one. Absent: whatever is there when the job
    begins."""


def _no_foreign_code(trust_remote_code: bool) -> Iterator[Problem]:
    if trust_remote_code:
        yield Problem(
            ("trustRemoteCode",),
            True,
            "is refused: it would run code from the model's repository with the job's credentials",
            "Leave it out, and take a model whose architecture transformers itself implements.",
        )


class ModelSpec(Block):
    """The base model."""

    rules = (_no_foreign_code,)

    source: ModelUri
    """Where the model is: hf://organisation/name, s3://bucket/path, pvc://claim/path or file:///folder (a folder with
    config.json, a tokenizer and safetensors weights; pickled weights are refused)."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model; resolved to a commit and pinned in status. Absent: the default branch."""
    task: ModelTask = ModelTask.CAUSAL_LM
    """causal-lm (Llama, Qwen, GPT) or seq2seq-lm: an encoder reads the prompt, a decoder writes the completion (T5,
    FLAN-T5, mT5, umT5)."""
    dtype: DType = DType.AUTO
    """Number format of weights that are not trained. bfloat16 halves their memory; auto: that of the products, see
    spec.training.precision. What is trained is always kept in float32: a bfloat16 step of 1e-5 moves 2 % of the weights
    only."""
    trust_remote_code: Flag = False
    """Must be false: code from a model repository is never run."""
    secret_ref: SecretRef | None = None
    """Secret with HF_TOKEN, or with the keys of an s3:// source, as spec.data.tasks[].secretRef has them."""
    start_from: StartFrom | None = None
    """Go on from what another job published instead of from the bare base model."""
