"""examples/comparison/run.sh as it is typed, a few sentences and updates of it."""

import json
import time
from pathlib import Path

import pytest
from test_examples import run

pytestmark = [pytest.mark.real, pytest.mark.recordings]


def test_the_comparison_runs_resumes_and_reports(tmp_path: Path) -> None:
    options = ["--updates", 4, "--sentences", 24, "--test-sentences", 4, "--only", "warm_blsp_kd", "--seeds", "1"]
    run("comparison", tmp_path, *options)
    results = {path.name for path in (tmp_path / "results").iterdir()}
    assert results == {"warm_blsp_kd-seed1.json", "text.json", "cascade.json"}  # where it begins is trained only
    measured = json.loads((tmp_path / "results" / "warm_blsp_kd-seed1.json").read_text())
    assert measured["updates"] == 2 and measured["train_wall"] > 0 and max(measured["text_kl"]["kl"]) == 0
    assert len(measured["sets"]["heard"]["repeat"]) == len(measured["sets"]["questions_heard"]["chat"]) == 4
    assert len(measured["sets"]["real"]["boundary_ms"]) == 4
    report = (tmp_path / "report" / "RESULTS.md").read_text()
    assert "warm-up, then BLSP-KD" in report and "**Not measured yet:** blsp, cnn_kl" in report
    assert (tmp_path / "report" / "overview.png").stat().st_size > 10_000
    begin = time.monotonic()
    run("comparison", tmp_path, *options)
    assert time.monotonic() - begin < 60  # nothing is made again
