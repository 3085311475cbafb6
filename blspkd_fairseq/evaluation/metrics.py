"""Word error rate and BLEU as sums over utterances, so that several processes can add them up."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import editdistance
import sacrebleu
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

logger = logging.getLogger(__name__)

# Written without spaces between words: their "words" are letters.
_LETTER_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "km", "yue"})
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab", "th": "char", "lo": "char"}
_BLEU_TOKENIZERS |= {"my": "char", "km": "char"}


class ErrorCount(NamedTuple):
    """Attributes: ``errors`` (substitutions, deletions, insertions) against ``words`` of the reference."""

    errors: int
    words: int


def word_errors(hypothesis: str, reference: str, language: str = "", normalize: bool = True) -> ErrorCount:
    """Edit distance in words (letters for languages without spaces).

    Args:
        hypothesis, reference: plain text.
        language: code such as "en" or "zh-CN"; decides between words and letters.
        normalize: lower case, no punctuation, no bracketed remarks (Whisper's language-independent normaliser).
    """
    letters = _base(language) in _LETTER_LANGUAGES
    pair = [hypothesis, reference]
    if normalize:
        pair = [_normalizer(letters)(text) for text in pair]
    elif letters:
        pair = [" ".join(text.replace(" ", "")) for text in pair]
    hypothesis_words, reference_words = (text.split() for text in pair)
    return ErrorCount(int(editdistance.eval(hypothesis_words, reference_words)), len(reference_words))


@cache
def _normalizer(letters: bool) -> BasicTextNormalizer:
    return BasicTextNormalizer(split_letters=letters)


class BleuCounts(NamedTuple):
    """Sufficient statistics of corpus BLEU. Attributes: matching and total n-grams (n = 1..4), lengths in tokens."""

    correct: list[int]
    total: list[int]
    hypothesis_length: int
    reference_length: int


def bleu_counts(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> BleuCounts:
    """Counts of these sentences; counts of several batches add up to those of all."""
    score = sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=bleu_tokenizer(language))
    return BleuCounts(score.counts, score.totals, score.sys_len, score.ref_len)


def bleu_score(counts: BleuCounts) -> float:
    """BLEU (0 to 100) of summed counts, with sacreBLEU's default smoothing."""
    return float(
        sacrebleu.BLEU.compute_bleu(
            correct=counts.correct,
            total=counts.total,
            sys_len=counts.hypothesis_length,
            ref_len=counts.reference_length,
            smooth_method="exp",
        ).score
    )


@cache
def bleu_tokenizer(language: str) -> str:
    """sacreBLEU's tokenizer for a target language: its default 13a scores 0 on languages without spaces."""
    name = _BLEU_TOKENIZERS.get(_base(language), "13a")
    if name.endswith("-mecab"):
        try:
            sacrebleu.BLEU(tokenize=name)
        except (ImportError, RuntimeError):
            logger.warning(
                f"BLEU for {language} is computed on characters, because {name} is not installed "
                f"(pip install 'sacrebleu[{name[:2]}]'): such scores do not compare with {name} ones"
            )
            name = "char"
    return name


def _base(language: str) -> str:
    return language.replace("_", "-").split("-")[0].lower()
