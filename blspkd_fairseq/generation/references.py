"""What fairseq-generate's scores compare answers with: the right reference, or none."""

from __future__ import annotations

import logging
from typing import Any

from blspkd_fairseq.data.languages import code_of, language_key
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.evaluation.metrics import bleu_tokenizer, is_unspaced

logger = logging.getLogger(__name__)

_TRANSCRIBING = ("transcribe", "repeat")
_NAMED_TASKS = (*_TRANSCRIBING, "translate")


def reference_column(manifest: Manifest, prompt: str, scoring: str) -> str:
    """The column that answers are scored against, "" for none; whatever is not as one may think is said.

    Args:
        manifest: what is answered.
        prompt: name or text, of rows without a prompt of their own.
        scoring: name of fairseq's scorer.

    Raises:
        ValueError: word error rates of answers that are no transcripts.
    """
    asks_itself = "prompt" in manifest.columns
    if scoring == "wer" and prompt not in _TRANSCRIBING and not asks_itself:
        raise ValueError(
            f"--scoring wer compares answers with what was said, and the prompt {prompt!r} does not ask for it: give "
            f"--prompt {' or '.join(_TRANSCRIBING)}"
        )
    column = "src_text" if scoring == "wer" or prompt in _TRANSCRIBING else "tgt_text"
    if column not in manifest.columns:
        logger.warning(f"no score: {manifest.path} has no {column}, with which answers could be compared")
        return ""
    empty = next((index for index, row in enumerate(manifest) if not row[column].strip()), None)
    if empty is not None:
        logger.warning(f"no score: {manifest.location(empty)} has no {column}, with which its answer could be compared")
        return ""
    if column == "tgt_text" and "cut" in manifest.columns:
        if prompt in _NAMED_TASKS:
            logger.warning(
                f"no score: tgt_text of {manifest.path} has the LLM's own responses (it has a column cut) and no "
                f"references for the prompt {prompt!r}"
            )
            return ""
        logger.warning(
            f"tgt_text of {manifest.path} has the LLM's own responses (it has a column cut): the score says how much "
            "answers are like these, and not how good they are"
        )
    elif column == "src_text":
        logger.info(f"answers are scored against src_text of {manifest.path}, what was said")
    return column


def check_scorer(manifest: Manifest, column: str, scoring: Any) -> None:
    """Says that fairseq's scorer splits at spaces, or otherwise, what the language writes without.

    Args:
        manifest, column: of the references.
        scoring: fairseq's options of the scorer.
    """
    language_column = "src_lang" if column == "src_text" else "tgt_lang"
    languages = {language_key(row.get(language_column, "")) for row in manifest} if column else set()
    name = getattr(scoring, "_name", "")
    for language in sorted(languages):
        right = bleu_tokenizer(language) if language else "13a"
        if name == "sacrebleu" and right != scoring.sacrebleu_tokenizer and not scoring.sacrebleu_char_level:
            option = (
                f"--sacrebleu-tokenizer {right}" if right in ("13a", "zh", "ja-mecab") else "--sacrebleu-char-level"
            )
            logger.warning(
                f"BLEU takes the tokenizer {scoring.sacrebleu_tokenizer}, and {language or 'no language'} in "
                f"{language_column} of {manifest.path} asks for {option}"
            )
        if name == "wer" and is_unspaced(language) and not scoring.wer_char_level:
            logger.warning(
                f"WER counts words, and {code_of(language, '')} ({language_column} of {manifest.path}) is written "
                "without spaces between them: give --wer-char-level"
            )
