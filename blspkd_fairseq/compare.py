"""Compares systems over training seeds and clusters of rows, as a plan says that was written before the runs.

    blspkd compare contrasts.toml --register       # before the runs: writes contrasts.toml.sha256
    blspkd compare contrasts.toml --out results    # after them
    blspkd compare contrasts.toml --out results --row-scores st/ours:1:COMET=comet/ours-1.jsonl

The plan (see blspkd_fairseq/evaluation/contrasts.py) names systems, seeds, files of answers, a metric with its smallest
effect of interest for each task, and at most four primary contrasts. Answers are JSON lines of any system (``id``,
``hypothesis``, ``reference``, columns of clusters) or texts line by line. OUT/compare.md, compare.json and
contrasts.png are written; primary contrasts have verdicts, others intervals alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blspkd_fairseq.evaluation.comparison_report import write_comparison
from blspkd_fairseq.evaluation.contrasts import ContrastError, Plan, load_plan, register
from blspkd_fairseq.evaluation.planned_runs import compare_plan
from blspkd_fairseq.evaluation.verdicts import Seed


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    plan = load_plan(args.plan)
    if args.register:
        print(register(plan))
        return
    comparison = compare_plan(plan, args.look, given_row_scores(plan, args.row_scores))
    write_comparison(comparison, plan, args.look, args.out)
    print((args.out / "compare.md").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blspkd compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="contrasts.toml")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--register", action="store_true", help="write the plan's hash beside it, and do nothing else")
    parser.add_argument("--look", type=int, default=0, choices=[0, 1, 2], help="which of the looks that the plan has")
    parser.add_argument(
        "--row-scores", action="append", default=[], metavar="[TASK/]NAME[:SEED]:METRIC=FILE",
        help="scores of rows by another program (JSON lines: id, value or sums, signature); may be repeated",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if not args.register and args.out is None:
        parser.error("give --out, or --register before the runs")
    return args


def given_row_scores(plan: Plan, options: Sequence[str]) -> dict[str, dict[tuple[str, Seed, str], Path]]:
    """By task, system, seed and metric.

    Raises:
        ContrastError: an option that names no task, system or seed of the plan.
    """
    given: dict[str, dict[tuple[str, Seed, str], Path]] = {}
    for option in options:
        names, equals, path = option.partition("=")
        task, slash, rest = names.rpartition("/")
        parts = rest.split(":")
        if not equals or len(parts) not in (2, 3):
            raise ContrastError(f"--row-scores {option} should be [TASK/]NAME[:SEED]:METRIC=FILE")
        if not slash and len(plan.tasks) > 1:
            raise ContrastError(f"--row-scores {option} names no task: write TASK/, one of {', '.join(plan.tasks)}")
        task, system = task or next(iter(plan.tasks)), parts[0]
        seed = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else None
        if task not in plan.tasks or system not in plan.systems:
            raise ContrastError(f"--row-scores {option} is of no task or system of {plan.path}")
        if (seed is None) != plan.systems[system].fixed:
            raise ContrastError(f"--row-scores {option}: {system} has {'no ' * (seed is not None)}seeds in {plan.path}")
        given.setdefault(task, {})[system, seed, parts[-1]] = Path(path)
    return given


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"compare: {error}")
