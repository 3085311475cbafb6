"""Metrics: sacreBLEU's, jiwer's and rouge-score's own figures on the same awkward rows, and what they leave open."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from blspkd_fairseq.evaluation import metrics
from blspkd_fairseq.evaluation.metrics import Measurement

_TEXTS = {
    "en": "the a light, kitchen? don't colour U.S. 1,000 o'clock naïve (laughs) [noise] <unk> well-known A_b ÉTÉ 🙂",
    "de": "der Straße, über Übergröße? 3,5 ging's »ja« niño été hören",
    "zh": "你 好 ， 世界 今天 天气 怎么 样 。 GPT 4",
    "ja": "今日 は 天気 が いい 。 テスト ABC",
}
WORDS = {language: text.split() for language, text in _TEXTS.items()}
JOIN = {"en": " ", "de": " ", "zh": "", "ja": ""}


def rows(language: str, count: int = 300) -> tuple[list[str], list[str]]:
    """References, and hypotheses with words dropped, replaced, doubled and swapped; some hypotheses are empty."""
    rng = random.Random(language)
    references, hypotheses = [], []
    for index in range(count):
        words = rng.choices(WORDS[language], k=rng.randint(1, 14))
        edited = [rng.choice(WORDS[language]) if rng.random() < 0.15 else word for word in words if rng.random() > 0.1]
        edited += rng.choices(WORDS[language], k=rng.randint(0, 2))
        references.append(JOIN[language].join(words))
        hypotheses.append("" if index % 29 == 0 else JOIN[language].join(edited))
    return hypotheses, references


# --- the same figures as the libraries --------------------------------------------------------------


@pytest.mark.parametrize(("language", "tokenizer"), [("en", "13a"), ("de", "13a"), ("zh-CN", "zh"), ("th", "char")])
def test_bleu_is_sacrebleus(language: str, tokenizer: str) -> None:
    hypotheses, references = rows("zh" if language in ("zh-CN", "th") else language)
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenizer)
    measured = metrics.bleu(hypotheses, references, language)
    assert 1 < expected.score < 99
    assert measured.score == expected.score
    assert f"tok:{tokenizer}|" in measured.signature and f"version:{sacrebleu.__version__}" in measured.signature


@pytest.mark.parametrize("language", WORDS)
def test_chrf_is_sacrebleus(language: str) -> None:
    hypotheses, references = rows(language)
    expected = sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert 1 < expected < 99
    assert metrics.chrf(hypotheses, references).score == expected


@pytest.mark.parametrize("measure", [metrics.bleu, metrics.chrf])
def test_scores_of_resampled_sums_are_those_of_the_resampled_rows(measure: Callable[..., Measurement]) -> None:
    hypotheses, references = rows("de", 40)
    measured = measure(hypotheses, references)
    draws = np.random.default_rng(0).integers(40, size=(2, 3, 40))
    scores = measured.score_of(measured.statistics[draws].sum(axis=2))
    assert scores.shape == (2, 3)
    for where in np.ndindex(2, 3):
        again = measure([hypotheses[i] for i in draws[where]], [references[i] for i in draws[where]])
        assert scores[where] == again.score


def test_a_perfect_and_an_empty_translation() -> None:
    for measure in (metrics.bleu, metrics.chrf):
        assert measure(["one two three four five"], ["one two three four five"]).score == pytest.approx(100)
        assert measure([""], ["one two three four five"]).score == 0


@pytest.mark.parametrize(("unit", "theirs"), [("WER", jiwer.wer), ("CER", jiwer.cer)])
@pytest.mark.parametrize("language", ["en", "de"])
def test_raw_error_rates_are_jiwers(language: str, unit: str, theirs: Callable[..., float]) -> None:
    hypotheses, references = rows(language)
    measured = metrics.error_rate(hypotheses, references, unit, language, normalize=False)
    assert measured.score == pytest.approx(100 * theirs(references, hypotheses))
    assert "norm:none" in measured.signature and measured.less_is_better


@pytest.mark.parametrize("unit", ["WER", "CER"])
@pytest.mark.parametrize("language", ["en", "de"])
def test_normalised_error_rates_are_jiwers_on_text_that_was_normalised_before(language: str, unit: str) -> None:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    clean = EnglishTextNormalizer({"colour": "color"}) if language == "en" else BasicTextNormalizer()
    hypotheses, references = rows(language)
    hypotheses = [text.replace("colour", "color") for text in hypotheses]
    pairs = [(clean(h).strip(), clean(r).strip()) for h, r in zip(hypotheses, references, strict=True)]
    with_words = [pair for pair in pairs if pair[1]]
    insertions = sum(len(h.split() if unit == "WER" else h) for h, r in pairs if not r)
    output = (jiwer.process_words if unit == "WER" else jiwer.process_characters)(
        [r for _, r in with_words], [h for h, _ in with_words]
    )
    errors = output.substitutions + output.deletions + output.insertions + insertions
    total = output.hits + output.substitutions + output.deletions
    measured = metrics.error_rate(hypotheses, references, unit, language, spelling={"colour": "color"})
    assert measured.score == pytest.approx(100 * errors / total)
    assert ("whisper-english|spellings:1" if language == "en" else "whisper-basic") in measured.signature


def test_rouge_l_is_rouge_scores() -> None:
    hypotheses, references = rows("en")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, hypotheses, strict=True)
    expected = np.array([scorer.score(r, h)["rougeL"].fmeasure for r, h in pairs])
    measured = metrics.rouge_l(hypotheses, references, "en")
    np.testing.assert_allclose(measured.statistics[:, 0], expected, rtol=1e-12)
    assert measured.score == pytest.approx(100 * expected.mean())
    assert 10 < measured.score < 95


@pytest.mark.parametrize("seed", range(20))
def test_longest_common_subsequence_is_that_of_the_table(seed: int) -> None:
    rng = random.Random(seed)
    left, right = (rng.choices("abcd", k=rng.randint(0, 90)) for _ in range(2))
    table = np.zeros((len(left) + 1, len(right) + 1), dtype=int)
    for i, j in np.ndindex(len(left), len(right)):
        table[i + 1, j + 1] = table[i, j] + 1 if left[i] == right[j] else max(table[i, j + 1], table[i + 1, j])
    assert metrics._lcs_length(left, right) == table[-1, -1]


# --- languages --------------------------------------------------------------------------------------


def test_letters_are_the_words_of_languages_without_spaces() -> None:
    text = ["今天天气怎么样。"]
    assert metrics.rouge_l(text, text, "zh").score == 100
    assert metrics.rouge_l(["今天天气很好"], ["今天天气怎么样"], "zh-CN").score == pytest.approx(100 * 8 / 13)
    assert metrics.bleu(text, text, "zh").score == pytest.approx(100)
    names = [one.name for one in metrics.transcription_metrics(text, text, "ja")]
    assert names == ["CER (raw)", "CER (normalized)"]
    assert metrics.error_rate(["今天 天气"], ["今天天汽"], "CER", "zh", normalize=False).score == 25


def test_other_alphabets_have_words_in_rouge_l() -> None:
    assert metrics.rouge_l(["Это был кот"], ["это был пёс"], "ru").score == pytest.approx(200 / 3)
    assert metrics.rouge_l(["हिन्दी में"], ["हिन्दी से"], "hi").score == 50  # vowel signs do not cut words


def test_the_spelling_table_is_used_for_english_and_named() -> None:
    table = {"colour": "color"}
    with_table = metrics.error_rate(["colour"], ["color"], "WER", "en", spelling=table)
    without = metrics.error_rate(["colour"], ["color"], "WER", "en")
    assert (with_table.score, without.score) == (0, 100)
    assert "spellings:1|" in with_table.signature and "spellings:none|" in without.signature
    assert metrics.error_rate(["colour"], ["color"], "WER", "de", spelling=table).score == 100


def test_the_spelling_table_comes_from_a_whisper_tokenizer(tmp_path: Path) -> None:
    from transformers import WhisperTokenizer

    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    assert metrics.whisper_spelling(WhisperTokenizer.from_pretrained(tmp_path)) == {"colour": "color"}
    assert metrics.whisper_spelling(object()) == {}


@pytest.mark.parametrize("text", ["今天天气很好", "Это был кот", "हिन्दी", "?!", "", "three small words"])
@pytest.mark.parametrize("language", ["", "en", "zh", "ru"])
def test_equal_texts_score_100_in_rouge_l(text: str, language: str) -> None:
    assert metrics.rouge_l([text], [text], language).score == 100


def test_other_texts_do_not(text: str = "今天天气很好") -> None:
    assert metrics.rouge_l([text], ["今天下雨"], "en").score == 0


# --- empty texts and matches ------------------------------------------------------------------------


def test_insertions_against_an_empty_reference_count() -> None:
    measured = metrics.error_rate(["a b", "x y z w"], ["", "x y z w"], "WER", "en", normalize=False)
    assert measured.score == 50
    assert math.isnan(metrics.error_rate(["a b"], [""], "WER", "en").score)


def test_a_remark_in_brackets_is_in_the_raw_figure_only() -> None:
    raw, normalized = metrics.transcription_metrics(["hello <|im_end|>"], ["hello"], "en")[:2]
    assert (raw.name, raw.score) == ("WER (raw)", 100)
    assert (normalized.name, normalized.score) == ("WER (normalized)", 0)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "contains"),
    [
        ("Paris.", "paris", 100, 100),
        ("It is Paris, of course", "Paris", 0, 100),
        ("(A)", "(B)", 0, 0),
        ("Comparison", "Paris", 0, 0),
        ("New cheap York", "New York", 0, 0),
        ("", "Paris", 0, 0),
        ("Paris", "?!", 0, 0),
        ("", "", 100, 100),
        ("the answer is twenty one", "twenty-one", 0, 100),
        ("It is not Paris.", "Paris", 0, 0),
        ("It isn't in Paris", "Paris", 0, 0),
        ("Not Lyon, but Paris", "Paris", 0, 100),
        ("It is not Lyon. It is Paris, not Nice", "Paris", 0, 100),
    ],
)
def test_matches(answer: str, reference: str, exact: float, contains: float) -> None:
    assert metrics.exact_match([answer], [reference], "en").score == exact
    assert metrics.contains_match([answer], [reference], "en").score == contains


def test_matches_in_a_language_without_spaces() -> None:
    assert metrics.contains_match(["答案是北京。"], ["北京"], "zh").score == 100
    assert metrics.contains_match(["答案是北 京市"], ["京北"], "zh").score == 0


def test_answers_are_compared_with_text_answers_and_references() -> None:
    answers, texts = rows("en", 30)
    self_bleu, self_rouge = metrics.answer_metrics(answers, texts, language="en")
    assert (self_bleu.name, self_bleu.score) == ("Self-BLEU", metrics.bleu(answers, texts, "en").score)
    assert (self_rouge.name, self_rouge.score) == ("Self-ROUGE-L", metrics.rouge_l(answers, texts, "en").score)
    all_four = metrics.answer_metrics(answers, texts, answers, "en")
    assert [one.name for one in all_four[2:]] == ["exact match", "contains match"]
    assert all_four[2].score == 100


def test_columns_of_different_lengths_and_no_rows_are_refused() -> None:
    for measure in (metrics.bleu, metrics.chrf, metrics.error_rate, metrics.rouge_l, metrics.exact_match):
        with pytest.raises(ValueError, match="2 hypotheses and 1 references"):
            measure(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="0 hypotheses"):
            measure([], [])
    with pytest.raises(ValueError, match="choose WER or CER"):
        metrics.error_rate(["a"], ["a"], "PER")
