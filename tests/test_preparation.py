"""Corpora to manifests: every layout, awkward texts, everything that is dropped, kills, full disks."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import import_corpus
import numpy as np
import prepare_common_voice
import prepare_covost2
import prepare_gigaspeech
import prepare_librispeech
import pytest
import soundfile
from tiny import PATIENCE, read_jsonl, write_speech

from blspkd_fairseq.data import conversion, preparation
from blspkd_fairseq.data.audio import find_zip_entry, load_audio
from blspkd_fairseq.data.corpora import EN_TO_X, X_TO_EN, check_direction, punctuate, read_table
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.zip_shards import ShardWriter

SCRIPTS = Path(__file__).parents[1] / "scripts"
AWKWARD = (
    'She said "no", twice.',
    '"""Good-bye,"" said the boy."',
    "A back\\slash, \\n and C:\\temp\\",
    "日本語のテキスト、はい。",
    "Fire 🔥 and family 👩‍👩‍👧",
    " leading and trailing ",
    'json:"not json"',
    "line\u2028separator and\u0085next line",
    "'quoted', `ticked`, ½ ﬁ é é",
)


def table(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], bom: bool = False, crlf: bool = False
) -> Path:
    end = "\r\n" if crlf else "\n"
    text = "".join("\t".join(row) + end for row in (columns, *rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


def speech(path: Path, seconds: float = 0.5, seed: int = 0, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_speech(path, seconds, seed, rate)
    return path


def librispeech(root: Path, subset: str = "train-clean-100", count: int = 6, speakers: int = 2) -> Path:
    for speaker in range(1, speakers + 1):
        folder = root / subset / str(speaker) / "7"
        names = [f"{speaker}-7-{i:04d}" for i in range(count)]
        for i, name in enumerate(names):
            speech(folder / f"{name}.flac", 0.3 + 0.05 * i, seed=100 * speaker + i)
        texts = "".join(f"{name} SENTENCE {i} OF {speaker}\n" for i, name in enumerate(names))
        (folder / f"{speaker}-7.trans.txt").write_text(texts)
    return root


def common_voice(folder: Path, texts: Sequence[str], **options: bool) -> Path:
    rows = []
    for i, text in enumerate(texts):
        speech(folder / "clips" / f"cv_{i}.mp3", 0.5, seed=i, rate=48_000)
        rows.append([f"client{i % 3}", f"cv_{i}.mp3", text, "2", "0"])
    table(folder / "train.tsv", ["client_id", "path", "sentence", "up_votes", "down_votes"], rows, **options)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(Manifest.load(path))


def dropped_of(path: Path) -> dict[str, str]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1] for line in lines[1:]}


def listing(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_import(path: Path, output: Path, *options: str) -> None:
    import_corpus.main(["--list", f"train={path}", "--output", str(output), "--processes", "1", *options])


# --- layouts --------------------------------------------------------------------------------------


def test_librispeech(tmp_path: Path) -> None:
    librispeech(tmp_path / "LibriSpeech", speakers=10, count=2)
    librispeech(tmp_path / "LibriSpeech", "dev-clean", count=1, speakers=11)
    for path in (tmp_path / "LibriSpeech" / "dev-clean").glob("*/*/*"):  # ids are unique in LibriSpeech
        path.rename(path.with_name("9" + path.name))
        if path.suffix == ".txt":
            path.with_name("9" + path.name).write_text("9" + path.with_name("9" + path.name).read_text())
    prepare_librispeech.main(["--root", str(tmp_path), "--output", str(tmp_path / "out"), "--processes", "1"])
    rows = rows_of(tmp_path / "out" / "train-clean-100.tsv")
    assert [row["id"] for row in rows] == [f"{s}-7-{i:04d}" for s in range(1, 11) for i in range(2)]
    assert rows[0] == {
        "id": "1-7-0000",
        "audio": "audio/train-clean-100/0000/1-7-0000.flac",
        "n_frames": "4800",
        "src_text": "SENTENCE 0 OF 1",
        "speaker": "1",
        "src_lang": "en",
    }
    assert len(rows_of(tmp_path / "out" / "dev-clean.tsv")) == 11
    original, _ = soundfile.read(tmp_path / "LibriSpeech/train-clean-100/1/7/1-7-0001.flac", dtype="int16")
    prepared, rate = soundfile.read(tmp_path / "out" / rows[1]["audio"], dtype="int16")
    assert rate == 16_000
    np.testing.assert_array_equal(original, prepared)


@pytest.mark.parametrize("form", [{}, {"bom": True}, {"crlf": True}, {"bom": True, "crlf": True}])
def test_common_voice_text_is_kept_to_the_character(tmp_path: Path, form: dict[str, bool]) -> None:
    common_voice(tmp_path / "cv" / "de", AWKWARD, **form)
    arguments = ["--root", str(tmp_path / "cv"), "--lang", "de", "--splits", "train", "--processes", "1"]
    prepare_common_voice.main([*arguments, "--output", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out" / "train.tsv")
    assert [row["src_text"] for row in rows] == list(AWKWARD)
    assert [row["id"] for row in rows] == [f"cv_{i}" for i in range(len(AWKWARD))]
    assert {row["src_lang"] for row in rows} == {"de"} and rows[1]["speaker"] == "client1"
    assert abs(int(rows[0]["n_frames"]) - 8000) < 1600
    for row in rows:
        assert len(load_audio(row["audio"], tmp_path / "out")) == int(row["n_frames"])


def test_common_voice_paths_without_ending_and_declared_durations(tmp_path: Path) -> None:
    folder = common_voice(tmp_path, ["one", "two", "three"])
    table(folder / "train.tsv", ["sentence", "path", "client_id"], [[f"s{i}", f"cv_{i}", "x"] for i in range(3)])
    table(folder / "clip_durations.tsv", ["clip", "duration[ms]"], [["cv_0.mp3", "500"], ["cv_1.mp3", "2000"]])
    arguments = ["--root", str(folder), "--lang", "en", "--splits", "train", "--max-dropped", "0.5", "--processes", "1"]
    prepare_common_voice.main([*arguments, "--output", str(tmp_path / "out")])
    assert [row["id"] for row in rows_of(tmp_path / "out" / "train.tsv")] == ["cv_0", "cv_2"]
    assert dropped_of(tmp_path / "out" / "train.dropped.tsv") == {"cv_1": "shorter than declared"}


def test_unescaped_cells(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"path\tsentence\n1\ta \\\\ b\n2\ttab\\\there\n3\tline\\\nbreak\n4\tplain\n")
    raw = [row if isinstance(row, dict) else row.reason for row in read_table(path)]
    assert raw[0] == {"path": "1", "sentence": "a \\\\ b"} and raw[1] == "malformed row" and raw[-1]["path"] == "4"  # type: ignore[index]
    cells = [row["sentence"] for row in read_table(path, unescape=True) if isinstance(row, dict)]
    assert cells == ["a \\ b", "tab\there", "line\nbreak", "plain"]


def gigaspeech(root: Path) -> Path:
    speech(root / "audio/podcast/P0/POD1.wav", 4.0, seed=1, rate=32_000)
    opus = root / "audio/youtube/Y0/YOU1.opus"
    opus.parent.mkdir(parents=True)
    samples = np.random.default_rng(0).normal(size=32_000) * 0.1
    soundfile.write(opus, samples, 16_000, format="OGG", subtype="OPUS")

    def segment(sid: str, begin: float, end: float, text: str, *subsets: str) -> dict[str, Any]:
        names = [f"{{{name}}}" for name in subsets]
        return {"sid": sid, "speaker": "N/A", "begin_time": begin, "end_time": end, "text_tn": text, "subsets": names}

    pod = [
        segment("POD1_S0", 0.5, 1.5, "HELLO <COMMA> WORLD <PERIOD>", "XL", "L", "XS"),
        segment("POD1_S1", 1.5, 2.0, "<MUSIC>", "XL", "L", "XS"),
        segment("POD1_S2", 2.0, 4.0, "REALLY <QUESTIONMARK> YES <EXCLAMATIONPOINT>", "XL", "XS"),
        segment("POD1_S3", 3.5, 9.0, "BEYOND THE END", "XL"),
    ]
    you = [segment("YOU1_S0", 0.0, 1.0, "ONLY IN DEV", "DEV")]
    audios = [
        {"aid": "POD1", "path": "audio/podcast/P0/POD1.wav", "duration": 4.0, "segments": pod},
        {"aid": "YOU1", "path": "audio/youtube/Y0/YOU1.opus", "duration": 2.0, "segments": you},
    ]
    (root / "GigaSpeech.json").write_text(json.dumps({"dataset": "GigaSpeech", "audios": audios}, indent=2))
    return root


def test_gigaspeech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blspkd_fairseq.data.corpora.gigaspeech._READ_CHARACTERS", 50)  # elements come in many pieces
    root, out = gigaspeech(tmp_path / "giga"), tmp_path / "out"
    arguments = ["--root", str(root), "--subsets", "XL", "DEV", "--max-dropped", "0.4", "--processes", "1"]
    decoded: list[str] = []
    load = conversion.load_audio
    monkeypatch.setattr(conversion, "load_audio", lambda p, **k: (decoded.append(p.name), load(p, **k))[1])
    prepare_gigaspeech.main([*arguments, "--output", str(out)])
    rows = rows_of(out / "train-xl.tsv")
    assert [(row["id"], row["src_text"]) for row in rows] == [("POD1_S0", "HELLO, WORLD."), ("POD1_S2", "REALLY? YES!")]
    assert decoded == ["POD1.wav", "YOU1.opus"]  # each once
    assert dropped_of(out / "train-xl.dropped.tsv") == {"POD1_S1": "no speech", "POD1_S3": "shorter than declared"}
    assert [int(row["n_frames"]) for row in (*rows, *rows_of(out / "dev.tsv"))] == [16_000, 32_000, 16_000]
    whole = load(root / "audio/podcast/P0/POD1.wav")
    np.testing.assert_allclose(load_audio(rows[0]["audio"], out), whole[8000:24_000], atol=1e-4)
    assert punctuate("A <COMMA>B<PERIOD>") == "A,B."


@pytest.mark.parametrize("content", ['{"audios": [{"path": "x", "segm', '{"other": 1}', '{"audios": [{"path": "x"}]}'])
def test_gigaspeech_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "GigaSpeech.json").write_text(content)
    with pytest.raises(ValueError, match="GigaSpeech.json"):
        prepare_gigaspeech.main(["--root", str(tmp_path), "--output", str(tmp_path / "out"), "--processes", "1"])


def covost2(folder: Path) -> Path:
    common_voice(folder, AWKWARD)
    (folder / "train.tsv").unlink()
    columns = ["client_id", "path", "sentence", "up_votes"]
    rows = [[f"client{i}", f"cv_{i}.mp3", text, "2"] for i, text in enumerate(AWKWARD)]
    table(folder / "validated.tsv", columns, rows)
    splits = ["train", "dev", "test", "train_covost", "train", "train", "dev_covost", "train", "train"]
    pairs = [[f"cv_{i}.mp3", f'T{i} "q" \\ 日', split] for i, split in enumerate(splits)]
    pairs.insert(2, ["gone.mp3", "no such clip", "train"])
    table(folder / "covost_v2.fr_en.tsv", ["path", "translation", "split"], pairs, bom=True, crlf=True)
    return folder


def test_covost2(tmp_path: Path) -> None:
    root, out = covost2(tmp_path / "cv" / "fr"), tmp_path / "out"
    arguments = ["--root", str(tmp_path / "cv"), "--direction", "fr_en", "--processes", "1", "--max-dropped", "0.2"]
    prepare_covost2.main([*arguments, "--output", str(out)])
    rows = rows_of(out / "train.tsv")
    assert list(rows[0]) == ["id", "audio", "n_frames", "src_text", "tgt_text", "speaker", "src_lang", "tgt_lang"]
    assert [row["id"] for row in rows] == ["cv_0", "cv_3", "cv_4", "cv_5", "cv_7", "cv_8"]
    assert [row["tgt_text"] for row in rows[:2]] == ['T0 "q" \\ 日', 'T3 "q" \\ 日']
    assert [row["src_text"] for row in rows[:2]] == [AWKWARD[0], AWKWARD[3]]
    assert {(row["src_lang"], row["tgt_lang"]) for row in rows} == {("fr", "en")}
    assert dropped_of(out / "train.dropped.tsv") == {"gone": "no clip"}
    assert [row["id"] for row in rows_of(out / "test.tsv")] == ["cv_2"]
    # The files of CoVoST's own script give the same.
    for split in ("train", "dev", "test"):
        cells = [[f"{r['id']}.mp3", r["src_text"], r["tgt_text"], r["speaker"]] for r in rows_of(out / f"{split}.tsv")]
        columns = ["path", "sentence", "translation", "client_id"]
        table(tmp_path / "covost" / f"covost_v2.fr_en.{split}.tsv", columns, cells)
    arguments = ["--root", str(root), "--translations", str(tmp_path / "covost"), *arguments[2:]]
    prepare_covost2.main([*arguments, "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "train.tsv").read_bytes() == (out / "train.tsv").read_bytes()


def test_covost2_directions(tmp_path: Path) -> None:
    assert (len(X_TO_EN), len(EN_TO_X)) == (21, 15)
    for lang in X_TO_EN:
        check_direction(lang, "en")
    for lang in EN_TO_X:
        check_direction("en", lang)
    for direction in ("en_fr", "de_fr", "en_en"):
        with pytest.raises(ValueError, match="has no direction .*sv-SE"):
            prepare_covost2.main(["--root", str(tmp_path), "--direction", direction, "--output", str(tmp_path / "o")])


def test_import_of_any_corpus(tmp_path: Path) -> None:
    speech(tmp_path / "wavs" / "long.wav", 3.0, seed=3, rate=44_100)
    rows = [["wavs/long.wav", 'a "b"', "0.5", "1.25", "Ü"], ["wavs/long.wav", "c\\d", "1.25", "", "ß"]]
    path = table(tmp_path / "my.tsv", ["file", "text", "start", "end", "translation"], rows, crlf=True)
    options = ["--column", "path=file", "--src-lang", "en", "--tgt-lang", "de"]
    run_import(path, tmp_path / "out", *options)
    found = rows_of(tmp_path / "out" / "train.tsv")
    assert [row["id"] for row in found] == ["wavs/long-0.5-1.25", "wavs/long-1.25"]
    assert [int(row["n_frames"]) for row in found] == [12_000, 28_000]
    assert [(row["src_text"], row["tgt_text"], row["tgt_lang"]) for row in found] == [
        ('a "b"', "Ü", "de"),
        ("c\\d", "ß", "de"),
    ]
    texts = [*AWKWARD, "tab\tand\nline"]
    path = listing(tmp_path, [{"path": "wavs/long.wav", "text": text, "id": i} for i, text in enumerate(texts)])
    run_import(path, tmp_path / "json")
    assert [row["src_text"] for row in rows_of(tmp_path / "json" / "train.tsv")] == texts


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        (prepare_librispeech, [], "SUBSET/SPEAKER/CHAPTER"),
        (prepare_common_voice, ["--lang", "de"], "expected clips/ and TSV files"),
        (prepare_gigaspeech, [], "expected GigaSpeech.json"),
        (prepare_covost2, ["--direction", "fr_en"], "expected clips/"),
    ],
)
def test_another_layout_is_told(tmp_path: Path, script: Any, options: list[str], expected: str) -> None:
    (tmp_path / "root" / "something").mkdir(parents=True)
    with pytest.raises(ValueError, match=expected):
        script.main(["--root", str(tmp_path / "root"), "--output", str(tmp_path / "out"), *options])


def test_missing_splits_and_columns_are_told(tmp_path: Path) -> None:
    folder = common_voice(tmp_path / "cv", ["one"])
    arguments = ["--root", str(folder), "--lang", "en", "--output", str(tmp_path / "out"), "--processes", "1"]
    with pytest.raises(ValueError, match="has no dev.tsv: there are train"):
        prepare_common_voice.main(arguments)
    table(folder / "train.tsv", ["client_id,path,sentence"], [["x"]])
    with pytest.raises(ValueError, match="train.tsv has no column client_id, path, sentence"):
        prepare_common_voice.main([*arguments, "--splits", "train"])


# --- what is dropped ------------------------------------------------------------------------------


def bad_corpus(folder: Path, good: int = 4) -> Path:
    speech(folder / "good.wav", 1.0)
    rows: list[dict[str, Any]] = [{"id": f"good{i}", "path": "good.wav", "text": f"text {i}"} for i in range(good)]
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 16_000)
    (folder / "noise.mp3").write_bytes(b"this is no audio at all" * 50)
    content = speech(folder / "cut.wav", 2.0).read_bytes()
    (folder / "cut.wav").write_bytes(content[: len(content) // 2])
    speech(folder / "half.wav", 1.0)
    speech(folder / "long.wav", 3.0)
    speech(folder / "short.wav", 0.05)
    speech(folder.parent / "outside.wav", 1.0)
    rows += [
        {"id": "no clip", "path": "missing.wav", "text": "x"},
        {"id": "zero length", "path": "empty.wav", "text": "x"},
        {"id": "zero length 2", "path": "nothing.wav", "text": "x"},
        {"id": "zero length 3", "path": "good.wav", "text": "x", "start": 0.5, "end": 0.5},
        {"id": "unreadable", "path": "noise.mp3", "text": "x"},
        {"id": "shorter than declared", "path": "cut.wav", "text": "x"},
        {"id": "shorter than declared 2", "path": "half.wav", "text": "x", "seconds": 2.0},
        {"id": "shorter than declared 3", "path": "good.wav", "text": "x", "start": 0.5, "end": 5},
        {"id": "too long", "path": "long.wav", "text": "x"},
        {"id": "too long 2", "path": "long.wav", "text": "x", "start": 0, "end": 2.9},
        {"id": "too short", "path": "short.wav", "text": "x"},
        {"id": "empty text", "path": "good.wav", "text": " \t"},
        {"id": "control characters", "path": "good.wav", "text": "a\u0007b"},
        {"id": "control characters 2", "path": "good.wav", "text": "a\rb"},
        {"id": "control characters 3", "path": "good.wav", "text": "half \ud83d of a pair"},
        {"id": "outside the root", "path": "../outside.wav", "text": "x"},
        {"id": "outside the root 2", "path": "/etc/passwd", "text": "x"},
        {"id": "malformed row", "path": "good.wav", "text": "x", "start": "soon"},
    ]
    return listing(folder, rows)


def test_what_is_dropped_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus").mkdir()
    path = bad_corpus(tmp_path / "corpus")
    options = ["--max-seconds", "2.5"]
    with pytest.raises(ValueError, match="18 of the 22 rows of train were dropped.*--max-dropped 0.05.*dropped.tsv"):
        run_import(path, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "train.tsv").exists()
    found = dropped_of(tmp_path / "out" / "train.dropped.tsv")
    assert found == {name: name.rstrip(" 0123456789") for name in found} and len(found) == 18
    run_import(path, tmp_path / "out", *options, "--max-dropped", "0.9")
    assert [row["id"] for row in rows_of(tmp_path / "out" / "train.tsv")] == [f"good{i}" for i in range(4)]
    printed = capsys.readouterr().out
    assert "dropped: outside the root" in printed and "kept" in printed


def test_a_repaired_corpus_is_taken_up(tmp_path: Path) -> None:
    speech(tmp_path / "a.wav")
    path = listing(tmp_path, [{"path": "a.wav", "text": "a"}, {"path": "b.wav", "text": "b"}])
    with pytest.raises(ValueError, match="1 of the 2 rows"):
        run_import(path, tmp_path / "out")
    speech(tmp_path / "b.wav")
    run_import(path, tmp_path / "out")
    assert [row["id"] for row in rows_of(tmp_path / "out" / "train.tsv")] == ["a", "b"]


def test_duplicated_ids_name_both(tmp_path: Path) -> None:
    speech(tmp_path / "a.wav")
    for name in ("one", "two"):
        table(tmp_path / f"{name}.tsv", ["id", "path", "text"], [[name, "a.wav", "x"], ["same", "a.wav", "y"]])
    lists = [option for name in ("one", "two") for option in ("--list", f"{name}={tmp_path / name}.tsv")]
    with pytest.raises(ValueError, match="one row 2 and two row 2 have the same id 'same'"):
        import_corpus.main([*lists, "--output", str(tmp_path / "out"), "--processes", "1"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "train"], "--list train=... is given twice"),
        (["../evil"], "a split is named by letters"),
        (["a/b"], "a split is named by letters"),
    ],
)
def test_names_of_splits(tmp_path: Path, names: list[str], message: str) -> None:
    path = listing(tmp_path, [{"path": "a.wav", "text": "a"}])
    lists = [option for name in names for option in ("--list", f"{name}={path}")]
    with pytest.raises(ValueError, match=message):
        import_corpus.main([*lists, "--output", str(tmp_path / "out"), "--processes", "1"])
    assert not (tmp_path / "out").exists()


def test_a_recording_that_changed_is_noticed_and_one_that_went_is_not_missed(tmp_path: Path) -> None:
    speech(tmp_path / "a.wav")
    path = listing(tmp_path, [{"path": "a.wav", "text": "a"}])
    run_import(path, tmp_path / "out")
    (tmp_path / "a.wav").rename(tmp_path / "b.wav")
    run_import(path, tmp_path / "out")
    (tmp_path / "a.wav").write_bytes((tmp_path / "b.wav").read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"bytes, but the corpus now has it in a\.wav of \d+ bytes: delete"):
        run_import(path, tmp_path / "out")


def test_other_options_for_the_same_output_are_refused(tmp_path: Path) -> None:
    speech(tmp_path / "a.wav")
    path = listing(tmp_path, [{"path": "a.wav", "text": "a"}])
    run_import(path, tmp_path / "out")
    with pytest.raises(ValueError, match="max_seconds"):
        run_import(path, tmp_path / "out", "--max-seconds", "5")
    listing(tmp_path, [{"path": "a.wav", "text": "a", "start": 0.1, "id": "a"}])
    with pytest.raises(ValueError, match=r"from a.wav of \d+ bytes, but the corpus now has it in a.wav 0.1"):
        run_import(path, tmp_path / "out")


@pytest.mark.parametrize("option", [["--processes", "0"], ["--max-dropped", "5"], ["--min-seconds", "40"]])
def test_options_that_make_no_sense(tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(ValueError, match=option[0]):
        run_import(tmp_path / "x.tsv", tmp_path / "out", *option)


# --- zip shards -----------------------------------------------------------------------------------


def test_zip_shards_hold_what_the_files_hold(tmp_path: Path) -> None:
    librispeech(tmp_path / "root")
    base = ["--root", str(tmp_path / "root"), "--processes", "1"]
    prepare_librispeech.main([*base, "--output", str(tmp_path / "files")])
    prepare_librispeech.main([*base, "--zip", "--output", str(tmp_path / "zip")])
    files, zipped = (rows_of(tmp_path / name / "train-clean-100.tsv") for name in ("files", "zip"))
    archive = tmp_path / "zip" / "audio" / "train-clean-100-00000.zip"
    with zipfile.ZipFile(archive) as content:
        assert content.testzip() is None
        for one, other in zip(files, zipped, strict=True):
            assert {**one, "audio": ""} == {**other, "audio": ""}
            member = Path(one["audio"]).name
            assert content.read(member) == (tmp_path / "files" / one["audio"]).read_bytes()
            assert find_zip_entry(archive, member) == str(tmp_path / "zip" / other["audio"])
            samples = [load_audio(one["audio"], tmp_path / "files"), load_audio(other["audio"], tmp_path / "zip")]
            np.testing.assert_array_equal(*samples)


def test_shards_are_limited_and_continued(tmp_path: Path) -> None:
    data = [bytes([i]) * 100 for i in range(7)]
    whole = ShardWriter(tmp_path / "a", "x", 300)
    for i, content in enumerate(data):
        whole.append(f"{i}-ü", content)
    whole.finish()
    known = []
    for i, content in enumerate(data):
        writer = ShardWriter(tmp_path / "b", "x", 300, known)
        known.append(writer.append(f"{i}-ü", content))
        writer.append("lost", b"written, but not kept by the caller" * i)
        if i == 3:
            writer._members.pop()
            writer.finish()  # killed just before the caller heard of it
        writer.close()
    ShardWriter(tmp_path / "b", "x", 300, known).finish()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) > 2
    for number, name in enumerate(names):
        members = zipfile.ZipFile(tmp_path / "a" / name).namelist()
        assert members and zipfile.ZipFile(tmp_path / "a" / name).testzip() is None, number
    for member in known:
        path = tmp_path / "b" / f"x-{member.shard:05d}.zip"
        assert zipfile.ZipFile(path).testzip() is None
        assert path.read_bytes()[member.offset : member.end] == data[int(member.name[0])]


# --- faults ---------------------------------------------------------------------------------------


def start(script: str, *arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.parametrize("container", [[], ["--zip", "--shard-mb", "1"]])
def test_killed_at_random_it_neither_loses_nor_repeats(tmp_path: Path, container: list[str]) -> None:
    librispeech(tmp_path / "root", count=100, speakers=3)
    base = ["--root", tmp_path / "root", *container]
    prepare_librispeech.main([*map(str, base), "--processes", "1", "--output", str(tmp_path / "undisturbed")])
    rng = random.Random(5)
    whole = (tmp_path / "undisturbed" / "prepared.jsonl").stat().st_size
    store, kills = tmp_path / "killed" / "prepared.jsonl", 0
    for fifth in range(4):
        process = start("prepare_librispeech", *base, "--processes", 2, "--output", tmp_path / "killed")
        wanted = whole * (fifth + rng.random()) / 5
        while process.poll() is None and (not store.exists() or store.stat().st_size < wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills  # a machine too busy to kill in time would test nothing
    process = start("prepare_librispeech", *base, "--processes", 2, "--output", tmp_path / "killed")
    assert process.wait() == 0, process.communicate()[0]
    assert not container or len(list((tmp_path / "killed").rglob("*.zip"))) >= 3
    ids = [record["id"] for record in read_jsonl(store)]
    assert len(ids) == len(set(ids)) == 300
    names = [path.relative_to(tmp_path / "undisturbed") for path in sorted((tmp_path / "undisturbed").rglob("*.*"))]
    found = [path.relative_to(tmp_path / "killed") for path in sorted((tmp_path / "killed").rglob("*.*"))]
    assert names == found  # nothing half-written either
    for name in names:
        if name.suffix in (".tsv", ".flac", ".zip"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def start_with_workers(tmp_path: Path) -> "tuple[subprocess.Popen[str], list[int]]":
    librispeech(tmp_path / "root", count=400, speakers=2)
    process = start("prepare_librispeech", "--root", tmp_path / "root", "--processes", 2, "--output", tmp_path / "out")
    store = tmp_path / "out" / "prepared.jsonl"
    while not store.exists() or store.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.005)
    workers = workers_of(process)
    assert workers
    return process, workers


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    process, workers = start_with_workers(tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1 and "a worker process was killed" in output and "Traceback" not in output, output


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process, workers = start_with_workers(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_process_on_the_same_output_is_told(tmp_path: Path) -> None:
    librispeech(tmp_path / "root", count=30, speakers=2)
    arguments = ["--root", tmp_path / "root", "--processes", 2, "--output", tmp_path / "out"]
    first = start("prepare_librispeech", *arguments)
    while not (tmp_path / "out" / "prepared.jsonl.settings.json").exists():
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match="another process"):
            prepare_librispeech.main(list(map(str, arguments)))
    finally:
        first.send_signal(signal.SIGCONT)
    output = first.communicate(timeout=PATIENCE)[0]
    assert first.returncode == 0, output


@pytest.mark.parametrize("container", [[], ["--zip"]])
def test_a_disk_that_fills_is_one_sentence_and_nothing_half_written_counts(
    tmp_path: Path, container: list[str]
) -> None:
    librispeech(tmp_path / "root", count=6, speakers=2)
    arguments = ["--root", tmp_path / "root", "--output", tmp_path / "out", "--processes", 1, *container]
    limit = 9_000 if not container else 60_000  # bytes a file may have: less than the largest audio, or the shard

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("prepare_librispeech", *arguments, preexec_fn=limited)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1 and "make room" in output and "Traceback" not in output, output
    assert not (tmp_path / "out" / "train-clean-100.tsv").exists()
    for record in read_jsonl(tmp_path / "out" / "prepared.jsonl"):
        if not container:
            assert len(load_audio(record["audio"], tmp_path / "out")) == record["n_frames"]
    prepare_librispeech.main(list(map(str, arguments)))
    rows = rows_of(tmp_path / "out" / "train-clean-100.tsv")
    assert len(rows) == 12
    for row in rows:
        assert len(load_audio(row["audio"], tmp_path / "out")) == int(row["n_frames"])
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_audio_that_is_gone_is_told(tmp_path: Path) -> None:
    speech(tmp_path / "a.wav")
    path = listing(tmp_path, [{"path": "a.wav", "text": "a"}])
    run_import(path, tmp_path / "out")
    (tmp_path / "out" / "audio/train/0000/a.flac").unlink()
    with pytest.raises(ValueError, match="was written and is gone"):
        run_import(path, tmp_path / "out")


def test_names_of_files(tmp_path: Path) -> None:
    assert preparation.file_name("1-2-0003") == "1-2-0003"
    names = {preparation.file_name(name) for name in ("a/b", "a_b", "..", ".x", "日本", "x" * 400, "a b", "a\tb", "-")}
    assert len(names) == 9 and not any(set(name) & set("/\\ \t") or name.startswith((".", "-")) for name in names)


def test_no_model_library_is_needed() -> None:
    code = "import sys, blspkd_fairseq.data.preparation, blspkd_fairseq.data.validate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_manifest_survives_as_written(tmp_path: Path) -> None:
    """What preparation writes can be written again from what is read, byte by byte."""
    speech(tmp_path / "a.wav")
    path = listing(tmp_path, [{"path": "a.wav", "text": text, "id": f"{i}"} for i, text in enumerate(AWKWARD)])
    run_import(path, tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out" / "train.tsv")
    write_manifest(tmp_path / "again.tsv", manifest, manifest.columns)
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "out" / "train.tsv").read_bytes()


def test_a_shard_that_was_closed_before_its_last_members_were_kept_is_gone_on_with(tmp_path: Path) -> None:
    """A kill between the end of a shard and the records of its last members: the same bytes as without it."""
    files = [(f"{i}.flac", bytes([i]) * 400) for i in range(5)]

    def write(folder: Path, kept: int) -> list[bytes]:
        first = ShardWriter(folder, "train", 1000)
        members = [first.append(*one) for one in files]
        first.close()
        if kept < len(files):
            again = ShardWriter(folder, "train", 1000, members[:kept])
            members[kept:] = [again.append(*one) for one in files[kept:]]
            again.finish()
        else:
            ShardWriter(folder, "train", 1000, members).finish()
        return [path.read_bytes() for path in sorted(folder.glob("*.zip"))]

    expected = write(tmp_path / "undisturbed", len(files))
    assert len(expected) == 3
    for kept in range(1, len(files)):
        assert write(tmp_path / f"killed-{kept}", kept) == expected, kept
