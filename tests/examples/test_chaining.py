"""Example 07: two jobs, of which the second begins where the first ended."""

import shutil
from pathlib import Path

from .conftest import report_of, run_example


def test_the_second_job_begins_where_the_first_one_ended(tmp_path: Path, tiny_base: Path) -> None:
    first = run_example("07-chaining", tmp_path, "general.yaml")
    shutil.copytree(first, tmp_path / "general")
    second = run_example("07-chaining", tmp_path, steps=5)
    before, after = report_of(first), report_of(second)
    (ancestor,) = after.lineage
    assert ancestor.spec_hash == before.spec_hash
    # From random weights, whose guesses are spread over 4096 pieces, the first loss would be above 8.
    first_loss = next(point.loss for point in after.training.curve if point.loss is not None)
    assert first_loss < 7.5
