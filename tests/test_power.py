"""Power: against simulations and the protocol's sizes, from given deviations and from a pilot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from blspkd_fairseq import power as command
from blspkd_fairseq.evaluation.sample_size import Spread, clusters_needed, power, spread_of_pilot, spread_of_rows
from blspkd_fairseq.evaluation.variance import Arm, components, estimate, p_value

# What the measured spread of sentences (17 points of WER, 22 of BLEU) and of seeds asks for: about 80 % of power.
_SIZES = [
    (2.0, 17, 1.0, 5, 1500), (2.0, 17, 1.0, 8, 800), (2.0, 17, 1.5, 8, 1500),
    (1.9, 22, 0.5, 3, 1500), (1.9, 22, 1.0, 8, 1500), (1.9, 22, 1.5, 10, 2000),
]  # fmt: skip


@pytest.mark.parametrize(("effect", "row_sd", "seed_sd", "seeds", "rows"), _SIZES)
def test_sizes_of_the_protocol(effect: float, row_sd: float, seed_sd: float, seeds: int, rows: int) -> None:
    assert 0.75 <= power(effect, spread_of_rows(seed_sd, row_sd), seeds, rows) <= 0.88


def test_more_than_ten_seeds_where_they_vary_much() -> None:
    assert power(2.0, spread_of_rows(2.3, 17), 10, 2000) < 0.7
    assert clusters_needed(2.0, spread_of_rows(2.3, 17), 8) is None


@pytest.mark.parametrize(("seeds", "clusters"), [(5, 20), (8, 40)])
@pytest.mark.parametrize("spread", [Spread(1.0, 3.0, 1.0), Spread(0.3, 5.0, 2.0), Spread(2.0, 0.5, 0.5)])
def test_power_is_the_share_of_simulated_runs_that_find_it(seeds: int, clusters: int, spread: Spread) -> None:
    rng, runs, effect = np.random.default_rng(0), 3000, 2.0
    values = (
        effect + rng.normal(0, spread.seeds, (runs, seeds, 1)) + rng.normal(0, spread.clusters, (runs, 1, clusters))
    )
    values = values + rng.normal(0, spread.residual, (runs, seeds, clusters))
    found = components([(1.0, Arm(values.mean(axis=-1), [values]))])
    share = float((p_value(values.mean(axis=(-2, -1)), found.total, found.df) < 0.05).mean())
    assert power(effect, spread, seeds, clusters) == pytest.approx(share, abs=0.045)


def test_without_an_effect_power_is_the_level() -> None:
    assert power(0, Spread(1, 1, 1), 5, 20, 0.05) == pytest.approx(0.05)


def test_the_clusters_needed_are_the_fewest() -> None:
    spread = Spread(0.5, 17, 1)
    needed = clusters_needed(2, spread, 8, 0.8)
    assert needed is not None
    assert power(2, spread, 8, needed) >= 0.8 > power(2, spread, 8, needed - 1)


def test_rows_of_a_cluster_that_are_alike_are_fewer() -> None:
    assert spread_of_rows(1, 20, 50, 0).clusters == pytest.approx(20 / math.sqrt(50))
    assert spread_of_rows(1, 20, 50, 1).clusters == 20
    assert spread_of_rows(1, 20, 50, 0.02).clusters == pytest.approx(20 * math.sqrt(1.98 / 50))


def test_a_pilots_spread_is_that_of_its_making() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 2, (200, 1)) + rng.normal(0, 5, (1, 200)) + rng.normal(0, 3, (200, 200))
    found = spread_of_pilot(estimate(Arm(values.mean(axis=1), [values])), 200, 200)
    assert (found.seeds, found.clusters, found.residual) == pytest.approx((2, 5, 3), rel=0.15)


def test_the_command_from_deviations(tmp_path: Path) -> None:
    command.main(["--effect", "2", "--seed-sd", "1", "--row-sd", "17", "--out", str(tmp_path)])
    text = (tmp_path / "power.md").read_text()
    found = json.loads((tmp_path / "power.json").read_text())[0]
    assert found["power"]["5"]["1500"] == pytest.approx(power(2, spread_of_rows(1, 17), 5, 1500))
    line = next(line for line in text.splitlines() if line.startswith("| 8 |"))
    needed = clusters_needed(2, spread_of_rows(1, 17), 8)
    assert needed is not None and line.endswith(f"| {needed:,} |") and 600 < needed < 900
    assert (tmp_path / "power.png").stat().st_size > 5000


def write_pilot(folder: Path, seeds: int) -> Path:
    plan = (
        f"seeds = {list(range(seeds))}\n[systems.a]\n[systems.b]\n[tasks.st]\nmetric = 'COMET'\nsmallest_effect = 1.5\n"
        "clusters = ['talk']\nrow_scores = { COMET = '{system}-{seed}.jsonl' }\n"
        "[[primary]]\nname = 'a beats b'\ntask = 'st'\nbetter = 'a'\nworse = 'b'\n"
    )
    (folder / "pilot.toml").write_text(plan)
    rng = np.random.default_rng(5)
    talks = rng.normal(0, 3, 25)
    for name, mean in (("a", 81.0), ("b", 80.0)):
        for seed in range(seeds):
            level = mean + rng.normal(0, 1)
            values = level + (name == "a") * np.repeat(talks, 8) + rng.normal(0, 10, 200)
            rows = [
                {"id": str(i), "talk": f"t{i // 8}", "value": value, "signature": "v"} for i, value in enumerate(values)
            ]
            (folder / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pilot.toml"


def test_the_command_from_a_pilot(tmp_path: Path) -> None:
    command.main([str(write_pilot(tmp_path, 3)), "--out", str(tmp_path / "out"), "--contrasts", "4"])
    found = json.loads((tmp_path / "out" / "power.json").read_text())[0]
    assert found["effect"] == 1.5 and found["rows_per_cluster"] == 8
    assert 1 < found["spread"]["clusters"] < 6 and 0 < found["spread"]["seeds"] < 4
    text = (tmp_path / "out" / "power.md").read_text()
    assert "Pilot of 3 seeds and 25 clusters" in text and "at 0.0125" in text


def test_a_pilot_of_one_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a pilot needs two or more"):
        command.main([str(write_pilot(tmp_path, 1)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--effect", "2"],
        ["pilot.toml", "--effect", "2"],
        ["--effect", "0", "--seed-sd", "1", "--row-sd", "1"],
        ["--effect", "2", "--seed-sd", "1", "--row-sd", "1", "--target", "1"],
        ["--effect", "2", "--seed-sd", "1", "--row-sd", "1", "--contrasts", "5"],
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*options, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed-sd", "-1", "--row-sd", "1"], "from 0 on"),
        (["--seed-sd", "nan", "--row-sd", "1"], "from 0 on"),
        (["--seed-sd", "0", "--row-sd", "0"], "nothing varies"),
        (["--seed-sd", "1", "--row-sd", "1", "--correlation", "2"], "0 to 1"),
    ],
)
def test_deviations_that_are_none(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["--effect", "2", *options, "--out", str(tmp_path / "out")])
