"""A language is the same one in every code and by its name, in prompts, tokenizers and normalisers."""

import logging

import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from blspkd_fairseq.data.corpora import EN_TO_X, X_TO_EN
from blspkd_fairseq.data.languages import LANGUAGES, find_language, is_same_language, looks_like_code
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation import metrics
from blspkd_fairseq.systems.systems import _whisper_language

SAME = {
    "zh": "zho chi cmn ZH zh-CN zh_TW zh-Hant-TW zho_Hans Chinese chinese Mandarin",
    "yue": "yue yue_Hant zh-yue zh-yue-HK Cantonese",
    "en": "eng en-US en_US.UTF-8 eng_Latn English",
    "de": "deu ger de-AT deu_Latn German",
    "fa": "fas per pes_Arab Persian Farsi",
    "lv": "lav lvs_Latn Latvian",
    "he": "heb iw Hebrew",
    "jv": "jav jw Javanese",
    "no": "nor nb nob_Latn Norwegian",
    "tl": "tgl fil tgl_Latn Tagalog Filipino",
    "ja": "jpn ja-JP jpn_Jpan Japanese",
    "th": "tha tha_Thai Thai",
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is said once in a process is said again."""
    from blspkd_fairseq.data import languages

    languages._warn_unknown.cache_clear()
    metrics._warn_of_spaces.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("code", SAME)
def test_codes_and_names_are_one_language(code: str) -> None:
    found = {find_language(text) for text in [code, *SAME[code].split()]}
    assert len(found) == 1 and found.pop() == (code, LANGUAGES[code])


@pytest.mark.parametrize("name", ["Chinese (Simplified)", "Traditional Chinese", "  simplified   chinese "])
def test_kinds_of_a_language(name: str) -> None:
    assert find_language(name) == ("zh", "Chinese")


def test_every_language_of_whisper_flores_and_covost_is_known() -> None:
    assert all(find_language(code) for code in (*WHISPER_LANGUAGES, *FAIRSEQ_LANGUAGE_CODES, *X_TO_EN, *EN_TO_X))
    assert all(find_language(name) == find_language(code) for name, code in TO_LANGUAGE_CODE.items())


@pytest.mark.parametrize("text", ["", " ", "xx", "qqq", "Klingon", "Englisch spoken", "x" * 300, "en\0", "zh--CN", "-"])
def test_what_is_no_language(text: str) -> None:
    assert find_language(text) is None
    assert not is_same_language(text, "en") and is_same_language(text, f" {text} ")


def test_codes_are_told_from_names() -> None:
    assert all(map(looks_like_code, ("zh", "xx", "zho_Hans", "en_US.UTF-8")))
    assert not any(map(looks_like_code, ("Chinese", "Ge ez", "")))


@pytest.mark.parametrize("code", SAME)
def test_scores_do_not_depend_on_how_a_language_is_written(code: str) -> None:
    hypotheses, references = ["今天天气很好 it costs $20, color"], ["今天天氣很好 It costs twenty dollars colour."]

    def figures(language: str) -> list[tuple[str, str, float]]:
        counts = metrics.word_errors(hypotheses[0], references[0], language)
        measured = [
            *metrics.transcription_metrics(hypotheses, references, language),
            *metrics.translation_metrics(hypotheses, references, language),
            *metrics.answer_metrics(hypotheses, references, references, language),
        ]
        return [("count", "", float(counts.errors)), *((one.name, one.signature, one.score) for one in measured)]

    expected = figures(code)
    for text in SAME[code].split():
        assert figures(text) == expected, text


@pytest.mark.parametrize("code", SAME)
def test_whisper_and_prompts_take_every_writing(code: str) -> None:
    expected = resolve_prompt("translate", "", code)
    for text in SAME[code].split():
        assert _whisper_language(text) == _whisper_language(code) in WHISPER_LANGUAGES
        if looks_like_code(text):
            assert resolve_prompt("translate", "", text) == expected


def test_names_stay_in_prompts_as_they_are_written(said: pytest.LogCaptureFixture) -> None:
    assert "text to Simplified Chinese." in resolve_prompt("translate", "", "Simplified Chinese")
    assert not said.records
    assert "text to Klingon." in resolve_prompt("translate", "", "Klingon")
    assert "'Klingon' is no language that is known here" in said.text


@pytest.mark.parametrize("language", ["xx", "Klingon", "zz_Latn"])
def test_an_unknown_language_is_said_once(language: str, said: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert "tok:13a" in metrics.bleu(["a b c d"], ["a b c d"], language).signature
        assert _whisper_language(language) is None
    assert said.text.count(f"{language!r} is no language that is known here") == 2  # for scores, and for Whisper
    assert "13a" in said.text and "Whisper listens" in said.text


@pytest.mark.parametrize(
    "text", ["今天天气很好我们去公园玩", "今日は天気がいい", "วันนี้อากาศดี", "ຂ້ອຍຢາກກິນເຂົ້າ", "နေကောင်းလား"]
)
@pytest.mark.parametrize("language", ["", "en", "xx"])
def test_words_are_never_counted_silently_where_there_are_none(
    text: str, language: str, said: pytest.LogCaptureFixture
) -> None:
    metrics.bleu([text], [text], language)
    metrics.bleu_counts([text], [text], language)
    assert said.text.count("BLEU's tokenizer 13a splits at spaces") == 1
    metrics.error_rate([text], [text], "WER", language)
    metrics.word_errors(text, text, language)
    assert said.text.count("WER splits at spaces") == 1


def test_right_languages_are_not_warned_about(said: pytest.LogCaptureFixture) -> None:
    for language, text in (
        ("zh", "今天天气很好"),
        ("en", "fine weather"),
        ("", "quoted 今天"),
        ("de", ""),
        ("ru", "привет"),
    ):
        metrics.bleu([text], [text], language)
        metrics.error_rate([text], [text], "CER" if language == "zh" else "WER", language)
        metrics.word_errors(text, text, language)
    assert not [record for record in said.records if "spaces" in record.message or "known" in record.message]
