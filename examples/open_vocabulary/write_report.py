"""Tables and the learning curve, from what hear.py measured and what training logged.

    python examples/open_vocabulary/write_report.py --results DIR --logs warm-up.log distillation.log --out DIR

DIR has NAME.json of each system; text.json, whose answers the others are compared with, is one of them. Intervals are
95 %, bootstrapped over utterances. OUT gets report.md, report.json and curve.png.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "comparison"))

from figures import ratio  # noqa: E402
from no_speech import ANSWER  # noqa: E402

from blspkd_fairseq.evaluation.metrics import answer_metrics, error_rate  # noqa: E402
from blspkd_fairseq.evaluation.significance import Interval, bootstrap_interval  # noqa: E402
from blspkd_fairseq.evaluation.tables import score_table  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

TEXT = "text"
# What an answer says that admits that nothing was understood; the training's own sentence among them.
ADMITS = re.compile(r"(not|n't|unable to|cannot) (\w+ ){0,3}(hear|heard|understand|make out)|nothing|nobody", re.I)
assert ADMITS.search(ANSWER)

Found = dict[str, list[Any]]


def scores_of(found: Found, text: Found | None) -> dict[str, Interval]:
    """The figures of a system on a set."""
    measured = {}
    if "heard" in found:  # an adapter without an embedding for each token has no words nearest to it
        measured["WER heard"] = error_rate(found["heard"], found["said"], language="en")
    if "repeat" in found:
        measured["WER repeat"] = error_rate(found["repeat"], found["said"], language="en")
    if "chat" in found and text is not None and text["id"] == found["id"]:
        for one in answer_metrics(found["chat"], text["chat"], language="en"):
            measured[f"{one.name} of answers"] = one
    for name in ("response", "input"):
        if f"{name}_kl" in found:
            measured[f"{name} KL"] = ratio(f"{name} KL", found[f"{name}_kl"], found[f"{name}_tokens"])
    if "counted" in found:
        wrong = [abs(a - b) for a, b in zip(found["counted"], found["tokens"], strict=True)]
        measured["token-count error, %"] = ratio("token-count error", wrong, found["tokens"], 100)
    if any(found.get("boundary_ms", ())):
        late = [[abs(ms) for ms in row] for row in found["boundary_ms"]]
        measured["boundary error, ms"] = ratio("boundary error", [sum(row) for row in late], [len(row) for row in late])
    return {name: bootstrap_interval(one.statistics, one.score_of) for name, one in measured.items()}


def false_answers(found: Found) -> str:
    """Of how many clips in which nobody speaks an answer says something else than that."""
    wrong = sum(not ADMITS.search(answer) for answer in found["chat"])
    return f"{wrong} of {len(found['chat'])}"


def curve(log: str) -> list[dict[str, float]]:
    """What training logged in validation, as numbers."""
    lines = (line.partition("| valid | ")[2] for line in log.splitlines() if "| valid | {" in line)
    return [{name: float(value) for name, value in json.loads(line).items() if _is_number(value)} for line in lines]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Every term that validation logged, over updates, a picture for each training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = ("token_ce", "input_kl", "response_kl")
    figure, axes = plt.subplots(1, max(1, len(curves)), figsize=(6 * max(1, len(curves)), 4), squeeze=False)
    for axis, (name, points) in zip(axes[0], curves.items(), strict=False):
        for term in terms:
            values = [(p["valid_num_updates"], p[f"valid_{term}"]) for p in points if f"valid_{term}" in p]
            if values:
                axis.plot(*zip(*values, strict=True), marker="o", label=term.replace("_", " "))
        axis.set(title=name, xlabel="updates", ylabel="nats per token", yscale="log")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--logs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.results.glob("*.json"))}
    if not results:
        raise ValueError(f"{args.results} holds no results: run hear.py first")
    texts = results.get(TEXT, {"sets": {}})["sets"]
    names = dict.fromkeys(name for result in results.values() for name in result["sets"])
    report: dict[str, Any] = {"sets": {}}
    lines = ["# What was heard", ""]
    for name in names:
        if name == "nothing":
            continue
        scores = {
            system: scores_of(result["sets"][name], texts.get(name))
            for system, result in results.items()
            if name in result["sets"] and (system != TEXT or "repeat" in result["sets"][name])
        }
        rows = max(len(result["sets"][name]["id"]) for result in results.values() if name in result["sets"])
        lines += [f"## {name} ({rows} utterances)", "", score_table(scores, 2)]
        report["sets"][name] = {s: {m: i._asdict() for m, i in found.items()} for s, found in scores.items()}
    silent = {s: r["sets"]["nothing"] for s, r in results.items() if "nothing" in r["sets"]}
    if silent:
        report["false_answers"] = {system: false_answers(found) for system, found in silent.items()}
        lines += ["## Clips in which nobody speaks: answers to something", ""]
        lines += [f"- {system}: {count}" for system, count in report["false_answers"].items()] + [""]
    curves = {path.stem: curve(path.read_text(encoding="utf-8", errors="replace")) for path in args.logs}
    report["curves"] = curves
    args.out.mkdir(parents=True, exist_ok=True)
    if any(curves.values()):
        draw({name: points for name, points in curves.items() if points}, args.out / "curve.png")
        lines += ["![learning curves](curve.png)", ""]
    lines += examples(results)
    write_whole(args.out / "report.md", "\n".join(lines))
    write_whole(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"{args.out}/report.md")


def examples(results: dict[str, Any], count: int = 6) -> list[str]:
    """What each system that hears made of the first rows of the spoken sets, and its answers where it was asked.

    The texts of the recordings that are fetched stay where they are.
    """
    lines: list[str] = []
    for system, result in results.items():
        for name, found in result["sets"].items():
            if system == TEXT or not name.startswith("test"):
                continue
            columns = [column for column in ("said", "heard", "chat") if column in found]
            lines += [f"## {system}, {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in list(zip(*(found[column] for column in columns), strict=True))[:count]:
                cells = [" ".join(cell.replace("|", " ").split()) for cell in row]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return lines


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"write_report: {error}")
