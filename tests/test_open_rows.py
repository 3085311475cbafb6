"""The comparison on everyday English: how long rows train, what goes on where it was, what the report says."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fairseq
from tiny import save_llm, save_whisper, tiny_model, write_split

ROOT = Path(__file__).resolve().parents[1]
OPEN = ROOT / "examples" / "open_vocabulary"
sys.path[:0] = [str(OPEN), str(ROOT / "examples" / "comparison")]

import compare  # noqa: E402
import compare_rows  # noqa: E402
import exposures  # noqa: E402
import hear  # noqa: E402
import mix_prompts  # noqa: E402
import rows as table  # noqa: E402
import rows_report  # noqa: E402
import select_sentences  # noqa: E402
import trainings  # noqa: E402
from figures import rates_table  # noqa: E402
from no_speech import TEACHER_TEXTS  # noqa: E402

from blspkd_fairseq.cli import responses  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402
from blspkd_fairseq.evaluation.contrasts import load_plan  # noqa: E402
from blspkd_fairseq.evaluation.significance import Interval  # noqa: E402
from blspkd_fairseq.systems import systems  # noqa: E402

# ---- the table -----------------------------------------------------------------------------------------------------


def test_every_row_finds_what_it_begins_with_and_its_rates() -> None:
    for name, row in table.ROWS.items():
        assert all(other in table.ROWS for other in trainings.needs(table.TABLE, name))
        assert table.searched(name) in table.RATES and set(table.RATES) <= set(table.BY_UTTERANCES)
        start = table.ROWS[row.start].share if row.start and table.ROWS[row.start].transcripts else 0
        assert start + row.share == (0.5 if name.startswith("warm_half") or row.start == "mix" else 1)
    assert all(rate in trainings.LADDER for rates in table.RATES.values() for rate in rates)


def test_the_plan_speaks_of_rows_that_all_seeds_train() -> None:
    plan = load_plan(rows_report.PLAN)
    assert set(plan.systems) <= {*table.ROWS, *table.UNTRAINED} and len(plan.primary) == 4
    assert {name for one in plan.primary for name in (one.better, one.worse)} <= set(table.MAIN)
    for one in plan.contrasts:
        pair = [{name, table.ROWS[name].start} for name in (one.better, one.worse) if name in table.ROWS]
        assert one.shared_start == (len(pair) == 2 and bool(pair[0] & pair[1] - {""})), one.name


# ---- how long a row trains -----------------------------------------------------------------------------------------


def write_asked(work: Path, count: int = 32) -> None:
    """What stage 4 of run.sh leaves, of three seconds each."""
    rows = [
        {"id": f"r{i}", "audio": f"{i}.wav", "n_frames": 48_000, "src_text": "a", "tgt_text": "b", "prompt": "chat"}
        for i in range(count)
    ]
    folder = work / "data" / "asked" / "responses"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        write_manifest(folder / f"{split}.tsv", rows, list(rows[0]))


def rows_of(work: Path, *options: Any) -> compare_rows.OpenRows:
    return compare_rows.OpenRows(compare_rows.parse(["--work", str(work), *map(str, options)]))


def note(rows: compare_rows.OpenRows, name: str, updates: int, wall: float, before: float = 0.0) -> None:
    folder = rows.folder(name, 1)
    folder.mkdir(parents=True)
    done = {"updates": updates, "batch": 16, "train_wall": wall, "wall_before": before, "utterances_before": 0}
    (folder / "done.json").write_text(json.dumps(done))


def test_rows_hear_as_many_utterances_and_again_have_as_many_minutes(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--utterances", 4800)
    assert rows.updates_of("blsp", 1) == rows.updates_of("scratch", 1) == 300
    assert (rows.updates_of("warm_half", 1), rows.updates_of("mix", 1), rows.updates_of("x_opd", 1)) == (50, 150, 150)
    note(rows, "warm_half", 50, 20)
    note(rows, "mix", 150, 100, before=20)
    note(rows, "longer", 150, 90, before=120)
    note(rows, "blsp", 300, 60)
    note(rows, "x_opd", 150, 450, before=120)
    note(rows, "encoder", 150, 300, before=20)
    assert rows.updates_of("blsp_in_time", 1) == 600  # 120 s at a fifth of a second each
    assert rows.updates_of("encoder_in_time", 1) == 50  # the 100 s that are left beside the warm-up
    assert rows.updates_of("x_opd_in_time", 1) == 30  # the 90 s of what goes on as it did


def test_rates_are_searched_where_rows_hear(tmp_path: Path) -> None:
    write_asked(tmp_path)
    rows = rows_of(tmp_path, "--utterances", 120_000, "--search", "--threshold-hours", 30)
    # 60 hours are 72,000 utterances of three seconds; a row from scratch hears them, what follows a warm-up has less
    # to go, and never less than a third.
    assert rows.search_part("scratch") == pytest.approx(0.6)
    note(rows, "warm_half", 3750, 1)  # 60,000 utterances
    assert rows.search_part("mix") == pytest.approx(1 / 3)
    assert rows_of(tmp_path, "--utterances", 12_000, "--search").search_part("scratch") == 1


def test_other_options_are_refused_and_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no train.tsv: run.sh --out .* --stop-stage 4 first"):
        rows_of(tmp_path).prepare()
    write_asked(tmp_path)
    rows_of(tmp_path, "--utterances", 10).keep_options()
    rows_of(tmp_path, "--utterances", 10, "--seeds", 1, 2).keep_options()
    with pytest.raises(ValueError, match="holds rows of --utterances 10, not 11: give another --out"):
        rows_of(tmp_path, "--utterances", 11).keep_options()


def test_parts_of_the_data_hold_each_other(tmp_path: Path) -> None:
    write_asked(tmp_path, 64)
    folder = tmp_path / "data" / "asked" / "responses"
    inner: set[str] = set()
    for divisor in table.DIVISORS:
        compare_rows.write_part(folder, divisor)
        ids = {row["id"] for row in Manifest.load(folder / f"train_{divisor}.tsv")}
        assert inner < ids and len(ids) == 64 // divisor
        inner = ids


def test_rows_are_asked_again_for_one_thing(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 4, speaker="x", src_lang="en")
    rows = list(Manifest.load(tmp_path / "train.tsv"))
    before = [mix_prompts.asked(row, "chat", is_speech=i < 3) for i, row in enumerate(rows)]
    write_manifest(tmp_path / "train.tsv", before, mix_prompts.COLUMNS)
    mix_prompts.asked_again(tmp_path, tmp_path / "again", "continue", ("train",))
    after = list(Manifest.load(tmp_path / "again" / "train.tsv"))
    assert [row["id"] for row in before] == [row["id"] for row in after]
    assert {row["prompt"] for row in after} == {"continue"}
    assert [row["teacher_text"] for row in after] == ["", "", "", TEACHER_TEXTS["continue"]]


def interval(number: int, seconds: float) -> str:
    speed = f"ups={10 / seconds:.2f}, wpb=5, num_updates={number}, lr=0.1, train_wall={seconds:.0f}, wall=0"
    return f"2026-01-01 | INFO | train_inner | epoch 001:  {number} / 99 loss=2, {speed}"


def test_what_else_runs_on_the_machine_costs_a_row_nothing() -> None:
    paces = [40, 41, 90, 120, 60, 200, 80, 75, 99, 110]
    log = [interval(10 * (i + 1), seconds) for i, seconds in enumerate(paces)]
    epoch = "| INFO | train | epoch 001 | loss 2 | train_wall 915 | wall 9"
    assert trainings.undisturbed_seconds("\n".join([*log, epoch]), 100) == pytest.approx(100 * 4.09)
    went_on = ["| INFO | fairseq.trainer | Loaded checkpoint x.pt (epoch 1 @ 108 updates)", interval(110, 2)]
    assert trainings.undisturbed_seconds("\n".join([*log, *went_on]), 100) == pytest.approx(100 * 4.09)
    quick = [interval(10 * (i + 1), 0.5) for i in range(20)]  # a second or none, in whole ones
    assert trainings.undisturbed_seconds("\n".join(quick), 200) == pytest.approx(10)
    assert trainings.undisturbed_seconds(epoch, 2) == 915  # too short for an interval


# ---- what goes on --------------------------------------------------------------------------------------------------


def test_a_figure_of_an_epoch_that_was_logged_twice_counts_once() -> None:
    lines = ["| INFO | train | epoch 001 | loss 2 | train_wall 4 | wall 9", "| INFO | train | epoch 002 | train_wall 3"]
    assert trainings.sum_over_epochs("\n".join([lines[0], *lines]), "train_wall") == 7
    valid = "| valid | epoch 001 | valid on 'valid' subset | loss {} | num_updates {}"
    log = "\n".join([valid.format(3, 10), valid.format(2, 20), valid.format(2.5, 20)])
    assert [point["loss"] for point in trainings.curve(log)] == [3, 2.5]


def test_a_command_ends_with_the_time_and_what_it_writes_goes_on(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    log = tmp_path / "log"
    assert rows.call([sys.executable, "-c", "print(1)"], log) == 0
    assert rows.call([sys.executable, "-c", "raise SystemExit(3)"], log) == 3
    script = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(143)))"
    rows.end_on_signals()
    killer = subprocess.Popen(["bash", "-c", f"until grep -q begun {log}; do sleep .1; done; kill -TERM {os.getpid()}"])
    try:
        with pytest.raises(trainings.TimeOver):
            rows.call([sys.executable, "-c", f"{script}; print('begun', flush=True); time.sleep(600)"], log)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        killer.wait()
    assert log.read_text().split() == ["1", "begun", "saved"]
    with pytest.raises(trainings.TimeOver):
        rows.call(["never"])


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [(1e-3, 3, False), (3e-3, 4, False), (1e-2, 5, False), (3e-2, 5, True), (1e-4, 5, False), (1e-5, 5, True)],
)
def test_a_best_rate_at_the_edge_is_followed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float, tried: int, edge: bool
) -> None:
    rows = rows_of(tmp_path, "--search")
    rows.args.results.mkdir(parents=True)

    def try_rate(name: str, rate: float, found: dict[str, Any]) -> None:
        found["losses"][f"{rate:g}"] = abs(np.log(rate / best))
        trainings.write_json(rows.found_rates(name), found)

    monkeypatch.setattr(rows, "try_rate", try_rate)
    found = rows.learning_rate("scratch")
    losses = json.loads(rows.found_rates("scratch").read_text())["losses"]
    assert len(losses) == tried and trainings.at_the_edge(losses) == edge and (edge or found == best)
    assert ("at the edge" in rates_table({"scratch": losses}, {"scratch": "x"})) == edge
    monkeypatch.setattr(rows, "try_rate", None)
    assert rows.learning_rate("scratch") == found  # of what is noted


# ---- report --------------------------------------------------------------------------------------------------------

WORDS = ("cats", "dogs", "mice", "birds", "fish", "cows", "pigs", "hens", "goats", "sheep", "bees", "ants")
SAID = [f"the {word} eat in the garden" for word in WORDS]


def run_of(wrong: int, kl: float = 1.0, hours: float = 2.0, long: bool = True) -> dict[str, Any]:
    """A run that gets so many sentences wrong."""
    answers = ["nothing of that kind at all" if i < wrong else text for i, text in enumerate(SAID)]
    found: dict[str, Any] = {"id": list(WORDS), "said": SAID, "heard": answers, "repeat": answers, "chat": answers}
    found |= {"continue": answers, "response_kl": [kl * (1 + i % 3) for i in range(12)], "response_tokens": [4] * 12}
    found |= {"long": answers} if long else {}
    done = {"utterances_before": 100, "updates": 10, "batch": 16, "utterance_hours": 0.1, "wall_before": 0.0}
    done |= {"train_wall": 60.0, "hours": hours, "machine": "a machine", "commands": ["fairseq-train"]}
    return {"sets": {"test": found}, **done}


def write_runs(folder: Path, runs: dict[str, dict[int, dict[str, Any]]]) -> Path:
    (folder / "results").mkdir(parents=True)
    (folder / "options.json").write_text(json.dumps({"threshold_hours": 30}))
    for name in table.UNTRAINED:
        (folder / "results" / f"{name}.json").write_text(json.dumps(run_of(0)))
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            (folder / "results" / f"{name}-seed{seed}.json").write_text(json.dumps(run))
    return folder


def report(folder: Path, out: Path) -> str:
    rows_report.main(["--rows", str(folder), "--out", str(out)])
    return (out / "ROWS.md").read_text()


def seeds_of(wrong: int, count: int = 8) -> dict[int, dict[str, Any]]:
    return {seed: run_of(wrong + seed % 2) for seed in range(1, count + 1)}


def test_what_was_not_trained_stands_in_the_table(tmp_path: Path) -> None:
    said = report(write_runs(tmp_path / "rows", {"mix": seeds_of(0, 2), "scratch": seeds_of(5, 3)}), tmp_path / "out")
    utterances, minutes = said.split("## As many minutes")
    line = next(line for line in utterances.splitlines() if line.startswith("| BLSP-KD from scratch |"))
    assert line.endswith("| 0.3 | 26.0 † | 1.0 | 3 |")  # (100 + 160) utterances of a tenth of an hour
    assert "| BLSP: CNN, cross-entropy | not measured |" in utterances
    assert "| BLSP-KD from scratch, equal minutes | not measured |" in minutes
    assert "| warm-up, BLSP-KD on the mix | " in minutes.split("## What was")[0]
    compared = (tmp_path / "out" / "compare.md").read_text()
    assert "## Exploratory" in compared and "## What was to be shown" not in compared
    assert "the warm-up helps BLSP-KD on as many utterances" in compared and "| 2 |" in compared
    assert "Not measured: the warm-up helps BLSP-KD in the same minutes; " in said
    assert "measured (2 to 3 seeds; **not measured:** " in said


def test_the_published_report_is_of_the_published_measurements(tmp_path: Path) -> None:
    published = Path(rows_report.__file__).parent / "results" / "rows"
    rows_report.main(["--rows", str(published), "--out", str(tmp_path)])
    for name in ("ROWS.md", "compare.md"):
        assert (tmp_path / name).read_text() == (published / name).read_text()


def test_the_readme_shows_the_figures_of_the_published_report() -> None:
    """Every row that was measured on as many utterances, in the columns that the README has."""
    published = Path(rows_report.__file__).parent / "results" / "rows" / "ROWS.md"
    shown, reported = (
        first_table(path, "| system | response KL |") for path in (Path(__file__).parents[1] / "README.md", published)
    )
    measured = {name: row for name, row in reported.items() if row["response KL"] != rows_report.NOT_MEASURED}
    assert shown.keys() == measured.keys()
    for name, row in shown.items():
        assert row == {title: measured[name][title] for title in row}, name


def first_table(path: Path, heading: str) -> dict[str, dict[str, str]]:
    """By the first cell of a row: its other cells, by their titles."""
    text = path.read_text(encoding="utf-8")
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: dict(zip(titles[1:], cells, strict=True)) for name, *cells in rows}


def test_answers_of_another_precision_are_refused(tmp_path: Path) -> None:
    write_runs(tmp_path, {"mix": {1: {**run_of(0), "llm_dtype": "float32"}, 2: run_of(0)}})
    with pytest.raises(ValueError, match="mix-seed1.json was measured with --llm-dtype float32, text.json with"):
        rows_report.Report(tmp_path)


@pytest.mark.parametrize(("count", "said"), [(1, "1 seed;"), (2, "2 seeds;")])
def test_rows_of_as_many_seeds_say_so(count: int, said: str, tmp_path: Path) -> None:
    write_runs(tmp_path, {"mix": seeds_of(0, count)})
    assert rows_report.Report(tmp_path).seeds_text().startswith(said)


def test_verdicts_take_every_planned_seed_of_every_primary_contrast(tmp_path: Path) -> None:
    primary = {"mix": 0, "scratch_in_time": 6, "blsp_in_time": 6, "chat": 1, "continue": 6, "x_opd_in_time": 1}
    runs = {name: seeds_of(wrong) for name, wrong in primary.items()}
    runs["longer"] = {seed: run_of(1 + (seed + 1) % 2) for seed in runs["mix"]}
    folder = write_runs(tmp_path / "rows", runs)
    said = rows_report.Report(folder).compare(tmp_path / "out")
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    verdicts = [one["verdict"] for one in compared["primary"]]
    assert verdicts == ["holds", "holds", "holds", "undecided"] and said[0].startswith("Verdicts by")
    (folder / "results" / "longer-seed8.json").unlink()
    said = rows_report.Report(folder).compare(tmp_path / "again")
    compared = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert not compared["primary"] and {one["verdict"] for one in compared["secondary"]} == {""}
    assert said[0].startswith("Without verdicts") and len(compared["secondary"]) >= 4


def test_less_data_has_a_line_on_logarithmic_axes(tmp_path: Path) -> None:
    runs = {f"mix_{divisor}": {1: run_of(3, kl=divisor**0.5, hours=32 / divisor)} for divisor in table.DIVISORS}
    folder = write_runs(tmp_path / "rows", runs | {"mix": {1: run_of(3, kl=1, hours=32)}})
    said = report(folder, tmp_path / "out")
    assert "| warm-up, BLSP-KD on the mix | | | response KL (nats): falls by 29 % with each doubling |" in said
    assert "| warm-up, BLSP-KD on the mix | 1/32 | 1.00 | 2.8" in said
    assert "| BLSP: CNN, cross-entropy | 1/32 | not measured |" in said
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    line = rows_report.fitted([1, 2, 4], [Interval(score, 0, 9, "") for score in (8.0, 4.0, 2.0)])
    assert line and line[0] == pytest.approx(-1) and line[1] == pytest.approx(np.log(8))
    assert rows_report.fitted([1, 2], [Interval(1, 0, 1, "")] * 2) is None


def test_too_few_sentences_make_no_contrast(tmp_path: Path) -> None:
    run = run_of(0)
    run["sets"]["test"] = {name: values[:9] for name, values in run["sets"]["test"].items()}
    folder = write_runs(tmp_path / "rows", {})
    (folder / "results" / "text.json").write_text(json.dumps(run))
    (said,) = rows_report.Report(folder).compare(tmp_path / "out")
    assert said == "No contrasts: 9 sentences were measured, and an interval takes 10 at least."


def test_results_without_the_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no text.json"):
        rows_report.Report(tmp_path)


# ---- sentences to speak next ---------------------------------------------------------------------------------------


def test_words_are_what_is_between_blanks_and_marks() -> None:
    assert exposures.words_of("Don’t say 'no', e.g. twenty-one!") == ["don't", "say", "no", "e", "g", "twenty", "one"]
    assert (
        exposures.words_of("Où est-ce, 2 fois?") == ["où", "est", "ce", "2", "fois"] and exposures.words_of("...") == []
    )


def test_what_one_more_exposure_is_worth() -> None:
    gains = exposures.Gains({"often": 100, "rare": 1, "never": 0}, {"often": 1000}, exposures.MissRate(10))
    assert gains.of("often") == pytest.approx(100 * (10 / 1010 - 10 / 1011))
    assert gains.of("rare") == pytest.approx(1 * (1 - 10 / 11)) and gains.of("never") == gains.of("unknown") == 0
    assert gains.missed() == pytest.approx((100 * 10 / 1010 + 1) / 101)
    before = gains.of("rare")
    gains.say(["rare", "rare"])
    assert gains.said["rare"] == 2 and 0 < gains.of("rare") < before


@pytest.mark.parametrize(("half", "floor"), [(0.5, 0.0), (12.0, 0.1), (300.0, 0.0)])
def test_the_rate_is_found_again_from_what_was_missed(half: float, floor: float) -> None:
    rng = np.random.default_rng(0)
    said = (10 ** rng.uniform(0, 3.5, size=20_000)).astype(int) - 1
    missed = rng.random(20_000) < floor + (1 - floor) / (1 + said / half)
    found = exposures.MissRate.fit(said.tolist(), missed.tolist())
    assert found.half == pytest.approx(half, rel=0.15) and found.floor == pytest.approx(floor, abs=0.021)
    assert found(0) == 1 and found(half) == pytest.approx((1 + floor) / 2, abs=0.05)
    with pytest.raises(ValueError, match="no word was said"):
        exposures.MissRate.fit([], [])


def test_sentences_that_teach_most_come_first_and_lists_hold_what_has_too_few() -> None:
    words = [f"w{name}{name}" for name in "abcdefghijklmnopqrst"]
    texts = [f"{a} {b} {a}." for a, b in zip(words, words[1:], strict=False)] + ["The the the."] * 30
    frequencies = dict.fromkeys(words, 10.0) | {"the": 1.0, "scarce": 2.0, "missing": 50.0}
    chosen = list(exposures.choices(texts, exposures.Gains(frequencies, {}, exposures.MissRate(5))))
    sentences, lists = ([one for one in chosen if one.is_list is kind] for kind in (False, True))
    assert sorted(one.text for one in sentences) == sorted(texts) and len(lists) == len(texts) // 3
    assert all("the" not in one.text for one in sentences[:19]) and chosen[3].is_list
    # A word without a sentence is in every list until others are worth more; one that people rarely say is in none.
    assert all("missing" in one.text.split() for one in lists[:3]) and all("scarce" not in one.text for one in lists)
    assert all(len(set(one.text.split())) == exposures.LIST_WORDS for one in lists)
    values = [one.gain for one in sentences]
    assert all(later <= earlier / exposures.SLACK**2 for earlier, later in zip(values, values[1:], strict=False))


def test_every_choice_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against counting all sentences anew for every choice."""
    monkeypatch.setattr(exposures, "SLACK", 1.0)
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(list("abcdefgh"), size=rng.integers(1, 6))) for _ in range(60)]
    frequencies = exposures.count_words(texts)
    said: Counter[str] = Counter()
    left = list(texts)
    for one in exposures.choices(texts, exposures.Gains(frequencies, {}, exposures.MissRate(3))):

        def gain(text: str) -> float:
            fall = sum(frequencies[w] * (3 / (3 + said[w]) - 3 / (4 + said[w])) for w in set(text.split()))
            return fall / (exposures.CLIP_COST + len(text.split()))

        assert one.gain == pytest.approx(gain(one.text)) == pytest.approx(max(map(gain, left)))
        left.remove(one.text)
        said.update(one.text.split())


