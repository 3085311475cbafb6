"""The comparison over seeds and clusters: files of any system in, verdicts that the files carry out, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blspkd_fairseq import compare
from blspkd_fairseq.evaluation import comparison_report
from blspkd_fairseq.evaluation.contrasts import load_plan
from blspkd_fairseq.evaluation.metrics import error_rate

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS, SPEAKERS = 120, 30
PLAN = """
seeds = [1, 2, 3, 4, 5]
exclusions = "rows without speech"
[systems.good]
[systems.bad]
[systems.same]
[systems.peer]
fixed = true
answers = { asr = "peer.jsonl" }
[tasks.asr]
answers = "{system}-{seed}.jsonl"
metric = "WER"
smallest_effect = 5.0
clusters = ["speaker"]
language = "de"
[[primary]]
name = "good beats bad"
task = "asr"
better = "good"
worse = "bad"
[[primary]]
name = "good beats same"
task = "asr"
better = "good"
worse = "same"
shared_start = true
[[secondary]]
name = "good beats the peer"
task = "asr"
better = "good"
worse = "peer"
[[secondary]]
name = "in letters"
task = "asr"
better = "good"
worse = "bad"
metric = "CER"
"""


@cache
def answers(rate: float, seed: int) -> list[dict[str, Any]]:
    """Words of each row are replaced with a probability."""
    texts, rng = np.random.default_rng(0), np.random.default_rng([seed, int(1000 * rate)])
    rows = []
    for i in range(ROWS):
        said = [WORDS[k] for k in texts.integers(10, size=12)]
        heard = ["uh" if rng.random() < rate else word for word in said]
        row = {"id": f"r{i}", "speaker": f"s{i % SPEAKERS}", "text": f"t{i // SPEAKERS * 10 + i % 10}"}
        rows.append({**row, "reference": " ".join(said), "hypothesis": " ".join(heard)})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contrasts.toml").write_text(PLAN)
    for seed in range(1, 6):
        for name, rate, offset in (("good", 0.1, 0), ("bad", 0.3, 10), ("same", 0.1, 20)):
            write(tmp_path / f"{name}-{seed}.jsonl", answers(rate, seed + offset))
    write(tmp_path / "peer.jsonl", answers(0.2, 99)[::-1])
    return tmp_path


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of the time: one test draws."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(comparison_report, "plot_contrasts", lambda *_: None)


@pytest.fixture
def pictures() -> None:
    """For a test that looks at them."""


def run(folder: Path, *options: str) -> dict[str, Any]:
    compare.main([str(folder / "contrasts.toml"), "--out", str(folder / "out"), *options])
    found: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return found


def replan(folder: Path, *changes: tuple[str, str]) -> None:
    text = (folder / "contrasts.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "contrasts.toml").write_text(text)


# --- verdicts ---------------------------------------------------------------------------------------


def test_verdicts_of_primary_contrasts_and_intervals_of_the_others(folder: Path, pictures: None) -> None:
    found = run(folder)
    holds, same = found["primary"]
    assert holds["verdict"] == "holds" and -22 < holds["estimate"]["value"] < -18
    assert same["verdict"] == "equivalent" and len(same["estimate"]["per_seed"]) == 5
    assert [one["verdict"] for one in found["secondary"]] == ["", ""]
    assert 0 < holds["corrected"] < 0.001 < same["corrected"] and len(holds["by_cluster"]) == SPEAKERS
    text = (folder / "out" / "compare.md").read_text()
    assert "| **holds** |" in text and "## Exploratory" in text and load_plan(folder / "contrasts.toml").sha256 in text
    assert "rows without speech" in text and (folder / "out" / "contrasts.png").stat().st_size > 5000


def test_scores_are_means_over_seeds_of_corpus_scores(folder: Path) -> None:
    found = run(folder)["scores"]["asr: WER"]["bad"]
    by_hand = []
    for seed in range(1, 6):
        rows = answers(0.3, seed + 10)
        by_hand.append(error_rate([r["hypothesis"] for r in rows], [r["reference"] for r in rows], "WER", "de").score)
    assert found["per_seed"] == pytest.approx(by_hand) and found["value"] == pytest.approx(np.mean(by_hand))


def test_what_is_worse_is_said_to_be(folder: Path) -> None:
    replan(folder, ('better = "good"\nworse = "bad"\n[[primary]]', 'better = "bad"\nworse = "good"\n[[primary]]'))
    assert run(folder)["primary"][0]["verdict"] == "the opposite holds"


def test_a_significant_difference_below_the_smallest_effect_does_not_hold(folder: Path) -> None:
    replan(folder, ("smallest_effect = 5.0", "smallest_effect = 25.0"))
    assert [one["verdict"] for one in run(folder)["primary"]] == ["equivalent", "equivalent"]
    replan(folder, ("smallest_effect = 25.0", "smallest_effect = 20.0"))
    found = run(folder)["primary"][0]
    assert found["verdict"] == ("holds" if found["estimate"]["value"] <= -20 else "undecided")


def test_fewer_than_five_seeds_get_no_verdict(folder: Path) -> None:
    replan(folder, ("seeds = [1, 2, 3, 4, 5]", "seeds = [1, 2, 3, 4]"))
    found = run(folder)["primary"][0]
    assert found["verdict"] == "no verdict" and found["estimate"]["note"] == "4 seeds: too few for a verdict (5)"
    assert "too few for a verdict" in (folder / "out" / "compare.md").read_text()


def test_equal_answers_get_no_verdict(folder: Path) -> None:
    for seed in range(1, 6):
        write(folder / f"same-{seed}.jsonl", answers(0.1, seed))
    found = run(folder)["primary"]
    assert found[1]["verdict"] == "no verdict" and "0 for every seed and cluster" in found[1]["sentence"]
    assert found[0]["verdict"] == "holds"


def test_systems_without_seeds_are_compared_as_they_are(folder: Path) -> None:
    """Two peers' outputs, without any model of ours."""
    write(folder / "other.jsonl", answers(0.4, 7))
    replan(
        folder,
        ("[systems.peer]", '[systems.other]\nfixed = true\nanswers = { asr = "other.jsonl" }\n[systems.peer]'),
        ('better = "good"\nworse = "bad"\n[[primary]]', 'better = "peer"\nworse = "other"\n[[primary]]'),
    )
    found = run(folder)["primary"][0]
    assert found["verdict"] == "holds" and found["estimate"]["seeds"] is None
    assert "these very systems" in (folder / "out" / "compare.md").read_text()


