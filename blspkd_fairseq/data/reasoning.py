"""Reasoning that a user does not see, spelled by ordinary text: of a whole answer, and of one that goes on."""

import re

# <think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>, <seed:think>, ...
_REASONING = r"(?:\w+:)?(?:think(?:ing)?|thought|reason(?:ing)?)"
BEGINS = re.compile(rf"[<\[◁]\|?(?:start_|begin_(?:of_)?)?{_REASONING}\|?[>\]▷]|<\|channel>", re.IGNORECASE)
ENDS = re.compile(rf"[<\[◁]\|?(?:/|end_(?:of_)?){_REASONING}\|?[>\]▷]|<channel\|>", re.IGNORECASE)
_MAY_BECOME_A_MARK = re.compile(r"\s*([<\[◁][^>\]▷]{0,30})?")
_LONGEST_MARK = 64  # characters


def without_reasoning(text: str) -> str:
    """A text without the block of reasoning that it begins with."""
    if not BEGINS.match(text.lstrip()):
        return text
    end = ENDS.search(text)
    return text[end.end() :].lstrip() if end else ""


class ReasoningFilter:
    """:func:`without_reasoning` of a text that comes in pieces, each looked at once."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "begins"  # then "hidden", "trimmed" (before the first letter behind a block), "seen"

    def push(self, piece: str) -> str:
        """What of the text is certain to be seen with this piece."""
        if self._state == "seen":
            return piece
        self._held += piece
        if self._state == "begins" and not _MAY_BECOME_A_MARK.fullmatch(self._held):
            self._state = "hidden" if BEGINS.match(self._held.lstrip()) else "seen"
        if self._state == "hidden":
            end = ENDS.search(self._held)
            self._held = self._held[end.end() :] if end else self._held[-_LONGEST_MARK:]
            self._state = "trimmed" if end else "hidden"
        if self._state == "trimmed":
            self._held = self._held.lstrip()
            self._state = "seen" if self._held else "trimmed"
        if self._state != "seen":
            return ""
        text, self._held = self._held, ""
        return text

    def trim(self, forget: bool = False) -> None:
        """A control token marks reasoning, so that text does not; ``forget``: all before was reasoning."""
        if forget:
            self._held = ""
        if forget or self._state != "seen":
            self._state = "trimmed"
