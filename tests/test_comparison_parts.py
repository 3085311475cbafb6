"""Parts of examples/comparison: what a row needs to be trained, and which claims hold."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from blspkd_fairseq.data.manifest import write_manifest

sys.path.append(str(Path(__file__).parents[1] / "examples" / "comparison"))
import compare  # noqa: E402
from report import Report, Runs  # noqa: E402
from systems import CLAIMS, QUESTIONS, ROWS, SETS  # noqa: E402

LOG = """
| INFO | train_inner | epoch 001: 1 / 2 loss=2 ups=0.5, wpb=3
| INFO | valid | epoch 001 | valid on 'valid' subset | loss {loss} | num_updates 3
| INFO | train | epoch 001 | loss 2.0 | train_wall 4
"""


def trained_by(comparison: compare.Comparison, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that the command trains."""
    trained = train_nothing(comparison, data, monkeypatch)
    comparison.measure_rates()
    comparison.run_all()
    return trained


def train_nothing(comparison: compare.Comparison, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the trainings and measurings; the names of what was trained, in their order, come to the list."""
    row: dict[str, object] = {"id": "1", "audio": "1.wav", "n_frames": 9, "src_text": "a", "tgt_text": "b"}
    for folder in (data, data / "responses"):
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder / "train.tsv", [row], list(row))
    trained: list[str] = []

    def train(row: Any, folder: Path, updates: int, seed: int, start: Path | None, rate: float, **_: Any) -> str:
        assert start is None or (start.parent / "done.json").exists()
        folder.mkdir(parents=True, exist_ok=True)
        trained.append(f"{folder.name} {rate:g}")
        return LOG.format(loss=rate) * 12

    def python(script: Path, *arguments: Any) -> None:
        Path(arguments[arguments.index("--out") + 1]).write_text("{}")

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(compare, "python", python)
    return trained


def test_one_row_alone_is_trained_with_all_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare.Comparison(compare.parse(["--out", str(tmp_path), "--only", "small", "--jobs", "2"]))
    trained = trained_by(comparison, tmp_path / "data", monkeypatch)
    trained = [name for name in trained if not name.startswith("probe")]
    # The rate of the warm-up is searched first, then that of what follows one, on top of the half warm-up.
    assert trained == [
        "search-warm_up 0.0003", "search-warm_up 0.001", "search-warm_up 0.003", "small_warm_up-seed1 0.0003",
        "warm_half-seed1 0.0003", "search-warm_kl 0.0001", "search-warm_kl 0.0003", "search-warm_kl 0.001",
        "small-seed1 0.0001",
    ]  # fmt: skip
    assert {path.name for path in comparison.args.results.glob("*seed*")} == {"small-seed1.json"}
    assert trained_by(compare.Comparison(comparison.args), tmp_path / "data", monkeypatch) == []


def test_every_row_finds_its_start_and_its_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compare.Comparison(compare.parse(["--out", str(tmp_path), "--jobs", "3", "--seeds", "1", "2"]))
    trained = trained_by(comparison, tmp_path / "data", monkeypatch)
    rows = [name.split()[0] for name in trained if re.search(r"-seed\d", name)]
    assert len(rows) == len(set(rows))  # nothing twice
    first = {name.removesuffix("-seed1") for name in rows if name.endswith("-seed1")}
    assert first == set(ROWS)
    second = {name.removesuffix("-seed2") for name in rows if name.endswith("-seed2")}
    assert second == {*compare.MAIN, "warm_half"}

    shutil.rmtree(tmp_path / "models")  # as in a clone, which has the results alone
    (tmp_path / "rates.json").unlink()
    assert trained_by(compare.Comparison(comparison.args), tmp_path / "data", monkeypatch) == []


# ---- claims ----------------------------------------------------------------------------------------------------------

ANIMALS = ("cats", "dogs", "mice", "birds", "fish", "cows", "pigs", "hens", "goats", "sheep")
SENTENCES = [f"{word} eat" for word in ANIMALS]
IDS = [str(i) for i in range(len(SENTENCES))]


def measured(wrong: dict[str, int]) -> dict[str, Any]:
    """A run that gets so many sentences of each set wrong; it answers everything as the text does."""
    sets = {}
    for one in ("heard", "unheard"):
        repeat = ["wrong word" if i < wrong[one] else text for i, text in enumerate(SENTENCES)]
        sets[one] = {"id": IDS, "repeat": repeat, "continue": SENTENCES}
        sets[f"questions_{one}"] = {"id": IDS, "chat": SENTENCES}
    return {"sets": sets}


def verdicts(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, str]:
    """On WER, by the two rows that a claim compares."""
    rows = {i: {"src_text": text, "tgt_text": text} for i, text in zip(IDS, SENTENCES, strict=True)}
    texts = dict.fromkeys((*SETS, *QUESTIONS), rows)
    right = {"heard": 0, "unheard": 0}
    report = Report(Runs({"text": {0: measured(right)}, **runs}, {}), texts, 0.0, "")
    found = report.claims_on("wer")
    return {f"{claim.better}>{claim.worse}": found[claim.text] for claim in CLAIMS if claim.text in found}


def test_a_claim_holds_where_every_common_seed_agrees() -> None:
    good, bad = {"heard": 0, "unheard": 1}, {"heard": 10, "unheard": 10}
    runs = {"kl": {1: measured(good), 2: measured(good)}, "ce": {1: measured(bad), 3: measured(good)}}
    # Seed 1 alone is common; the other seeds change nothing.
    assert verdicts(runs) == {"kl>ce": verdicts({"kl": {1: measured(good)}, "ce": {1: measured(bad)}})["kl>ce"]}
    assert verdicts(runs)["kl>ce"].startswith("**holds**: -95.0")
    assert verdicts({"kl": runs["ce"], "ce": runs["kl"]})["kl>ce"].startswith("**the opposite holds**: +95.0")
    nearly = {"kl": {s: measured(good) for s in (1, 2, 3)}, "ce": {1: measured(bad), 2: measured(bad)}}
    nearly["ce"][3] = measured({"heard": 0, "unheard": 0})
    nearly["kl"][3] = measured({"heard": 0, "unheard": 2})
    # Significant over sentences, and yet the third seed says the opposite.
    text = verdicts(nearly)["kl>ce"]
    assert text.startswith("not decided: -60.0") and "(-95.0 to +10.0)" in text and float(text.split("p ")[1]) < 0.05


def test_both_voices_of_a_sentence_are_one_observation() -> None:
    """Five sentences differ in both voices: 2 of 2^5 exchanges are as large; as ten rows it were 2 of 2^10."""
    runs = {"kl": {1: measured({"heard": 0, "unheard": 0})}, "ce": {1: measured({"heard": 5, "unheard": 5})}}
    p = float(verdicts(runs)["kl>ce"].split("p ")[1])
    assert p == pytest.approx(2 / 2**5, abs=0.01)


def continuing(answers: list[str]) -> dict[str, Any]:
    run = measured({"heard": 0, "unheard": 0})
    run["sets"]["heard"]["continue"] = answers
    return run


def test_a_score_of_several_seeds_is_their_mean() -> None:
    """One seed says too little and one too much: in one corpus of both the lengths would come out right."""
    full = [f"we see that {sentence} today" for sentence in SENTENCES]
    seeds = {1: continuing(["today"] * len(full)), 2: continuing([f"{sentence} and so on" for sentence in full])}
    rows = {i: {"src_text": sentence} for i, sentence in zip(IDS, SENTENCES, strict=True)}
    report = Report(Runs({"text": {0: continuing(full)}, "kl": seeds}, {}), dict.fromkeys(SETS, rows), 0.0, "")
    short, long = (made.score for made in report.measurements("kl", ["heard"], "self_bleu"))
    interval = report.interval("kl", "heard", "self_bleu")
    assert interval and interval.score == pytest.approx((short + long) / 2)
    assert interval.low <= interval.score <= interval.high


def test_a_system_without_training_stands_for_every_seed() -> None:
    better, worse = {"heard": 0, "unheard": 0}, {"heard": 9, "unheard": 9}
    runs = {"warm_blsp_kd": {1: measured(better), 2: measured(better)}, "cascade": {0: measured(worse)}}
    assert verdicts(runs)["warm_blsp_kd>cascade"].startswith("**holds**: -90.0")


def test_results_without_the_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blsp-seed1.json").write_text(json.dumps(measured({"heard": 0, "unheard": 0})))
    with pytest.raises(ValueError, match="has no text.json"):
        Runs.load(tmp_path)
