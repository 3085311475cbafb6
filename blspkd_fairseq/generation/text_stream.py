"""Text of tokens that arrive one by one: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from blspkd_fairseq.data.chat import ChatFormat

_INCOMPLETE = "\ufffd"  # what a tokenizer shows of bytes that are no whole character yet


class TextStream:
    """Turns tokens into pieces of text that are certain.

    Args:
        chat: decodes.
        stop: the text ends before the first of these strings.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self.chat = chat
        self.stop = tuple(stop)
        self.stopped = False
        self._ids: list[int] = []
        self._begin = self._read = 0  # text of ids[begin:read] was given; what follows is decoded beside it
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._ids.append(token)
        text = self._decode_new()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._pass_on(text)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        text, self._held = self._held, ""
        if self.stopped:
            return ""
        rest = self._decode_new()
        self._begin = self._read = len(self._ids)
        self._held = text
        return self._pass_on(rest) + self._take_held()

    def _decode_new(self) -> str:
        known = self.chat.decode(self._ids[self._begin : self._read])
        return self.chat.decode(self._ids[self._begin :])[len(known) :]

    def _pass_on(self, text: str) -> str:
        """Of what is held and new, all but what may be the beginning of a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self._take_held()
        kept = max((_overlap(self._held, one) for one in self.stop), default=0)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain

    def _take_held(self) -> str:
        text, self._held = self._held, ""
        return text


class AnswerStream(TextStream):
    """As :class:`TextStream`, of what a user sees of an answer: no reasoning, neither while it is made nor after."""

    _shown = 0

    def _decode_new(self) -> str:
        # The whole each time, since a mark may change what is seen: a tenth of a millisecond beside a step of the LLM.
        return self.chat.answer_so_far(self._ids)[self._shown :]

    def finish(self) -> str:
        """What was held back; a mark that was never ended is text."""
        rest = self.chat.decode_answer(self._ids)[self._shown :]
        shown = self._pass_on(rest)
        return shown + ("" if self.stopped else self._take_held())

    def _pass_on(self, text: str) -> str:
        self._shown += len(text)
        return super()._pass_on(text)


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
