"""Checkpoints in the output store: whole when every node has stored its part, dropped when they are of no use."""

from pathlib import Path

import pytest

from finetune_trainer.adjustment import Adjustment
from finetune_trainer.checkpoint import keep_weights, kept_weights, newest_complete, seal
from finetune_trainer.file_store import FileStore
from finetune_trainer.manifest import verify_manifest
from finetune_trainer.shared_state import SharedState
from finetune_trainer.workspace import Workspace


def node(folder: Path, name: str) -> SharedState:
    return SharedState(FileStore(folder / "store"), "team/job", Workspace(folder / name))


def part(state: SharedState, step: int, **files: str) -> Path:
    folder = state.workspace.checkpoints / f"checkpoint-{step}"
    for name, content in files.items():
        (folder / "global_step").mkdir(parents=True, exist_ok=True)
        (folder / "global_step" / name).write_text(content)
    return seal(state.workspace.checkpoints, step)


def store_from_two_nodes(folder: Path, step: int) -> None:
    for number in (0, 1):
        state = node(folder, f"node-{number}")
        state.push_part(part(state, step, **{f"rank_{number}": f"shard {number}"}), step, number)


def test_what_two_nodes_stored_is_one_checkpoint_on_every_node(tmp_path: Path):
    store_from_two_nodes(tmp_path, 4)
    later = node(tmp_path, "later")
    later.complete_parts(4, 2, keep=1)
    later.pull_checkpoint()
    found = newest_complete(later.workspace.checkpoints)
    assert found is not None
    verify_manifest(found)
    assert {path.name: path.read_text() for path in (found / "global_step").iterdir()} == {
        "rank_0": "shard 0",
        "rank_1": "shard 1",
    }


def test_every_complete_checkpoint_can_be_had_and_what_they_hold_of_the_model_kept(tmp_path: Path):
    writer, reader = node(tmp_path, "writer"), node(tmp_path, "reader")
    for step in (2, 4):
        folder = writer.workspace.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json", "best.safetensors", "optimizer.pt"):
            (folder / name).write_text(f"{name} of {step}")
        writer.push_checkpoint(seal(writer.workspace.checkpoints, step), step, keep=2)
    reader.pull_checkpoints()
    (reader.workspace.checkpoints / "checkpoint-6").mkdir()

    keep_weights(reader.workspace.checkpoints, reader.workspace.tuned)
    kept = kept_weights(reader.workspace.tuned)
    assert list(kept) == [2, 4]
    for step, folder in kept.items():
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: f"{name} of {step}" for name in ("adapter_model.safetensors", "adapter_config.json")
        }


def test_parts_without_a_marker_are_no_checkpoint(tmp_path: Path):
    store_from_two_nodes(tmp_path, 4)
    assert node(tmp_path, "later").complete_steps() == []


def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path: Path):
    store_from_two_nodes(tmp_path, 4)
    later = node(tmp_path, "later")
    later.complete_parts(4, 2, keep=1)
    later.store.delete_tree("team/job/checkpoints/step-000004/node-1")
    assert not later.pull_checkpoint_of(4)
    assert newest_complete(later.workspace.checkpoints) is None


def test_a_damaged_checkpoint_does_not_outlive_the_attempt_that_finds_it(tmp_path: Path):
    writer = node(tmp_path, "writer")
    for step in (2, 4):
        writer.push_checkpoint(part(writer, step, rank_0=f"of {step}"), step, keep=2)
    (damaged,) = (tmp_path / "store").rglob("step-000004/global_step/rank_0")
    damaged.write_text("flipped")
    later = node(tmp_path, "later")
    later.pull_checkpoint()
    found = newest_complete(later.workspace.checkpoints)
    assert found is not None and found.name == "checkpoint-2"
    later.push_checkpoint(part(later, 3, rank_0="of 3"), 3, keep=1)
    assert later.complete_steps() == [3], "it is not taken for a newer one"


def test_a_store_whose_listing_lags_behind_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = node(tmp_path, "program")
    monkeypatch.setattr(FileStore, "list", lambda self, prefix: ("team/job/checkpoints/step-000004/node-0/state",))
    state.push_checkpoint(part(state, 4, rank_0="of 4"), 4, keep=1)
    monkeypatch.undo()
    assert state.complete_steps() == [4]


def test_parts_of_two_attempts_at_the_same_step_are_no_checkpoint(tmp_path: Path):
    store_from_two_nodes(tmp_path, 4)
    later = node(tmp_path, "later")
    later.complete_parts(4, 2, keep=1)
    again = node(tmp_path, "again")
    again.push_part(part(again, 4, rank_0="another shard"), 4, 0)
    assert not later.pull_checkpoint_of(4), "the second attempt has died before its other node stored anything"
    again.push_part(part(node(tmp_path, "other"), 4, rank_1="another shard"), 4, 1)
    again.complete_parts(4, 2, keep=1)
    assert later.pull_checkpoint_of(4)


def test_a_store_that_refuses_the_marker_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store_from_two_nodes(tmp_path, 4)
    state = node(tmp_path, "program")
    state.store.delete_tree("team/job/checkpoints/step-000004/node-1")
    state.complete_parts(4, 2, keep=1)
    assert state.complete_steps() == []
    assert "checkpoint not completed step=4 reason=cannot read" in caplog.text


def test_old_checkpoints_go_when_a_newer_one_is_complete(tmp_path: Path):
    state = node(tmp_path, "program")
    for step in (1, 2, 3):
        store_from_two_nodes(tmp_path, step)
        state.complete_parts(step, 2, keep=2)
    assert state.complete_steps() == [3, 2]


def test_parts_of_a_step_that_was_never_completed_go_when_a_later_one_is(tmp_path: Path):
    state = node(tmp_path, "program")
    for step, is_completed in ((1, True), (2, False), (4, False), (3, True)):
        store_from_two_nodes(tmp_path, step)
        if is_completed:
            state.complete_parts(step, 2, keep=2)
    assert state.complete_steps() == [3, 1]
    left = {key.split("/")[3] for key in state.store.list("team/job/checkpoints")}
    assert left == {"step-000001", "step-000003", "step-000004"}, "the fourth may still be on its way"


@pytest.mark.parametrize(
    "adjustment, left",
    [
        (Adjustment(micro_batch_size=1), [3, 2]),
        (Adjustment(learning_rate_scale=0.5), [2]),
        (Adjustment(zero_stage=3), []),
    ],
    ids=["less memory", "smaller steps", "another ZeRO stage"],
)
def test_an_adjusted_attempt_drops_what_is_useless_once(tmp_path: Path, adjustment: Adjustment, left: list[int]):
    state = node(tmp_path, "program")
    for step in (2, 3):
        store_from_two_nodes(tmp_path, step)
        state.complete_parts(step, 2, keep=2)
    state.drop_useless_checkpoints(adjustment)
    assert state.complete_steps() == left
    # The attempt is stopped and made again.
    state.drop_useless_checkpoints(adjustment)
    assert state.complete_steps() == left
