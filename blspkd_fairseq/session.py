"""A conversation that is spoken: hears while the user speaks, and remembers its turns."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, prepare_portion
from blspkd_fairseq.data.conversation import Speech, Turn
from blspkd_fairseq.data.vad import speech_windows
from blspkd_fairseq.data.windows import WindowCutter
from blspkd_fairseq.generation.streaming import Request, Sampling
from blspkd_fairseq.hub import BlspKd

WINDOW_SECONDS = 6.0
"""Of what is heard at once while the user speaks, where the model could take more."""


class ChatSession:
    """Turns of user and model, one after another::

        session = ChatSession(model)
        while microphone.is_open():
            session.feed(*microphone.read())      # heard at once, window by window
        for text in session.answer(max_new_tokens=64):
            print(text, end="")

    Earlier turns are not read again, and of what was fed only the last window is still to hear and to read when the
    answer begins.

    Args:
        model: answers.
        system: system message; by default that of the LLM's template.
        vad: "energy" or "silero": hear only where somebody speaks; None: everything.
        window_seconds: longest window; shorter ones are heard sooner, and with less around them.
    """

    def __init__(
        self, model: BlspKd, system: str = "", vad: str | None = "energy", window_seconds: float = WINDOW_SECONDS
    ) -> None:
        self.model = model
        self.vad = vad
        self.window_seconds = min(window_seconds, model.window_seconds)
        self.turns: list[Turn] = [Turn("system", (system,))] if system else []
        self._speech: list[list[np.ndarray]] = []
        self._parts: list[str | Speech] = []
        self._cutter: WindowCutter | None = None
        self._rate: int | None = None  # of the piece that is fed
        self._resampler: Any = None

    def say(self, part: Any) -> None:
        """Adds to the user's turn: a text with ``say("...")``, or whole audio as :meth:`BlspKd.chat` takes it
        (``say({"audio": AUDIO})``; a path is no text)."""
        self._close_piece()
        if isinstance(part, str):
            self._parts.append(part)
        else:
            audio = part["audio"] if isinstance(part, Mapping) and "audio" in part else part
            windows = self.model.windows(audio, self.vad)
            self._begin_piece().extend(windows)

    def feed(self, chunk: Any, rate: int = SAMPLE_RATE) -> None:
        """Adds a portion of what the user is saying, and hears the windows that it completes.

        Args:
            chunk: ``[samples]``, floats in [-1, 1] or integers as of :func:`prepare_waveform`.
            rate: in Hz, the same for all portions of a piece.

        Raises:
            AudioError: it is not that.
        """
        chunk = prepare_portion(chunk, rate)
        if self._cutter is None:
            self._cutter = WindowCutter(self.window_seconds)
            self._begin_piece()
        self._hear(self._cutter.feed(self._at_16k(chunk, rate)))

    def answer(self, **sampling: Any) -> Iterator[str]:
        """The answer to the user's turn, as it comes; the turn is over when it ends, or when the iterator is closed.

        Args:
            sampling: fields of :class:`Sampling`.

        Raises:
            ValueError: the user has said nothing, or the LLM has no room for it all.
        """
        self._close_piece()
        if not self._parts:
            raise ValueError("the user has said nothing: use say or feed before answer")
        options, turn, said = Sampling(**sampling), Turn("user", tuple(self._parts)), ""
        try:
            for delta in self.model.decoder.stream(self._request(options)):
                said += delta.text
                if delta.text:
                    yield delta.text
        finally:
            if said:  # a turn without an answer is none
                self.turns += [turn, Turn("assistant", (said,))]
            self.discard()

    @property
    def is_silent(self) -> bool:
        """Whether audio was given in this turn and nobody speaks in any of it."""
        self._close_piece()
        pieces = [part.piece for part in self._parts if isinstance(part, Speech)]
        return bool(pieces) and not any(self._speech[piece] for piece in pieces)

    def discard(self) -> None:
        """Forgets what the user has said since the last answer."""
        self._parts, self._cutter, self._resampler, self._rate = [], None, None, None
        del self._speech[sum(isinstance(part, Speech) for one in self.turns for part in one.parts) :]

    def _request(self, sampling: Sampling) -> Request:
        """The conversation as far as it goes."""
        turn = Turn("user", tuple(self._parts))
        silent = not any(isinstance(part, str) or self._speech[part.piece] for part in turn.parts)
        segments = self.model.chat_format.render((*self.turns, turn))
        return Request(segments, [list(piece) for piece in self._speech], sampling, silent)

    def _begin_piece(self) -> list[np.ndarray]:
        self._parts.append(Speech(len(self._speech)))
        self._speech.append([])
        return self._speech[-1]

    def _close_piece(self) -> None:
        if self._cutter is None:
            return
        if self._resampler is not None:
            self._hear(self._cutter.feed(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)))
        self._hear(self._cutter.flush())
        self._cutter = self._resampler = self._rate = None

    def _hear(self, windows: list[np.ndarray]) -> None:
        if self.vad is not None:
            windows = [part for one in windows for _, part in speech_windows(one, self.vad)]
        if windows:
            self._speech[-1] += windows
            self.model.decoder.read_ahead(self._request(Sampling()))

    def _at_16k(self, chunk: np.ndarray, rate: int) -> np.ndarray:
        if self._rate is None:
            self._rate = rate
            self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1)
        if self._rate != rate:
            raise AudioError(f"the rate changed from {self._rate} to {rate} Hz in the midst of a piece")
        if self._resampler is None:
            return chunk
        resampled: np.ndarray = self._resampler.resample_chunk(chunk)
        return resampled