def test_words_are_missed_by_how_often_training_said_them() -> None:
    rows = [select_sentences.SpokenRow(["the", "the", "cat", "sat"], ["the", "hat", "sat"], 1.0)]
    pairs = select_sentences.misses(rows, {"the": 500, "sat": 2})
    assert pairs == [(500, False), (500, True), (0, True), (2, False)]
    lines = select_sentences.by_exposures(pairs, exposures.MissRate(2))
    assert lines == [("0", 1, "1.000", "1.000"), ("1 to 3", 1, "0.000", "0.500"), ("301 to 1000", 2, "0.500", "0.004")]


def test_a_model_picks_what_is_spoken_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "data", "valid", 8, speaker="x")
    trained = ["The light was on."] * 3
    write_split(tmp_path / "data", "train", 3, texts=trained, speaker="x")
    tiny_model(tmp_path).save_pretrained(tmp_path / "model")
    said = [row["src_text"] for row in Manifest.load(tmp_path / "data" / "valid.tsv")]
    new = ["Turn the light on.", "Play music in Paris.", "The weather is cold.", "Unheard things happen."]
    folder = tmp_path / "sentences"
    folder.mkdir()
    for name, texts in {"train": [*said, *trained, *new], "valid": ["One."], "test": ["Two."]}.items():
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
    exposures.write_frequencies(folder / "frequencies.tsv", exposures.count_words([*said, *new, *new, *new]))
    given = ["--checkpoint", tmp_path / "model", "--rows", tmp_path / "data" / "valid.tsv"]
    given += [
        "--spoken",
        tmp_path / "data" / "train.tsv",
        "--sentences",
        folder,
        "--count",
        4,
        "--out",
        tmp_path / "next",
    ]
    select_sentences.main(list(map(str, given)))
    next_folder = tmp_path / "next"
    chosen = (next_folder / "train.txt").read_text().splitlines()
    assert len(chosen) == 3 and set(chosen) < set(new)
    (listed,) = (next_folder / "lists.txt").read_text().splitlines()
    assert len(listed.split()) == exposures.LIST_WORDS
    assert all(
        (next_folder / name).read_bytes() == (folder / name).read_bytes() for name in ("valid.txt", "frequencies.tsv")
    )
    ranked = [line.split("\t") for line in (next_folder / "rows.tsv").read_text().splitlines()]
    assert ranked[0] == ["kl", "id", "said", "heard"] and {line[2] for line in ranked[1:]} == set(said)
    assert [float(line[0]) for line in ranked[1:]] == sorted((float(line[0]) for line in ranked[1:]), reverse=True)
    assert (next_folder / "exposures.tsv").read_text().startswith("exposures\twords\tmissed\texpected\n0\t")
    printed = capsys.readouterr().out
    assert "4 clips, 1 of them lists, from 4 sentences" in printed and "expected to be missed: " in printed
    (folder / "train.txt").write_text("\n".join(said))
    with pytest.raises(ValueError, match="has no sentence that nobody said yet"):
        select_sentences.main(list(map(str, given)))


