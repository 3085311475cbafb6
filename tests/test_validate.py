"""The check of a finished data directory."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import write_speech, write_split

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.validate import main, sentence_key, validate

TRAIN = [f"This is sentence number {i}." for i in range(8)]
DEV = [f"Another text has the number {i}." for i in range(8)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A good data directory."""
    for split, texts in (("train", TRAIN), ("valid", DEV)):
        write_split(tmp_path, split, 6, texts, speaker=f"speaker of {split}")
    return tmp_path


def change(path: Path, row: int, **cells: str) -> None:
    manifest = Manifest.load(path)
    columns = [*manifest.columns, *(name for name in cells if name not in manifest.columns)]
    rows = [dict.fromkeys(columns, "") | cell | (cells if i == row else {}) for i, cell in enumerate(manifest)]
    write_manifest(path, rows, columns)


def test_good_data_passes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train.dropped.tsv").write_text("id\treason\tdetail\n")
    assert main([str(data), "--audio", "all"]) == 0
    printed = capsys.readouterr().out
    assert "train: audio of 6 rows decoded" in printed and "0 problems, 0 warnings" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    seconds = sorted(n / 16_000 for n in Manifest.load(data / "train.tsv").n_frames)
    assert lines["train"][:3] == ["train", "6", f"{sum(seconds) / 3600:.2f}"]
    assert lines["train"][3] == f"{seconds[0]:.2f}" and lines["train"][6] == f"{seconds[-1]:.2f}"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"src_text": " "}, "train.tsv line 4 (id train-2): src_text is empty"),
        ({"tgt_text": ""}, "train.tsv line 4 (id train-2): tgt_text is empty"),
        ({"audio": "audio/none.flac"}, "train.tsv line 4 (id train-2): audio/none.flac does not exist"),
        ({"audio": "../x.flac"}, "train.tsv line 4 (id train-2): ../x.flac is outside"),
        ({"n_frames": "90000"}, "train.tsv line 4 (id train-2): audio/train-2.flac holds"),
        ({"n_frames": "100"}, "n_frames is 100, but audio/train-2.flac has 13760 samples"),
        ({"audio": "audio/valid-2.flac"}, "valid.tsv shares 1 of its 6 recordings with"),
        ({"prompt": "nope"}, "train.tsv line 4 (id train-2): there is no prompt 'nope'"),
        ({"cut": "x"}, "train.tsv line 4 (id train-2): cut is 'x': write 1"),
    ],
)
def test_problems_are_found(data: Path, cells: dict[str, str], expected: str) -> None:
    change(data / "train.tsv", 2, **cells)
    findings = validate(data)
    assert any(expected in problem for problem in findings.problems), findings
    assert main([str(data)]) == 1


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"id": "valid-1"}, "share 1 ids: line 4 and valid line 3"),
        (
            {"audio": "audio/train-1.flac", "n_frames": "11680"},
            "1 rows repeat the audio of another: line 4 has the audio of line 3",
        ),
        ({"src_text": "this is  SENTENCE number 0"}, "1 rows repeat the sentence of another: line 4 has"),
        ({"src_text": "ANOTHER text has the number 3!"}, "shares 1 of its 6 sentences with"),
        ({"speaker": "speaker of valid"}, "shares 1 of its 1 speakers with"),
        (
            {
                "conversation": '[{"role": "user", "content": '
                '[{"type": "audio", "audio": "audio/train-2.flac", "text": "so"}]}]',
                "prompt": "repeat",
            },
            "train.tsv line 4 (id train-2): its conversation says what is asked, and its prompt is not used",
        ),
        ({"src_text": "word " * 200}, "train.tsv line 4 (id train-2): 1000 characters in 0.9 s"),
    ],
)
def test_warnings_do_not_fail(data: Path, cells: dict[str, str], expected: str) -> None:
    change(data / "train.tsv", 2, **cells)
    findings = validate(data)
    assert any(expected in warning for warning in findings.warnings), findings
    assert findings.problems == []
    assert main([str(data)]) == 0
    assert main([str(data), "--strict"]) == 1


def test_manifests_that_cannot_be_loaded_are_problems(data: Path) -> None:
    content = (data / "train.tsv").read_text()
    (data / "train.tsv").write_text(content.replace("train-3\t", "train-1\t"))
    (data / "valid.tsv").write_text("id\taudio\nx\ty\n")
    (data / "test.tsv").write_text("id\taudio\tn_frames\n")
    problems = "\n".join(validate(data).problems)
    assert "train.tsv lines 3 and 5 have the same id 'train-1'" in problems
    assert "valid.tsv has no column 'n_frames'" in problems
    assert "test.tsv has no rows" in problems and "neither src_text nor tgt_text" in problems


def test_a_sample_is_repeatable_and_its_size_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_speech(data / "audio" / "train-2.flac", 0.2, seed=1)
    found = [bool(validate(data, sample=2, seed=seed).problems) for seed in range(12)]
    assert found == [bool(validate(data, sample=2, seed=seed).problems) for seed in range(12)]
    assert True in found and False in found
    assert validate(data, audio="none").problems == []
    assert main([str(data), "--sample", "2", "--audio", "all"]) == 1
    assert "train: audio of 6 rows decoded" in capsys.readouterr().out


