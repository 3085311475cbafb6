"""fairseq-generate and -interactive answer what can be read, go on where they were cut, and errors are one sentence."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import arguments, fairseq, program, train
from tiny import PATIENCE, read_jsonl, save_llm, save_whisper, write_speech, write_split

import blspkd_fairseq
from blspkd_fairseq.compat import errors
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.record_store import StoreError
from blspkd_fairseq.generation import fairseq_generator, fairseq_rows
from blspkd_fairseq.generation.results import UnansweredError

blspkd_fairseq.register()


# What libraries say of themselves, in the midst of a command's own lines.
OF_LIBRARIES = re.compile(
    r"Traceback|deprecated|Warning|DEBUG|Loading weights|can_reuse_epoch_itr|creating new batches"
)


class World:
    """A checkpoint, and six rows to answer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.llm, self.whisper, self.data = save_llm(root / "llm"), save_whisper(root / "whisper"), root / "data"
        write_split(self.data, "train", 4)
        write_split(self.data, "test", 6)
        self.train(root / "save", "--max-update", 1, "--disable-validation", "--no-epoch-checkpoints")
        self.checkpoint = root / "save" / "checkpoint_last.pt"

    def train(self, save_dir: Path, *options: Any) -> str:
        return train(self.data, save_dir, self.llm, self.whisper, *options)

    def generate(self, data: Path, results: Path, *options: Any) -> str:
        return fairseq(
            "generate", data, "--gen-subset", "test", "--path", self.checkpoint, "--beam", 1, "--max-len-b", 4,
            "--batch-size", 2, "--num-workers", 0, "--results-path", results, "--scoring", "sacrebleu", *options,
        )  # fmt: skip

    def interactive(self, lines: str, results: Path, *options: Any) -> str:
        return fairseq(
            "interactive", self.data, "--path", self.checkpoint, "--beam", 1, "--max-len-b", 4, "--batch-size", 2,
            "--buffer-size", 3, "--results-path", results, *options, stdin=lines,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def answers(world: World) -> list[dict[str, Any]]:
    """Of the six rows, in one go."""
    world.generate(world.data, world.root / "whole")
    return read_jsonl(world.root / "whole" / "generate-test.jsonl")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each batch had that was answered."""
    sizes: list[int] = []
    answer = fairseq_generator.answer_where_it_fits

    def counted(model: Any, chat: Any, heard: Any, prompts: Any, *args: Any) -> Any:
        sizes.append(len(prompts))
        return answer(model, chat, heard, prompts, *args)

    monkeypatch.setattr(fairseq_generator, "answer_where_it_fits", counted)
    return sizes


def cut_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The command is interrupted at a batch, from 0."""
    answer, batches = fairseq_generator.answer_where_it_fits, iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(batches) == batch:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(fairseq_generator, "answer_where_it_fits", interrupted)


def lines_of(path: Path, kind: str) -> dict[int, str]:
    found = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(kind)]
    assert len({name for name, _ in found}) == len(found)
    return {int(name[2:]): rest for name, rest in found}


# ---- rows that cannot be read --------------------------------------------------------------------------------------


def rows_of(data: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in Manifest.load(data / "test.tsv")]