def test_two_looks(folder: Path) -> None:
    for seed in range(6, 11):
        for name, rate, offset in (("good", 0.1, 0), ("bad", 0.3, 10), ("same", 0.1, 20)):
            write(folder / f"{name}-{seed}.jsonl", answers(rate, seed + offset))
    replan(folder, ("seeds = [1, 2, 3, 4, 5]", f"seeds = {list(range(1, 11))}\nlooks = [5, 10]"))
    with pytest.raises(ValueError, match="plans 2 looks: give --look 1 or --look 2"):
        run(folder)
    first, second = run(folder, "--look", "1")["primary"][1], run(folder, "--look", "2")["primary"][1]
    assert first["estimate"]["seeds"] == 5 and second["estimate"]["seeds"] == 10
    run(folder, "--look", "1")
    text = (folder / "out" / "compare.md").read_text()
    assert "below 0.005" in text and "the 99 % interval" in text and "5 of 10 seeds" in text


def test_crossed_speakers_and_texts_and_a_table_of_clusters(folder: Path) -> None:
    replan(folder, ('clusters = ["speaker"]', 'clusters = ["speaker", "text"]\ntable = "rows.tsv"'))
    lines = [f"r{i}\ts{i % 24}\tt{i // 3}" for i in range(ROWS)]
    (folder / "rows.tsv").write_text("\n".join(["id\tspeaker\ttext", *lines]) + "\n")
    found = run(folder)
    assert found["primary"][0]["estimate"]["clusters"] == 24 and found["primary"][0]["verdict"] == "holds"
    assert "speaker and text (crossed)" in (folder / "out" / "compare.md").read_text()


def test_files_of_lines(folder: Path) -> None:
    """As sacreBLEU reads them; clusters in a file of lines, too."""
    for name in ("good", "bad", "same"):
        for seed in range(1, 6):
            rows = [json.loads(line) for line in (folder / f"{name}-{seed}.jsonl").read_text().splitlines()]
            (folder / f"{name}-{seed}.txt").write_text("".join(row["hypothesis"] + "\n" for row in rows))
            references, speakers = ([row[key] for row in rows] for key in ("reference", "speaker"))
    (folder / "ref.txt").write_text("\n".join(references) + "\n")
    (folder / "speakers.txt").write_text("\n".join(speakers))
    write(folder / "peer.jsonl", [{**row, "id": row["id"][1:]} for row in answers(0.2, 99)])
    replan(folder, ('better = "good"\nworse = "peer"', 'better = "good"\nworse = "bad"'))
    expected = run(folder)["primary"][0]["estimate"]
    replan(
        folder,
        ('"{system}-{seed}.jsonl"', '"{system}-{seed}.txt"\nreferences = "ref.txt"'),
        ('language = "de"', 'language = "de"\ncolumns = { speaker = "speakers.txt" }'),
    )
    assert run(folder)["primary"][0]["estimate"] == expected
    (folder / "ref.txt").write_text("one line\n")
    with pytest.raises(ValueError, match=r"ref.txt has 1 lines for 120 rows"):
        run(folder)


