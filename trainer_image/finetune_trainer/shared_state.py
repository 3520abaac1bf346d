"""The run's state in the output store, for stages whose pods share no disk. A laptop's workspace needs none of this.

Below the job's prefix: ``state/*.json`` (results), ``state/tuned`` (weights), ``state/predictions.parquet`` and, while
training, ``checkpoints/step-000100``. Trees are complete when their marker is there.
"""

import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.status import Checkpoint
from finetune_trainer.adjustment import Adjustment, Useless, useless_checkpoints
from finetune_trainer.checkpoint import folder_of, newest_complete
from finetune_trainer.durable import disk_errors, write_file
from finetune_trainer.errors import DataError, FineTuneError, SpecError
from finetune_trainer.manifest import COMPLETE_NAME, MANIFEST_NAME, is_complete, write_manifest
from finetune_trainer.store import Store
from finetune_trainer.workspace import RESULTS, Workspace

logger = logging.getLogger(__name__)

MOST_LISTED = 5
_PART = re.compile(r"node-\d+(?=/)")
_STEP = re.compile(r"step-(\d+)/")
_MARKER = re.compile(rf"step-(\d+)/{COMPLETE_NAME}")


@dataclass(frozen=True, slots=True)
class SharedState:
    """What stages leave to each other in the output store."""

    store: Store
    prefix: str
    """The job's folder in the store."""
    workspace: Workspace

    # --- results

    def pull_results(self) -> None:
        """Bring the results of finished stages into the workspace."""
        present = set(self.store.list(f"{self.prefix}/state"))
        for name in RESULTS:
            if (key := self._result_key(name)) in present:
                write_file(self.workspace.result_file(name), self.store.get_bytes(key))

    def push_result(self, name: str) -> None:
        """Store one result of the workspace."""
        path = self.workspace.result_file(name)
        with disk_errors("read", path):
            content = path.read_bytes()
        self.store.put_bytes(self._result_key(name), content)

    # --- the tuned weights and what they answered

    def has_tuned(self) -> bool:
        """Whether the tuned weights are there, whole."""
        return self.store.exists(f"{self.prefix}/state/tuned/{COMPLETE_NAME}")

    def pull_tuned(self) -> None:
        """Bring the tuned weights into the workspace.

        Raises:
            SpecError: training has not ended yet.
        """
        if is_complete(self.workspace.tuned):
            return
        if not self.has_tuned():
            raise SpecError(f"{self._show('state/tuned')} is not there: the train stage has not ended; run it first.")
        self.store.get_tree(f"{self.prefix}/state/tuned", self.workspace.tuned)

    def push_tuned(self) -> None:
        """Store the tuned weights; checkpoints are of no use any more and go."""
        self.store.put_tree(self.workspace.tuned, f"{self.prefix}/state/tuned")

    def pull_predictions(self) -> None:
        """Bring the test rows' answers into the workspace's report, if they are there."""
        key = f"{self.prefix}/state/{self.workspace.predictions.name}"
        if self.store.exists(key):
            write_file(self.workspace.predictions, self.store.get_bytes(key))

    def push_predictions(self) -> None:
        """Store the test rows' answers."""
        path = self.workspace.predictions
        with disk_errors("read", path):
            content = path.read_bytes()
        self.store.put_bytes(f"{self.prefix}/state/{path.name}", content)

    # --- checkpoints

    def pull_checkpoint(self) -> None:
        """Bring the newest complete checkpoint into the workspace, unless it holds one; nothing where there is none."""
        if newest_complete(self.workspace.checkpoints) is not None:
            return
        for step in self.complete_steps():
            if self.pull_checkpoint_of(step):
                return
            self.drop_checkpoint(step)

    def pull_checkpoints(self) -> None:
        """Bring every complete checkpoint into the workspace that it does not hold."""
        for step in self.complete_steps():
            if not is_complete(folder_of(self.workspace.checkpoints, step)):
                self.pull_checkpoint_of(step)

    def pull_checkpoint_of(self, step: int) -> bool:
        """Bring one complete checkpoint into the workspace; whether it was whole: if not, an older one may be.

        One that is not counts as complete all the same, until `drop_checkpoint` removes it.
        """
        folder, key = folder_of(self.workspace.checkpoints, step), self._checkpoint_key(step)
        below = {one.removeprefix(f"{key}/") for one in self.store.list(key)}
        parts = sorted({match[0] for one in below if (match := _PART.match(one))})
        try:
            if unfinished := [part for part in parts if f"{part}/{COMPLETE_NAME}" not in below]:
                raise DataError(f"{self.store.uri}/{key} is unfinished: {', '.join(unfinished)}")
            if parts:
                self._join(key, parts, folder)
            else:
                self.store.get_tree(key, folder)
        except DataError as error:
            logger.warning("checkpoint is damaged step=%s reason=%s", step, error)
            return False
        return True

    def _join(self, key: str, parts: list[str], folder: Path) -> None:
        """Make one checkpoint of what several nodes stored; the manifest comes last, as ever."""
        if self.store.get_bytes(f"{key}/{COMPLETE_NAME}") != self._markers(key, parts):
            raise DataError(f"{self.store.uri}/{key} has other parts than those that made it complete: {parts}")
        for part in parts:
            fetched = folder.with_name(f"{folder.name}-{part}")
            shutil.rmtree(fetched, ignore_errors=True)
            self.store.get_tree(f"{key}/{part}", fetched)
            with disk_errors("create", folder):
                shutil.copytree(
                    fetched,
                    folder,
                    copy_function=shutil.move,
                    ignore=shutil.ignore_patterns(MANIFEST_NAME, COMPLETE_NAME),
                    dirs_exist_ok=True,
                )
            shutil.rmtree(fetched)
        write_manifest(folder)

    def drop_useless_checkpoints(self, adjustment: Adjustment) -> None:
        """Remove what an attempt so adjusted must not go on from, and remember the adjustment."""
        key = f"{self.prefix}/state/adjustment.json"
        before = Adjustment()
        if self.store.exists(key):
            before = Adjustment.model_validate_json(self.store.get_bytes(key))
        if before == adjustment:
            return
        match useless_checkpoints(before, adjustment):
            case Useless.ALL:
                self.drop_checkpoints()
            case Useless.NEWEST:
                for step in self.complete_steps()[:1]:
                    self.drop_checkpoint(step)
            case Useless.NONE:
                pass
        # Behind the removal: who is stopped between the two goes back once more, never too little.
        self.store.put_bytes(key, adjustment.model_dump_json(by_alias=True).encode())

    def drop_checkpoint(self, step: int) -> None:
        """Remove a checkpoint that nobody can go on from: kept, it would take the place of those of earlier steps."""
        self.store.delete_tree(self._checkpoint_key(step))

    def push_checkpoint(self, folder: Path, step: int, keep: int) -> None:
        """Store a sealed checkpoint, then remove older ones, all but the ``keep`` newest complete ones."""
        self.store.put_tree(folder, self._checkpoint_key(step))
        self._discard_old(keep)

    def push_part(self, folder: Path, step: int, node: int) -> None:
        """Store what one of several nodes wrote of a checkpoint; it is complete when `complete_parts` is called."""
        self.store.put_tree(folder, f"{self._checkpoint_key(step)}/node-{node}")

    def complete_parts(self, step: int, nodes: int, keep: int) -> None:
        """Declare the checkpoint complete, as every node's part is stored; then remove old ones.

        A store that refuses costs this checkpoint; training goes on, and the next one is tried again.
        """
        key = self._checkpoint_key(step)
        parts = [f"node-{node}" for node in range(nodes)]
        try:
            self.store.put_bytes(f"{key}/{COMPLETE_NAME}", self._markers(key, parts))
            self._discard_old(keep)
        except FineTuneError as error:
            logger.warning("checkpoint not completed step=%s reason=%s", step, error)

    def _markers(self, key: str, parts: Iterable[str]) -> bytes:
        """Name the parts with what is in them: parts of two attempts at the same step are no checkpoint."""
        marked = {part: self.store.get_bytes(f"{key}/{part}/{COMPLETE_NAME}") for part in sorted(parts)}
        return b"".join(part.encode() + b" " + marker for part, marker in marked.items())

    def _discard_old(self, keep: int) -> None:
        """Remove complete checkpoints beyond ``keep``, and what was begun before the newest one and never completed."""
        below = self._below_checkpoints()
        begun, complete = {int(match[1]) for match in map(_STEP.match, below) if match}, _complete_steps(below)
        for old in sorted(step for step in begun - {*complete[:keep]} if step < max(complete, default=0)):
            self.drop_checkpoint(old)

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints."""
        self.store.delete_tree(f"{self.prefix}/checkpoints")

    def complete_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        return _complete_steps(self._below_checkpoints())

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Return the newest complete checkpoints, as the status lists them."""
        steps = self.complete_steps()[:MOST_LISTED]
        return tuple(Checkpoint(step=step, uri=f"{self.store.uri}/{self._checkpoint_key(step)}") for step in steps)

    def _below_checkpoints(self) -> list[str]:
        folder = f"{self.prefix}/checkpoints"
        return [key.removeprefix(f"{folder}/") for key in self.store.list(folder)]

    def _checkpoint_key(self, step: int) -> str:
        return f"{self.prefix}/checkpoints/step-{step:06d}"

    def _result_key(self, name: str) -> str:
        return f"{self.prefix}/state/{name}.json"

    def _show(self, name: str) -> str:
        return f"{self.store.uri}/{self.prefix}/{name}"


def _complete_steps(below: Iterable[str]) -> list[int]:
    """Return the steps whose marker is among ``below``, names below ``checkpoints``; newest first."""
    return sorted((int(match[1]) for match in map(_MARKER.fullmatch, below) if match), reverse=True)
