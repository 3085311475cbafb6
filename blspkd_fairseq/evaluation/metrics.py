"""Metrics as sums over utterances, so that several processes can add them up and a bootstrap can resample them."""

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import editdistance
import numpy as np
import sacrebleu
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from blspkd_fairseq.data.languages import code_of

logger = logging.getLogger(__name__)

# Written without spaces between words: their "words" are letters.
_LETTER_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "km", "yue", "bo", "dz"})
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab", "th": "char", "lo": "char"}
_BLEU_TOKENIZERS |= {"my": "char", "km": "char", "bo": "char", "dz": "char"}
# Their scripts: kana, Han, Thai and Lao, Tibetan and Burmese, Khmer.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff]")


_NEGATIONS = frozenset({"not", "never", "no", "nor", "neither", "t"})  # "isn't" is the words "isn" and "t"
_LITTLE_WORDS = frozenset({"the", "a", "an", "in", "by", "at", "of", "called", "really"})


class ErrorCount(NamedTuple):
    """Attributes: ``errors`` (substitutions, deletions, insertions) against ``words`` of the reference."""

    errors: int
    words: int


def word_errors(hypothesis: str, reference: str, language: str = "", normalize: bool = True) -> ErrorCount:
    """Edit distance in words (letters for languages without spaces).

    Args:
        hypothesis, reference: plain text.
        language: code such as "en" or "zh-CN", or English name; decides between words and letters.
        normalize: lower case, no punctuation, no bracketed remarks (Whisper's language-independent normaliser).
    """
    letters = is_unspaced(language)
    if not letters:
        _check_spaces("WER", language, [reference])
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
    tokenizer = bleu_tokenizer(language)
    if tokenizer == "13a":
        _check_spaces("BLEU's tokenizer 13a", language, references)
    score = sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=tokenizer)
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
    """The code of a language, by whatever code or name; "" for none, or for one that is unknown, which is said."""
    return code_of(language, "BLEU takes sacreBLEU's tokenizer 13a, WER words and Whisper's basic normaliser")


def is_unspaced(language: str) -> bool:
    """Whether a language is written without spaces between words, so that letters are counted."""
    return _base(language) in _LETTER_LANGUAGES


def _check_spaces(unit: str, language: str, references: Sequence[str]) -> None:
    """Says that words are counted in texts that have none, where all but a perfect answer is wrong altogether."""
    letters = [c for text in references[:_EXAMINED] for c in text if c.isalpha()]
    if 2 * sum(_UNSPACED.match(c) is not None for c in letters) > len(letters):
        _warn_of_spaces(unit, language)


_EXAMINED = 200  # references


@cache
def _warn_of_spaces(unit: str, language: str) -> None:
    """Once for each."""
    said = f"the language is given as {language!r}" if language else "no language is given"
    logger.warning(
        f"{unit} splits at spaces, and most references are in a script that is written without ({said}): give the "
        "right language, such as zh, ja or th, by the column src_lang or tgt_lang, or by --language of evaluate"
    )


# --- metrics that can be resampled ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measurement:
    """One metric of one system, as sums over rows: a resampled corpus is a product of weights and ``statistics``.

    Attributes:
        name: heading of a table, such as "BLEU".
        signature: what the figure depends on (tokenizer, normaliser, versions), to be printed beside it.
        statistics: ``[rows, k]`` float64, sufficient statistics of every row.
        score_of: sums over rows ``[..., k]`` to scores ``[...]``; NaN where the score is not defined.
        less_is_better: an error rate.
        is_proportion: the percentage of rows that have a property: statistics are 0 or 1, and 1.
    """

    name: str
    signature: str
    statistics: np.ndarray
    score_of: Callable[[np.ndarray], np.ndarray]
    less_is_better: bool = False
    is_proportion: bool = False

    @property
    def score(self) -> float:
        """The figure of the whole corpus (in percent but for BLEU and chrF, which are 0 to 100 as well)."""
        return float(self.score_of(self.statistics.sum(axis=0)))


def mean_of(measurements: Sequence[Measurement]) -> Measurement:
    """The mean of the scores of several answers to the same rows (seeds, draws of noise) as one metric ``[rows, n k]``.

    A row is then drawn in all of them at once. Their sums would make one corpus, and the brevity penalty of BLEU sees
    nothing where short and long answers meet.
    """
    if len(measurements) == 1:
        return measurements[0]

    def score_of(totals: np.ndarray) -> np.ndarray:
        parts = np.split(totals, len(measurements), axis=-1)
        return np.mean([one.score_of(part) for one, part in zip(measurements, parts, strict=True)], axis=0)

    statistics = np.concatenate([one.statistics for one in measurements], axis=-1)
    return replace(measurements[0], statistics=statistics, score_of=score_of, is_proportion=False)


def translation_metrics(hypotheses: Sequence[str], references: Sequence[str], language: str) -> list[Measurement]:
    """Corpus BLEU and chrF2 by sacreBLEU, BLEU with the tokenizer of the target language.

    Raises:
        ValueError: no rows, or not as many hypotheses as references.
    """
    return [bleu(hypotheses, references, language), chrf(hypotheses, references)]


