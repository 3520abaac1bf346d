"""Example 10 from its YAML to its report, beside a small model, a few steps long."""

from pathlib import Path

from ..examples.conftest import EXAMPLES, load_script, report_of, run_example


def test_example_10_trains_beside_four_bits_and_publishes(tmp_path: Path) -> None:
    assert load_script("15-chat").main() == 0
    model = EXAMPLES / "15-chat" / "prepared" / "model"
    report = report_of(run_example("10-qlora", tmp_path, steps=4, model=model))
    assert "4-bit" in report.training.precision
    assert report.evaluation is not None
    accuracy = next(one for one in report.evaluation.metrics if one.metric == "accuracy")
    assert accuracy.rows == report.data.rows.test
    [parity] = report.parity
    assert parity.difference <= parity.allowed
    assert report.published
