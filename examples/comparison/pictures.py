"""The pictures of the comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from systems import DIVISORS, MAIN, SCALED, SETS, SMALL, UNTRAINED

if TYPE_CHECKING:
    from report import Report

_MOST_WER = 150


def plot_all(report: "Report", folder: Path) -> None:
    """Writes overview (all systems) and main (the main ones), curves, scaling and robustness as PNG."""
    plot_overview(report, folder / "overview.png", report.shown)
    plot_overview(report, folder / "main.png", [n for n in report.shown if n in (*UNTRAINED, *MAIN, *SMALL)])
    plot_curves(report, folder / "curves.png")
    plot_scaling(report, folder / "scaling.png")
    plot_robustness(report, folder / "robustness.png")


def kl_curve(run: dict[str, Any]) -> list[dict[str, float]]:
    """The validations that have a response KL; those of a warm-up alone and of X-OPD have none."""
    return [point for point in run["curve"] if "response_kl" in point]


def plot_curves(report: "Report", path: Path) -> None:
    """KL and agreement in validation against updates, utterances and minutes, each with what it began with."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True, sharey="row", sharex="col")
    for number, name in enumerate(name for name in report.shown if name in MAIN):
        for index, run in enumerate(report.runs.of[name].values()):
            points = kl_curve(run)
            if not points:
                continue
            updates = np.array([point["num_updates"] for point in points])
            heard = run["utterances_before"] + updates * run["batch"]
            wall = run["wall_before"] + updates / run["updates"] * run["train_wall"]
            label = None if index else report.titles(name)
            for row, figure_name in zip(axes, ("response_kl", "response_agreement"), strict=True):
                values = [point[figure_name] for point in points]
                for axis, x in zip(row, (updates, heard / 1000, wall / 60), strict=True):
                    axis.plot(x, values, "o-", color=f"C{number}", label=label, markersize=3)
    axes[0, 0].set(ylabel="response KL (nats), validation", yscale="log")
    axes[1, 0].set(ylabel="top-1 agreement, validation", xlabel="updates of 16, without a warm-up's")
    axes[1, 1].set(xlabel="thousand utterances, with a warm-up's")
    axes[1, 2].set(xlabel="minutes of training, with a warm-up's")
    axes[0, 0].legend(fontsize=7)
    _save(figure, path)


def plot_scaling(report: "Report", path: Path) -> None:
    """Response KL and WER on unheard sentences against the amount of training data, equal minutes each."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for number, name in enumerate(SCALED):
        of_shares = {1 / divisor: f"{name}_{divisor}" for divisor in DIVISORS} | {1.0: name}
        of_shares = {share: row for share, row in of_shares.items() if row in report.runs.of}
        for axis, measure in zip(axes, ("response_kl", "wer"), strict=True):
            for one, style in (("heard", "o-"), ("unheard", "s--")):
                scores = [report.score(row, one, measure) for row in of_shares.values()]
                label = f"{report.titles(name)}, {SETS[one]}"
                axis.plot(list(of_shares), scores, style, color=f"C{number}", label=label)
    for axis, measure in zip(axes, ("response_kl", "wer"), strict=True):
        axis.set(xlabel="share of the training data", ylabel=report.measure_title(measure), xscale="log")
        axis.set_xticks([1 / 8, 1 / 4, 1 / 2, 1], ["1/8", "1/4", "1/2", "1"])
        axis.minorticks_off()
    axes[0].legend(fontsize=7)
    _save(figure, path)


def plot_robustness(report: "Report", path: Path) -> None:
    """WER of repeat under white noise and babble."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    for number, name in enumerate(name for name in report.shown if "conditions" in report.first(name)):
        for axis, kind in zip(axes, ("white", "babble"), strict=True):
            levels, scores = zip(*report.noise_curve(name, kind), strict=True)
            axis.plot(range(len(levels)), scores, "o-", color=f"C{number}", label=report.titles(name))
            axis.set_xticks(range(len(levels)), levels)
            axis.set(xlabel=f"{'white noise' if kind == 'white' else kind}: signal-to-noise ratio, dB")
    axes[0].set(ylabel="WER of repeat, %, heard voices")
    axes[0].legend(fontsize=7)
    _save(figure, path)


def plot_overview(report: "Report", path: Path, names: Sequence[str]) -> None:
    """WER of repeat and response KL on every test set, with 95 % intervals over utterances."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.4 * len(names) + 1.2), constrained_layout=True, sharey=True)
    places = np.arange(len(names))[::-1]
    for axis, measure, most in zip(axes, ("wer", "response_kl"), (_MOST_WER, np.inf), strict=True):
        for offset, (one, title) in enumerate(SETS.items()):
            found = {place: report.interval(name, one, measure) for place, name in zip(places, names, strict=True)}
            bars = [(place + 0.27 * (1 - offset), bar) for place, bar in found.items() if bar is not None]
            for y, bar in bars:
                label = title if y == bars[0][0] else None
                axis.barh(y, min(bar.score, most), 0.27, color=f"C{offset}", label=label)
                axis.plot(np.minimum([bar.low, bar.high], most), [y, y], color="black", linewidth=1)
    axes[0].set_yticks(places, [report.titles(name) for name in names], fontsize=8)
    axes[0].set(xlabel=f"WER of repeat, % (cut at {_MOST_WER})")
    axes[1].set(xlabel="response KL (nats)")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
