"""Costs of answers: systems in turns, on a stand-in whose times are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny

from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.evaluation.cost import cost_section
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.systems import cost
from blspkd_fairseq.systems.answers import Questions
from blspkd_fairseq.systems.cost import measure_costs
from blspkd_fairseq.systems.systems import Answer, Utterance


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow:
    """Takes some seconds and then some for each token."""

    hears = True

    def __init__(self, name: str, begin: float, token: float, clock: Clock, log: list[str]) -> None:
        self.name, self.begin, self.token, self.clock, self.log = name, begin, token, clock, log
        self.loaded = False

    def identity(self) -> dict[str, str]:
        return {}

    def load(self) -> None:
        self.loaded = True
        self.log.append(self.name)

    def unload(self) -> None:
        self.loaded = False

    def answer(self, batch: Sequence[Utterance], options: DecodingOptions, is_asr: bool = False) -> list[Answer]:
        assert self.loaded and len(batch) == 1 and batch[0].waveform is not None
        self.clock.now += self.begin + self.token * options.max_new_tokens
        return [Answer("x")]


def test_systems_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_split(tmp_path, "test", 6)
    manifest = Manifest.load(tmp_path / "test.tsv")
    clock, log = Clock(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(cost, "time", clock)
    systems = {"a": Slow("a", 0.5, 0.01, clock, log), "b": Slow("b", 0.1, 0.02, clock, log)}
    questions = Questions("qa", manifest, "chat", options=DecodingOptions(max_new_tokens=10))
    found = measure_costs(systems, questions, rows=4)
    assert log == ["a", "b", "b", "a", "a", "b"]
    seconds = float(np.sum(manifest.n_frames[:4])) / 16_000
    assert found["a"].real_time_factor == pytest.approx(4 * 0.6 / seconds)
    assert (found["a"].first_token_ms, found["b"].first_token_ms) == pytest.approx((510, 120))
    assert (found["b"].rows, found["b"].turns) == (4, 3)
    table = cost_section(found)
    assert "| a |" in table and "| 510 |" in table and "4 utterances one by one" in table
