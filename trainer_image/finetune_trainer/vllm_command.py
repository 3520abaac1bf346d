"""The command line of vLLM's OpenAI server for what is published, and what it does not load. Pure."""

from collections.abc import Mapping

from finetune_api.spec import MethodType

MOST_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""


def refused_kind(method: str, use_dora: bool) -> str | None:
    """Return what to call an adapter that vLLM does not load, and None for one that it does."""
    if use_dora:
        return "dora"
    return None if method in (MethodType.LORA, MethodType.QLORA) else method


def max_lora_rank(rank: int) -> int | None:
    """Return the least ``--max-lora-rank`` for adapters up to ``rank``; None above the last of `MOST_RANKS`."""
    return next((size for size in MOST_RANKS if size >= rank), None)


def served_name(uri: str) -> str:
    """Return what clients call a base that lies at ``uri``."""
    return uri.partition("://")[2].strip("/")


def serve_command(
    model: str, name: str, revision: str | None = None, adapters: Mapping[str, str] | None = None, max_rank: int = 0
) -> list[str]:
    """Return the words of the command.

    Args:
        model: hub id or folder.
        name: what requests call it.
        revision: commit of a hub model.
        adapters: folders of LoRA adapters by the names that requests call them.
        max_rank: from `max_lora_rank`, for them.
    """
    words = ["vllm", "serve", model]
    if revision is not None:
        words += ["--revision", revision]
    words += ["--served-model-name", name]
    if adapters:
        words += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(max_rank)]
        words += ["--lora-modules", *(f"{adapter}={folder}" for adapter, folder in adapters.items())]
    return words