# ---- commands ------------------------------------------------------------------------------------------------------


def in_this_process(command: list[str], log: Path | None = None) -> int:
    """Runs what a piece runs without a process of its own, whose imports take longer than a tiny training."""
    if Path(command[0]).name == "fairseq-train":
        assert log is not None
        handler = logging.FileHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            fairseq("train", Path(command[1]), *command[2:])
        finally:
            logging.getLogger().removeHandler(handler)
    else:
        if "--cascade" in command:  # a tiny Whisper has no words: the text stands for what it hears
            del command[(at := command.index("--cascade")) : at + 2]
        {"hear.py": hear.main, "generate_responses.py": responses.main}[Path(command[1]).name](command[2:])
    return 0


@pytest.fixture(scope="module")
def tiny_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stages 1 to 7 of run.sh leave, of tiny models and noise."""
    work = tmp_path_factory.mktemp("work")
    save_llm(work / "llm"), save_whisper(work / "whisper", width=24)
    for split, count in (("train", 64), ("valid", 4), ("test", 12)):
        write_split(work / "data", split, count, texts=SAID, speaker="x", src_lang="en")
    mix_prompts.make(work / "data", 0, 0, 0, mix_prompts.MIX)
    for split in ("train", "valid", "test"):
        rows = [{**row, "tgt_text": "It is cold."} for row in Manifest.load(work / "data" / "asked" / f"{split}.tsv")]
        (work / "data" / "asked" / "responses").mkdir(exist_ok=True)
        write_manifest(work / "data" / "asked" / "responses" / f"{split}.tsv", rows, list(rows[0]))
    write_split(work / "sets", "phone", 3, drop=["tgt_text"], speaker="x")
    return work


def test_a_cascade_hears_once_whatever_is_asked(tiny_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []

    class Whisper:
        def __init__(self, *_: object) -> None: ...

        def transcribe(self, waveforms: list[np.ndarray], *_: object) -> list[str]:
            heard.extend(map(len, waveforms))
            return [f"{len(heard)} cats" for _ in waveforms]

    monkeypatch.setattr(systems, "WhisperTranscriber", Whisper)
    spoken = ["--set", f"phone={tiny_work / 'sets' / 'phone.tsv'}", "--conditions", "white:0", "--most-tokens", "2"]
    told = ["--cascade", "whisper", "--llm", str(tiny_work / "llm"), "--batch-size", "2", "--out"]
    hear.main([*told, str(tiny_work / "cascade.json"), *spoken, "--answers", "repeat", "chat"])
    sets = json.loads((tiny_work / "cascade.json").read_text())["sets"]
    assert len(heard) == 6  # three rows, and again under noise
    assert sets["phone"]["heard"] == ["2 cats", "2 cats", "3 cats"]
    assert {"id", "said", "heard", "repeat", "chat"} == set(sets["phone"])
    assert {"id", "said", "heard"} == set(sets["phone white:0"])
    read = ["--llm", str(tiny_work / "llm"), "--out", str(tiny_work / "text.json"), *spoken, "--answers", "chat"]
    hear.main(read)
    text = json.loads((tiny_work / "text.json").read_text())["sets"]["phone"]
    assert text["heard"] == text["said"] and len(text["chat"]) == 3


def test_answers_that_are_compared_are_not_rounded(tiny_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[torch.dtype] = []
    load = systems.load_llm
    monkeypatch.setattr(systems, "load_llm", lambda *given: loaded.append((llm := load(*given)).dtype) or llm)
    told = ["--llm", str(tiny_work / "llm"), "--set", f"phone={tiny_work / 'sets' / 'phone.tsv'}", "--most-tokens", "2"]
    hear.main([*told, "--out", str(tiny_work / "rounded.json")])
    hear.main([*told, "--out", str(tiny_work / "whole.json"), "--llm-dtype", "float32", "--repeat-only", "phone"])
    assert loaded == [torch.bfloat16, torch.float32]
    rounded, whole = (json.loads((tiny_work / f"{n}.json").read_text())["sets"]["phone"] for n in ("rounded", "whole"))
    assert "repeat" in whole and rounded.keys() - whole.keys() == {"chat"}
    with pytest.raises(SystemExit):
        hear.main([*told, "--out", str(tiny_work / "no.json"), "--repeat-only", "telephone"])
    rows = rows_of(tiny_work)
    commands: list[list[str]] = []
    monkeypatch.setattr(rows, "python", lambda *command: commands.append([str(word) for word in command]))
    for out in ("text", "mix"):
        rows.measure(out, 1, tiny_work / "checkpoint.pt", tiny_work / f"{out}.json")
        assert commands[-1][commands[-1].index("--llm-dtype") + 1] == "float32"


def tiny_rows(work: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> compare_rows.OpenRows:
    bases = ["--speech-encoder", work / "whisper", "--llm", work / "llm"]
    rows = rows_of(work, "--quick", "--test-rows", 12, "--jobs", 1, *bases, *options)
    monkeypatch.setattr(rows, "call", in_this_process)
    return rows


def test_the_speed_of_a_row_is_measured_with_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    closed = compare.Comparison(compare.parse(["--out", str(tmp_path), "--jobs", "2", "--only", "warm_up"]))
    threads: list[str | None] = []
    monkeypatch.setattr(closed, "write_part", lambda *_: None)
    monkeypatch.setattr(closed, "measure_rate", lambda _: threads.append(os.environ.get("OMP_NUM_THREADS")))
    closed.measure_rates()
    assert set(threads) == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_what_runs_before_the_rows_has_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_asked(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    rows = rows_of(tmp_path, "--only", "warm_up", "--jobs", 2)
    threads: list[str | None] = []

    def call(_: object, log: Path | None = None) -> int:
        threads.append(os.environ.get("OMP_NUM_THREADS"))
        if log:
            log.touch()
        return 0

    monkeypatch.setattr(rows, "call", call)
    rows.prepare()
    assert threads == [None]  # the frames
    with pytest.raises(FileNotFoundError, match=r"warm_up-seed1\.json"):  # nothing was measured
        rows.run_all()
    assert set(threads[1:]) == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


@pytest.mark.slow
def test_a_row_and_what_it_needs_are_trained_measured_and_not_made_again(
    tiny_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--out", tiny_work / "few", "--only", "scratch", "--search"]
    rows = tiny_rows(tiny_work, monkeypatch, *given)
    rows.prepare()
    rows.run_all()
    names = {path.name for path in (tiny_work / "few" / "results").iterdir()}
    assert names == {"text.json", "cascade.json", "scratch-seed1.json", "search-scratch.json"}
    found = json.loads(rows.result("scratch", 1).read_text())
    assert (found["utterances_before"], found["updates"], found["batch"]) == (0, 6, 4)
    assert found["sets"]["phone"]["heard"] and "response_kl" in found["sets"]["test"]
    assert found["curve"] and "long" not in found["sets"]["test"]
    assert len(json.loads(rows.found_rates("scratch").read_text())["losses"]) >= 3
    made = {path: path.stat().st_mtime_ns for path in (tiny_work / "few" / "results").iterdir()}
    again = tiny_rows(tiny_work, monkeypatch, *given)
    monkeypatch.setattr(again, "call", None)  # nothing is called
    again.prepare()
    again.run_all()
    assert made == {path: path.stat().st_mtime_ns for path in made}
    said = report(rows.args.out, tiny_work / "few-report")
    assert "Hours that a trial had heard when it ended: scratch 0.0" in said


@pytest.mark.slow
def test_every_kind_of_row_is_trained_and_measured(tiny_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that hear as many utterances, two of those that train as long, and the least and the most of less data."""
    kinds = [
        *(set(table.BY_UTTERANCES) - set(table.HIDDEN)),
        "blsp_in_time",
        "x_opd_in_time",
        "blsp_32",
        "blsp_2",
        "mix_32",
        "mix_2",
    ]
    rows = tiny_rows(tiny_work, monkeypatch, "--out", tiny_work / "all", "--only", *kinds)
    rows.prepare()
    rows.run_all()
    for name in table.ROWS:
        assert rows.result(name, 1).exists() == (name in kinds), name
    blsp = json.loads(rows.result("blsp_in_time", 1).read_text())["sets"]["test"]
    assert "heard" not in blsp and "long" not in blsp and "response_kl" in blsp
    assert json.loads(rows.result("mix", 1).read_text())["sets"]["test"]["long"]
    shown = json.loads(rows.result("anchored", 1).read_text())["commands"]
    assert len(shown) == 3 and "--off-policy-cross-entropy" in shown[2] and "--train-subset train " in shown[0]
    assert "--unfreeze-speech-encoder" in json.loads(rows.result("encoder", 1).read_text())["commands"][1]
    assert "--train-subset train_32" in json.loads(rows.result("mix_32", 1).read_text())["commands"][0]
    said = report(tiny_work / "all", tiny_work / "all-report")
    left_out = {name for name in table.ROWS if name not in kinds and not name.startswith(table.HIDDEN)}
    (missing,) = re.findall(r"not measured:\*\* (\w+(?:, \w+)*)", said)
    assert set(missing.split(", ")) == left_out
    assert "| BLSP: CNN, cross-entropy | 1/32 | 0.00 |" in said and "with each doubling" in said