def spoil(rows: list[dict[str, Any]], data: Path) -> dict[str, str]:
    """Rows that cannot be answered, one of each kind, among those that can; what is said of each."""
    one = rows[1]
    (data / "empty.flac").write_bytes(b"")
    (data / "noise.flac").write_bytes(b"fLaC" + bytes(range(256)) * 8)
    whole = (data / one["audio"]).read_bytes()
    (data / "half.flac").write_bytes(whole[: len(whole) // 2])
    samples = write_speech(data / "long.flac", 31, seed=3)
    bad = {
        "missing": ({"audio": "no.flac"}, "does not exist"),
        "empty": ({"audio": "empty.flac"}, "empty file"),
        "noise": ({"audio": "noise.flac"}, "cannot be decoded"),
        "half": ({"audio": "half.flac"}, "half.flac"),
        "outside": ({"audio": "../out.flac"}, "the audio root"),
        "declared": ({"n_frames": 10 * int(one["n_frames"])}, "the manifest declares"),
        "long": ({"audio": "long.flac", "n_frames": samples}, "the limit is 30 s"),
        "text": ({"src_text": "word " * 400}, "not the text of this audio"),
        "cut": ({"cut": "perhaps"}, "cut is 'perhaps'"),
        "talk": ({"conversation": "[1]"}, ""),
    }
    for place, (name, (cells, _)) in enumerate(bad.items()):
        rows.insert(2 * place % len(rows), {**one, "id": name, **cells})
    return {name: said for name, (_, said) in bad.items()}


def test_a_row_that_cannot_be_read_is_an_error_of_its_own(
    world: World, answers: list[dict[str, Any]], answered: list[int], tmp_path: Path
) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    write_split(data, "test", 6)
    rows = [row | {"cut": "", "conversation": ""} for row in rows_of(data)]
    good = [row["id"] for row in rows]
    said = spoil(rows, data)
    columns = ["id", "audio", "n_frames", "src_text", "tgt_text", "cut", "conversation"]
    write_manifest(data / "test.tsv", rows, columns)
    with pytest.raises(
        UnansweredError, match=f"{len(said)} of {len(rows)} rows have no answer, so that there is no sc"
    ):
        world.generate(data, results)
    records = {record["id"]: record for record in read_jsonl(results / "generate-test.jsonl")}
    assert list(records) == [row["id"] for row in rows]
    assert not {name: records[name] for name, reason in said.items() if reason not in records[name]["error"]}
    assert not any("hypothesis" in records[name] for name in said)
    assert [records[name]["hypothesis"] for name in good] == [record["hypothesis"] for record in answers]

    text = results / "generate-test.txt"
    places = [place for place, row in enumerate(rows) if row["id"] in said]
    for kind in ("T-", "H-", "D-", "P-"):
        assert sorted(lines_of(text, kind)) == list(range(len(rows))), kind
    hypotheses = lines_of(text, "D-")
    assert sorted(place for place in hypotheses if hypotheses[place] == "-inf\t") == places
    assert "Generate test with beam" not in text.read_text(encoding="utf-8")  # no score without all rows

    # Mended: only those are answered.
    one = next(row for row in rows if row["id"] == "test-1")
    mended = [one | {"id": row["id"]} if row["id"] in said else row for row in rows]
    write_manifest(data / "test.tsv", mended, columns)
    before = sum(answered)
    world.generate(data, results)
    assert before == 6 and sum(answered) - before == len(said)
    assert {r["hypothesis"] for r in read_jsonl(results / "generate-test.jsonl") if r["id"] in said} == {
        answers[1]["hypothesis"]
    }
    assert sorted(path.name for path in results.iterdir()) == ["generate-test.jsonl", "generate-test.txt"]
    assert "Generate test with beam" in text.read_text(encoding="utf-8")


def test_interactive_answers_the_other_lines_and_exits_1(world: World, tmp_path: Path) -> None:
    """As typed, without a file for the results."""
    paths = [write_speech(tmp_path / f"{i}.wav", 0.5, seed=i) and tmp_path / f"{i}.wav" for i in range(6)]
    paths[2].write_bytes(b"RIFF")
    command = [*program("interactive"), *arguments(
        "interactive", world.data, "--path", world.checkpoint, "--beam", 1, "--max-len-b", 4, "--batch-size", 2,
        "--buffer-size", 3, "--no-repeat-ngram-size", 2,
    )]  # fmt: skip
    done = subprocess.run(
        command, input="".join(f"{path}\n" for path in paths), text=True, capture_output=True, timeout=PATIENCE
    )
    hypotheses = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("D-")]
    assert [name for name, *_ in hypotheses] == [f"D-{i}" for i in range(6)]
    assert [score for _, score, _ in hypotheses].index("-inf") == 2
    assert done.returncode == 1
    assert not OF_LIBRARIES.search(done.stdout + done.stderr), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fairseq-interactive: 1 of 6 rows have no answer") and "2.wav" in last


# ---- cut, and gone on with -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [(), ("--beam", 2, "--nbest", 2), ("--sampling", "--beam", 2, "--nbest", 2, "--temperature", 1.5)],
    ids=["greedy", "beam", "sampling"],
)
def test_generation_goes_on_where_it_was_cut(
    world: World, answered: list[int], tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.generate(world.data, tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, 2)
        world.generate(world.data, tmp_path / "cut", *options)
    partial = tmp_path / "cut" / "generate-test.jsonl.partial"
    assert len(read_jsonl(partial)) == 4 and not (tmp_path / "cut" / "generate-test.jsonl").exists()
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"id": "test-')  # killed within a line
    answered.clear()
    read: list[str] = []
    load = fairseq_rows.SpeechTextDataset._read
    monkeypatch.setattr(
        fairseq_rows.SpeechTextDataset, "_read", lambda self, i, row: read.append(row["id"]) or load(self, i, row)
    )
    world.generate(world.data, tmp_path / "cut", *options)
    assert sum(answered) == len(read) == 2
    for name in ("generate-test.jsonl", "generate-test.txt"):
        one, other = ((tmp_path / run / name).read_text(encoding="utf-8") for run in ("whole", "cut"))
        assert _without_log(one) == _without_log(other), name
    assert not partial.exists()


def _without_log(text: str) -> list[str]:
    return [line for line in text.splitlines() if " | INFO | " not in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-len-b", 5), "made with other settings .decoding"),
        (("--prompt", "repeat"), "row test-. is not what was answered"),
        (("--model-overrides", "{'system_prompt': 'You are a bat.'}"), "made with other settings"),
    ],
)
def test_answers_of_other_options_are_not_mixed(
    world: World, tmp_path: Path, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, 1)
        world.generate(world.data, tmp_path)
    with pytest.raises(StoreError, match=message):
        world.generate(world.data, tmp_path, *options)
    assert len(read_jsonl(tmp_path / "generate-test.jsonl.partial")) == 2


