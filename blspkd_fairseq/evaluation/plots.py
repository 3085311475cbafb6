"""Pictures. Needs matplotlib, which the extra ``quickstart`` brings."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio
from blspkd_fairseq.evaluation.robustness import Condition, parse_condition
from blspkd_fairseq.evaluation.significance import Interval
from blspkd_fairseq.evaluation.tables import in_full
from blspkd_fairseq.evaluation.verdicts import Verdict
from blspkd_fairseq.files import whole_file

if TYPE_CHECKING:
    from blspkd_fairseq.hub import AlignedToken, BlspKd

_FRAMES_PER_SECOND = 50
_TIMELINE_SECONDS = 8.0
_LONGEST_PICTURE = 300.0
_FAINTEST_DB = -140


def plot_alignment(
    model: "BlspKd",
    audio: str | Path,
    text: str,
    path: Path,
    tokens: "Sequence[AlignedToken] | None" = None,
    vad: str | None = None,
) -> None:
    """Spectrogram of speech over its CIF weights, cut at token boundaries, labelled with the tokens heard.

    Args:
        model: hears. audio: a file. text: the title. path: of the picture.
        tokens: of :meth:`BlspKd.align`, which is asked without them.
        vad: as there.

    Raises:
        AudioError: audio that cannot be used, or of more than 300 s. ValueError: the adapter has no CIF.
    """
    from matplotlib.figure import Figure

    samples = load_audio(audio, max_seconds=_LONGEST_PICTURE)
    seconds = len(samples) / SAMPLE_RATE
    tokens = model.align(audio, vad=vad) if tokens is None else tokens
    alpha = np.zeros(max(1, round(seconds * _FRAMES_PER_SECOND)), np.float32)
    for window in model.timed_windows(audio, vad):
        adapted = model.adapt((window.samples, SAMPLE_RATE), reads=False)
        if adapted.alpha is None:
            raise ValueError("the adapter has no CIF weights to draw")
        place = alpha[round(window.start * _FRAMES_PER_SECOND) :]
        heard = adapted.alpha[0].float().cpu().numpy()[: len(place)]
        place[: len(heard)] = heard

    figure = Figure(figsize=(max(11.0, seconds), 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    *_, image = upper.specgram(samples + 1e-7, NFFT=400, Fs=SAMPLE_RATE, noverlap=240, cmap="magma")
    image.set_clim(_FAINTEST_DB, max(_FAINTEST_DB + 1, image.get_array().max()))  # silence has nothing above it
    upper.set(ylabel="Hz", ylim=(0, 8000), xlim=(0, seconds))
    upper.set_title(text, fontsize=12, loc="left", pad=22)
    lower.fill_between(np.arange(len(alpha)) / _FRAMES_PER_SECOND, alpha, step="post", color="tab:orange", alpha=0.7)
    lower.set(xlabel="seconds", ylabel="CIF weight", ylim=(0, None))
    for token in tokens:
        for axis in (upper, lower):
            axis.axvline(token.end, color="tab:cyan", linewidth=1)
        middle = (token.start + token.end) / 2
        upper.text(middle, 8150, token.token.strip() or "␣", ha="center", va="bottom", fontsize=9, clip_on=False)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix.removeprefix(".") or "png")


def plot_before_after(
    sets: Mapping[str, Any], measures: Mapping[str, tuple[str, str, bool]], names: Mapping[str, str], path: Path
) -> None:
    """One panel per measure: before and after training on every held-out set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, (len(measures) + 1) // 2).flatten()
    for axis, (measure, (heading, form, less_is_better)) in zip(axes, measures.items(), strict=False):
        for offset, (when, color) in enumerate((("before", "lightgray"), ("after", "tab:blue"))):
            values = [rows[when][measure] for rows in sets.values()]
            bars = axis.bar(np.arange(len(values)) + 0.4 * offset, values, 0.38, color=color, label=when)
            axis.bar_label(bars, [format(value, form) for value in values], fontsize=8)
        axis.set_xticks(np.arange(len(sets)) + 0.2, [names[name].split(", ")[-1] for name in sets], fontsize=8)
        better = "lower" if less_is_better else "higher"
        axis.set_title(f"{textwrap.fill(heading, 45)}\n({better} is better)", fontsize=8)
        axis.margins(y=0.15)
    for axis in axes[len(measures) :]:
        axis.set_axis_off()
    axes[len(measures) - 1].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def plot_robustness(scores: Mapping[str, Mapping[str, Interval]], measure: str, path: Path) -> None:
    """One panel per kind of degradation, one curve per system with its interval; dashed: clean speech.

    Args:
        scores: ``scores[system][condition]``, conditions as :func:`parse_condition` reads them.
        measure: name of the y axis.
        path: the picture.
    """
    from matplotlib.figure import Figure

    conditions = [parse_condition(text) for text in dict.fromkeys(name for row in scores.values() for name in row)]
    kinds = list(dict.fromkeys(condition.kind for condition in conditions if condition.kind != "clean"))
    columns = min(3, max(1, len(kinds)))
    rows = max(1, -(-len(kinds) // columns))
    figure = Figure(figsize=(0.6 + 3.9 * columns, 0.6 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, kind in zip(axes, kinds, strict=False):
        _draw_degradation(axis, sorted((c for c in conditions if c.kind == kind), key=_level), scores)
        axis.tick_params(labelleft=True)
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel(textwrap.fill(in_full(measure), 30))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=110)


def _level(condition: Condition) -> float:
    return condition.level or 0.0


def _draw_degradation(axis: Any, conditions: Sequence[Condition], scores: Mapping[str, Mapping[str, Interval]]) -> None:
    """One kind: a curve over its levels, or points side by side if it has none."""
    has_levels = conditions[0].level is not None
    axis.set_title(conditions[0].kind, fontsize=11)
    axis.set_xlabel(conditions[0].axis or " ")
    axis.grid(alpha=0.3)
    for index, (system, row) in enumerate(scores.items()):
        color = f"C{index}"
        points = [(_level(c) if has_levels else index, row[str(c)]) for c in conditions if str(c) in row]
        x, y = [level for level, _ in points], [interval.score for _, interval in points]
        low, high = [interval.low for _, interval in points], [interval.high for _, interval in points]
        axis.plot(x, y, marker="o", markersize=4, color=color, label=system)
        axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        if len(points) == 1:
            axis.vlines(x, low, high, color=color, linewidth=1.5)
        if "clean" in row:
            axis.axhline(row["clean"].score, color=color, linestyle="--", linewidth=1)
    if has_levels:
        axis.set_xticks([_level(condition) for condition in conditions])
    else:
        axis.set(xticks=[], xlim=(-0.7, len(scores) - 0.3))


def plot_scores(scores: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """One panel per metric, one bar per system with its interval.

    Args:
        scores: ``scores[system][metric]``; a system may lack a metric.
        path: the picture.
    """
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    columns = min(4, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    height = 0.7 + 0.34 * max(1, len(scores))
    figure = Figure(figsize=(1.8 + 3.0 * columns, 0.3 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, metric in zip(axes, metrics, strict=False):
        _draw_bars(axis, [row.get(metric) for row in scores.values()])
        axis.set_title(textwrap.fill(in_full(metric), 26), fontsize=10)
        axis.tick_params(labelsize=9)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    axes[0].set_yticks(range(len(scores)), list(scores))
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def _draw_bars(axis: Any, intervals: Sequence[Interval | None]) -> None:
    """Horizontal, from top to bottom; the figure stands behind the interval."""
    for index, one in enumerate(intervals):
        if one is None or np.isnan(one.score):
            axis.text(0, index, " –", va="center", fontsize=9)
            continue
        axis.barh(index, one.score, 0.6, color=f"C{index}", alpha=0.75)
        axis.plot([one.low, one.high], [index, index], color="black", linewidth=1.5)
        axis.annotate(
            f"{one.score:.1f}", (max(one.high, one.score), index), (4, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    axis.margins(x=0.2)
    axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    axis.spines[["top", "right"]].set_visible(False)


def plot_contrasts(verdicts: Sequence[Verdict], path: Path) -> None:
    """Differences in favour of what is to be shown, with 95 % intervals, seeds as dots, the smallest effect as a band.

    Each has its own axis, as units differ.
    """
    from matplotlib.figure import Figure

    shown = [one for one in verdicts if one.estimate]
    figure = Figure(figsize=(9, 0.6 + 1.05 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), 1, squeeze=False).flatten()
    for axis, one in zip(axes, shown, strict=False):
        _draw_contrast(axis, one)
    if not shown:
        axes[0].text(0.5, 0.5, "no contrast could be estimated", ha="center")
        axes[0].set_axis_off()
    figure.savefig(path, dpi=110)


def _draw_contrast(axis: Any, one: Verdict) -> None:
    assert one.estimate is not None
    sign = -1 if one.less_is_better else 1
    low, high = sorted(sign * end for end in one.estimate.interval())
    if not np.isnan(one.smallest_effect):
        axis.axvspan(-one.smallest_effect, one.smallest_effect, color="lightgray", alpha=0.6, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.plot([low, high], [0, 0], color="tab:blue", linewidth=2)
    axis.plot([sign * value for value in one.estimate.per_seed], [0.35] * len(one.estimate.per_seed), ".", color="gray")
    axis.plot([sign * one.estimate.value], [0], "o", color="tab:blue")
    verdict = f": {one.verdict}" if one.verdict else " (exploratory)"
    axis.set_title(f"{one.contrast.name}{verdict}", fontsize=9, loc="left")
    axis.set_xlabel(f"{one.contrast.task}: {one.metric}, to the right in its favour", fontsize=8)
    axis.set(ylim=(-0.6, 0.8), yticks=[])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)


def plot_power(tables: Mapping[str, Mapping[int, Mapping[int, float]]], target: float, path: Path) -> None:
    """Power over rows, a curve for each number of seeds, a panel for each question; dashed: what is wanted.

    Args:
        tables: ``tables[question][seeds][rows]``, 0 to 1.
        target: the power that is wanted.
        path: the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 4.6 * len(tables), 4), layout="constrained")
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False).flatten()
    for axis, (name, by_seeds) in zip(axes, tables.items(), strict=True):
        for seeds, by_rows in by_seeds.items():
            axis.plot(
                list(by_rows), [100 * one for one in by_rows.values()], marker="o", markersize=3, label=f"{seeds}"
            )
        axis.axhline(100 * target, color="black", linestyle="--", linewidth=0.8)
        rows = list(next(iter(by_seeds.values())))
        axis.set(xscale="log", xlabel="rows", ylim=(0, 101))
        axis.minorticks_off()
        axis.set_xticks(rows, [f"{one:,}" for one in rows], fontsize=8)
        axis.set_title(textwrap.fill(name, 45), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("power (%)")
    axes[-1].legend(title="seeds", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_boundaries(
    differences_ms: np.ndarray,
    tokens: Sequence[tuple[str, float]],
    words: Sequence[tuple[str, float]],
    path: Path,
) -> None:
    """How far token boundaries are from word ends, as a histogram, and the two timelines of one utterance.

    Args:
        differences_ms: ``[words]``, token end minus word end of all utterances.
        tokens, words: text and end in seconds of the example; its first 8 seconds are drawn.
        path: the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[2, 1.1])
    upper.hist(differences_ms, bins="auto" if len(differences_ms) else 1, color="tab:blue", alpha=0.7)
    upper.axvline(0, color="black", linewidth=1)
    if len(differences_ms):
        mean, bias = np.abs(differences_ms).mean(), differences_ms.mean()
        upper.axvline(bias, color="tab:red", linestyle="--", linewidth=1.5)
        upper.set_title(
            f"{len(differences_ms)} words: {mean:.0f} ms apart on average, bias {bias:+.0f} ms (dashed)", fontsize=11
        )
    upper.set(xlabel="end of the word's last token − end of the word (ms)", ylabel="words")
    for height, row, color in ((1, words, "tab:green"), (0, tokens, "tab:orange")):
        _draw_timeline(lower, row, height, color)
    end = min(_TIMELINE_SECONDS, max((end for row in (tokens, words) for _, end in row), default=1.0))
    lower.set(xlabel="seconds", xlim=(0, 1.01 * end), ylim=(0, 2), yticks=[0.5, 1.5], yticklabels=["tokens", "words"])
    figure.savefig(path, dpi=110)


def _draw_timeline(axis: Any, row: Sequence[tuple[str, float]], height: float, color: str) -> None:
    """A line at every end, the text between it and the one before."""
    start = 0.0
    for text, end in (one for one in row if one[1] <= _TIMELINE_SECONDS):
        axis.plot([end, end], [height, height + 1], color=color, linewidth=1.5)
        axis.text(
            (start + end) / 2, height + 0.5, text.strip() or "␣", ha="center", va="center", fontsize=8, rotation=45
        )
        start = end
