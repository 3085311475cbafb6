"""Lists as spreadsheets, pandas and Hugging Face write them; audio that means nothing; columns against options."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import import_corpus
import numpy as np
import prepare_common_voice
import prepare_covost2
import pytest
import soundfile
from tiny import write_speech

from blspkd_fairseq.data.corpora import CorpusError, Dropped, Entry, read_listed
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.preparation import PreparationError
from blspkd_fairseq.data.record_store import StoreError

TEXTS = (
    'The robot, and the tiger, live in "Madrid".',
    "The robot and the tiger; nothing else.",
    'He said: "yes, no"',
    "The robot\nand the tiger",
    "a\ttab",
    "日本語のテキスト, é 🔥",
    "ok",
)
COLUMNS = ["id", "path", "text"]
ROWS = [[f"u{i}", "a.wav", text] for i, text in enumerate(TEXTS)]
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def quoted(rows: Sequence[Sequence[str]], delimiter: str, end: str = "\r\n", quoting: int = csv.QUOTE_MINIMAL) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([COLUMNS, *rows])
    return buffer.getvalue()


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def texts_of(path: Path, **options: Any) -> list[str]:
    return [row.text for row in read_listed(path, **options) if isinstance(row, Entry)]


# --- quoted tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.tsv", "\t"), ("a.txt", "\t"), ("a.csv", ","), ("a.CSV", ";"), ("b.csv", "\t")]
)
def test_quoted_tables_are_read(
    name: str, delimiter: str, quoting: int, end: str, encoding: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, quoted(ROWS, delimiter, end, quoting), encoding)
    assert texts_of(path) == list(TEXTS)


def test_excels_tsv(tmp_path: Path) -> None:
    """It quotes cells with commas, too."""
    text = (
        'id\tpath\ttext\nu0\ta.wav\t"The robot, and the tiger, live in ""Madrid""."\nu1\ta.wav\tThe robot.\n'
        'u3\ta.wav\t"He said: ""yes, no"""\nu4\ta.wav\t"The robot\nand the tiger"\nu5\ta.wav\tok\n'
    )
    expected = [TEXTS[0], "The robot.", TEXTS[2], TEXTS[3], "ok"]
    assert texts_of(write(tmp_path / "a.tsv", text)) == expected
    assert texts_of(write(tmp_path / "a.tsv", text), quotes="csv") == expected
    raw = list(read_listed(write(tmp_path / "a.tsv", text), quotes="raw"))
    assert [row.reason for row in raw if isinstance(row, Dropped)] == ["malformed row"]  # the second half of a cell


RAW = (
    '"Good-bye", said the boy.',
    'She said "no".',
    '12" of rain',
    '"""Good-bye,"" said the boy.',
    '"',
    '""',
)


@pytest.mark.parametrize("text", RAW)
def test_quotes_that_can_only_be_text_stay(text: str, tmp_path: Path) -> None:
    rows = [["u0", "a.wav", "plain"], ["u1", "a.wav", '"Good-bye", said the boy.'], ["u2", "a.wav", text]]
    path = write(tmp_path / "a.tsv", "".join("\t".join(row) + "\n" for row in [COLUMNS, *rows]))
    assert texts_of(path) == [row[2] for row in rows]