def test_answers_against_those_of_another_system(folder: Path) -> None:
    replan(folder, ('metric = "WER"', 'metric = "BLEU"\nreference_system = "peer"'), ("effect = 5.0", "effect = 1.0"))
    found = run(folder)
    assert found["primary"][0]["verdict"] == "holds" and found["primary"][0]["estimate"]["value"] > 5
    assert "smooth" in found["signatures"]["asr: BLEU"]


# --- row scores -------------------------------------------------------------------------------------


def score_file(folder: Path, name: str, seed: int, mean: float, **fields: Any) -> Path:
    rng = np.random.default_rng([seed, int(mean)])
    rows = [{"id": f"r{i}", "value": rng.normal(mean, 5), "signature": "judge|v1", **fields} for i in range(ROWS)]
    write(folder / f"judge-{name}-{seed}.jsonl", rows)
    return folder / f"judge-{name}-{seed}.jsonl"


def test_row_scores_are_tested_as_any_other_metric(folder: Path) -> None:
    options = []
    for name, mean in (("good", 70), ("bad", 60)):
        for seed in range(1, 6):
            options += ["--row-scores", f"{name}:{seed}:JUDGE={score_file(folder, name, seed, mean)}"]
    replan(folder, ('metric = "CER"', 'metric = "JUDGE"'))
    by_option = run(folder, *options)["secondary"][1]
    assert by_option["estimate"]["value"] == pytest.approx(10, abs=1) and by_option["estimate"]["seeds"] == 5
    replan(folder, ('language = "de"', 'language = "de"\nrow_scores = { JUDGE = "judge-{system}-{seed}.jsonl" }'))
    assert run(folder)["secondary"][1] == by_option
    assert "judge|v1" in (folder / "out" / "compare.md").read_text()


