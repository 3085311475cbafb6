"""examples/comparison/run.sh as it is typed, a few sentences and updates of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import EXAMPLES, run

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.recordings]


def test_the_comparison_runs_resumes_and_reports(tmp_path: Path) -> None:
    options = ["--updates", 2, "--sentences", 24, "--test-sentences", 2, "--only", "small", "--seeds", "1"]
    run("comparison", tmp_path, *options)
    results = {path.name for path in (tmp_path / "results").iterdir()}
    assert results == {"small-seed1.json", "text.json", "cascade.json"}  # where it begins is trained only
    measured = json.loads((tmp_path / "results" / "small-seed1.json").read_text())
    assert measured["updates"] == 2 and measured["utterances_before"] == 2 * 48
    assert 0 < measured["train_wall"] <= measured["training_seconds"] and max(measured["text_kl"]["kl"]) == 0
    assert len(measured["sets"]["heard"]["repeat"]) == len(measured["sets"]["questions_heard"]["chat"]) == 2
    assert len(measured["sets"]["real"]["boundary_ms"]) == 2
    cascade = json.loads((tmp_path / "results" / "cascade.json").read_text())
    assert [len(answers) for answers in cascade["conditions"].values()] == [2] * 6
    report = (tmp_path / "report" / "RESULTS.md").read_text()
    assert "BLSP-KD: longer, rank 4" in report and "**Not measured yet:** blsp, cnn_kl" in report
    for picture in ("overview", "main", "curves", "scaling", "robustness"):
        assert (tmp_path / "report" / f"{picture}.png").stat().st_size > 10_000
    readme = (EXAMPLES.parent / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    folders = {"--results": "results", "--data": "data", "--readme": "README.md"}
    command = [sys.executable, EXAMPLES / "comparison" / "readme_table.py"]
    subprocess.run([*command, *(x for k, v in folders.items() for x in (k, tmp_path / v))], check=True)
    table = (tmp_path / "README.md").read_text().split("| system | WER of")[1].split("\n\n")[0]
    assert table.splitlines()[2].startswith("| the LLM reads the transcript |")
    assert len(table.splitlines()) == 2 + 3 and table.endswith(" | 1 |")
    rest = [text.split("| system | WER of")[0] for text in (readme, (tmp_path / "README.md").read_text())]
    assert rest[0] == rest[1] and (tmp_path / "README.md").read_text().endswith(readme[-2000:])

    made = {path: path.stat().st_mtime_ns for name in ("results", "models") for path in (tmp_path / name).rglob("*.*")}
    run("comparison", tmp_path, *options)
    assert made == {path: path.stat().st_mtime_ns for path in made}  # nothing is made again