def test_another_checkpoint_or_audio_is_another_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_split(data, "test", 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, 1)
        world.generate(data, tmp_path / "results")
    state = torch.load(world.checkpoint, weights_only=True)
    torch.save(state | {"new": 1}, tmp_path / "other.pt")
    with pytest.raises(StoreError, match="made with other settings .checkpoint"):
        world.generate(data, tmp_path / "results", "--path", tmp_path / "other.pt")
    for path in (data / "audio").iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(StoreError, match="is not what was answered in .* the audio has changed"):
        world.generate(data, tmp_path / "results")


def test_interactive_goes_on_where_it_was_cut(
    world: World, answered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"{world.data}/audio/test-{i}.flac\n" for i in range(5)) + "no.flac\n"
    with pytest.raises(UnansweredError, match="1 of 6 rows"):
        world.interactive(lines, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, 2)
        world.interactive(lines, tmp_path / "cut")
    answered.clear()
    with pytest.raises(UnansweredError, match="1 of 6 rows"):
        world.interactive(lines, tmp_path / "cut")
    assert sum(answered) == 2
    whole, cut = (read_jsonl(tmp_path / run / "interactive.jsonl") for run in ("whole", "cut"))
    assert whole == cut and [record["id"] for record in cut] == list("012345")
    assert "does not exist" in cut[5]["error"] and cut[4]["audio"].endswith("test-4.flac")
    with pytest.raises(StoreError, match="row 0 is not what was answered"):
        world.interactive("".join(reversed(lines.splitlines(True)[:5])), tmp_path / "cut")


# ---- shards, limits ------------------------------------------------------------------------------------------------


