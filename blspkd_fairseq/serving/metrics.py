"""Figures of a server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blspkd_fairseq.generation.streaming import Delta

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures.

    Args:
        active: answers that are decoded or wait, now.
        rows: answers that are decoded together at most.
    """

    def __init__(self, active: Callable[[], int], rows: int) -> None:
        self.registry = one = CollectorRegistry()
        self._requests = Counter("blspkd_requests", "Requests answered.", ["path", "status"], registry=one)
        self._seconds = Histogram(
            "blspkd_request_seconds", "From request to end of answer.", ["path"], buckets=_SECONDS, registry=one
        )
        self._first = Histogram(
            "blspkd_first_token_seconds", "From the whole request to the first text.", buckets=_SECONDS, registry=one
        )
        self._prompt = Counter("blspkd_prompt_tokens", "Tokens of prompts, speech included.", registry=one)
        self._reused = Counter("blspkd_reused_tokens", "Those whose keys and values were known.", registry=one)
        self._answer = Counter("blspkd_answer_tokens", "Tokens of answers.", registry=one)
        self._audio = Counter("blspkd_audio_seconds", "Seconds of audio received.", registry=one)
        running = Gauge("blspkd_answers_running", "Answers that are decoded.", registry=one)
        running.set_function(lambda: min(active(), rows))
        waiting = Gauge("blspkd_answers_waiting", "Answers that wait for a place.", registry=one)
        waiting.set_function(lambda: max(0, active() - rows))

    def note_request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def note_first_text(self, seconds: float) -> None:
        """Notes the seconds to the first text of an answer."""
        self._first.observe(seconds)

    def note_audio(self, seconds: float) -> None:
        """Adds audio that was received."""
        self._audio.inc(seconds)

    def note_step(self, deltas: Sequence[Delta]) -> None:
        """Adds the tokens of the rows that ended with this step of the decoder."""
        for delta in deltas:
            if delta.usage is not None:
                self._prompt.inc(delta.usage.prompt)
                self._reused.inc(delta.usage.reused)
                self._answer.inc(delta.usage.answer)

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self.registry)
