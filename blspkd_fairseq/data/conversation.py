"""Conversations: turns whose parts are texts and pieces of speech.

A row of a manifest with a prompt is the conversation of one turn. Others stand in its column ``conversation``, in the
shape of chat LLMs' messages::

    [{"role": "user", "content": [{"type": "audio", "audio": "a.flac", "text": "how tall is it"}]},
     {"role": "assistant", "content": "Of what do you speak?"},
     {"role": "user", "content": [{"type": "text", "text": "Of this: "}, {"type": "audio", "audio": "b.flac", ...}]}]

``text`` of a piece of audio is its transcript, which the teacher reads in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blspkd_fairseq.data.prompts import SPEECH_SLOT

ROLES = ("system", "user", "assistant")
MOST_PIECES = 64
"""Of speech in a conversation."""


class ConversationError(ValueError):
    """Messages that are no conversation; the text says which one and what it should be."""


class Speech(NamedTuple):
    """The place of a piece of speech in a rendered conversation. Attribute: its number among the row's pieces."""

    piece: int


Segment = Sequence[int] | Speech
"""Ids of text, or a piece of speech."""


class Turn(NamedTuple):
    """What one party says.

    Attributes:
        role: system, user or assistant.
        parts: texts, and the places of pieces of speech, which are numbered through the conversation.
    """

    role: str
    parts: tuple[str | Speech, ...]


class AudioPart(NamedTuple):
    """A piece of speech.

    Attributes:
        audio: where it is: a path as in a manifest, or whatever else the caller can read.
        transcript: what is said, or "".
    """

    audio: Any
    transcript: str = ""


Conversation = tuple[Turn, ...]

TAUGHT_TWICE = "teacher_text stands for one piece of speech, and the row has a conversation: empty one of them"


CUT = re.compile("[\ud800-\udfff]")
"""Half of a character, as JSON that was cut and terminals of another encoding give it."""
CUT_CHARACTER = "half of a surrogate pair, which is no character"


def one_turn(prompt: str) -> Conversation:
    """The conversation in which the user says ``prompt``, speech in the place of each ``{speech}``."""
    parts: list[str | Speech] = []
    for number, text in enumerate(prompt.split(SPEECH_SLOT)):
        parts += [Speech(number - 1), text] if number else [text]
    return (Turn("user", tuple(part for part in parts if part != "")),)


def read_messages(messages: Any) -> tuple[Conversation, list[AudioPart]]:
    """Takes messages apart.

    Args:
        messages: a list of ``{"role": ..., "content": ...}``, content being a text or a list of parts; or its JSON.

    Returns:
        The turns, and the pieces of speech that they number.

    Raises:
        ConversationError: another shape, roles that do not take turns, or a last turn that is not the user's.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise ConversationError(f"a conversation must be JSON: {error}") from error
    if not isinstance(messages, Sequence) or not messages:
        raise ConversationError("a conversation must be a list of messages, at least one")
    pieces: list[AudioPart] = []
    turns = tuple(_read_turn(number, message, pieces) for number, message in enumerate(messages, start=1))
    _check_roles([turn.role for turn in turns])
    return turns, pieces


def read_conversation(cell: str) -> tuple[Conversation, list[AudioPart]]:
    """The cell ``conversation`` of a manifest.

    Raises:
        ConversationError: no conversation, none with speech, or audio that is not named by a path or has no transcript.
    """
    turns, pieces = read_messages(cell)
    if not pieces:
        raise ConversationError("the conversation has no piece of audio: nothing is heard in it")
    if len(pieces) > MOST_PIECES:
        raise ConversationError(f"the conversation has {len(pieces)} pieces of audio: {MOST_PIECES} at most")
    for number, piece in enumerate(pieces, start=1):
        if not isinstance(piece.audio, str) or not piece.audio.strip():
            raise ConversationError(f"piece {number} of the conversation's audio must be a path")
        if not piece.transcript.strip():
            raise ConversationError(f'piece {number} of the conversation\'s audio has no transcript: give it as "text"')
    return turns, pieces


def with_audio_in(cell: str, folder: Path) -> str:
    """The cell ``conversation`` of a manifest in this folder, for one in another: its paths lead out of the folder.

    Raises:
        ConversationError: as of :func:`read_conversation`.
    """
    read_conversation(cell)
    messages = json.loads(cell)
    for message in messages:
        for part in message["content"]:
            if isinstance(part, dict) and part["type"] == "audio":
                part["audio"] = str(folder / part["audio"])
    return json.dumps(messages, ensure_ascii=False)


def _read_turn(number: int, message: Any, pieces: list[AudioPart]) -> Turn:
    where = f"message {number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ConversationError(f"{where} must be an object with a role ({', '.join(ROLES)}) and content")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ConversationError(f"{where}: content must be a text or a list of parts")
    read = [_read_part(where, part, pieces) for part in parts]
    kept = tuple(part for part in read if part != "")
    if not kept:
        raise ConversationError(f"{where} is empty")
    if message["role"] != "user" and any(isinstance(part, Speech) for part in kept):
        raise ConversationError(f"{where}: only the user speaks; give the {message['role']}'s content as text")
    return Turn(message["role"], kept)


def _read_part(where: str, part: Any, pieces: list[AudioPart]) -> str | Speech:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(part.get("text"), str) and CUT.search(part["text"]):
        raise ConversationError(f"{where} holds {CUT_CHARACTER}: write its text anew")
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "audio" and part.get("audio") is not None and isinstance(part.get("text", ""), str):
        pieces.append(AudioPart(part["audio"], part.get("text", "")))
        return Speech(len(pieces) - 1)
    raise ConversationError(
        f'{where}: a part must be {{"type": "text", "text": TEXT}} or '
        '{"type": "audio", "audio": PATH, "text": TRANSCRIPT}, '
        f"not {json.dumps(part, default=str, ensure_ascii=False)[:80]}"
    )


def _check_roles(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)) or len(spoken) % 2 == 0:
        raise ConversationError(
            "user and assistant must take turns, the user first (after a system message, if any) and last; "
            f"got {', '.join(roles)}"
        )
