"""Draws what was heard after each part of the training, from the table of the guide (README.md beside this file).

python examples/open_vocabulary/draw_parts.py --out examples/open_vocabulary/results/parts.png
"""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

GUIDE = Path(__file__).with_name("README.md")
SETS = ("heard voices", "never heard", "telephone", "a game's actors")
BARS = {"never heard": 15, "telephone": 30, "a game's actors": 40}  # that were set before
_FIGURE = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]")


class Part(NamedTuple):
    """A line of the table. Attributes: its name, and for each of the sets the WER with its interval, in percent."""

    name: str
    figures: list[tuple[float, float, float]]


def read_parts(markdown: str) -> list[Part]:
    """The lines that begin with a name and have a figure for each set.

    Raises:
        ValueError: there are none.
    """
    parts = []
    for line in markdown.splitlines():
        found = [(float(score), float(low), float(high)) for score, low, high in _FIGURE.findall(line)]
        if line.startswith("| ") and len(found) == len(SETS):
            parts.append(Part(line.split("|")[1].strip(), found))
    if not parts:
        raise ValueError(f"no line of the table has a figure with its interval for each of {', '.join(SETS)}")
    return parts


def draw(parts: Sequence[Part], path: Path) -> None:
    """A line for each set, with its intervals; dotted: what was to be reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, name in enumerate(SETS):
        scores, lows, highs = zip(*(part.figures[number] for part in parts), strict=True)
        places = [place + 0.08 * (number - 1.5) for place in range(len(parts))]  # so that intervals stand apart
        errors = [
            [s - low for s, low in zip(scores, lows, strict=True)],
            [h - s for s, h in zip(scores, highs, strict=True)],
        ]
        drawn = axis.errorbar(places, scores, errors, marker="o", capsize=2, label=name)
        if name in BARS:
            axis.axhline(BARS[name], color=drawn[0].get_color(), linestyle=":", linewidth=1)
    names = [textwrap.fill(part.name, 12) for part in parts]
    axis.set_xticks(range(len(parts)), names, fontsize=8)
    axis.set(ylabel="WER of the nearest tokens, %", ylim=(0, None))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper right", title="dotted: the bar set before", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a picture")
    args = parser.parse_args(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(read_parts(GUIDE.read_text(encoding="utf-8")), args.out)


if __name__ == "__main__":
    main()