def transcription_metrics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str,
    spelling: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """WER and CER, raw and normalised; only CER in languages without spaces, whose "words" would be letters anyway.

    Args:
        hypotheses, references: plain text, row by row.
        language: code such as "en" or "zh-CN", or English name.
        spelling: British to American words for English, see :func:`whisper_spelling`.

    Raises:
        ValueError: no rows, or not as many hypotheses as references.
    """
    units = ["CER"] if is_unspaced(language) else ["WER", "CER"]
    return [
        error_rate(hypotheses, references, unit, language, normalize, spelling)
        for unit in units
        for normalize in (False, True)
    ]


def answer_metrics(
    answers: Sequence[str],
    text_answers: Sequence[str],
    references: Sequence[str] | None = None,
    language: str = "",
) -> list[Measurement]:
    """Spoken question answering: answers to speech against the same LLM's answers to the text.

    Args:
        answers, text_answers: row by row; the language of both is ``language``.
        references: right answers, for exact and contained matches; None: there are none.

    Raises:
        ValueError: no rows, or columns of different lengths.

    Returns:
        Among others "Self-BLEU" and "Self-ROUGE-L", as files call corpus BLEU and ROUGE-L against the text answers (not
        the diversity metric of that name); tables say it in full.
    """
    measurements = [
        replace(bleu(answers, text_answers, language), name="Self-BLEU"),
        replace(rouge_l(answers, text_answers, language), name="Self-ROUGE-L"),
    ]
    if references is not None:
        measurements += [exact_match(answers, references, language), contains_match(answers, references, language)]
    return measurements


