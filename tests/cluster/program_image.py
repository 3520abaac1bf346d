"""Images of one static program each, made without a Dockerfile."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .binary import ensure_binaries, module_pins
from .command import pipe
from .daemon import Docker
from .folder import BIN, alone, digest
from .node_store import load


def provide_program(docker: Docker | None, program: str) -> str:
    """Return the name of an image of one of our pinned programs, loaded into the node; it has no entrypoint."""
    name = f"finetune/{program}:{digest(module_pins([program]))}"
    if docker is None:
        return name
    with alone():
        if not docker.has_image(name):
            ensure_binaries([program])
            import_program(docker, BIN / program, name)
        load(docker, name)
    return name


def import_program(docker: Docker, program: Path, name: str, entrypoint: Sequence[str] = ()) -> None:
    """Make the image ``name`` of one static program in /usr/local/bin and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "usr/local/bin" / program.name
        target.parent.mkdir(parents=True)
        shutil.copy2(program, target)
        (Path(folder) / "tmp").mkdir()
        (Path(folder) / "tmp").chmod(0o1777)
        changes = ["ENV PATH=/usr/local/bin", *([f"ENTRYPOINT {json.dumps(list(entrypoint))}"] if entrypoint else [])]
        pipe(
            ["tar", "--create", "--owner=0", "--group=0", "--directory", folder, "."],
            [docker.client, "import", *change(changes), "-", name],
            timeout=300,
            environment=docker.environment,
        )


def change(instructions: Sequence[str]) -> list[str]:
    """Return the arguments that let `docker import` follow ``instructions`` of a Dockerfile."""
    return [word for instruction in instructions for word in ("--change", instruction)]
