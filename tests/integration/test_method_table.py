"""The table in docs/methods.md: every yes is trained by a test, past the refusal where users need a GPU; every no is
refused before anything is fetched."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_api.problem import InvalidJobError
from finetune_api.spec import MethodType, ModelTask

from ..four_bits.test_four_bits import QLORA
from ..four_bits.test_four_bits import TASKS as QLORA_TASKS
from .jobs import tiny_job
from .test_encoder_decoder import METHODS as SEQ2SEQ_METHODS
from .test_methods import METHODS as CAUSAL_METHODS
from .test_workers import TRAININGS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

Cell = tuple[MethodType, ModelTask, str]
ENGINES = ("one process", "several workers")


YES, ON_A_GPU, NO = "yes", "on a GPU", "no"


def documented() -> dict[Cell, str]:
    lines = [line.strip("|").split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    heads = [tuple(re.split(", ", head.strip())) for head in lines[0][1:]]
    return {
        (MethodType(line[0].strip(" `")), ModelTask(task), engine): cell.strip()
        for line in lines[2:]
        for (task, engine), cell in zip(heads, line[1:], strict=True)
    }


def types_of(methods: Mapping[str, Mapping[str, Any]]) -> set[MethodType]:
    return {MethodType(method["type"]) for method in methods.values()}


def trained_on_workers(task: ModelTask) -> set[MethodType]:
    """Return the methods that two workers train as one does."""
    return types_of(
        {
            name: changes["method"]
            for name, changes in TRAININGS.items()
            if changes.get("model__task", "causal-lm") == task.value
        }
    )


TRAINED = {
    (ModelTask.CAUSAL_LM, "one process"): types_of(CAUSAL_METHODS),
    (ModelTask.SEQ2SEQ_LM, "one process"): types_of(SEQ2SEQ_METHODS),
    (ModelTask.CAUSAL_LM, "several workers"): trained_on_workers(ModelTask.CAUSAL_LM),
    (ModelTask.SEQ2SEQ_LM, "several workers"): trained_on_workers(ModelTask.SEQ2SEQ_LM),
}
"""Methods of the jobs that the other tests of this folder train."""

TRAINED_ON_A_GPU = {place: set[MethodType]() for place in TRAINED} | {
    (ModelTask(task), "one process"): types_of({"qlora": QLORA}) for task in QLORA_TASKS.values()
}
"""Methods that a CPU trains in tests alone."""

CELLS = [(method, task, engine) for method in MethodType for task in ModelTask for engine in ENGINES]


def test_the_table_has_every_cell():
    assert list(documented()) == CELLS


@pytest.mark.parametrize(("method", "task", "engine"), CELLS, ids=lambda part: str(part))
def test_a_cell_says_what_happens(method: MethodType, task: ModelTask, engine: str, tmp_path: Path):
    workers = {"compute__workers": 2, "compute__gpusPerWorker": 0} if engine == "several workers" else {}
    block = {"selective": {"train": "lastLayers"}} if method is MethodType.SELECTIVE else {}
    changes = {"method": {"type": method.value, **block}, "model__task": task.value, **workers}
    changes["model__dtype"] = "auto"
    cell = documented()[method, task, engine]
    if cell == NO:
        with pytest.raises(InvalidJobError, match=r"spec\.(method\.type|compute\.workers)"):
            tiny_job(tmp_path, tmp_path, **changes)
        assert method not in TRAINED[task, engine] | TRAINED_ON_A_GPU[task, engine]
    else:
        assert tiny_job(tmp_path, tmp_path, **changes)
        assert method in {YES: TRAINED, ON_A_GPU: TRAINED_ON_A_GPU}[cell][task, engine]
