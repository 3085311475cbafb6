"""Limits of a server: for one request, and for all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        rows: answers that are decoded together in one batch.
        waiting: answers that may wait for a place in it; more are refused.
        body_mib: size of a request.
        audio_seconds: length of the audio of a request.
        body_seconds: time that a client has to send its request.
        answer_seconds: time from the whole request to the end of the answer.
        new_tokens: tokens of an answer, and of those that ask for no number of their own.
        choices: answers of one request (``n``).
        kept_mib: memory for keys and values of earlier conversations, which those that go on do not read again.
    """

    rows: int = 16
    waiting: int = 256
    body_mib: float = 25.0
    audio_seconds: float = 600.0
    body_seconds: float = 60.0
    answer_seconds: float = 300.0
    new_tokens: int = 512
    choices: int = 8
    kept_mib: float = 256.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "waiting" else 1
            if not math.isfinite(value) or value < least and isinstance(field.default, int) or value < 0:
                raise ValueError(f"the limit {field.name} must be at least {least}, got {value}")
            if isinstance(field.default, float) and value == 0:
                raise ValueError(f"the limit {field.name} must be more than 0")

    @property
    def body_bytes(self) -> int:
        """Size of a request in bytes."""
        return int(self.body_mib * 2**20)
