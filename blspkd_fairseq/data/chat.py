"""Token ids of a chat: the LLM's own template around the speech, and texts that can never act as control tokens."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from blspkd_fairseq.data.bpe import common_ends, with_fewer_merges
from blspkd_fairseq.data.conversation import CUT, CUT_CHARACTER, Conversation, Segment, Speech, Turn, one_turn
from blspkd_fairseq.data.prompts import SPEECH_SLOT
from blspkd_fairseq.data.reasoning import BEGINS, ENDS, without_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Private-use characters around a number stand for what the template must not see, or must leave where it is.
_HIDDEN = re.compile("\U000f0000(\\d+)\U000f0001")
_MARKER_CHARACTER = "[\U000f0000\U000f0001]"
_BYTE_PIECE = "<0x[0-9A-F]{2}>"
_NOTHING = "(?!)"

TEMPLATE_DATE = date(2024, 7, 26)
"""What templates that ask for today's date are told, on whatever day: Llama 3.1's own default."""

_TAG = re.compile(r"<([A-Za-z][\w:]*)>")
# Harmony's channels: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
FINAL_CHANNEL = "final"


class ChatError(ValueError):
    """A tokenizer or a chat template that cannot be used; the message says what to do."""


class Marks(NamedTuple):
    """Control tokens that say what of an answer a user sees.

    Attributes:
        begins, ends: of a block of reasoning.
        channel: of Harmony: the name of a channel follows.
        message: of Harmony: the text of the channel follows.
    """

    begins: frozenset[int]
    ends: frozenset[int]
    channel: int | None
    message: int | None


class ChatFormat:
    """How one LLM wants its conversations to be written.

    Control tokens are the special tokens, and the added ones that look like markup (``<think>``). They come from the
    chat template alone: a transcript, a response, an instruction that spells one gives the ids of ordinary text.

    Answers are what a user sees: :meth:`decode_answer` leaves out blocks of reasoning, and all channels of Harmony but
    the final one. The prompt ends where the template begins the text of an answer, with the block closed or in the
    final channel, if that is how it writes answers without reasoning. A template that leaves a block open is refused,
    since answers to speech would begin with reasoning.

    Texts are encoded on their own, so the number of tokens of a transcript does not depend on what surrounds it.
    With byte-level BPE, ``decode(encode_text(text)) == text`` for every text. With SentencePiece, a space at the
    beginning may be lost, and so may be what the model's normaliser changes (T5: runs of spaces, compatibility
    characters); without byte fallback, so are characters that are not in the vocabulary.

    Args:
        tokenizer: a Hugging Face tokenizer.
        system: system message; None: the template's default, if it has one.
        chat_template: Jinja text in place of the tokenizer's own.
        transcript_merges: how many merges of a BPE tokenizer what is heard is written with; 0: all of them.

    Attributes:
        tokenizer: as given.
        control_ids: ids that :meth:`encode_text` never gives and :meth:`decode` skips.
        marks: those of them that say what of an answer a user sees.
        end_of_turn_id: the token by which the template closes an answer.
        eos_ids: tokens at which generation stops: ``end_of_turn_id`` first.

    Raises:
        ChatError: there is no chat template, it has no place for a user or a system message, nothing ends a turn, it
            opens a block of reasoning that it does not close, or the tokenizer has not so many merges.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        chat_template: str | None = None,
        transcript_merges: int = 0,
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ChatError(
                f"the tokenizer of {_name(tokenizer)} has no chat template: use the instruction-tuned (chat) version "
                "of this LLM, or give the text of a template"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.chat_template = chat_template
        self.transcript_merges = transcript_merges
        self._dated_template = _with_fixed_date(str(tokenizer.get_chat_template(chat_template)))
        control = _control_tokens(tokenizer)
        self.control_ids = frozenset(control)
        self.marks = _marks(control)
        # Longer names first, so that one name inside of another does not hide it.
        names = sorted(map(re.escape, control.values()), key=len, reverse=True)
        self._control_names = re.compile("|".join([*names, _MARKER_CHARACTER]))
        byte_piece = _BYTE_PIECE if "<0x0A>" in tokenizer.get_vocab() else _NOTHING
        self._byte_piece = re.compile(byte_piece)
        self._reserved_names = re.compile("|".join([*names, byte_piece]))
        self._adds_space = self._encode_as_is("a")[:1] != self._encode_inside("a", self._encode_as_is)[:1]
        self.end_of_turn_id = self._find_end_of_turn()
        eos_ids = [self.end_of_turn_id, tokenizer.eos_token_id]
        self.eos_ids = [token for token in dict.fromkeys(eos_ids) if token is not None]
        # An unknown character is no control token, unless the tokenizer uses one token for both.
        self._unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id not in self.eos_ids else None
        self._warned = False
        self._transcriber = self._with_fewer_merges()
        self._opening = self._find_opening()
        self._cached_render = lru_cache(maxsize=1024)(self._render_turns)
        self.prompt_ids(SPEECH_SLOT)  # a template that cannot be used is said now

    def __reduce__(self) -> tuple[type[ChatFormat], tuple[Any, ...]]:
        """A spawned worker builds it again: a cache of a method cannot be pickled."""
        return ChatFormat, (self.tokenizer, self.system, self.chat_template, self.transcript_merges)

    # --- texts ------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, none of them a control id; the tokenizer's own unless the text spells a control token.

        Raises:
            ChatError: the tokenizer makes a control token of this text in every way, or it holds half of a character.
        """
        return self._encode(text, self.tokenizer)

    def encode_transcript(self, text: str) -> list[int]:
        """As :meth:`encode_text`, of what is heard: with ``transcript_merges``, rarer words are several tokens."""
        return self._encode(text, self._transcriber)

    def common_ends(self, first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
        """The pairs of places up to which two sequences of ids of one text have written the same."""
        return common_ends(*map(self.tokenizer.convert_ids_to_tokens, (list(first), list(second))))

    def _encode(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ids = self._encode_as_is(text, tokenizer)
        if self.control_ids.isdisjoint(ids) and not self._byte_piece.search(text):
            return ids
        ids = self._spell(text, tokenizer)
        controls = self.control_ids.intersection(ids)
        if self._unknown_id in controls:
            self._warn_unknown(text)
        if controls - {self._unknown_id}:
            raise ChatError(
                f"the tokenizer of {_name(self.tokenizer)} turns the text {text[:80]!r} into the control tokens "
                f"{self.tokenizer.convert_ids_to_tokens(sorted(controls))}: remove them from the text"
            )
        return ids

    def response_ids(self, text: str, finished: bool = True) -> list[int]:
        """Ids of an answer, and of its end of turn unless it was cut off."""
        return self.encode_text(text) + ([self.end_of_turn_id] if finished else [])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control ids are skipped."""
        plain = [token for token in map(int, ids) if token not in self.control_ids]
        return str(self.tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def may_reason(self) -> bool:
        """Whether an answer may begin with reasoning, by what tokenizer and template know of it."""
        if self.marks.begins or self.marks.channel is not None:
            return True
        return BEGINS.search(str(self.tokenizer.chat_template)) is not None

    def decode_answer(self, ids: Iterable[int]) -> str:
        """What a user sees of what the LLM generated: no reasoning, and of several channels the final one."""
        tokens = list(map(int, ids))
        if self.marks.channel in tokens:
            tokens = self._final_channel(tokens)
        if self.marks.begins.union(self.marks.ends).isdisjoint(tokens):
            return without_reasoning(self.decode(tokens))
        return self.decode(self._without_reasoning(tokens)).lstrip()

    def _without_reasoning(self, ids: Iterable[int]) -> list[int]:
        """The ids outside of blocks of reasoning; what is before the end of a block was in it."""
        kept: list[int] = []
        is_inside = False
        for token in ids:
            if token in self.marks.begins:
                is_inside = True
            elif token in self.marks.ends:
                kept = kept if is_inside else []
                is_inside = False
            elif not is_inside:
                kept.append(token)
        return kept

    def _final_channel(self, ids: Sequence[int]) -> list[int]:
        """What is said in the final channel, in which the prompt ends if the template says so."""
        places = [place for place, token in enumerate(ids) if token == self.marks.channel]
        kept = self._until_control(ids[: places[0]])
        for start, end in zip(places, [*places[1:], len(ids)], strict=True):
            part = list(ids[start + 1 : end])
            place = part.index(self.marks.message) if self.marks.message in part else len(part)
            if self.decode(part[:place]).strip() == FINAL_CHANNEL:
                kept += self._until_control(part[place + 1 :])
        return kept

    def _until_control(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first control token but for blocks."""
        ends = self.control_ids - self.marks.begins - self.marks.ends
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return list(ids[:end])

    def _encode_as_is(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
        """What the tokenizer gives by itself, control tokens included."""
        if cut := CUT.search(text):
            around = text[max(0, cut.start() - 40) : cut.end() + 40]
            raise ChatError(f"the text {around!r} holds {CUT_CHARACTER}: write it anew, in UTF-8")
        tokenizer = self.tokenizer if tokenizer is None else tokenizer  # `or` would count its words
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False))

    def _spell(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
        """Ids without the tokenizer's added tokens.

        `split_special_tokens` of a fast tokenizer splits special tokens but not other added ones, so its steps are
        taken one by one. The model knows some control tokens as ordinary pieces too: their names are cut in two.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer  # `or` would count its words
        if not tokenizer.is_fast:
            return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        pieces = (piece for word in words for piece in self._cut_names(word))
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]

    def _cut_names(self, word: str) -> list[str]:
        """Cuts a word after the first character of every control token that it spells."""
        pieces = []
        while match := self._reserved_names.search(word):
            cut = match.start() + 1
            pieces.append(word[:cut])
            word = word[cut:]
        return [piece for piece in (*pieces, word) if piece]

    def _encode_inside(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a text that does not begin the conversation.

        SentencePiece puts a space before whatever it is given; after a line break, it does not.
        """
        line_break, ids = encode("\n"), encode("\n" + text)
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else encode(text)

    def _with_fewer_merges(self) -> PreTrainedTokenizerBase:
        if not self.transcript_merges:
            return self.tokenizer
        try:
            return with_fewer_merges(self.tokenizer, self.transcript_merges)
        except ValueError as error:
            where = f"--transcript-merges {self.transcript_merges}: the tokenizer of {_name(self.tokenizer)}"
            raise ChatError(f"{where} {error}") from error

    def _warn_unknown(self, text: str) -> None:
        if not self._warned:
            logger.warning(
                f"the vocabulary of {_name(self.tokenizer)} has no token for a character in {text[:80]!r}: "
                f"such characters become {self.tokenizer.unk_token} (said once)"
            )
        self._warned = True

    # --- the template -----------------------------------------------------------------------------

    def prompt_ids(self, prompt: str) -> tuple[list[int], list[int]]:
        """Ids before and after the speech, of a conversation in which the user has said one thing.

        Args:
            prompt: what the user says, with one ``{speech}`` where the speech is heard.

        Raises:
            ChatError: there is not exactly one slot, or the template fails, loses it, or refuses the system message.
        """
        if prompt.count(SPEECH_SLOT) != 1:
            raise ChatError(f"the prompt {prompt!r} must have exactly one slot {SPEECH_SLOT}")
        before, _, after = self.render(one_turn(prompt))
        return list(before), list(after)

    def bare_opening(self) -> list[int]:
        """Ids before what a user says first, as short as the template writes them: its system message says nothing."""
        turn = one_turn(SPEECH_SLOT)
        try:
            first, *_ = self.render((Turn("system", ("",)), *turn))
        except ChatError:  # a template without a place for a system message brings none of its own
            first, *_ = self.render(turn)
        return [] if isinstance(first, Speech) else list(first)

    def render(self, conversation: Conversation) -> list[Segment]:
        """A conversation, up to where the next answer begins, as typed segments.

        For example, of ``one_turn("Repeat: {speech}")`` with ChatML::

            rendered   <|im_start|>user Repeat: (0)<|im_end|><|im_start|>assistant
            segments   ids of "<|im_start|>user Repeat: ", Speech(0), ids of "<|im_end|><|im_start|>assistant"

        Only the template makes control tokens: those that a text spells are hidden by markers while the template is
        rendered. Earlier answers are encoded by themselves, as :meth:`response_ids` does.

        Raises:
            ChatError: the template fails, loses a part, or refuses the system message.
        """
        return [one if isinstance(one, Speech) else list(one) for one in self._cached_render(conversation)]

    def _render_turns(self, conversation: Conversation) -> tuple[Segment, ...]:
        segments = self._segments(conversation)
        texts = [one for one in segments if not isinstance(one, Speech)]
        plain = tuple(Turn(turn.role, tuple(map(_without_text, turn.parts))) for turn in conversation)
        if plain != conversation and self._controls(*texts) != self._plain_controls(plain):
            said = "".join(part for turn in conversation for part in turn.parts if isinstance(part, str))
            raise ChatError(f"the text {said[:80]!r} changes the control tokens of the chat: remove them from it")
        return segments

    def _plain_controls(self, conversation: Conversation) -> list[int]:
        texts = [one for one in self._cached_render(conversation) if not isinstance(one, Speech)]
        return self._controls(*texts)

    def _segments(self, conversation: Conversation) -> tuple[Segment, ...]:
        hidden = _Hidden(self._control_names)
        slots: dict[str, Speech | str] = {}

        def hide(role: str, part: str | Speech) -> str:
            if isinstance(part, str) and role != "assistant":
                return hidden.hide_names(part)
            marker = hidden.hide(SPEECH_SLOT)
            slots[marker] = part
            return marker

        messages = [
            {"role": turn.role, "content": "".join(hide(turn.role, part) for part in turn.parts)}
            for turn in conversation
        ]
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": hidden.hide_names(self.system)})
        rendered = self._render(messages, add_generation_prompt=True) + self._opening
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in rendered:
            raise ChatError(f"the chat template of {_name(self.tokenizer)} ignores the system message: leave it out")
        found = [(rendered.find(marker), marker) for marker in slots]
        if any(rendered.count(marker) != 1 for marker in slots) or found != sorted(found):
            raise ChatError(f"the chat template of {_name(self.tokenizer)} does not show what the user says once")
        segments: list[Segment] = []
        text: list[int] = []
        for marker, part in slots.items():
            before, rendered = rendered.split(marker)
            if self._adds_space:
                before = before.removesuffix(" ")  # the transcript brings its own
            text += self._encode_template(before, hidden, is_inside=bool(segments or text))
            if isinstance(part, Speech):
                segments += [tuple(text), part]
                text = []
            else:
                text += self.encode_text(part)
        text += self._encode_template(rendered, hidden, is_inside=bool(segments or text))
        return (*segments, tuple(text))

    def _encode_template(self, text: str, hidden: _Hidden, is_inside: bool = False) -> tuple[int, ...]:
        """Ids of template text, in which hidden names stand for themselves."""
        ids: list[int] = []
        for part, is_hidden in hidden.parts(text):
            encode = self._spell if is_hidden else self._encode_as_is
            ids += self._encode_inside(part, encode) if is_inside and self._adds_space else encode(part)
            is_inside = True
        return tuple(ids)

    def _controls(self, *texts: Sequence[int]) -> list[int]:
        ids = (token for text in texts for token in text)
        return [token for token in ids if token in self.control_ids and token != self._unknown_id]

    def _find_end_of_turn(self) -> int:
        hidden = _Hidden(self._control_names)
        answer = hidden.hide("")
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        closing = self._render(messages, add_generation_prompt=False).partition(answer)[2]
        controls = [token for token in self._encode_inside(closing, self._encode_as_is) if token in self.control_ids]
        end: int | None = controls[0] if controls else self.tokenizer.eos_token_id
        if end is None:
            raise ChatError(
                f"neither the chat template of {_name(self.tokenizer)} nor its tokenizer has a token that ends a "
                "turn: set the tokenizer's eos_token"
            )
        return end

    def _find_opening(self) -> str:
        """What the template writes between its prompt for an answer and the text of an answer without reasoning.

        Harmony's prompt leaves the channel to the LLM, and that of some reasoners opens a block, which their finished
        answers close before they begin.

        Raises:
            ChatError: the prompt opens a block, and finished answers do not say how it ends.
        """
        hidden = _Hidden(self._control_names)
        question, answer = hidden.hide(""), hidden.hide("")
        asked = [{"role": "user", "content": question}]
        prompt = self._render(asked, add_generation_prompt=True).rpartition(question)[2]
        answered = self._render([*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        header = answered.partition(answer)[0].rpartition(question)[2]
        opening = header.removeprefix(prompt) if header.startswith(prompt) else ""
        if not (self._control_names.search(opening) or BEGINS.search(opening) or ENDS.search(opening)):
            opening = ""  # spaces, which the answer brings itself
        open_block = _open_block((prompt + opening).removeprefix(header))
        if open_block:
            raise ChatError(
                f"the chat template of {_name(self.tokenizer)} opens {open_block} before every answer, so that answers "
                "begin with reasoning, which nobody is to hear: take an LLM that answers at once, or give "
                f"--chat-template a copy of the template that closes the block ({open_block} and its end, empty) in "
                "the generation prompt"
            )
        return opening

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._dated_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=False,
                )
            )
        except Exception as error:  # Jinja's own, and whatever a template raises
            roles = " and ".join(message["role"] for message in messages)
            raise ChatError(
                f"the chat template of {_name(self.tokenizer)} fails on messages of {roles}: {error}"
            ) from error


class _Hidden:
    """Texts that are replaced by markers while a template is rendered."""

    def __init__(self, names: re.Pattern[str]) -> None:
        self.names = names
        self.texts: list[str] = []

    def hide(self, text: str) -> str:
        self.texts.append(text)
        return f"\U000f0000{len(self.texts) - 1}\U000f0001"

    def hide_names(self, text: str) -> str:
        """Hides every control token that a text spells."""
        return self.names.sub(lambda match: self.hide(match[0]), text)

    def parts(self, rendered: str) -> list[tuple[str, bool]]:
        """The pieces of a rendered text that are not empty, and whether they were hidden."""
        pieces = _HIDDEN.split(rendered)  # text, number, text, number, ..., text
        parts = [(self.texts[int(piece)], True) if i % 2 else (piece, False) for i, piece in enumerate(pieces)]
        return [part for part in parts if part[0]]


def _with_fixed_date(template: str) -> str:
    """A template in which ``strftime_now`` writes :data:`TEMPLATE_DATE`: answers would change by the day.

    A macro takes the place of transformers' function, and replaces one directive of the format after another.
    """
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for letter in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ" for flag in ("", "-")]
    written = {code: TEMPLATE_DATE.strftime(code) for code in codes}
    macro = (
        "{%- macro strftime_now(format) -%}{%- set written = namespace(text=format) -%}"
        f"{{%- for code, text in {json.dumps(written)}.items() -%}}"
        "{%- set written.text = written.text | replace(code, text) -%}{%- endfor -%}{{ written.text }}{%- endmacro -%}"
    )
    return macro + template


def _open_block(prompt: str) -> str:
    """The mark of a block that a prompt leaves open, or ""."""
    begin = max(BEGINS.finditer(prompt), key=lambda match: match.start(), default=None)
    if begin and not ENDS.search(prompt, begin.end()):
        return begin[0]
    tags = [match for match in _TAG.finditer(prompt) if f"</{match[1]}>" not in prompt[match.end() :]]
    return tags[-1][0] if tags else ""


def _without_text(part: str | Speech) -> str | Speech:
    return "a" if isinstance(part, str) else part


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id and name of every control token."""
    added = tokenizer.added_tokens_decoder
    control = {token: str(one.content) for token, one in added.items() if one.special or _is_markup(str(one.content))}
    return control | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _marks(control: Mapping[int, str]) -> Marks:
    ids = {name: token for token, name in control.items()}
    begins, ends = (frozenset(t for t, name in control.items() if one.fullmatch(name)) for one in (BEGINS, ENDS))
    return Marks(begins, ends, ids.get(_CHANNEL), ids.get(_MESSAGE))


def _is_markup(content: str) -> bool:
    """Whether an added token that is not special looks like ``<think>`` or ``[INST]``, not like a word or spaces."""
    text = content.replace("▁", " ").strip()
    return len(text) > 2 and not text[0].isalnum() and not text[-1].isalnum()


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the LLM"
