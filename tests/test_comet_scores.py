"""COMET's scores of answers, by a stand-in for COMET, and back into the tests of differences."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comet_scores
import pytest

from blspkd_fairseq.evaluation.row_scores import read_row_scores


def stand_in(scores: list[float]) -> ModuleType:
    module: Any = ModuleType("comet")
    module.seen = []

    def predict(inputs: list[dict[str, str]], batch_size: int, gpus: int) -> SimpleNamespace:
        module.seen += inputs
        return SimpleNamespace(scores=scores)

    module.download_model = lambda name: f"/models/{name}"
    module.load_from_checkpoint = lambda path: SimpleNamespace(predict=predict)
    return module


def write_answers(path: Path, rows: int = 3, drop: str = "") -> Path:
    row = {"transcript": "good morning", "hypothesis": "guten Tag", "reference": "guten Morgen"}
    lines = [{key: value for key, value in {"id": f"r{i}", **row}.items() if key != drop} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = stand_in([0.5, 0.75, 1.0])
    monkeypatch.setitem(sys.modules, "comet", module)
    monkeypatch.setattr(comet_scores, "version", lambda name: "2.2.7")
    return module


def test_scores_are_read_as_a_metric(comet: Any, tmp_path: Path) -> None:
    out = tmp_path / "scores" / "ours.jsonl"
    comet_scores.main(["--answers", str(write_answers(tmp_path / "a.jsonl")), "--out", str(out)])
    found = read_row_scores(out, "COMET", ["r0", "r1", "r2"])
    assert found.score == 0.75 and found.signature == "Unbabel/wmt22-comet-da|unbabel-comet:2.2.7|scale:0-1"
    assert comet.seen[0] == {"src": "good morning", "mt": "guten Tag", "ref": "guten Morgen"}


@pytest.mark.parametrize("field", ["id", "transcript", "hypothesis", "reference"])
def test_rows_without_a_text_are_named(comet: Any, tmp_path: Path, field: str) -> None:
    answers = write_answers(tmp_path / "a.jsonl", drop=field)
    with pytest.raises(ValueError, match=f"row 1 has no text in the field '{field}'"):
        comet_scores.main(["--answers", str(answers), "--out", str(tmp_path / "o.jsonl")])
    assert not (tmp_path / "o.jsonl").exists()


def test_fewer_scores_than_rows_are_refused(comet: Any, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "a.jsonl", rows=4)
    with pytest.raises(ValueError, match="3 scores to 4 rows"):
        comet_scores.main(["--answers", str(answers), "--out", str(tmp_path / "o.jsonl")])


def test_without_comet_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "comet", None)
    answers = write_answers(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="pip install unbabel-comet, in an environment of its own"):
        comet_scores.main(["--answers", str(answers), "--out", str(tmp_path / "o.jsonl")])
