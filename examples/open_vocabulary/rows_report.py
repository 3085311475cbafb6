"""The tables, contrasts and pictures of the comparison on everyday English, from what compare_rows.py measured.

    python examples/open_vocabulary/rows_report.py --rows OUT/rows --out DIR

Writes DIR/ROWS.md and the pictures beside it. Whatever was not trained stands there as not measured. The contrasts are
those of contrasts.toml: verdicts where every primary one has all planned seeds, else intervals alone.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "comparison")]

from figures import NOT_MEASURED, cell, from_to, mean_of_seeds, rates_table, ratio  # noqa: E402
from rows import BY_UTTERANCES, DIVISORS, HIDDEN, RATES, ROWS, SCALED, UNTRAINED, in_time  # noqa: E402

from blspkd_fairseq.evaluation.comparison_report import write_comparison  # noqa: E402
from blspkd_fairseq.evaluation.contrasts import Contrast, Plan, load_plan  # noqa: E402
from blspkd_fairseq.evaluation.metrics import Measurement, bleu, error_rate  # noqa: E402
from blspkd_fairseq.evaluation.planned_runs import Comparison, compare_plan  # noqa: E402
from blspkd_fairseq.evaluation.significance import Interval  # noqa: E402
from blspkd_fairseq.evaluation.variance import MIN_CLUSTERS  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

PLAN = HERE / "contrasts.toml"
ASKED = {"repeating": "repeat", "answering": "chat", "long_answers": "long"}  # what a task of the plan looks at
TESTS = ("test", "test_unheard")  # on which contrasts are tested
Run = dict[str, Any]


class Column(NamedTuple):
    """Attributes: ``title``; the test set; what is looked at, of hear.py; how it is written."""

    title: str
    set_name: str
    figure: str
    form: str = ".1f"


COLUMNS = (
    Column("response KL", "test", "response_kl", ".3f"),
    Column("WER of the nearest tokens, %", "test_unheard", "heard"),
    Column('WER of "repeat", %: heard voices', "test", "repeat"),
    Column("... voices never heard", "test_unheard", "repeat"),
    Column("... telephone prompts", "phone", "repeat"),
    Column("... a game's actors", "game", "repeat"),
    Column("BLEU against the text's: answers", "test", "chat"),
    Column("... continuations", "test", "continue"),
    Column("... long answers", "test", "long"),
)
SCALING = (Column("response KL (nats)", "test", "response_kl", ".3f"), Column('WER of "repeat", %', "test", "repeat"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="folder of compare_rows.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.rows)
    if report.is_scaled:
        report.draw_scaling(args.out / "scaling.png")
    text = report.markdown(report.compare(args.out))
    write_whole(args.out / "ROWS.md", text)
    print(args.out / "ROWS.md")


class Report:
    """Everything that is computed from the measurements in a folder of compare_rows.py.

    Raises:
        ValueError: the text's own answers are not there, or answers are of an LLM of another precision.
    """

    def __init__(self, folder: Path) -> None:
        self.results = folder / "results"
        options = folder / "options.json"
        self.options: dict[str, Any] = json.loads(options.read_text(encoding="utf-8")) if options.exists() else {}
        self.runs: dict[str, dict[int | None, Run]] = {}
        files = self.files()
        for (name, seed), path in files.items():
            self.runs.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
        if "text" not in self.runs:
            raise ValueError(f"{self.results} has no text.json, with which answers are compared: run compare_rows.py")
        text = self.runs["text"][None].get("llm_dtype")
        for (name, seed), path in files.items():  # in another precision an LLM does not agree with itself
            if (dtype := self.runs[name][seed].get("llm_dtype")) != text:
                raise ValueError(
                    f"{path} was measured with --llm-dtype {dtype or '(none)'}, text.json with {text or '(none)'}: "
                    "remove the older ones, and run compare_rows.py"
                )

    def files(self) -> dict[tuple[str, int | None], Path]:
        """Of each system, and of each seed of a row, what was measured."""
        untrained: dict[tuple[str, int | None], Path] = {
            (name, None): path for name in UNTRAINED if (path := self.results / f"{name}.json").exists()
        }
        return untrained | {
            (name, int(path.stem.rpartition("seed")[2])): path
            for name in ROWS
            for path in sorted(self.results.glob(f"{name}-seed*.json"))
        }

    # ---- figures -----------------------------------------------------------------------------------------------------

    def measured(self, run: Run, column: Column) -> Measurement | None:
        """A figure of one run; None where it has none."""
        found, text = run["sets"].get(column.set_name), self.runs["text"][None]["sets"].get(column.set_name)
        if found is None:
            return None
        if column.figure == "response_kl":
            both = [found.get(f"response_{part}") for part in ("kl", "tokens")]
            return ratio("response KL", *both) if all(both) else None  # type: ignore[arg-type]
        if column.figure not in found:
            return None
        if column.figure in ("heard", "repeat"):
            return error_rate(found[column.figure], found["said"], language="en")
        if text is None or text["id"] != found["id"]:
            return None
        return bleu(found[column.figure], text[column.figure], "en")

    def interval(self, name: str, column: Column) -> Interval | None:
        """Over seeds and sentences."""
        runs = self.runs.get(name, {})
        by_seed = {seed: self.measured(run, column) for seed, run in runs.items()}
        whole = {seed: one for seed, one in by_seed.items() if one is not None}
        if not whole:
            return None
        said = next(iter(runs.values()))["sets"][column.set_name]["said"]
        return mean_of_seeds(whole, said)

    # ---- tables ------------------------------------------------------------------------------------------------------

    def markdown(self, contrasts: Sequence[str]) -> str:
        threshold = self.options.get("threshold_hours", 0.0)
        parts = [_HEAD.format(seeds=self.seeds_text(), machine=self.machine(), threshold=threshold)]
        shown = [name for name in BY_UTTERANCES if name not in HIDDEN]
        parts += ["## As many utterances", self.table(shown), "## As many minutes"]
        parts += [_MINUTES, self.table(list(map(in_time, shown)))]
        parts += ["## What was to be shown", *contrasts, "## Less data, as many utterances", _SCALING]
        parts += [self.scaling_table(), *(["![KL and WER against hours](scaling.png)"] if self.is_scaled else [])]
        parts += ["## Learning rates", self.rates_text(), "## Commands", self.commands()]
        return "\n\n".join(part.strip("\n") for part in parts) + "\n"

    def table(self, names: Sequence[str]) -> str:
        heading = [
            "system",
            *(column.title for column in COLUMNS),
            "thousand utterances",
            "hours heard",
            "minutes",
            "seeds",
        ]
        lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
        for name in (*UNTRAINED, *names):
            title = UNTRAINED.get(name) or ROWS[name].title
            if name not in self.runs:
                cells = [NOT_MEASURED, *[""] * (len(heading) - 2)]
            else:
                cells = [cell(self.interval(name, column), column.form) for column in COLUMNS] + self.effort(name)
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def effort(self, name: str) -> list[str]:
        """Thousand utterances, hours heard and minutes, a warm-up's included, and seeds."""
        if name in UNTRAINED:
            return ["–"] * 4
        runs = list(self.runs[name].values())
        utterances = float(np.mean([run["utterances_before"] + run["updates"] * run["batch"] for run in runs]))
        hours = utterances * float(np.mean([run["utterance_hours"] for run in runs]))
        minutes = float(np.mean([run["wall_before"] + run["train_wall"] for run in runs])) / 60
        early = " †" if hours < self.options.get("threshold_hours", 0.0) else ""
        return [f"{utterances / 1000:.1f}", f"{hours:.1f}{early}", f"{minutes:.1f}", str(len(runs))]

    def seeds_text(self) -> str:
        missing = [name for name in ROWS if name not in self.runs and not name.startswith(HIDDEN)]
        counts = [len(self.runs[name]) for name in self.runs if name in ROWS]
        text = f"{from_to(counts)} seed{'s' * (max(counts) > 1)}" if counts else "no row was trained"
        return text + (f"; **not measured:** {', '.join(missing)}" if missing else "")

    def machine(self) -> str:
        machines = {run["machine"] for name in ROWS for run in self.runs.get(name, {}).values()}
        return ", ".join(sorted(machines)) or "–"

    def rates_text(self) -> str:
        searches, notes = {}, []
        for name in RATES:
            path = self.results / f"search-{name}.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                searches[name] = found["losses"]
                utterances = found["utterances_before"] + found["updates"] * found["batch"]
                notes.append(f"{name} {utterances * found['utterance_hours']:.1f}")
        if not searches:
            return "Not searched: each kind of row has the middle of its rates."
        early = f"Hours that a trial had heard when it ended: {', '.join(notes)}."
        return f"{early}\n\n{rates_table(searches, {name: ROWS[name].title for name in searches})}"

    def commands(self) -> str:
        lines = ["| row | seed | commands (the names of the base models and folders aside) |", "|---|---|---|"]
        for name in ROWS:
            for seed, run in self.runs.get(name, {}).items():
                commands = "<br>".join(f"`{command}`" for command in run["commands"])
                lines.append(f"| {name} | {seed} | {commands} |")
        return "\n".join(lines)

    # ---- less data ---------------------------------------------------------------------------------------------------

    def scaling(self, name: str) -> dict[int, str]:
        """The rows that were measured, by the divisor of the data."""
        rows = {divisor: f"{name}_{divisor}" for divisor in DIVISORS} | {1: name}
        return {divisor: row for divisor, row in rows.items() if row in self.runs}

    @property
    def is_scaled(self) -> bool:
        """Whether some system was trained on two amounts of data, or more."""
        return any(len(self.scaling(name)) > 1 for name in SCALED)

    def hours(self, row: str) -> float:
        """Of speech in its training set."""
        return float(next(iter(self.runs[row].values()))["hours"])

    def scaling_table(self) -> str:
        heading = ["system", "share", "hours", *(column.title for column in SCALING), "seeds"]
        lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
        for name in SCALED:
            found = self.scaling(name)
            for divisor in (*DIVISORS, 1):
                share = f"1/{divisor}" if divisor > 1 else "1"
                cells = [NOT_MEASURED, *[""] * (len(SCALING) + 1)]
                if divisor in found:
                    row = found[divisor]
                    figures = [cell(self.interval(row, column), column.form) for column in SCALING]
                    cells = [f"{self.hours(row):.2f}", *figures, str(len(self.runs[row]))]
                lines.append(f"| {ROWS[name].title} | {share} | " + " | ".join(cells) + " |")
            for column in SCALING:
                if line := fitted(*self.points(name, column)):
                    lines.append(f"| {ROWS[name].title} | | | {column.title}: {doubling(line)} |" + " |" * len(SCALING))
        return "\n".join(lines)

    def points(self, name: str, column: Column) -> tuple[list[float], list[Interval]]:
        """Hours and figures, from the least to the most data."""
        pairs = [(self.hours(row), self.interval(row, column)) for row in self.scaling(name).values()]
        known = sorted(((hours, one) for hours, one in pairs if one is not None), key=lambda pair: pair[0])
        return [hours for hours, _ in known], [one for _, one in known]

    def draw_scaling(self, path: Path) -> None:
        """KL and WER against hours, both logarithmic, with the fitted lines."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        for axis, column in zip(figure.subplots(1, len(SCALING)), SCALING, strict=True):
            lowest = np.inf
            for number, name in enumerate(SCALED):
                hours, found = self.points(name, column)
                if not hours:
                    continue
                scores = np.array([one.score for one in found])
                lowest = min(lowest, scores.min())
                ends = np.nan_to_num(np.abs(np.array([[one.low, one.high] for one in found]).T - scores))
                ends[0] = np.minimum(ends[0], 0.999 * scores)  # a logarithm ends above 0
                style = {"color": f"C{number}", "marker": "o", "capsize": 3, "linestyle": "none"}
                axis.errorbar(hours, scores, yerr=ends, label=ROWS[name].title, **style)
                if line := fitted(hours, found):
                    axis.plot(hours, np.exp(line[1]) * np.array(hours) ** line[0], "--", color=f"C{number}",
                              label=doubling(line))  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="hours of speech in training", ylabel=column.title)
            axis.grid(alpha=0.3, which="both")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
                if lowest > 0:  # an interval down to 0 would take the axis with it
                    axis.set_ylim(bottom=lowest / 3)
            else:
                axis.set_title(NOT_MEASURED)
        figure.savefig(path, dpi=110)

    # ---- contrasts ---------------------------------------------------------------------------------------------------

    def compare(self, folder: Path) -> list[str]:
        """Writes compare.md, compare.json and contrasts.png, with the plan and the answers, and says what they hold."""
        texts = self.runs["text"][None]["sets"]
        if (count := len({said for name in self.tests for said in texts[name]["said"]})) < MIN_CLUSTERS:
            return [f"No contrasts: {count} sentences were measured, and an interval takes {MIN_CLUSTERS} at least."]
        self.write_answers(folder)
        for path in (PLAN, PLAN.with_name(f"{PLAN.name}.sha256")):
            if path.exists():
                write_whole(folder / path.name, path.read_bytes())
        plan = load_plan(folder / PLAN.name)
        comparison, missing = decide(plan, {name: list(runs) for name, runs in self.runs.items()}, self.can_tell)
        write_comparison(comparison, plan, 0, folder)
        text = [_VERDICTS if comparison.primary else _EXPLORATORY, "[The contrasts](compare.md), with their intervals."]
        return [*text, *([f"Not measured: {'; '.join(missing)}."] if missing else []), "![contrasts](contrasts.png)"]

    def can_tell(self, task: str, name: str) -> bool:
        """Whether a system was asked what the task looks at."""
        return all(ASKED[task] in run["sets"][one] for run in self.runs[name].values() for one in self.tests)

    @cached_property
    def tests(self) -> list[str]:
        return [name for name in TESTS if name in self.runs["text"][None]["sets"]]

    def write_answers(self, folder: Path) -> None:
        """JSON lines of each system and seed, as ``blspkd compare`` reads them."""
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        for name, runs in self.runs.items():
            for seed, run in runs.items():
                for asked in ASKED.values():
                    sets = [run["sets"][one] for one in self.tests]
                    if all(asked in found for found in sets):
                        lines = [
                            json.dumps({"id": row, "hypothesis": answer, "reference": said, "sentence": said})
                            for found in sets
                            for row, answer, said in zip(found["id"], found[asked], found["said"], strict=True)
                        ]
                        who = name if seed is None else f"{name}-{seed}"
                        write_whole(folder / "answers" / f"{who}.{asked}.jsonl", "\n".join(lines) + "\n")


def decide(plan: Plan, seeds: Mapping[str, Sequence[int | None]], can_tell: Any) -> tuple[Comparison, list[str]]:
    """The comparison of what was measured, and the names of the contrasts that were not.

    Verdicts are given when all primary contrasts have all planned seeds: before, they would be of another plan.

    Args:
        plan: of contrasts.toml.
        seeds: that each system was trained with; (None,) of one without training.
        can_tell: of a task and a system that was measured, whether it has the answers.
    """

    def common(contrast: Contrast) -> list[int]:
        pair = contrast.better, contrast.worse
        if any(name not in seeds or not can_tell(contrast.task, name) for name in pair):
            return []
        both = [set(seeds[name]) for name in pair if not plan.systems[name].fixed]
        return sorted(set.intersection(*both) & set(plan.seeds)) if both else [0]  # type: ignore[arg-type]

    is_complete = all(common(contrast) == sorted(plan.seeds) for contrast in plan.primary)
    made = Comparison([], [], {}, {})
    if is_complete:
        made = compare_plan(replace(plan, secondary=()))
    missing = []
    for contrast in plan.secondary if is_complete else plan.contrasts:
        if not (found := common(contrast)):
            missing.append(contrast.name)
            continue
        one = compare_plan(replace(plan, seeds=tuple(found), primary=(), secondary=(contrast,)))
        made.secondary.extend(one.secondary)
        made.signatures.update(one.signatures)
        for title, scores in one.scores.items():
            made.scores.setdefault(title, {}).update(scores)
    return made, missing


def fitted(hours: Sequence[float], found: Sequence[Interval]) -> tuple[float, float] | None:
    """Slope and offset of the logarithm of a figure against that of the hours; None of fewer than three."""
    pairs = [(hour, one.score) for hour, one in zip(hours, found, strict=True) if hour > 0 and one.score > 0]
    if len(pairs) < 3:
        return None
    slope, offset = np.polyfit(*np.log(np.array(pairs).T), 1)
    return float(slope), float(offset)


def doubling(line: tuple[float, float]) -> str:
    """A fitted line in words."""
    return f"falls by {100 * (1 - 2 ** line[0]):.0f} % with each doubling"


_HEAD = """# The comparison on everyday English

Made by compare_rows.py and rows_report.py; every figure was measured ({seeds}; on {machine}). In brackets: 95 % t
intervals over seeds and sentences, with one seed over sentences alone, so that another seed may lie outside. A row
marked † has heard less than {threshold:g} hours of speech: of one from scratch this is what happens before it hears.
What a row is, and what it is compared with, stands in rows.py and contrasts.toml."""
_MINUTES = """Minutes are those of the trainer's log at the pace of the quickest tenth of its intervals, so that what
else runs on the machine does not count, and without loading, validating and, but for the trained encoder, the encoder.
Rows go on from the same warm-up as above; it and what follows it together have the minutes of "warm-up, BLSP-KD on the
mix", what goes on from that those of "half as long again"; these two stand here as they stand above."""
_VERDICTS = "Verdicts by the package's protocol, Holm's correction over the primary contrasts."
_EXPLORATORY = """Without verdicts: these take all planned seeds of every primary contrast. With fewer than five seeds
nothing is decided, and what follows is exploratory."""
_SCALING = """Parts of the training set, each within the next; a warm-up has the same part. Every row hears as many
utterances, so that what differs is how many of them are new. The line is one through the logarithms of both."""


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"rows_report: {error}")
