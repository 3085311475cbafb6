"""Instructions around the speech: by name, or as a text of one's own.

A prompt is a text with one ``{speech}`` slot, where the teacher reads the transcript and the student hears it.
"""

from __future__ import annotations

from blspkd_fairseq.data.languages import LANGUAGES, code_of, find_language, looks_like_code

__all__ = ["LANGUAGES", "PROMPTS", "SPEECH_SLOT", "PromptError", "language_name", "resolve_prompt"]

SPEECH_SLOT = "{speech}"

PROMPTS: dict[str, str] = {
    # The continuation prompt of BLSP-Emo (https://github.com/cwang621/blsp-emo), from which responses are made.
    "continue": "Continue the following sentence in a coherent style: {speech}",
    # Ours: what a small LLM follows best.
    "repeat": 'Repeat the following sentence exactly, word for word: "{speech}"',
    # Ours.
    "transcribe": "Transcribe the following speech. Give only its words: {speech}",
    # The translation prompt of Ultravox's evaluation (https://github.com/fixie-ai/ultravox).
    "translate": "Please translate the text to {tgt_lang}. Your response should only include the {tgt_lang} "
    "translation, without any additional words:\n{speech}",
    # The speech is the whole message, as typed text would be.
    "chat": "{speech}",
}


class PromptError(ValueError):
    """A prompt or a language that cannot be used; the message says which, and what can be."""


def resolve_prompt(name_or_text: str, src_lang: str = "", tgt_lang: str = "") -> str:
    """The instruction that a name or a text stands for.

    Args:
        name_or_text: a name in :data:`PROMPTS`; or a text, which the speech follows on a new line unless the text
            holds ``{speech}``. ``{src_lang}`` and ``{tgt_lang}`` are filled in; other braces stand for themselves.
        src_lang, tgt_lang: code (``de``, ``zh-CN``, ``zho_Hans``) or English name of a language.

    Returns:
        A text with one ``{speech}``.

    Raises:
        PromptError: an unknown name, several slots, or a language that is unknown or missing.
    """
    if not isinstance(name_or_text, str):
        raise PromptError(f"a prompt is a name or a text, not {name_or_text!r}")
    template = PROMPTS.get(name_or_text) or _own_text(name_or_text)
    for slot, language in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
        if f"{{{slot}}}" in template:
            template = template.replace(f"{{{slot}}}", language_name(language, slot, name_or_text))
    return template


def _own_text(text: str) -> str:
    slots = text.count(SPEECH_SLOT)
    if slots > 1:
        raise PromptError(f"the prompt {text!r} has {slots} slots {SPEECH_SLOT}: leave one")
    if slots == 1:
        return text
    if len(text.split()) < 2:
        raise PromptError(
            f"there is no prompt {text!r}: choose one of {', '.join(PROMPTS)}, or write a text with the slot "
            f"{SPEECH_SLOT}"
        )
    return f"{text}\n{SPEECH_SLOT}"


def language_name(language: str, column: str = "language", prompt: str = "") -> str:
    """English name of a language code; a name stays as it is ("Simplified Chinese"), which is said if it is unknown.

    Raises:
        PromptError: no language at all, or an unknown code.
    """
    if not isinstance(language, str) or not language.strip():
        raise PromptError(f"the prompt {prompt!r} needs a {column}: give the manifest this column and fill it in")
    known = find_language(language)
    if looks_like_code(language) and known is not None:
        return known.name
    if looks_like_code(language):
        raise PromptError(f"{column} {language!r} is an unknown language code: write its English name in place of it")
    code_of(language, "prompts have it as it is written")
    return language.strip()
