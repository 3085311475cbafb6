"""A comparison as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from blspkd_fairseq.evaluation.contrasts import Plan, registration
from blspkd_fairseq.evaluation.plain import plain
from blspkd_fairseq.evaluation.planned_runs import Comparison
from blspkd_fairseq.evaluation.plots import plot_contrasts
from blspkd_fairseq.evaluation.tables import format_p, markdown_table
from blspkd_fairseq.evaluation.variance import Estimate
from blspkd_fairseq.evaluation.verdicts import NONE, Verdict
from blspkd_fairseq.files import write_whole


def write_comparison(comparison: Comparison, plan: Plan, look: int, folder: Path) -> None:
    """Writes ``compare.md``, ``compare.json`` and ``contrasts.png``; each file appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_contrasts([*comparison.primary, *comparison.secondary], folder / "contrasts.png")
    content = {"plan": {"file": plan.path.name, "sha256": plan.sha256, "look": look}, **vars(comparison)}
    write_whole(folder / "compare.json", json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "compare.md", markdown(comparison, plan, look))


def markdown(comparison: Comparison, plan: Plan, look: int) -> str:
    """The comparison as text."""
    parts = ["# Comparison\n", _plan_text(plan, look)]
    if comparison.primary:
        parts += ["## What was to be shown\n", _rules(plan, look), _primary_table(comparison.primary)]
        parts.append(_sentences(comparison.primary))
    if comparison.secondary:
        parts += ["## Exploratory\n", "Intervals without verdicts: these contrasts were not what was to be shown.\n"]
        parts += [_secondary_table(comparison.secondary), _sentences(comparison.secondary)]
    parts.append("![differences](contrasts.png)\n")
    parts += ["## Where the uncertainty comes from\n", _variance_table([*comparison.primary, *comparison.secondary])]
    parts += ["## Scores\n", _score_tables(comparison)]
    return "\n".join(parts)


def _plan_text(plan: Plan, look: int) -> str:
    lines = [f"Plan: `{plan.path.name}`, sha256 `{plan.sha256}`. {registration(plan)}"]
    if look:
        lines.append(f"Look {look} of {len(plan.looks)}: {len(plan.seeds_at(look))} of {len(plan.seeds)} seeds.")
    if plan.exclusions:
        lines.append(f"Left out: {plan.exclusions}.")
    for task in plan.tasks.values():
        unit = " and ".join(task.clusters) + (" (crossed)" if len(task.clusters) == 2 else "")
        lines.append(
            f"{task.name}: {task.metric}, smallest effect of interest {task.smallest_effect:g}; independent: "
            + (unit or "rows")
            + "."
        )
    return "\n\n".join(lines) + "\n"


def _rules(plan: Plan, look: int) -> str:
    level = plan.level_at(look)
    return (
        f"Better less worse, mean over seeds, with its 95 % t interval over seeds and clusters. Holm's p is over all "
        f"{len(plan.primary)} primary contrasts. *Holds*: it is below {level:g}, the difference at least the smallest "
        f"effect. *Equivalent*: the {100 * (1 - 2 * level):g} % interval lies within that effect. Else *undecided*.\n"
    )


def _primary_table(verdicts: Sequence[Verdict]) -> str:
    heading = [
        "contrast",
        "metric",
        "better",
        "worse",
        "difference",
        "seeds",
        "p",
        "Holm",
        "smallest effect",
        "verdict",
    ]
    rows = [
        [
            *_cells(one),
            format_p(one.estimate.p if one.estimate else math.nan),
            format_p(one.corrected),
            f"{one.smallest_effect:g}",
            f"**{one.verdict}**" if one.verdict != NONE else one.verdict,
        ]
        for one in verdicts
    ]
    return markdown_table(heading, rows)


def _secondary_table(verdicts: Sequence[Verdict]) -> str:
    heading = ["contrast", "metric", "better", "worse", "difference", "seeds"]
    return markdown_table(heading, [_cells(one) for one in verdicts])


def _cells(one: Verdict) -> list[str]:
    better, worse = (
        f"{name} {score:.2f}" for name, score in zip((one.contrast.better, one.contrast.worse), one.scores, strict=True)
    )
    arrow = "↓" if one.less_is_better else "↑"
    return [
        one.contrast.name,
        f"{one.contrast.task}: {one.metric} {arrow}",
        better,
        worse,
        _difference(one),
        _seeds(one),
    ]


def _difference(one: Verdict) -> str:
    if one.estimate is None:
        return f"{one.scores[0] - one.scores[1]:+.2f}"
    low, high = one.estimate.interval()
    return f"{one.estimate.value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _seeds(one: Verdict) -> str:
    if one.estimate is None:
        return "–"
    if one.estimate.seeds is None:
        return "none (these very systems)"
    pairs = one.estimate.per_seed
    return f"{one.estimate.seeds}" + (f" ({min(pairs):+.2f} to {max(pairs):+.2f})" if len(pairs) > 1 else "")


def _sentences(verdicts: Sequence[Verdict]) -> str:
    return "".join(f"- {one.contrast.name}: {one.sentence}.\n" for one in verdicts if one.sentence)


def _variance_table(verdicts: Sequence[Verdict]) -> str:
    """Standard errors that seeds, clusters and their interaction alone would give."""
    heading = ["contrast", "of seeds", "of clusters", "of both together", "standard error", "degrees of freedom"]
    rows = []
    for one in verdicts:
        if e := one.estimate:
            parts = [math.sqrt(max(v, 0)) for v in (e.v_seeds, e.v_clusters, e.v_residual)]
            rows.append(
                [one.contrast.name, *(f"{part:.2f}" for part in parts), f"{e.standard_error:.2f}", f"{e.df:.1f}"]
            )
    return markdown_table(heading, rows)


def _score_tables(comparison: Comparison) -> str:
    parts = []
    for title, systems in comparison.scores.items():
        rows = [[name, *_score_cells(score)] for name, score in systems.items()]
        table = markdown_table(["system", "mean over seeds", "of each seed"], rows)
        parts.append(f"{title}, `{comparison.signatures[title]}`\n\n{table}")
    return "\n".join(parts)


def _score_cells(score: Estimate | str) -> list[str]:
    if isinstance(score, str):
        return [score, "–"]
    low, high = score.interval()
    return [f"{score.value:.2f} [{low:.2f}, {high:.2f}]", ", ".join(f"{one:.2f}" for one in score.per_seed) or "–"]