def spoiled(change: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
    rows = [{"id": f"r{i}", "value": 1.0 * i, "signature": "v1"} for i in range(ROWS)]
    changed = change(rows)
    return changed if isinstance(changed, list) else rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "no score of row 'r119' (1 are missing)"),
        (lambda rows: rows.append({**rows[0], "id": "x"}), "score of row 'x', which is not among"),
        (lambda rows: rows.append(rows[0]), "the id 'r0' for the second time"),
        (lambda rows: rows[3].update(value=float("nan")), "row 'r3' has nan, which is no finite number"),
        (lambda rows: rows[3].update(value="high"), "row 'r3' has 'high'"),
        (lambda rows: rows[3].update(value=True), "row 'r3' has True"),
        (lambda rows: rows[3].update(sums=[1, 2]), "needs either a value or sums"),
        (
            lambda rows: rows.insert(3, {"id": "r3", "signature": "v1"}) or rows.pop(4) and None,
            "needs either a value or sums",
        ),
        (lambda rows: rows[3].update(id=None), "line 4 has no id"),
        (lambda rows: rows[3].update(signature="v2"), "signature is 'v1' and 'v2'"),
        (lambda rows: [{**row, "signature": ""} for row in rows], "has no signature"),
    ],
)
def test_row_scores_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    write(folder / "scores.jsonl", spoiled(change))
    replan(folder, ('metric = "CER"', 'metric = "JUDGE"'))
    with pytest.raises(ValueError) as error:
        run(folder, *(f"--row-scores=good:{seed}:JUDGE={folder / 'scores.jsonl'}" for seed in range(1, 6)))
    assert message in str(error.value) and "scores.jsonl" in str(error.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("good:JUDGE=x", "good has seeds"),
        ("peer:1:JUDGE=x", "peer has no seeds"),
        ("none:1:JUDGE=x", "no task or system"),
        ("st/good:1:JUDGE=x", "no task or system"),
        ("good", "should be"),
    ],
)
def test_row_scores_of_nothing_are_refused(folder: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(folder, "--row-scores", option)


# --- registration -----------------------------------------------------------------------------------


def test_a_plan_is_registered_once_and_a_changed_one_is_said(folder: Path) -> None:
    run(folder)
    assert "not registered before the runs" in (folder / "out" / "compare.md").read_text()
    compare.main([str(folder / "contrasts.toml"), "--register"])
    assert (folder / "contrasts.toml.sha256").read_text().endswith("  contrasts.toml\n")
    run(folder)
    assert "as it was registered" in (folder / "out" / "compare.md").read_text()
    replan(folder, ("smallest_effect = 5.0", "smallest_effect = 1.0"))
    run(folder)
    assert "changed after it was registered" in (folder / "out" / "compare.md").read_text()
    with pytest.raises(ValueError, match="registered once"):
        compare.main([str(folder / "contrasts.toml"), "--register"])


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('worse = "bad"\n[[primary]]', 'worse = "none"\n[[primary]]', "'none', which is no system"),
        ('worse = "bad"\n[[primary]]', 'worse = "good"\n[[primary]]', "with itself"),
        ('task = "asr"', 'task = "st"', "the task 'st': choose among asr"),
        ('metric = "WER"', 'metric = "PER"', "metric 'PER' of asr is unknown"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = [1, 2, 3, 4, 6]", "-6.jsonl cannot be read"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = [1, 2, 2]", "a number twice"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = 5", "no list of whole numbers"),
        ("seeds = [1, 2, 3, 4, 5]", "", "good has no seeds"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = [1, 2, 3, 4, 5]\nlooks = [3, 9]", "two numbers of seeds"),
        ("[systems.same]", "[systems.same]\nseeds = [6, 7]", "its systems have other seeds"),
        ("smallest_effect = 5.0", "smallest_effect = 0", "above 0"),
        ("smallest_effect = 5.0", 'smallest_effect = "big"', "is no float"),
        ("smallest_effect = 5.0", "", "has no smallest_effect"),
        ("smallest_effect = 5.0", "smallest_effect = 5.0\nalpha = 0.1", "'alpha', which is unknown"),
        ('clusters = ["speaker"]', 'clusters = ["a", "b", "c"]', "none, one or two"),
        ('clusters = ["speaker"]', 'clusters = ["talk"]', "row 'r0' of asr has no talk"),
        ('clusters = ["speaker"]', 'clusters = ["speaker"]\ntable = "none.tsv"', "none.tsv cannot be read"),
        ("shared_start = true", 'shared_start = "yes"', "is no bool"),
        ('name = "good beats same"', 'name = "good beats bad"', "two contrasts of the name"),
        ("[[secondary]]", "[[primary]]", "primary on another metric"),
        ('fixed = true\nanswers = { asr = "peer.jsonl" }', "fixed = true", "peer has no seeds, so name its file"),
        ('"{system}-{seed}.jsonl"', '"{system}.jsonl"', "has no {seed}, but good has seeds"),
        (
            'language = "de"',
            'language = "de"\nreference = "transcript"',
            "row 'r0' has no text in the field 'transcript'",
        ),
        ("[tasks.asr]", "[tasks.asr", "is no TOML"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(folder: Path, old: str, new: str, message: str) -> None:
    replan(folder, (old, new))
    with pytest.raises(ValueError) as error:
        run(folder)
    assert message in str(error.value) and "\n" not in str(error.value).strip()
    assert not (folder / "out").exists()


def test_more_than_four_primary_contrasts_are_refused(folder: Path) -> None:
    more = "".join(f'[[primary]]\nname = "{i}"\ntask = "asr"\nbetter = "good"\nworse = "bad"\n' for i in range(3))
    (folder / "contrasts.toml").write_text(PLAN + more)
    with pytest.raises(ValueError, match="5 primary contrasts: choose 4"):
        run(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("good-3", lambda rows: rows[:-1], "no row 'r119' (1 are missing)"),
        ("bad-2", lambda rows: [*rows, {**rows[0], "id": "x"}], "the row 'x', which others lack"),
        ("bad-2", lambda rows: [*rows, rows[0]], "for the second time"),
        ("bad-2", lambda rows: [{**row, "id": f"x{i}"} for i, row in enumerate(rows)], "no row 'r0' (120 are missing)"),
        ("bad-2", lambda rows: [{**row, "reference": "other"} for row in rows], "other references"),
        ("bad-2", lambda rows: [{**row, "reference": ""} for row in rows], "no text in the field 'reference'"),
        ("bad-2", lambda rows: [{**row, "hypothesis": None} for row in rows], "no text in the field 'hypothesis'"),
        ("bad-2", lambda rows: [], "has no rows"),
        ("good-1", lambda rows: [{**row, "speaker": "s"} for row in rows], "asr has 1 different speaker"),
        ("good-1", lambda rows: [{**row, "speaker": f"s{i % 9}"} for i, row in enumerate(rows)], "has 9 different"),
        ("good-1", lambda rows: [{**rows[0], "speaker": ""}, *rows[1:]], "row 'r0' of asr has no speaker"),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    folder: Path, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str
) -> None:
    path = folder / f"{name}.jsonl"
    write(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    with pytest.raises(ValueError) as error:
        run(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "out").exists()


def test_half_a_line_is_refused(folder: Path) -> None:
    path = folder / "good-1.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"good-1.jsonl, line 120 is no JSON .* cut off"):
        run(folder)


def test_empty_answers_count_as_deletions(folder: Path) -> None:
    for seed in range(1, 6):
        rows = answers(0.3, seed)
        write(folder / f"bad-{seed}.jsonl", [{**row, "hypothesis": ""} for row in rows])
    found = run(folder)["primary"][0]
    assert found["scores"][1] == 100 and found["verdict"] == "holds"