def bleu(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> Measurement:
    """Corpus BLEU (0 to 100); statistics: lengths, matching and total n-grams."""
    tokenizer = bleu_tokenizer(language)
    if tokenizer == "13a":
        _check_spaces("BLEU's tokenizer 13a", language, references)
    return _sacrebleu("BLEU", sacrebleu.BLEU(tokenize=tokenizer), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Measurement:
    """Corpus chrF2 (0 to 100); statistics: character n-grams of hypothesis, reference and both, n = 1..6."""
    return _sacrebleu("chrF2", sacrebleu.CHRF(), hypotheses, references)


def error_rate(
    hypotheses: Sequence[str],
    references: Sequence[str],
    unit: str = "WER",
    language: str = "",
    normalize: bool = True,
    spelling: Mapping[str, str] | None = None,
) -> Measurement:
    """Errors in percent of the reference's words or letters, over the corpus: NaN if all references are empty.

    A row with an empty reference adds its insertions to the errors and nothing to the words.

    Args:
        hypotheses, references: plain text, row by row.
        unit: "WER" (words) or "CER" (letters; spaces count, but for languages without spaces).
        language: English has Whisper's English normaliser, the others its basic one, which drops combining marks:
            in Hindi or Tamil look at the raw figure.
        normalize: False: only surrounding space is dropped.
        spelling: British to American words for English, see :func:`whisper_spelling`.

    Raises:
        ValueError: no rows, not as many hypotheses as references, or an unknown unit.
    """
    _check_rows(hypotheses, references)
    if unit not in ("WER", "CER"):
        raise ValueError(f"unit {unit!r} is unknown: choose WER or CER")
    if unit == "WER" and not is_unspaced(language):
        _check_spaces("WER", language, references)
    tokens = tokens_of(unit, language, normalize, spelling)
    counts = [_count_errors(tokens(h), tokens(r)) for h, r in zip(hypotheses, references, strict=True)]
    _, normalizer = _cleaner(language, normalize, spelling)
    return Measurement(
        name=f"{unit} ({'normalized' if normalize else 'raw'})",
        signature=f"{unit}|lang:{_base(language) or '?'}|norm:{normalizer}|editdistance:{version('editdistance')}",
        statistics=np.array(counts, dtype=np.float64),
        score_of=_percent,
        less_is_better=True,
    )


def tokens_of(
    unit: str, language: str, normalize: bool, spelling: Mapping[str, str] | None = None
) -> Callable[[str], list[str]]:
    """The words or letters of a text that an error rate counts; arguments as :func:`error_rate`."""
    clean, _ = _cleaner(language, normalize, spelling)
    split = str.split if unit == "WER" else _letters_only if is_unspaced(language) else _letters
    return lambda text: split(clean(text))


def rouge_l(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> Measurement:
    """F-measure of the longest common subsequence (Lin 2004) in percent, mean over rows.

    English: what ``rouge-score`` gives without stemming. Other languages: words of Unicode letters, marks and digits;
    letters where words are not spaced. Equal texts score 1, also if they have no word for the tokenizer (another
    alphabet, punctuation alone, nothing).
    """
    _check_rows(hypotheses, references)
    name, tokenize = _rouge_tokenizer(language)
    pairs = zip(hypotheses, references, strict=True)
    scores = [1.0 if h.strip() == r.strip() else _rouge_l(tokenize(h), tokenize(r)) for h, r in pairs]
    return _mean_over_rows("ROUGE-L", f"ROUGE-L|f1|tok:{name}|case:lc|stem:no|equal:1|mean:rows", scores)


def exact_match(answers: Sequence[str], references: Sequence[str], language: str = "") -> Measurement:
    """Percentage of answers with the words of the reference and no others, whatever case and punctuation."""
    _check_rows(answers, references)
    pairs = _token_pairs(answers, references, language)
    return _proportion("exact match", "exact|case:lc|punct:no", [a == r for a, r in pairs])


def contains_match(answers: Sequence[str], references: Sequence[str], language: str = "") -> Measurement:
    """Percentage of answers that hold the words of the reference in a row; only an empty one holds an empty one.

    In English, words just after "not", "never" or the like do not count ("It is not Paris."); what a whole sentence
    denies is for a judge.
    """
    _check_rows(answers, references)
    pairs = _token_pairs(answers, references, language)
    negations = _NEGATIONS if _base(language) == "en" else frozenset()
    signature = f"contains|case:lc|punct:no|negated:{'no' if negations else 'yes'}"
    return _proportion("contains match", signature, [_contains(a, r, negations) for a, r in pairs])


def whisper_spelling(tokenizer: Any) -> dict[str, str]:
    """The British-to-American spellings of a Whisper tokenizer (its ``normalizer.json``); empty if it has none."""
    return dict(getattr(tokenizer, "english_spelling_normalizer", None) or {})


# --- their parts ------------------------------------------------------------------------------------


def _check_rows(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: give one of each per row")


def _sacrebleu(name: str, metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Measurement:
    """sacreBLEU's own statistics and formula, so that the score of the sums is its corpus score."""
    _check_rows(hypotheses, references)
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.float64)

    def score_of(sums: np.ndarray) -> np.ndarray:
        rows = sums.reshape(-1, sums.shape[-1]).tolist()
        return np.array([metric._compute_score_from_stats(row).score for row in rows]).reshape(sums.shape[:-1])

    return Measurement(name, str(metric.get_signature()), statistics, score_of)


def _proportion(name: str, signature: str, values: Sequence[bool]) -> Measurement:
    return replace(_mean_over_rows(name, signature, values), is_proportion=True)


def _mean_over_rows(name: str, signature: str, values: Sequence[float]) -> Measurement:
    """Statistics: value, 1."""
    column = np.array(values, dtype=np.float64)
    return Measurement(name, signature, np.stack([column, np.ones_like(column)], axis=1), _percent)


def _percent(sums: np.ndarray) -> np.ndarray:
    part, whole = sums[..., 0], sums[..., 1]
    return np.divide(100 * part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _cleaner(language: str, normalize: bool, spelling: Mapping[str, str] | None) -> tuple[Callable[[str], str], str]:
    """A function of text, and its name in signatures."""
    if not normalize:
        return str.strip, "none"
    if _base(language) != "en":
        return _basic_normalizer, "whisper-basic"
    spellings = dict(spelling or {})
    return _stripped(EnglishTextNormalizer(spellings)), f"whisper-english|spellings:{len(spellings) or 'none'}"


def _basic_normalizer(text: str) -> str:
    return _normalizer(letters=False)(text).strip()


def _stripped(function: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: function(text).strip()


def _letters(text: str) -> list[str]:
    return list(text)


def _letters_only(text: str) -> list[str]:
    return list("".join(text.split()))


def _count_errors(hypothesis: Sequence[str], reference: Sequence[str]) -> ErrorCount:
    return ErrorCount(int(editdistance.eval(hypothesis, reference)), len(reference))


def _rouge_tokenizer(language: str) -> tuple[str, Callable[[str], list[str]]]:
    if _base(language) == "en":
        return "ascii-words", _ascii_words
    return ("letters", _letter_tokens) if is_unspaced(language) else ("words", _words)


def _ascii_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _words(text: str) -> list[str]:
    """Runs of letters, marks and digits."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def _letter_tokens(text: str) -> list[str]:
    return list("".join(_words(text)))


def _rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    common = _lcs_length(hypothesis, reference)
    return 2 * common / (len(hypothesis) + len(reference)) if common else 0.0


def _lcs_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Longest common subsequence; a row of the table is the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << index
    everywhere = (1 << len(left)) - 1
    row = everywhere
    for token in right:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & everywhere
    return len(left) - row.bit_count()


def _token_pairs(answers: Sequence[str], references: Sequence[str], language: str) -> list[tuple[list[str], list[str]]]:
    tokenize = _letter_tokens if is_unspaced(language) else _words
    return [(tokenize(answer), tokenize(reference)) for answer, reference in zip(answers, references, strict=True)]


def _contains(answer: list[str], reference: list[str], negations: frozenset[str] = frozenset()) -> bool:
    if not reference:
        return not answer
    starts = [i for i in range(len(answer)) if answer[i : i + len(reference)] == reference]
    return any(not negations.intersection(_before(answer, start)) for start in starts)


def _before(answer: list[str], start: int) -> list[str]:
    """The word before a place, and the one before that if the first is an article or a preposition."""
    words = answer[max(0, start - 2) : start]
    return words if words and words[0] in _NEGATIONS and words[-1] in _LITTLE_WORDS else words[-1:]
