"""Writes the main rows of the comparison into the README's table of the comparison.

    python examples/comparison/readme_table.py --results examples/comparison/results

The seeds' range of each figure is in RESULTS.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from report import Report, training_minutes
from systems import UNTRAINED

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "text": "the LLM reads the transcript",
    "cascade": "cascade: Whisper tiny.en, then the LLM",
    "blsp": "BLSP: CNN, cross-entropy",
    "cnn_kl": "CNN, response KL",
    "blsp_kd": "BLSP-KD from scratch",
    "warm_up": "warm-up: token cross-entropy alone",
    "warm_blsp_kd": "half of it warm-up, then BLSP-KD",
    "longer": "... half as long again",
    "x_opd": "... X-OPD (sampled) on top",
    "x_opd_exact": "... X-OPD (exact) on top",
    "small": "warm-up, then BLSP-KD, rank 4, {minutes:.0f} minutes",
}
COLUMNS = {
    'WER of "repeat", %': ("heard", "wer"),
    "... a voice never heard": ("unheard", "wer"),
    "BLEU of continuations against the text's": ("heard", "self_bleu"),
    "... of answers": ("questions_heard", "answer_bleu"),
    "response KL": ("heard", "response_kl"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="of compare.py (default: the texts beside the results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(arguments)
    text, made = args.readme.read_text(encoding="utf-8"), table(Report.load(args.results, args.data))
    begin = text.index("| system | WER of")
    args.readme.write_text(text[:begin] + made + text[text.index("\n\n", begin) + 1 :], encoding="utf-8")


def table(report: Report) -> str:
    """The seeds' mean with its interval."""
    lines = [f"| system | {' | '.join(COLUMNS)} | seeds |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, title in ROWS.items():
        if name in report.runs.of:
            cells = [report.cell(name, *column, with_range=False) for column in COLUMNS.values()]
            seeds = "–"
            if name not in UNTRAINED:
                seeds = str(len(report.runs.of[name]))
                title = title.format(minutes=training_minutes(report.first(name)))
            lines.append(f"| {title} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
