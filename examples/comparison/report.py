"""The tables and pictures of the comparison, from the measurements of all rows and seeds.

    python examples/comparison/report.py --results out/comparison/results --data out/comparison/data --out DIR

The data are not needed where the results have texts.json. Writes DIR/RESULTS.md and the pictures beside it; what a
person has to say about it, discussion.md of the results, follows the first table.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import texts
from figures import cell, from_to, mean_of_seeds, rates_table, ratio
from pictures import kl_curve, plot_all
from systems import CLAIMS, DIVISORS, HIDDEN, LEARNING_RATES, LESS_DATA, QUESTIONS, ROWS, SCALED, SETS, UNTRAINED, Claim

from blspkd_fairseq.evaluation.contrasts import Contrast
from blspkd_fairseq.evaluation.metrics import Measurement, bleu, contains_match, error_rate, rouge_l
from blspkd_fairseq.evaluation.significance import Interval
from blspkd_fairseq.evaluation.variance import MIN_CLUSTERS
from blspkd_fairseq.evaluation.verdicts import NONE, Verdict, compare_runs, correct
from blspkd_fairseq.evaluation.verdicts import Runs as ClusteredRuns

_SPOKEN = ("heard", "unheard")


class Measure(NamedTuple):
    """A column. ``of`` makes its statistics from a run, the text's run and the rows of a set, or None."""

    title: str
    of: Callable[[dict[str, Any], dict[str, Any], dict[str, str]], Measurement | None]
    less_is_better: bool
    form: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of data.py, for results without texts.json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report.load(args.results, args.data)
    plot_all(report, args.out)
    (args.out / "RESULTS.md").write_text(report.markdown(), encoding="utf-8")
    print(args.out / "RESULTS.md")


class Runs(NamedTuple):
    """Attributes: measurements of each row by seed (seed 0 for systems without training); losses by learning rate."""

    of: dict[str, dict[int, dict[str, Any]]]
    searches: dict[str, dict[str, float]]

    @classmethod
    def load(cls, folder: Path) -> "Runs":
        """Reads what compare.py measured.

        Raises:
            ValueError: nothing is there, or the text's own answers are missing.
        """
        of: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for name in UNTRAINED:
            if (folder / f"{name}.json").exists():
                of[name][0] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ROWS:
            for path in sorted(folder.glob(f"{name}-seed*.json")):
                of[name][int(path.stem.rsplit("seed", 1)[1])] = json.loads(path.read_text(encoding="utf-8"))
        if "text" not in of:
            raise ValueError(f"{folder} has no text.json, with which all answers are compared: run compare.py")
        searches = {
            name: json.loads((folder / f"search-{name}.json").read_text(encoding="utf-8"))["losses"]
            for name in LEARNING_RATES
            if (folder / f"search-{name}.json").exists()
        }
        return cls(dict(of), searches)


# ---- measures --------------------------------------------------------------------------------------------------------