@pytest.mark.parametrize("text", ['"yes"', '"She said ""no"", twice."', '"a, b"'])
def test_quotes_of_either_kind_are_asked_about(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", f"path\ttext\nb.wav\tplain\na.wav\t{text}\n")
    with pytest.raises(CorpusError, match=r'a.tsv has cells in quotes, such as ".*--quotes raw.*--quotes csv'):
        texts_of(path)
    assert texts_of(path, quotes="raw") == ["plain", text]
    assert texts_of(path, quotes="csv") == ["plain", next(csv.reader([text]))[0] if "," not in text else
                                            text[1:-1].replace('""', '"')]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", 'path,text\na.wav,"open\n', "a.csv line 2 is no CSV"),
        ("a.csv", 'path,text\na.wav,"a" b\n', "a.csv line 2 is no CSV"),
        ("a.csv", "path;sentence\na.wav;b\n", "a.csv has no column .*text"),
        ("a.csv", "", "a.csv has no column path, text"),
        ("a.tsv", "audio\tsentence\na.wav\tb\n", "--column path=COLUMN --column text=COLUMN"),
        ("a.tsv", "path,text\na.wav,b\n", "a.tsv has no column path, text"),
        ("a.jsonl", '{"path": "a.wav"}\n', "a.jsonl line 1 has no text"),
        ("a.jsonl", '{"path": "a", "text": "b"}\nnot json\n', "a.jsonl line 2 is no JSON"),
        ("a.json", '[{"path": "a", "text": "b"}, {"path": "a"}]', "a.json object 2 has no text"),
        ("a.json", '[{"path": "a", "text": "b"}, 3]', "a.json object 2 has no path, text"),
        ("a.json", '{"a": 1}', "a.json line 1 has no path, text"),
        ("a.json", '{\n"a": [], "b": []}', "a.json holds no list of objects"),
        ("a.json", "[1, 2", "a.json is no JSON"),
    ],
)
def test_lists_that_cannot_be_read_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=message):
        texts_of(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_other_encodings_are_named(name: str, tmp_path: Path) -> None:
    text = json.dumps([{"path": "a", "text": "é"}], ensure_ascii=False) if "json" in name else 'path,text\na,"é"\n'
    text = text.replace(",", "\t") if name == "a.tsv" else text
    text = text[1:-1] + "\n" if name == "a.jsonl" else text
    with pytest.raises(CorpusError, match=f"{name} .*is not UTF-8: convert"):
        texts_of(write(tmp_path / name, text, "latin-1"))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", ["lines", "list", "indented list", "object"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json(name: str, form: str, encoding: str, tmp_path: Path) -> None:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = {
        "lines": lines,
        "list": json.dumps(rows),
        "indented list": json.dumps(rows, indent=1),
        "object": json.dumps({"version": 1, "data": rows}, indent=1),
    }[form]
    assert texts_of(write(tmp_path / name, text, encoding)) == list(TEXTS)


# --- folders of audio -----------------------------------------------------------------------------


def audio_folder(folder: Path, name: str = "metadata.csv", text: str = "transcription", seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for i in range(3):
        write_speech(folder / f"{seed}-{i}.wav", 0.5, seed + i)
        rows.append({"file_name": f"{seed}-{i}.wav", text: f'Sentence, "number" {i}.', "speaker": "s"})
    if name.endswith("csv"):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("text", ["transcription", "text", "sentence", "what was said"])
def test_folders_of_hugging_face(name: str, text: str, tmp_path: Path) -> None:
    train = audio_folder(tmp_path / "data" / "train", name, text)
    test = audio_folder(tmp_path / "data" / "test", name, text, seed=7)
    named = ["--column", f"text={text}"] if text == "what was said" else []
    arguments = ["--list", f"train={train}", "--list", f"test={test}", "--output", str(tmp_path / "out"), *named]
    import_corpus.main([*arguments, "--processes", "1"])
    rows = list(Manifest.load(tmp_path / "out" / "test.tsv"))
    assert [row["src_text"] for row in rows] == [f'Sentence, "number" {i}.' for i in range(3)]
    assert rows[0]["speaker"] == "s" and len(Manifest.load(tmp_path / "out" / "train.tsv")) == 3


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="empty has no metadata.csv or .*: expected one of them$"):
        texts_of(tmp_path / "empty")
    folder = audio_folder(tmp_path / "data" / "train", text="words")
    with pytest.raises(CorpusError, match="metadata.csv has no column text or transcription .*--column text=COLUMN"):
        texts_of(folder)
    with pytest.raises(CorpusError, match="data has no metadata.csv .*there is one in .*train: name a folder for each"):
        texts_of(folder.parent)
    write(folder / "metadata.jsonl", "{}")
    with pytest.raises(CorpusError, match="train has metadata.csv and metadata.jsonl"):
        texts_of(folder)


# --- audio that means nothing ---------------------------------------------------------------------

SPEECH = np.random.default_rng(0).normal(0, 0.1, 16_000)
BAD = {
    "silent": (np.zeros(16_000), "digital silence"),
    "constant": (np.full(16_000, 0.3), "digital silence"),
    "offset": (SPEECH * 0.2 + 0.6, "constant offset"),
    "clipped": (np.sign(SPEECH), "clipped throughout"),
    "integers": (SPEECH * 32768, "out of range"),
    "nan": (np.where(np.arange(16_000) == 7, np.nan, SPEECH), "NaN or infinite"),
}


def bad_corpus(folder: Path) -> Path:
    samples = {"good": SPEECH, "opposite": np.stack([SPEECH, -SPEECH], 1)}
    samples |= {name: bad[0] for name, bad in BAD.items()}
    for name, array in samples.items():
        soundfile.write(folder / f"{name}.wav", array, 16_000, subtype="FLOAT")
    (folder / "half.wav").write_bytes((folder / "good.wav").read_bytes()[:9000])
    names = [*samples, "half"]
    return write(folder / "list.csv", "path,text\n" + "".join(f"{name}.wav,text of {name}\n" for name in names))


