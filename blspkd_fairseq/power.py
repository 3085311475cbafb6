"""How many training seeds and rows an effect needs, from a pilot's answers or from given standard deviations.

    blspkd power --effect 2 --seed-sd 1.0 --row-sd 17 --rows-per-cluster 50 --out size
    blspkd power pilot.toml --out size     # a plan whose answers are there for a few seeds

Writes OUT/power.md, power.json and power.png: the probability that a difference of the effect's size is found, by seeds
and rows, and the rows that 80 % of power need. A pilot estimates the variances, and is then thrown away.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blspkd_fairseq.evaluation.contrasts import load_plan
from blspkd_fairseq.evaluation.planned_runs import TaskData
from blspkd_fairseq.evaluation.plots import plot_power
from blspkd_fairseq.evaluation.sample_size import (
    Spread,
    clusters_needed,
    power,
    seed_sd_interval,
    spread_of_pilot,
    spread_of_rows,
)
from blspkd_fairseq.evaluation.tables import markdown_table
from blspkd_fairseq.evaluation.variance import FEW_CLUSTERS, MIN_SEEDS
from blspkd_fairseq.files import write_whole

SEEDS = (5, 6, 8, 10, 12, 15)
ROWS = (200, 400, 800, 1500, 2000, 3000, 5000)


@dataclass(frozen=True)
class Question:
    """One effect to be found; ``rows_per_cluster`` is the test set's, ``note`` says where the spread comes from."""

    name: str
    effect: float
    spread: Spread
    rows_per_cluster: float
    note: str


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    level = 0.05 / args.contrasts
    questions = pilot_questions(args.pilot) if args.pilot else [given_question(args)]
    tables = {one.name: power_table(one, level) for one in questions}
    args.out.mkdir(parents=True, exist_ok=True)
    plot_power(tables, args.target, args.out / "power.png")
    parts = [_section(one, tables[one.name], args.target, level) for one in questions]
    head = (
        f"# Seeds and rows\n\nPower of a two-sided t test over seeds and clusters at {level:g} (0.05 by "
        f"{args.contrasts} primary contrast{'s' * (args.contrasts > 1)}), in percent. A verdict needs {MIN_SEEDS} "
        f"seeds and is best from {FEW_CLUSTERS} clusters on.\n"
    )
    content = [{**asdict(one), "power": tables[one.name]} for one in questions]
    write_whole(args.out / "power.json", json.dumps(content, indent=2) + "\n")
    write_whole(args.out / "power.md", "\n".join([head, *parts, "![power](power.png)\n"]))
    print((args.out / "power.md").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blspkd power",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pilot", type=Path, nargs="?", help="a plan (contrasts.toml) with a pilot's answers")
    add("--effect", type=float, help="difference that is to be found, in the metric's units")
    add("--seed-sd", type=float, help="standard deviation of the difference over training seeds")
    add("--row-sd", type=float, help="standard deviation of the rows' differences")
    add("--rows-per-cluster", type=float, default=1, help="rows of a speaker or talk (default: %(default)s)")
    add("--correlation", type=float, default=0, help="of rows of one cluster, 0 to 1 (default: %(default)s)")
    add("--contrasts", type=int, default=1, choices=range(1, 5), help="primary contrasts, for Holm's correction")
    add("--target", type=float, default=0.8, help="power that is wanted (default: %(default)s)")
    add("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    given = [args.effect, args.seed_sd, args.row_sd]
    if (args.pilot is None) == (None in given) or (args.pilot and any(one is not None for one in given)):
        parser.error("give a pilot's plan, or all of --effect, --seed-sd and --row-sd")
    if not 0 < args.target < 1 or (args.effect is not None and not 0 < args.effect < math.inf):
        parser.error("--target is between 0 and 1, and --effect above 0")
    return args


def given_question(args: argparse.Namespace) -> Question:
    spread = spread_of_rows(args.seed_sd, args.row_sd, args.rows_per_cluster, args.correlation)
    note = f"Given: standard deviation over seeds {args.seed_sd:g}, over rows {args.row_sd:g}"
    if args.rows_per_cluster > 1:
        note += f", {args.rows_per_cluster:g} rows per cluster that correlate by {args.correlation:g}"
    return Question(f"a difference of {args.effect:g}", args.effect, spread, args.rows_per_cluster, note)


def pilot_questions(path: Path) -> list[Question]:
    """The plan's contrasts, their spreads from the answers that are there.

    Raises:
        ValueError: files that do not fit, or a system with one seed.
    """
    plan = load_plan(path)
    questions = []
    for contrast in plan.contrasts:
        task, metric = plan.tasks[contrast.task], plan.metric_of(contrast)
        data = TaskData(plan, task)
        runs = data.runs(metric, (contrast.better, contrast.worse))
        found = runs.difference(contrast.better, contrast.worse, contrast.shared_start)
        counts = {len(runs.of[name]) for name in (contrast.better, contrast.worse) if not plan.systems[name].fixed}
        if len(counts) > 1 or counts == {1}:
            found_seeds = " and ".join(map(str, sorted(counts)))
            raise ValueError(
                f"{path}: {contrast.name!r} has {found_seeds} seeds: a pilot needs two or more, as many of both systems"
            )
        seeds = counts.pop() if counts else 1
        spread = spread_of_pilot(found, seeds, found.clusters)
        note = f"Pilot of {seeds} seeds and {found.clusters} clusters: standard deviation over seeds {spread.seeds:.2f}"
        if seeds > 1:
            note += " [{:.2f}, {:.2f}] (80 % interval)".format(*seed_sd_interval(spread.seeds, seeds))
        note += f", over clusters {spread.clusters:.2f}, of both together {spread.residual:.2f}"
        rows_per_cluster = len(data.ids) / found.clusters
        questions.append(Question(contrast.name, task.smallest_effect, spread, rows_per_cluster, note))
    return questions


def power_table(question: Question, level: float) -> dict[int, dict[int, float]]:
    """``[seeds][rows]``; rows that make fewer than two clusters are left out."""
    return {
        seeds: {
            rows: power(question.effect, question.spread, seeds, clusters, level)
            for rows in ROWS
            if (clusters := int(rows / question.rows_per_cluster)) >= 2
        }
        for seeds in SEEDS
    }


def _section(question: Question, table: dict[int, dict[int, float]], target: float, level: float) -> str:
    rows_shown = list(next(iter(table.values())))
    heading = ["seeds", *(f"{rows:,} rows" for rows in rows_shown), f"rows for {100 * target:g} %"]
    lines = []
    for seeds, by_rows in table.items():
        needed = clusters_needed(question.effect, question.spread, seeds, target, level)
        rows = "no number is enough" if needed is None else f"{math.ceil(needed * question.rows_per_cluster):,}"
        lines.append([str(seeds), *(f"{100 * one:.0f}" for one in by_rows.values()), rows])
    return f"## {question.name}: {question.effect:g}\n\n{question.note}.\n\n{markdown_table(heading, lines)}"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"power: {error}")
