"""What an answer of a system costs, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from blspkd_fairseq.evaluation.tables import markdown_table


class Cost(NamedTuple):
    """One system, utterances one by one.

    Attributes:
        real_time_factor: seconds of computing per second of speech, median of the turns; lowest and highest of them.
        first_token_ms: from having the audio to the first token, median of the utterances; a cascade transcribes first.
        peak_mib: memory at most, weights included (on a CPU, of the whole process); None where nothing tells it.
        rows, turns: what was measured. device: where.
    """

    real_time_factor: float
    lowest_factor: float
    highest_factor: float
    first_token_ms: float
    peak_mib: float | None
    rows: int
    turns: int
    device: str


def cost_section(costs: Mapping[str, Cost]) -> str:
    """Part of a report."""
    one = next(iter(costs.values()))
    rows = [
        [
            system,
            f"{cost.real_time_factor:.3f} ({cost.lowest_factor:.3f} to {cost.highest_factor:.3f})",
            f"{cost.first_token_ms:.0f}",
            "–" if cost.peak_mib is None else f"{cost.peak_mib:,.0f}",
        ]
        for system, cost in costs.items()
    ]
    heading = ["system", "real-time factor (turns)", "time to first token (ms)", "peak memory (MiB)"]
    text = f"{one.rows} utterances one by one, systems in turns ({one.turns} each), on {one.device}."
    return f"## Cost\n\n{text}\n\n" + markdown_table(heading, rows)
