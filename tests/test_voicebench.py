"""VoiceBench's files: what is written is read back, and judgements give the figures of its evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blspkd_fairseq.evaluation.significance import bootstrap_interval
from blspkd_fairseq.evaluation.voicebench import VoiceBenchError, read_answers, read_judgements, write_answers

ROWS = [
    {"id": "a", "prompt": 'Say "hi"\n\tnow', "response": "嗨\u2028 🙂 \\", "speaker": "s1"},
    {"id": "b", "prompt": "Why?", "response": ""},
    {"id": "c", "prompt": "1+1", "response": "2", "key": 7, "instruction_id_list": ["x"], "kwargs": [{"n": None}]},
]


def judged(path: Path, scores: list[Any], reference: bool) -> Path:
    """What api_judge.py writes: the rows with a score each."""
    with open(path, "w") as file:
        for number, score in enumerate(scores):
            row = {"id": f"u{number}", "prompt": "q", "response": "r", "score": score}
            file.write(json.dumps(row | ({"reference": "x"} if reference else {})) + "\n")
    return path


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert write_answers(path, ROWS) == 3
    assert read_answers(path) == ROWS
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == ROWS and lines[-1] == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.jsonl"]


def test_the_judge_is_chosen_by_the_presence_of_references(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, [{"prompt": "q", "response": "r", "reference": nothing} for nothing in ("", None)])
    assert read_answers(path) == [{"prompt": "q", "response": "r"}] * 2
    write_answers(path, [{"prompt": "q", "response": "r", "reference": "x"}])
    assert read_answers(path)[0]["reference"] == "x"
    with pytest.raises(VoiceBenchError, match="two files"):
        write_answers(path, [{"prompt": "q", "response": "r", "reference": "x"}, {"prompt": "q", "response": "r"}])
    assert read_answers(path)[0]["reference"] == "x"


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"response": "r"}, {"prompt": None, "response": "r"}])
def test_rows_without_question_or_answer_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(VoiceBenchError, match="row 2 has no text in the field"):
        write_answers(tmp_path / "x", [ROWS[0], row])
    assert not list(tmp_path.iterdir())


def test_ratings_are_averaged_over_all_votes(tmp_path: Path) -> None:
    votes = [["5", "4", "5"], ["1", "[[2]]", "1.5"], ["3"]]
    found = read_judgements(judged(tmp_path / "result-x.jsonl", votes, reference=False))
    assert found.name == "VoiceBench rating"
    assert found.score == pytest.approx(np.mean([5, 4, 5, 1, 2, 1.5, 3]))


def test_yes_needs_most_votes(tmp_path: Path) -> None:
    votes = [["Yes", "yes", "No"], ["No", "No", "Yes"], ["YES "], ["Yes", "No"]]
    found = read_judgements(judged(tmp_path / "result-x.jsonl", votes, reference=True))
    assert found.name == "VoiceBench correct"
    assert found.statistics[:, 0].tolist() == [100, 0, 100, 0]
    assert found.score == 50
    interval = bootstrap_interval(found.statistics, found.score_of)
    assert 0 <= interval.low < interval.score == 50 < interval.high <= 100


def test_scores_have_the_order_of_the_export(tmp_path: Path) -> None:
    path = judged(tmp_path / "result-x.jsonl", [["1"], ["2"], ["3"]], reference=False)
    assert read_judgements(path, ["u2", "u0", "u1"]).statistics[:, 0].tolist() == [3, 1, 2]
    for ids in (["u0", "u1"], ["u0", "u1", "u2", "u3"], ["u0", "u1", "x"], ["u0", "u0", "u1"]):
        with pytest.raises(VoiceBenchError, match=f"3 rows for {len(ids)} answers"):
            read_judgements(path, ids)


@pytest.mark.parametrize(
    ("score", "said"),
    [(["good"], "rating 'good'"), (["6"], "1 to 5"), (["nan"], "1 to 5"), ([], "no list of scores"), (None, "no list")],
)
def test_unreadable_judgements_are_refused(tmp_path: Path, score: Any, said: str) -> None:
    with pytest.raises(VoiceBenchError, match=said):
        read_judgements(judged(tmp_path / "x", [["3"], score], reference=False))


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = judged(tmp_path / "x", [["3"], ["4"]], reference=False)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(VoiceBenchError, match="line 2 is no JSON .*cut off"):
        read_judgements(path)
    path.write_text("")
    with pytest.raises(VoiceBenchError, match="no rows"):
        read_judgements(path)
    path.write_text("[1]\n")
    with pytest.raises(VoiceBenchError, match="no JSON object"):
        read_answers(path)