def test_rows_that_training_would_refuse_as_too_long_are_counted(data: Path) -> None:
    samples = write_speech(data / "audio" / "long.flac", 31, seed=1)
    change(data / "train.tsv", 2, audio="audio/long.flac", n_frames=str(samples))
    (warning,) = validate(data).warnings
    assert "train.tsv: 1 rows last over 30 s, more than training takes: line 4" in warning


def test_no_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no manifest"):
        validate(tmp_path)
    with pytest.raises(ValueError, match="away does not exist"):
        validate(tmp_path / "away")


def test_one_manifest_by_itself(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(data / "train.tsv", 2, src_text=" ")
    assert main([str(data / "valid.tsv")]) == 0
    printed = capsys.readouterr().out
    assert "valid: audio of 6 rows decoded" in printed and "train" not in printed
    assert main([str(data / "train.tsv")]) == 1
    (data / "notes.txt").write_text("no table")
    assert main([str(data / "notes.txt")]) == 1


def test_sentences_are_compared_as_they_sound() -> None:
    assert sentence_key("Hello,  WORLD!") == sentence_key("hello world") != sentence_key("hello word")
    every = "".join(map(chr, range(0x2E80)))  # each character, and each once more from what is known by then
    for _ in range(2):
        kept = "".join(c for c in unicodedata.normalize("NFKC", every).casefold() if unicodedata.category(c)[0] != "P")
        assert sentence_key(every) == " ".join(kept.split())
    assert sentence_key("你好。") == sentence_key("你好") and sentence_key("...") == ""


# --- what is wrong without a word -----------------------------------------------------------------


def write_audio(data: Path, name: str, samples: np.ndarray, rate: int = 16_000) -> None:
    soundfile.write(data / "audio" / name, samples, rate)


@pytest.mark.parametrize(
    ("samples", "flaw"),
    [
        (np.zeros(13_760), "digital silence"),
        (np.full(13_760, 0.2), "digital silence"),
        (np.sign(np.sin(np.arange(13_760))), "clipped throughout"),
        (np.sin(np.arange(13_760)) * 0.1 + 0.6, "constant offset"),
    ],
)
def test_audio_in_which_nothing_is_heard_is_a_warning(data: Path, samples: np.ndarray, flaw: str) -> None:
    write_audio(data, "train-2.flac", samples)
    findings = validate(data)
    assert not findings.problems
    expected = (
        f"train.tsv line 4 (id train-2): audio/train-2.flac is audio with a flaw ({flaw}): is anything said in it?"
    )
    assert [expected in warning for warning in findings.warnings] == [True]
    assert main([str(data), "--strict"]) == 1


def test_opposite_channels_are_heard(data: Path) -> None:
    samples, rate = soundfile.read(data / "audio" / "train-2.flac")
    write_audio(data, "train-2.flac", np.stack([samples, -samples], 1), rate)
    assert validate(data) and not validate(data).problems and not validate(data).warnings


def test_integers_as_floats_are_a_problem(data: Path) -> None:
    samples, rate = soundfile.read(data / "audio" / "train-2.flac")
    soundfile.write(data / "audio" / "loud.wav", samples * 32768, rate, subtype="FLOAT")
    change(data / "train.tsv", 2, audio="audio/loud.wav")
    assert any("audio/loud.wav holds samples of up to" in problem for problem in validate(data).problems)


@pytest.mark.parametrize("form", ["copy", "FLAC as WAV", "MP3"])
@pytest.mark.parametrize("text", ["the same", "another"])
def test_a_recording_of_the_training_set_under_another_name_is_a_problem(data: Path, form: str, text: str) -> None:
    name = {"copy": "x.flac", "FLAC as WAV": "x.wav", "MP3": "x.mp3"}[form]
    source = data / "audio" / "train-2.flac"
    samples, rate = soundfile.read(source)
    if form == "copy":
        shutil.copy(source, data / "audio" / name)
    else:
        write_audio(data, name, samples, rate)
    row = Manifest.load(data / "train.tsv")[2]
    cells = {"src_text": row["src_text"].upper()} if text == "the same" else {}
    change(data / "valid.tsv", 4, audio=f"audio/{name}", n_frames=str(len(samples)), **cells)
    problems = validate(data).problems
    if form == "copy" or text == "the same":
        assert len(problems) == 1 and "valid.tsv has 1 recordings of" in problems[0]
        assert "line 6 and train line 4 are the same recording" in problems[0]
        assert not any("are the same recording" in problem for problem in validate(data, "none").problems)
    else:  # what is said is another text, and the file another one: nobody can tell without hearing all
        assert not problems


def test_what_a_spreadsheet_has_put_around_cells_is_a_warning(data: Path) -> None:
    change(data / "train.tsv", 2, src_text='"He said ""yes"", twice."')
    change(data / "train.tsv", 3, src_text='"Yes", he said "twice".')
    assert [w for w in validate(data).warnings if "1 cells of src_text are in quotes" in w and "line 4" in w]


@pytest.mark.parametrize(("language", "is_known"), [("xx", False), ("Klingon", False), ("zho_Hans", True), ("", True)])
def test_unknown_languages_are_a_warning(data: Path, language: str, is_known: bool) -> None:
    change(data / "train.tsv", 2, src_lang=language)
    assert any("src_lang has languages that are not known" in w for w in validate(data).warnings) != is_known
