"""Pictures. Needs matplotlib, which the extra ``quickstart`` brings."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio

if TYPE_CHECKING:
    from blspkd_fairseq.hub import BlspKd

_FRAMES_PER_SECOND = 50


def plot_alignment(model: "BlspKd", audio: str | Path, text: str, path: Path) -> None:
    """Spectrogram of an utterance over its CIF weights, cut at token boundaries, labelled with the tokens heard."""
    from matplotlib.figure import Figure

    samples = load_audio(audio)
    adapted = model.adapt(audio)
    tokens = model.align(audio)
    if adapted.alpha is None:
        raise ValueError("the adapter has no CIF weights to draw")
    alpha = adapted.alpha[0].float().cpu().numpy()
    seconds = len(samples) / SAMPLE_RATE

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    upper.specgram(samples + 1e-7, NFFT=400, Fs=SAMPLE_RATE, noverlap=240, cmap="magma", vmin=-140)
    upper.set(ylabel="Hz", ylim=(0, 8000), xlim=(0, seconds))
    upper.set_title(text, fontsize=12, loc="left", pad=22)
    lower.fill_between(np.arange(len(alpha)) / _FRAMES_PER_SECOND, alpha, step="post", color="tab:orange", alpha=0.7)
    lower.set(xlabel="seconds", ylabel="CIF weight", ylim=(0, None))
    for token in tokens:
        for axis in (upper, lower):
            axis.axvline(token.end, color="tab:cyan", linewidth=1)
        middle = (token.start + token.end) / 2
        upper.text(middle, 8150, token.token.strip() or "␣", ha="center", va="bottom", fontsize=9, clip_on=False)
    figure.savefig(path, dpi=110)


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
        axis.set_title(f"{heading} ({'lower' if less_is_better else 'higher'} is better)", fontsize=8, wrap=True)
        axis.margins(y=0.15)
    for axis in axes[len(measures) :]:
        axis.set_axis_off()
    axes[len(measures) - 1].legend(fontsize=8)
    figure.savefig(path, dpi=100)