def test_shards_have_their_part_of_the_rows(world: World, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    for shard in range(2):
        world.generate(world.data, tmp_path, "--num-shards", 2, "--shard-id", shard)
    parts = [read_jsonl(tmp_path / f"shard-{i}-of-2" / "generate-test.jsonl") for i in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    found = {record["id"]: record["hypothesis"] for part in parts for record in part}
    assert found == {record["id"]: record["hypothesis"] for record in answers}
    for i, part in enumerate(parts):
        assert sorted(lines_of(tmp_path / f"shard-{i}-of-2" / "generate-test.txt", "D-")) == [i, i + 2, i + 4]
        assert [record["id"] for record in part] == [f"test-{n}" for n in (i, i + 2, i + 4)]
    with pytest.raises(ValueError, match="--shard-id must be between 0 and --num-shards - 1 = 1, got 2"):
        world.generate(world.data, tmp_path, "--num-shards", 2, "--shard-id", 2)


def test_a_limit_that_is_too_small_names_the_row(world: World, tmp_path: Path) -> None:
    limit = ("--batch-size", 4, "--max-tokens", 15_000)
    message = r"(train|test)\.tsv line \d.*: its audio has \d+ samples, and --max-tokens, which counts samples"
    with pytest.raises(ValueError, match=message):
        world.train(tmp_path, *limit, "--max-update", 1, "--disable-validation")
    with pytest.raises(ValueError, match=message):
        world.generate(world.data, tmp_path / "results", *limit)
    with pytest.raises(ValueError, match=message):
        fairseq("validate", world.data, "--path", world.checkpoint, "--valid-subset", "test", *limit)
    lines = "".join(f"{world.data}/audio/test-{i}.flac\n" for i in range(6))
    with pytest.raises(UnansweredError, match="3 of 6 rows .* --max-tokens, which counts them, is 15000"):
        world.interactive(lines, tmp_path / "lines", "--max-tokens", 15_000)


# ---- errors --------------------------------------------------------------------------------------------------------


def ends_with(command: Callable[[], Any]) -> str:
    """What a command prints to stderr that ends with an error, by the hook that Python calls for it."""
    try:
        command()
    except BaseException as error:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            sys.excepthook(type(error), error, error.__traceback__)
        return printed.getvalue()
    raise AssertionError("it did not fail")


def test_errors_of_commands_are_one_sentence(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, bad = tmp_path / "damaged.pt", tmp_path / "bad"
    damaged.write_bytes(world.checkpoint.read_bytes()[:2000])
    write_split(bad, "train", 4)
    (bad / "audio" / "train-1.flac").write_bytes(b"fLaC")
    limit = ("--batch-size", 1)
    worker = ("--max-update", 9, "--num-workers", 1, "--disable-validation")
    commands: dict[str, tuple[Callable[[], Any], str]] = {
        "no manifest": (lambda: world.train(tmp_path, "--train-subset", "none"), "fairseq-train: "),
        "no LLM": (lambda: world.train(tmp_path, "--llm", "/no/llm"), "fairseq-train: cannot load the tokenizer '/no"),
        "a value": (lambda: world.train(tmp_path, "--adapter", "rnn"), "fairseq-train: unknown --adapter 'rnn'"),
        "a worker": (
            lambda: train(bad, tmp_path / "save", world.llm, world.whisper, *worker),
            f"fairseq-train: {bad}/train.tsv line 3",
        ),
        "no checkpoint": (lambda: world.generate(world.data, tmp_path, "--path", "/no.pt"), "fairseq-generate: "),
        "damaged": (
            lambda: world.generate(world.data, tmp_path, "--path", damaged),
            f"fairseq-generate: {damaged} is damaged: it is cut, overwritten or no checkpoint",
        ),
        "interactive": (lambda: world.interactive("", tmp_path, "--path", damaged), "fairseq-interactive: "),
        "validate": (lambda: fairseq("validate", world.data, "--path", damaged, *limit), "fairseq-validate: "),
        "assertion": (
            lambda: world.interactive("", tmp_path, "--batch-size", 9),
            "fairseq-interactive: --batch-size cannot be larger than --buffer-size",
        ),
        "read-only": (
            lambda: world.generate(world.data, Path("/proc/results")),
            "fairseq-generate: /proc/results: No such file or directory",
        ),
    }  # fmt: skip
    for name, (command, start_of) in commands.items():
        said = ends_with(command)
        assert said.startswith(start_of) and said.count("\n") == 1, (name, said)
    monkeypatch.setenv("BLSPKD_DEBUG", "1")
    assert "Traceback" in ends_with(commands["a value"][0])


def test_faults_of_programs_keep_their_traceback(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairseq_generator, "answer_where_it_fits", lambda *_: [][1])
    assert "IndexError" in ends_with(lambda: world.generate(world.data, tmp_path)).splitlines()[-1]
    monkeypatch.setattr(fairseq_generator, "answer_where_it_fits", lambda *_: torch.zeros(2).view(3))
    assert "Traceback" in ends_with(lambda: world.generate(world.data, tmp_path))

    def not_a_command() -> None:
        raise ValueError("of another program")

    assert "Traceback" in ends_with(not_a_command)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (
            '  File "/x/site-packages/blspkd_fairseq/data/audio.py", line 1, in f\nValueError: a.flac: bad',
            "a.flac: bad",
        ),
        ('  File "/x/site-packages/torch/a.py", line 1, in f\nblspkd_fairseq.data.audio.AudioError: it', "it"),
        ('  File "/x/site-packages/torch/a.py", line 1, in f\nValueError: of torch', None),
        ('  File "/x/blspkd_fairseq/a.py", line 1, in f\nKeyError: 3', None),
    ],
)
def test_errors_of_other_processes_are_read_from_their_text(last: str, expected: str | None) -> None:
    """torch hands on those of loader workers and spawned ranks as text."""
    error = Exception(
        f"-- Process 0 terminated with the following error:\nTraceback (most recent call last):\n{last}\n"
    )
    assert errors.sentence(error) == expected


def test_real_commands_exit_1_with_one_sentence(world: World, tmp_path: Path) -> None:
    """fairseq-train, and fairseq-hydra-train, which catches errors itself."""
    hydra = [
        f"+task.data={tmp_path}", "++task._name=blsp_kd", "++model._name=blsp_kd", f"+model.llm={world.llm}",
        f"+model.speech_encoder={world.whisper}", "+model.adapter=rnn", "~criterion",
        "+criterion._name=kl_distillation", "++optimizer._name=adam", "common.cpu=true", "dataset.batch_size=4",
        f"common.user_dir={Path(blspkd_fairseq.__file__).parent}", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    pipes: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([*program("hydra-train"), *hydra], cwd=tmp_path, **pipes),
        subprocess.Popen([*program("train"), *arguments(
            "train", tmp_path, "--arch", "blsp_kd", "--criterion", "kl_distillation", "--llm", world.llm,
            "--speech-encoder", world.whisper, "--optimizer", "adam", "--batch-size", 1, "--adapter", "rnn",
        )], **pipes),
    ]  # fmt: skip
    for name, process in zip(("fairseq-hydra-train", "fairseq-train"), processes, strict=True):
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert said.splitlines()[-1].startswith(f"{name}: unknown --adapter 'rnn'"), said
        assert "Traceback" not in said


def test_bleu_of_texts_without_a_token() -> None:
    from fairseq.scoring.bleu import BleuConfig, Scorer

    words, nothing = torch.IntTensor([5, 6, 7, 8]), torch.IntTensor([])
    scorer = Scorer(BleuConfig(pad=1, eos=2, unk=3))
    for _ in range(50):
        scorer.add(words, nothing)
    assert scorer.score() == 0 and "BLEU" in scorer.result_string()
    scorer.add(nothing, words)
    scorer.add(nothing, nothing)
    scorer.add(words, words)
    assert scorer.stat.reflen == 51 * 4 and scorer.stat.predlen == 8 and scorer.stat.match1 == 4
