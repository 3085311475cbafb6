"""Text of tokens that arrive one by one: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from blspkd_fairseq.data.chat import FINAL_CHANNEL, ChatFormat
from blspkd_fairseq.data.reasoning import ReasoningFilter

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
        return self._pass_on(self._text_of(token))

    def finish(self) -> str:
        """What was held back, when no token follows."""
        return self._finish_with(self._decode_new())

    def _finish_with(self, rest: str) -> str:
        text = self._pass_on(rest)
        return text if self.stopped else text + self._take_held()

    def _text_of(self, token: int) -> str:
        """The whole characters that this token ends; only tokens since the last but one of such are decoded."""
        self._ids.append(token)
        text = self._decode_new()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return text

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
    """As :class:`TextStream`, of what a user sees of an answer: no reasoning, neither while it is made nor after.

    Together the pieces are :meth:`ChatFormat.decode_answer` of all tokens, unless a mark comes later that would take
    back what was shown.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        super().__init__(chat, stop)
        self._tokens: list[int] = []
        self._shown: list[str] = []
        self._filter = ReasoningFilter()
        self._is_reasoning = False
        self._is_closed = False  # of Harmony: until the final channel begins
        self._channel_name: list[int] | None = None  # while it is spelled

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._show(self._filter.push(self._text_of(token))) if self._is_seen(token) else ""

    def finish(self) -> str:
        """What was held back; a mark that was never ended is text."""
        shown, whole = "".join(self._shown), self.chat.decode_answer(self._tokens)
        rest = whole[len(shown) :] if whole.startswith(shown) else self._decode_new()
        return self._finish_with(rest)

    def _show(self, text: str) -> str:
        self._shown.append(text)
        return self._pass_on(text)

    def _is_seen(self, token: int) -> bool:
        """Whether a token is text for the user, as :meth:`ChatFormat.decode_answer` has it; marks change the state."""
        marks = self.chat.marks
        if token == marks.channel:
            self._channel_name, self._is_closed = [], True
        elif self._channel_name is not None:
            if token == marks.message:
                self._is_closed = self.chat.decode(self._channel_name).strip() != FINAL_CHANNEL
                self._channel_name = None
            else:
                self._channel_name.append(token)
        elif self._is_closed:
            pass
        elif token in marks.begins:
            self._is_reasoning = True
            self._filter.trim()
        elif token in marks.ends:
            if not self._is_reasoning:
                self._ids, self._begin, self._read = [], 0, 0
            self._filter.trim(forget=not self._is_reasoning)
            self._is_reasoning = False
        elif token in self.chat.control_ids:
            self._is_closed = marks.channel is not None
        else:
            return not self._is_reasoning
        return False


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