def _kl(part: str) -> Callable[..., Measurement | None]:
    def of(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement | None:
        return ratio(part, run[f"{part}_kl"], run[f"{part}_tokens"]) if f"{part}_kl" in run else None

    return of


def _agreement(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement | None:
    return ratio("agreement", run["response_agree"], run["response_tokens"], 100) if "response_agree" in run else None


def _repeat(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement:
    return error_rate(run["repeat"], [rows[i]["src_text"] for i in run["id"]], "WER", "en")


def _like_text(metric: Callable[..., Measurement], asked: str) -> Callable[..., Measurement]:
    def of(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement:
        answers = dict(zip(text["id"], text[asked], strict=True))
        return metric(run[asked], [answers[i] for i in run["id"]], "en")

    return of


def _capitals(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement:
    return contains_match(run["chat"], [rows[i]["tgt_text"] for i in run["id"]], "en")


def _counts(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement | None:
    if "counted" not in run:
        return None
    errors = [abs(a - b) for a, b in zip(run["counted"], run["tokens"], strict=True)]
    return ratio("token-count error", errors, run["tokens"], 100)


def _boundaries(run: dict[str, Any], text: dict[str, Any], rows: dict[str, Any]) -> Measurement | None:
    if "boundary_ms" not in run:
        return None
    return ratio(
        "boundary error", [sum(map(abs, row)) for row in run["boundary_ms"]], [len(row) for row in run["boundary_ms"]]
    )


MEASURES = {
    "response_kl": Measure("response KL", _kl("response"), True, ".3f"),
    "free_response_kl": Measure("response KL, own count", _kl("free_response"), True, ".3f"),
    "agreement": Measure("top-1 agreement, %", _agreement, False, ".1f"),
    "wer": Measure("WER of repeat, %", _repeat, True, ".1f"),
    "self_bleu": Measure("BLEU of continuations against the text's", _like_text(bleu, "continue"), False, ".1f"),
    "self_rouge": Measure("ROUGE-L of continuations against the text's", _like_text(rouge_l, "continue"), False, ".1f"),
    "count": Measure("token-count error, %", _counts, True, ".1f"),
    "boundary": Measure("boundary error, ms", _boundaries, True, ".0f"),
}
QUESTION_MEASURES = {
    "capitals": Measure("right capitals, %", _capitals, False, ".0f"),
    "answer_bleu": Measure("BLEU of answers against the text's", _like_text(bleu, "chat"), False, ".1f"),
    "answer_rouge": Measure("ROUGE-L of answers against the text's", _like_text(rouge_l, "chat"), False, ".1f"),
}
_ALL = MEASURES | QUESTION_MEASURES
# What the claims are tested on, and on which sets.
SMALLEST_EFFECTS = {"wer": 2.0, "self_bleu": 1.9, "answer_bleu": 1.9}
DECIDING = {"response_kl": _SPOKEN, "wer": _SPOKEN, "self_bleu": _SPOKEN, "answer_bleu": QUESTIONS}


def training_minutes(run: dict[str, Any]) -> float:
    """Of a row, with what it began with."""
    return float(run["wall_before"] + run["train_wall"]) / 60


def _runs(of: Mapping[str, Mapping[int, Measurement]], clusters: Sequence[str]) -> ClusteredRuns:
    """Systems with their seeds; those without training have none."""
    return ClusteredRuns(
        {name: {None if name in UNTRAINED else seed: one for seed, one in side.items()} for name, side in of.items()},
        [clusters],
    )


def share_start(claim: Claim) -> bool:
    """With one seed, both rows go on from the same weights."""
    pair = [ROWS[name].start for name in (claim.better, claim.worse) if name in ROWS]
    starts = [{name, start} - {""} for name, start in zip((claim.better, claim.worse), pair, strict=False)]
    return len(starts) == 2 and bool(starts[0] & starts[1])


# ---- report ----------------------------------------------------------------------------------------------------------


class Report:
    """Everything that is computed from the runs."""

    def __init__(self, runs: Runs, texts: dict[str, dict[str, dict[str, str]]], discussion: str) -> None:
        self.runs = runs
        self.texts = texts
        self.discussion = discussion
        self.shown = [name for name in (*UNTRAINED, *ROWS) if name in runs.of and name not in (*HIDDEN, *LESS_DATA)]

    @classmethod
    def load(cls, results: Path, data: Path | None) -> "Report":
        """From the folders of compare.py; ``discussion.md`` of the results is what a person says."""
        discussion = results / "discussion.md"
        said = discussion.read_text(encoding="utf-8") if discussion.exists() else ""
        found = texts.load(results, data)
        return cls(Runs.load(results), found.rows, said)

    def by_seed(self, name: str, sets: Sequence[str], measure: str) -> dict[int, Measurement]:
        """Rows of several sets one after another, those without speech left out.

        Nothing where the system has no such figure.
        """
        spoken = self.spoken(sets)
        found = {}
        for seed, run in self.runs.of.get(name, {}).items():
            parts = [
                _ALL[measure].of(run["sets"][one], self.runs.of["text"][0]["sets"][one], self.texts[one])
                for one in sets
            ]
            whole = [part for part in parts if part is not None]
            if len(whole) == len(sets):
                statistics = np.concatenate([part.statistics for part in whole])
                found[seed] = replace(whole[0], statistics=statistics[spoken])
        return found

    def measurements(self, name: str, sets: Sequence[str], measure: str) -> list[Measurement]:
        """One for each seed."""
        return list(self.by_seed(name, sets, measure).values())

    def said(self, sets: Sequence[str]) -> list[dict[str, str]]:
        """What is said in each row, in the order of the measurements."""
        return [self.texts[one][i] for one in sets for i in self.runs.of["text"][0]["sets"][one]["id"]]

    def spoken(self, sets: Sequence[str]) -> np.ndarray:
        """Of all rows: whether somebody speaks in them."""
        return np.array([texts.is_speech(row["src_text"]) for row in self.said(sets)])

    def clusters(self, sets: Sequence[str]) -> list[str]:
        """A cluster per row: sentences of one template, or, of questions and recordings, the same sentence.

        Both voices of a sentence are in one cluster.
        """
        rows = [row for row, spoken in zip(self.said(sets), self.spoken(sets), strict=True) if spoken]
        templates = [row.get("template", "") for row in rows]
        return (
            templates if len(set(templates)) >= MIN_CLUSTERS and all(templates) else [row["src_text"] for row in rows]
        )

    def interval(self, name: str, set_name: str, measure: str) -> Interval | None:
        """The mean of the seeds with a t interval over seeds and clusters, cut off at what no figure exceeds.

        Without an interval where nothing can be said.
        """
        by_seed = self.by_seed(name, [set_name], measure)
        if not by_seed:
            return None
        seeds = {None if name in UNTRAINED else seed: one for seed, one in by_seed.items()}
        return mean_of_seeds(seeds, self.clusters([set_name]))

    def cell(self, name: str, set_name: str, measure: str, with_range: bool = True) -> str:
        """The mean of the seeds with its interval, and their range."""
        form = _ALL[measure].form
        text = cell(self.interval(name, set_name, measure), form)
        made = self.measurements(name, [set_name], measure)
        if with_range and len(made) > 1:
            scores = [one.score for one in made]
            text += f" ({min(scores):{form}}–{max(scores):{form}})"
        return text

    def score(self, name: str, set_name: str, measure: str) -> float:
        made = self.measurements(name, [set_name], measure)
        return float(np.mean([one.score for one in made])) if made else float("nan")

    def markdown(self) -> str:
        parts = [_HEAD.format(seeds=self.seeds_text(), machine=self.machine(), sizes=self.sizes())]
        parts.append(self.main_table())
        parts += [self.discussion] if self.discussion else []
        pictures = {
            "WER and response KL of every system": "overview",
            "Learning curves": "curves",
            "Less data": "scaling",
            "Under noise": "robustness",
        }
        parts.append("\n\n".join(f"![{title}]({name}.png)" for title, name in pictures.items()) + f"\n\n{_CURVES}\n")
        parts.append("## Which claims hold\n\n" + _CLAIMS + "\n\n" + self.claims_table())
        for one, title in SETS.items():
            parts.append(f"## Every figure: {title}\n\n" + self.set_table(one))
        parts.append("## Less data, as many minutes\n\n" + self.less_data_table())
        parts.append("## Questions\n\n" + _QUESTIONS + "\n\n" + self.questions_table())
        parts.append("## Text and cost\n\n" + _COST + "\n\n" + self.cost_table())
        parts.append("## Learning rates\n\n" + _LEARNING_RATES + "\n\n" + self.learning_rates_table())
        parts.append("## Commands\n\n" + self.commands())
        return "\n".join(parts)

    def seeds_text(self) -> str:
        counts = {name: len(self.runs.of[name]) for name in self.shown if name in ROWS}
        groups = defaultdict(list)
        for name, count in counts.items():
            groups[count].append(name)
        missing = [name for name in ROWS if name not in (*self.runs.of, *HIDDEN)]
        text = "; ".join(
            f"{count} seed{'s' if count > 1 else ''}: {', '.join(names)}" for count, names in groups.items()
        )
        return text + (f". **Not measured yet:** {', '.join(missing)}" if missing else "")

    def sizes(self) -> str:
        """Utterances of each set, and how many recordings are left out."""
        sets = self.runs.of["text"][0]["sets"]
        counts = []
        for one, title in SETS.items():
            spoken = self.spoken([one])
            silent = len(spoken) - int(spoken.sum())
            left_out = f" ({silent} more, in which nobody speaks, are left out)" if silent else ""
            counts.append(f"{int(spoken.sum())} utterances of {title}{left_out}")
        return ", ".join([*counts, f"{len(sets[QUESTIONS[0]]['id'])} questions in both kinds of voices"])

    def machine(self) -> str:
        machines = {run["machine"] for name in ROWS for run in self.runs.of.get(name, {}).values()}
        return ", ".join(sorted(machines)) or "–"

    def first(self, name: str) -> dict[str, Any]:
        return next(iter(self.runs.of[name].values()))

    def noise_curve(self, name: str, kind: str) -> list[tuple[str, float]]:
        """Level and WER of the first seed, from clean to loud."""
        run, rows = self.first(name), self.texts["heard"]
        texts = [rows[i]["src_text"] for i in run["sets"]["heard"]["id"]]
        levels = {"clean": run["sets"]["heard"]["repeat"]}
        levels |= {key.split(":")[1]: given for key, given in run["conditions"].items() if key.startswith(kind)}
        return [(level, error_rate(given, texts, "WER", "en").score) for level, given in levels.items()]

    def measure_title(self, measure: str) -> str:
        return _ALL[measure].title

    def titles(self, name: str) -> str:
        return ROWS[name].title if name in ROWS else UNTRAINED[name]

    def main_table(self) -> str:
        lines = [
            "| system | response KL | WER of repeat, % | ... unheard voice | ... real recordings "
            "| BLEU of continuations against the text's | ... of answers to questions |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in self.shown:
            cells = [
                self.cell(name, "heard", "response_kl"),
                *(self.cell(name, one, "wer") for one in SETS),
                self.cell(name, "heard", "self_bleu"),
                self.cell(name, "questions_heard", "answer_bleu"),
            ]
            lines.append(f"| {self.titles(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def less_data_table(self) -> str:
        lines = [
            "| system | share of the data | response KL | WER of repeat, % | ... unheard voice | seeds |",
            "|---" * 6 + "|",
        ]
        for name in SCALED:
            for share, row in [*((f"1/{divisor}", f"{name}_{divisor}") for divisor in DIVISORS), ("1", name)]:
                if row in self.runs.of:
                    cells = [self.cell(row, "heard", "response_kl"), *(self.cell(row, s, "wer") for s in _SPOKEN)]
                    lines.append(
                        f"| {self.titles(name)} | {share} | " + " | ".join(cells) + f" | {len(self.runs.of[row])} |"
                    )
        return "\n".join(lines) + "\n"

    def set_table(self, set_name: str) -> str:
        shown = [one for one in MEASURES if any(self.measurements(name, [set_name], one) for name in self.shown)]
        lines = [
            "| system | " + " | ".join(MEASURES[one].title for one in shown) + " |",
            "|---" * (1 + len(shown)) + "|",
        ]
        for name in self.shown:
            cells = [self.cell(name, set_name, measure) for measure in shown]
            lines.append(f"| {self.titles(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def questions_table(self) -> str:
        columns = [(one, measure) for one in QUESTIONS for measure in QUESTION_MEASURES]
        titles = [f"{_ALL[measure].title}, {SETS[one.removeprefix('questions_')]}" for one, measure in columns]
        lines = ["| system | " + " | ".join(titles) + " |", "|---" * (1 + len(columns)) + "|"]
        for name in self.shown:
            cells = [self.cell(name, one, measure) for one, measure in columns]
            lines.append(f"| {self.titles(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def cost_table(self) -> str:
        trained = [name for name in self.shown if name in ROWS]
        common = max((int(points[0]["num_updates"]) for n in trained if (points := kl_curve(self.first(n)))), default=0)
        lines = [
            "| system | KL of text against the base LLM | updates | utterances | updates/s | training minutes | "
            f"of it roll-outs | response KL in validation after {common} updates |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in trained:
            runs = list(self.runs.of[name].values())
            text = [sum(run["text_kl"]["kl"]) / sum(run["text_kl"]["tokens"]) for run in runs]
            wall = float(np.mean([run["train_wall"] for run in runs]))
            updates = [run["updates"] for run in runs]
            utterances = [run["utterances_before"] + run["updates"] * run["batch"] for run in runs]
            rolled = float(np.mean([run["rollout_wall"] for run in runs])) / 60
            start = f" after {ROWS[name].start}" if ROWS[name].start else ""
            cells = [
                f"{np.mean(text):.4f}" if max(text) else "0",
                f"{from_to(updates)}{start}",
                from_to(utterances),
                f"{np.mean(updates) / max(wall, 1e-9):.2f}",
                f"{np.mean([training_minutes(run) for run in runs]):.1f}",
                f"{rolled:.1f}" if rolled else "–",
                self.validation_kl(runs, common),
            ]
            lines.append(f"| {self.titles(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    @staticmethod
    def validation_kl(runs: Sequence[dict[str, Any]], updates: int) -> str:
        """Between two validations by interpolation; of what trained for less there is none."""
        found = []
        for points in map(kl_curve, runs):
            at = [point["num_updates"] for point in points]
            if points and at[0] <= updates <= at[-1]:
                found.append(float(np.interp(updates, at, [point["response_kl"] for point in points])))
        return f"{np.mean(found):.3f}" if found else "–"

    def learning_rates_table(self) -> str:
        return rates_table(self.runs.searches, {name: self.titles(name) for name in self.runs.searches})

    def claims_table(self) -> str:
        columns = {measure: self.claims_on(measure) for measure in DECIDING}
        titles = [_ALL[measure].title for measure in DECIDING]
        lines = ["| claim | " + " | ".join(titles) + " | seeds |", "|---" * (2 + len(DECIDING)) + "|"]
        for claim in CLAIMS:
            found = {measure: columns[measure].get(claim.text) for measure in DECIDING}
            cells = [self.claim_cell(measure, one) if one else "–" for measure, one in found.items()]
            lines.append(f"| {claim.text} | " + " | ".join(cells) + f" | {len(self.common_seeds(claim))} |")
        return "\n".join(lines) + "\n"

    def common_seeds(self, claim: Claim) -> list[int]:
        """That both rows were trained with; systems without training stand for every seed."""
        sides = [set(self.runs.of.get(name, {})) for name in (claim.better, claim.worse) if name in ROWS]
        return sorted(set.intersection(*sides))

    def claims_on(self, measure: str) -> dict[str, Verdict]:
        """Each claim that can be estimated, by its text."""
        sets, made = DECIDING[measure], []
        for claim in CLAIMS:
            sides = {name: self.by_seed(name, sets, measure) for name in (claim.better, claim.worse)}
            seeds = self.common_seeds(claim)
            if all(sides.values()) and seeds:
                # A system without training is the same with every seed.
                common = {
                    name: {seed: one for seed, one in side.items() if seed in seeds or name in UNTRAINED}
                    for name, side in sides.items()
                }
                contrast = Contrast(claim.text, measure, claim.better, claim.worse, "", share_start(claim))
                runs = _runs(common, self.clusters(sets))
                made.append(compare_runs(contrast, measure, runs, SMALLEST_EFFECTS.get(measure, float("nan"))))
        return {one.contrast.name: one for one in correct(made)}

    @staticmethod
    def claim_cell(measure: str, one: Verdict) -> str:
        """The difference with its interval; a verdict where there are seeds enough, and a smallest effect was named."""
        form = _ALL[measure].form
        if one.estimate is None:
            return f"{one.scores[0] - one.scores[1]:+{form}}"
        low, high = one.estimate.interval()
        text = f"{one.estimate.value:+{form}} [{low:+{form}}, {high:+{form}}]"
        if one.estimate.per_seed and len(one.estimate.per_seed) > 1:
            text += f" ({min(one.estimate.per_seed):+{form}} to {max(one.estimate.per_seed):+{form}})"
        if one.estimate.seeds == 1:
            return f"{text}, of this one seed"
        known = one.verdict != NONE and measure in SMALLEST_EFFECTS
        return f"**{one.verdict}**: {text}, p {one.corrected:.3f}" if known else text

    def commands(self) -> str:
        columns = ("row", "seed", "minutes", "commands (the names of the base models and folders aside)")
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for name in (*self.shown, *LESS_DATA):
            for seed, run in self.runs.of.get(name, {}).items():
                if name in UNTRAINED:
                    system = " --cascade WHISPER --robustness" if name == "cascade" else ""
                    lines.append(
                        f"| {name} | – | 0 | `python examples/comparison/measure.py --data data --llm LLM{system}` |"
                    )
                else:
                    commands = "<br>".join(f"`{command}`" for command in run["commands"])
                    lines.append(f"| {name} | {seed} | {training_minutes(run):.1f} | {commands} |")
        return "\n".join(lines) + "\n"


_HEAD = """# Which is better: BLSP, BLSP-KD, X-OPD?

Made by `bash examples/comparison/run.sh`, and again from the measurements beside it with `--results` and this folder;
every figure was measured. Whisper tiny.en and SmolLM2-135M-Instruct, both
frozen unless a row says otherwise; trained on the prompt "Continue the following sentence" alone, tested on it and,
without training for them, on "repeat" and on questions (not on translation, which SmolLM2 cannot do from text either).
In brackets: 95 % t intervals over seeds and kinds of sentences (where there is one seed, over sentences alone: another
seed may lie outside); in parentheses: lowest and highest seed.
Runs so far: {seeds}. On {machine}.

**Data.** 2,400 sentences of a grammar of 140 words and 32 countries in three synthetic voices, since a few CPU hours
do not teach an open vocabulary. Tested on {sizes}. The sentences of the heard voices and of the voice never heard are
the same, new ones made of known words; the real recordings (telephone prompts: Asterisk core sounds, CC-BY-SA-3.0)
hold mostly words that training never had, which nothing here but the cascade can repeat. There are no audio books among
them: no package of the sources used here has some.

**Time.** Every row is given the same minutes, counted in updates by the seconds per update of that row, measured
before (what it took stands below); a warm-up is paid out of it, and X-OPD is compared with as much more of BLSP-KD.
16 utterances an update, temperature 1, one layer before and one after CIF. Learning rates were searched in one way
for one row of each kind, whose rate the others of that kind have (below).

**The warm-up** is no paper's. It learns from transcripts, token by token, among the words of the training set,
without the LLM: an update of 48 utterances takes less time than one of 16 with the LLM, so that in the same minutes
it hears about six times as many. The KL rows compare the whole vocabulary.

**Token counts.** Response KL and agreement give the CFormer the transcript's number of tokens, as in training; where
it counts wrongly when it answers (token-count error) shows in WER, BLEU against the text's answers, and answers only.
"""
_QUESTIONS = """"What is the capital of Estonia?", spoken to the model without any instruction; training never asks a
question of this form. Right is an answer that contains the capital's name. BLEU (of the corpus) and ROUGE-L: the
overlap with what the LLM answers to the text."""
_LEARNING_RATES = """Three rates, half a decade apart, for each kind of training, a third of a row's minutes each,
with a linear warm-up of a tenth of the updates and linear decay; the best by validation loss (bold) is taken for all
rows of that kind: with the CNN, those of BLSP (also for both losses together) and of response KL; with the CFormer from
scratch, that of response KL, also for cross-entropy; and those of the warm-up, of what follows it, and of X-OPD. Rows
with more layers or trained parts have the rate of the others of their kind. Adam, gradients clipped at 1; 16 utterances
an update, 48 in a warm-up."""
_CLAIMS = """Heard and unheard voices together, difference of both systems with its 95 % t interval over seeds and kinds
of sentences (questions: over questions), and in parentheses the lowest and highest seed where both rows go on from the
same weights. A verdict needs five seeds (three would give 14 to 28 % of them to equal systems); where a row has fewer,
there is none, and the figures are exploratory. With one seed the interval is of these two trainings alone. Corrected
over all claims of a column (Holm)."""
_CURVES = """Learning curves: the warm-up alone has none, as it never runs the LLM, nor has X-OPD, which is validated
on its own roll-outs."""
_COST = """KL of text is 0 where the LLM reads text through nothing that was trained: without LoRA, and with Partial
LoRA (that they are bit for bit the base LLM is tested)."""


if __name__ == "__main__":
    main()