def test_audio_that_means_nothing_is_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--list", f"train={bad_corpus(tmp_path)}", "--output", str(tmp_path / "out"), "--processes", "1"]
    with pytest.raises(PreparationError, match="7 of the 9 rows"):
        import_corpus.main(arguments)
    import_corpus.main([*arguments, "--max-dropped", "0.9"])
    printed = capsys.readouterr().out
    dropped = {row["id"]: row["reason"] for row in _table(tmp_path / "out" / "train.dropped.tsv")}
    assert dropped == {**{name: reason for name, (_, reason) in BAD.items()}, "half": "shorter than declared"}
    assert all(f"dropped: {reason}" in printed for reason in dropped.values())
    rows = {row["id"]: row for row in Manifest.load(tmp_path / "out" / "train.tsv")}
    assert list(rows) == ["good", "opposite"]
    one, other = (soundfile.read(tmp_path / "out" / row["audio"])[0] for row in rows.values())
    np.testing.assert_array_equal(one, other)  # a channel, and not the silence of both


def test_flawed_audio_may_be_kept(tmp_path: Path) -> None:
    arguments = ["--list", f"train={bad_corpus(tmp_path)}", "--output", str(tmp_path / "out"), "--processes", "1"]
    import_corpus.main([*arguments, "--max-dropped", "0.9", "--keep-flawed"])
    kept = [row["id"] for row in Manifest.load(tmp_path / "out" / "train.tsv")]
    assert kept == ["good", "opposite", "silent", "constant", "offset", "clipped"]
    with pytest.raises(StoreError, match="keep_flawed was True"):
        import_corpus.main([*arguments, "--max-dropped", "0.9"])


def _table(path: Path) -> list[dict[str, str]]:
    header, *lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


# --- Common Voice's own columns -------------------------------------------------------------------


def common_voice(folder: Path, locale: str) -> Path:
    (folder / "clips").mkdir(parents=True)
    for name in ("train", "validated"):
        header = "client_id\tpath\tsentence\tlocale\n" if locale else "client_id\tpath\tsentence\n"
        cells = [f"c{i}\tcv_{i}.mp3\tSentence {i}" + (f"\t{locale}" if locale else "") for i in range(2)]
        write(folder / f"{name}.tsv", header + "".join(f"{line}\n" for line in cells))
    for i in range(2):
        write_speech(folder / "clips" / f"cv_{i}.mp3", 0.5, i, 48_000)
    write(folder / "covost_v2.fr_en.tsv", "path\ttranslation\tsplit\ncv_0.mp3\tA\ttrain\ncv_1.mp3\tB\ttrain\n")
    return folder


def prepare_voice(root: Path, lang: str, out: Path) -> None:
    prepare_common_voice.main(
        ["--root", str(root), "--lang", lang, "--splits", "train", "--output", str(out), "--processes", "1"]
    )


@pytest.mark.parametrize(("locale", "lang"), [("en", "fr"), ("zh-CN", "ja"), ("sv-SE", "no")])
def test_another_language_than_the_locale_is_refused(locale: str, lang: str, tmp_path: Path) -> None:
    root = common_voice(tmp_path / "cv" / locale, locale)
    with pytest.raises(CorpusError, match=f"train.tsv says that the language of cv_0.mp3 is {locale}, and not {lang}"):
        prepare_voice(root, lang, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tsv"))


@pytest.mark.parametrize(("locale", "lang"), [("zh-CN", "zh-CN"), ("zh-CN", "zh"), ("sv-SE", "sv"), ("", "fr")])
def test_the_locale_of_that_language_is_fine(locale: str, lang: str, tmp_path: Path) -> None:
    prepare_voice(common_voice(tmp_path / "cv" / (locale or "x"), locale), lang, tmp_path / "out")
    assert {row["src_lang"] for row in Manifest.load(tmp_path / "out" / "train.tsv")} == {lang}


def test_releases_without_a_locale_have_a_folder(tmp_path: Path) -> None:
    root = common_voice(tmp_path / "cv-corpus-4" / "en", "")
    with pytest.raises(CorpusError, match="en is Common Voice of en and not of fr"):
        prepare_voice(root, "fr", tmp_path / "out")


@pytest.mark.parametrize("where", ["locale", "folder"])
def test_covost_of_another_language_is_refused(where: str, tmp_path: Path) -> None:
    folder, locale = ("fr", "de") if where == "locale" else ("de", "")
    root = common_voice(tmp_path / "cv-corpus-4" / folder, locale)
    options = ["--direction", "fr_en", "--splits", "train", "--output", str(tmp_path / "out"), "--processes", "1"]
    with pytest.raises(CorpusError, match="is de, and not fr|of de and not of fr"):
        prepare_covost2.main(["--root", str(root), *options])
