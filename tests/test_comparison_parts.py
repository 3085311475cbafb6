"""Parts of examples/comparison: what a row needs to be trained, and which claims hold."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation.verdicts import Verdict
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.systems.systems import TextSystem, Utterance

sys.path.append(str(Path(__file__).parents[1] / "examples" / "comparison"))
import compare  # noqa: E402
import measure  # noqa: E402
import texts  # noqa: E402
from report import Report, Runs, share_start  # noqa: E402
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
    monkeypatch.setattr(comparison, "python", python)
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


def test_a_system_hears_once_whatever_is_asked(tmp_path: Path) -> None:
    class Reading(TextSystem):
        def __init__(self) -> None:
            self.heard = 0

        def hear(self, batch: Sequence[Utterance], beam: int = 1) -> list[str]:
            self.heard += len(batch)
            return [one.transcript for one in batch]

        def read(self, texts: Sequence[str], prompts: Sequence[str], options: DecodingOptions) -> list[str]:
            asked = zip(texts, prompts, strict=True)
            return [f"{text}, {prompt}, {options.max_new_tokens}" for text, prompt in asked]

    rows = [{"id": f"r{i}", "audio": f"{i}.wav", "n_frames": "1", "src_text": f"cat {i}"} for i in range(3)]
    write_manifest(tmp_path / "heard.tsv", rows, list(rows[0]))
    system = Reading()
    answers = measure.ask(system, Manifest.load(tmp_path / "heard.tsv"), tmp_path, {"repeat": 28, "chat": 16})
    assert system.heard == 3 and [len(found) for found in answers.values()] == [3, 3]
    assert answers["repeat"][2] == f"cat 2, {resolve_prompt('repeat')}, 28"
    assert answers["chat"][0] == f"cat 0, {resolve_prompt('chat')}, 16"


def measured(wrong: dict[str, int]) -> dict[str, Any]:
    """A run that gets so many sentences of each set wrong; it answers everything as the text does."""
    sets = {}
    for one in ("heard", "unheard"):
        repeat = ["wrong word" if i < wrong[one] else text for i, text in enumerate(SENTENCES)]
        sets[one] = {"id": IDS, "repeat": repeat, "continue": SENTENCES}
        sets[f"questions_{one}"] = {"id": IDS, "chat": SENTENCES}
    return {"sets": sets}


def verdicts(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Verdict]:
    """On WER, by the two rows that a claim compares."""
    rows = {i: {"src_text": text, "tgt_text": text} for i, text in zip(IDS, SENTENCES, strict=True)}
    said = dict.fromkeys((*SETS, *QUESTIONS), rows)
    right = {"heard": 0, "unheard": 0}
    report = Report(Runs({"text": {0: measured(right)}, **runs}, {}), said, "")
    found = report.claims_on("wer")
    assert all(report.claim_cell("wer", one) for one in found.values())
    return {f"{claim.better}>{claim.worse}": found[claim.text] for claim in CLAIMS if claim.text in found}


def seeds_of(count: int, heard: int, unheard: int) -> dict[int, dict[str, Any]]:
    """Runs that differ a little from seed to seed."""
    return {s: measured({"heard": heard + s % 2, "unheard": unheard + s % 3}) for s in range(1, count + 1)}


def test_a_claim_holds_with_five_seeds_and_has_no_verdict_with_fewer() -> None:
    for count, verdict, opposite in ((5, "holds", "the opposite holds"), (3, "no verdict", "no verdict")):
        runs = {"kl": seeds_of(count, 0, 0), "ce": seeds_of(count, 7, 7)}
        found = verdicts(runs)["kl>ce"]
        assert found.verdict == verdict and found.estimate and found.estimate.seeds == count
        assert verdicts({"kl": runs["ce"], "ce": runs["kl"]})["kl>ce"].verdict == opposite


def test_only_common_seeds_are_compared() -> None:
    good, bad = {"heard": 0, "unheard": 1}, {"heard": 9, "unheard": 10}
    runs = {"kl": {1: measured(good), 2: measured(good)}, "ce": {1: measured(bad), 3: measured(good)}}
    alone = verdicts({"kl": {1: measured(good)}, "ce": {1: measured(bad)}})["kl>ce"]
    found = verdicts(runs)["kl>ce"]
    assert (found.estimate, found.scores, found.verdict) == (alone.estimate, alone.scores, alone.verdict)
    assert found.verdict == "no verdict" and "knows nothing of other seeds" in found.sentence


def test_seeds_that_disagree_decide_nothing() -> None:
    runs = {"kl": seeds_of(5, 0, 0), "ce": seeds_of(5, 5, 5)}
    for seed in (4, 5):
        runs["ce"][seed] = measured({"heard": 0, "unheard": 0})
        runs["kl"][seed] = measured({"heard": 6, "unheard": 6})
    assert verdicts(runs)["kl>ce"].verdict == "undecided"


def test_both_voices_of_a_sentence_are_one_cluster() -> None:
    found = verdicts({"kl": seeds_of(5, 0, 0), "ce": seeds_of(5, 5, 5)})["kl>ce"]
    assert found.estimate and found.estimate.clusters == len(SENTENCES)


def test_rows_without_speech_are_left_out() -> None:
    rows = {i: {"src_text": text} for i, text in zip(IDS, SENTENCES, strict=True)}
    rows["3"] = {"src_text": "(3 seconds of silence)"}
    run = measured({"heard": 0, "unheard": 0})
    run["sets"]["heard"]["repeat"][3] = "many words that nobody said " * 20
    report = Report(Runs({"text": {0: run}}, {}), dict.fromkeys(SETS, rows), "")
    (made,) = report.measurements("text", ["heard"], "wer")
    assert made.score == 0 and len(made.statistics) == len(SENTENCES) - 1


@pytest.mark.parametrize(
    ("text", "spoken"),
    [("(3 seconds of silence)", False), ("[sound of monkeys screaming]", False), ("", False), ("yes (laughs)", True)],
)
def test_remarks_are_no_speech(text: str, spoken: bool) -> None:
    assert texts.is_speech(text) == spoken


def test_sentences_have_the_template_that_made_them() -> None:
    assert texts.template_of("Turn on the light in the kitchen.") == "{turn} the {device} in the {room}."
    assert texts.template_of("Turn on the light in the kitchen after lunch.").endswith("in the {room} {when}.")
    assert texts.template_of("What is the weather in Iran on Friday?").startswith("What is the weather")
    assert texts.template_of("Nobody said this.") == ""


def test_rows_that_go_on_from_the_same_weights_are_pairs() -> None:
    pairs = {(claim.better, claim.worse): share_start(claim) for claim in CLAIMS}
    assert pairs["x_opd", "longer"] and pairs["warm_kl", "warm_ce"] and not pairs["cnn_kl", "blsp"]
    assert not pairs["warm_blsp_kd", "cascade"]


def continuing(answers: list[str]) -> dict[str, Any]:
    run = measured({"heard": 0, "unheard": 0})
    run["sets"]["heard"]["continue"] = answers
    return run


def test_a_score_of_several_seeds_is_their_mean() -> None:
    """One seed says too little and one too much: in one corpus of both the lengths would come out right."""
    full = [f"we see that {sentence} today" for sentence in SENTENCES]
    seeds = {1: continuing(["today"] * len(full)), 2: continuing([f"{sentence} and so on" for sentence in full])}
    rows = {i: {"src_text": sentence} for i, sentence in zip(IDS, SENTENCES, strict=True)}
    report = Report(Runs({"text": {0: continuing(full)}, "kl": seeds}, {}), dict.fromkeys(SETS, rows), "")
    short, long = (made.score for made in report.measurements("kl", ["heard"], "self_bleu"))
    interval = report.interval("kl", "heard", "self_bleu")
    assert interval and interval.score == pytest.approx((short + long) / 2)
    assert interval.low <= interval.score <= interval.high


def test_a_system_without_training_stands_for_every_seed() -> None:
    runs = {"warm_blsp_kd": seeds_of(5, 0, 0), "cascade": {0: measured({"heard": 9, "unheard": 9})}}
    found = verdicts(runs)["warm_blsp_kd>cascade"]
    assert found.verdict == "holds" and found.estimate and found.estimate.seeds == 5


def test_results_without_the_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blsp-seed1.json").write_text(json.dumps(measured({"heard": 0, "unheard": 0})))
    with pytest.raises(ValueError, match="has no text.json"):
        Runs.load(tmp_path)
