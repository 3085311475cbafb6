"""What an answer costs: real-time factor, time to the first token and peak memory, of systems measured in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.evaluation.cost import Cost
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.systems.answers import Questions, utterance_of
from blspkd_fairseq.systems.peak_memory import PeakMemory
from blspkd_fairseq.systems.systems import System, Utterance


class _Turn(NamedTuple):
    """One system once over all rows. Attributes: seconds of each answer and each first token; peak MiB, or None."""

    seconds: list[float]
    first_token: list[float]
    peak_mib: float | None


def measure_costs(systems: Mapping[str, System], questions: Questions, rows: int, turns: int = 3) -> dict[str, Cost]:
    """Answers the first rows one by one, every system in each of several turns, so that none has the quiet machine.

    Args:
        systems: one is in memory at a time; the first row of each turn is answered once before it is timed.
        questions: the test set, on clean speech.
        rows: how many, as far as there are.
        turns: how often.

    Returns:
        Medians over turns; the spread of the turns tells how quiet the machine was.
    """
    indices = range(min(rows, len(questions.manifest)))
    seconds_of_audio = [int(questions.manifest.n_frames[i]) / SAMPLE_RATE for i in indices]
    taken: dict[str, list[_Turn]] = {name: [] for name in systems}
    for turn in range(turns):
        names = list(systems)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            system = systems[name]
            gc.collect()  # what the system before held is none of this one's memory
            system.load()
            taken[name].append(_one_turn(system, [utterance_of(system, questions, i) for i in indices], questions))
            system.unload()
    return {name: _cost(of_system, seconds_of_audio) for name, of_system in taken.items()}


def _one_turn(system: System, batch: Sequence[Utterance], questions: Questions) -> _Turn:
    is_asr = questions.kind == "asr"
    first_token = replace(questions.options, max_new_tokens=1, min_new_tokens=0)
    _seconds(system, batch[0], questions.options, is_asr)
    peak = PeakMemory()
    seconds = [_seconds(system, one, questions.options, is_asr) for one in batch]
    mib = peak.mib()
    return _Turn(seconds, [_seconds(system, one, first_token, is_asr) for one in batch], mib)


def _seconds(system: System, utterance: Utterance, options: DecodingOptions, is_asr: bool) -> float:
    _wait()
    begin = time.perf_counter()
    system.answer([utterance], options, is_asr)
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cost(turns: Sequence[_Turn], seconds_of_audio: Sequence[float]) -> Cost:
    factors = [sum(turn.seconds) / sum(seconds_of_audio) for turn in turns]
    peaks = [turn.peak_mib for turn in turns if turn.peak_mib is not None]
    return Cost(
        real_time_factor=float(np.median(factors)),
        lowest_factor=min(factors),
        highest_factor=max(factors),
        first_token_ms=1000 * float(np.median([np.median(turn.first_token) for turn in turns])),
        peak_mib=float(np.median(peaks)) if peaks else None,
        rows=len(seconds_of_audio),
        turns=len(turns),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    )
