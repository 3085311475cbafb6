"""Damaged, missing and unwritable checkpoints: what is whole is gone on from, and nothing whole is harmed."""

import errno
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fairseq
from damage import DAMAGES, directory_of, flip
from interruptions import World

from blspkd_fairseq import BlspKd, files
from blspkd_fairseq.checkpoint_files import (
    CheckpointError,
    DamagedCheckpointError,
    check_whole,
    checkpoint_to_resume,
    copy_checkpoint,
    prepare_folder,
    read_checkpoint,
    write_checkpoint,
)

OPTIONS = ("--batch-size", 4, "--disable-validation", "--save-interval-updates", 1)
LAST = "checkpoint_last.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of four updates: those of one and two, of an epoch's end (three), and the last."""
    folder = tmp_path_factory.mktemp("saved")
    world.train(folder, *OPTIONS, "--max-update", 4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint1.pt", "checkpoint_1_1.pt", "checkpoint_1_2.pt", "checkpoint_2_4.pt", LAST,
    ]  # fmt: skip
    (folder / "checkpoint_2_4.pt").unlink()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "save"))


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_whatever_is_damaged_is_seen_and_the_newest_whole_one_is_taken(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[name](folder / LAST)
    with pytest.raises(DamagedCheckpointError, match="damaged") as error:
        read_checkpoint(folder / LAST)
    assert "\n" not in str(error.value)
    assert checkpoint_to_resume(folder) == folder / "checkpoint1.pt"
    (warning,) = caplog.messages
    assert f"{LAST} is" in warning and "going on from checkpoint1.pt at 3 updates; " in warning
    assert "updates after it are lost" in warning


def test_a_flipped_bit_is_seen_or_changes_nothing(saved: Path, tmp_path: Path) -> None:
    """Not every bit of an archive matters: dates, the space between records."""
    path, whole = tmp_path / LAST, (saved / LAST).read_bytes()
    weights = read_checkpoint(saved / LAST)
    rng, size, directory = random.Random(0), 8 * len(whole), 8 * directory_of(saved / LAST)
    seen = 0
    for bit in [rng.randrange(size) for _ in range(60)] + [rng.randrange(directory, size) for _ in range(60)]:
        path.write_bytes(whole)
        flip(path, bit)
        try:
            assert same(read_checkpoint(path), weights), f"bit {bit}"
        except DamagedCheckpointError:
            seen += 1
    assert seen > 60


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_what_is_lost_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES["a flipped bit of the weights"](folder / LAST)
    DAMAGES["half"](folder / "checkpoint1.pt")
    assert checkpoint_to_resume(folder) == folder / "checkpoint_1_2.pt"
    assert caplog.messages[-1].endswith(
        "going on from checkpoint_1_2.pt at 2 updates; the 2 updates after it are lost and made again"
    )


def test_one_that_is_damaged_beside_the_last_is_passed_by(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES["a flipped bit of the weights"](folder / "checkpoint1.pt")
    (folder / LAST).unlink()
    assert checkpoint_to_resume(folder) == folder / "checkpoint_1_2.pt"
    assert "checkpoint1.pt is damaged" in caplog.messages[0] and f"{LAST} is missing" in caplog.messages[1]


def test_what_is_no_checkpoint_of_a_training_is_not_gone_on_from(folder: Path) -> None:
    state = read_checkpoint(folder / LAST)
    for path in folder.iterdir():
        path.unlink()
    assert checkpoint_to_resume(folder) is None
    write_checkpoint({name: value for name, value in state.items() if name != "last_optimizer_state"}, folder / LAST)
    (folder / LAST).rename(folder / "checkpoint_best.pt")  # an average
    write_checkpoint(state, folder / "crash.pt")
    with pytest.raises(CheckpointError, match="is missing, and no whole checkpoint is beside it"):
        checkpoint_to_resume(folder)


def test_one_that_cannot_be_opened_is_not_passed_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile", refuse)
        with pytest.raises(CheckpointError, match=rf"no checkpoint at .*{LAST} \(Permission denied\)"):
            checkpoint_to_resume(folder)
    (folder / LAST).unlink()
    (folder / LAST).mkdir()
    with pytest.raises(CheckpointError, match=r"\(Is a directory\)"):
        checkpoint_to_resume(folder)


def test_training_goes_on_from_the_newest_whole_one(world: World, folder: Path) -> None:
    through = read_checkpoint(folder / LAST)["model"]
    DAMAGES["half"](folder / LAST)
    steps, log = world.train(folder, *OPTIONS, "--max-update", 4)
    assert [step.update for step in steps] == [3] and "going on from checkpoint1.pt at 3 updates" in (log or "")
    assert same(read_checkpoint(folder / LAST)["model"], through)


def test_training_does_not_begin_anew_beside_damaged_ones(world: World, folder: Path) -> None:
    for path in folder.iterdir():
        DAMAGES["half"](path)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="is damaged.*, and no whole checkpoint is beside it"):
        world.train(folder, *OPTIONS, "--max-update", 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model", "--pretrained-model"])
@pytest.mark.parametrize("damage", ["half", "missing"])
def test_one_that_was_asked_for_is_the_one_or_none(
    world: World, folder: Path, tmp_path: Path, option: str, damage: str
) -> None:
    path = folder / LAST
    path.unlink() if damage == "missing" else DAMAGES[damage](path)
    with pytest.raises(CheckpointError, match="is damaged" if damage == "half" else "no checkpoint at") as error:
        world.train(tmp_path / "new", *OPTIONS, option, path)
    assert "\n" not in str(error.value)


def test_a_restored_file_that_hides_the_last_is_said(world: World, folder: Path) -> None:
    _, log = world.train(folder, *OPTIONS, "--max-update", 3, "--restore-file", folder / "checkpoint_1_2.pt")
    assert f"{LAST} is passed over, since --restore-file" in (log or "")


def test_other_commands_refuse_a_damaged_one(world: World, folder: Path, tmp_path: Path) -> None:
    import average_checkpoints

    path = folder / LAST
    DAMAGES["a flipped bit of the weights"](path)
    ways: list[Callable[[], Any]] = [
        lambda: fairseq("generate", world.data, "--gen-subset", "valid", "--path", path),
        lambda: fairseq("validate", world.data, "--valid-subset", "valid", "--path", path, "--batch-size", 1),
        lambda: fairseq("interactive", tmp_path, "--path", path),
        lambda: BlspKd.from_pretrained(path),
        lambda: average_checkpoints.main(["--inputs", str(path), "--output", str(tmp_path / "mean.pt")]),
    ]
    for way in ways:
        with pytest.raises(DamagedCheckpointError, match="the content of .* is not what was written"):
            way()
    assert not (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize("name", ["empty", "half", "zeros at the end", "a text", "a flipped bit"])
def test_a_damaged_folder_of_save_pretrained_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    BlspKd.from_pretrained(saved / LAST).save_pretrained(tmp_path)
    assert BlspKd.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    flip(weights, 8 * weights.stat().st_size - 99) if name == "a flipped bit" else DAMAGES[name](weights)
    with pytest.raises(DamagedCheckpointError, match="is damaged") as error:
        BlspKd.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ---- writing -------------------------------------------------------------------------------------------------------


def fail(number: int) -> Callable[..., Any]:
    def raise_(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return raise_


FAILURES = {
    "full while writing": ("torch.save", errno.ENOSPC),
    "full while syncing": ("blspkd_fairseq.files._sync", errno.ENOSPC),
    "read-only": ("os.replace", errno.EROFS),
    "over quota": ("torch.save", errno.EDQUOT),
    "broken": ("torch.save", errno.EIO),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_harms_nothing_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, number = FAILURES[failure]
    with monkeypatch.context() as patch:
        patch.setattr(name, fail(number))
        with pytest.raises(CheckpointError, match=os.strerror(number)) as error:
            write_checkpoint({"cfg": {}, "model": {}}, folder / LAST)
    assert "\n" not in str(error.value) and "the same command goes on" in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile" if name == "torch.save" else name, fail(number))
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            copy_checkpoint(folder / LAST, folder / "checkpoint_best.pt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A limit on the length of files stands for a full disk: torch's writer hides what the system said."""
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from blspkd_fairseq.checkpoint_files import write_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_checkpoint({'model': torch.zeros(200_000)}, Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    path = tmp_path / LAST
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{path} could not be written (File too large): "), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be written to .*give --save-dir"):
        world.train(tmp_path / "file" / "save", *OPTIONS)
    monkeypatch.setattr("os.replace", fail(errno.EROFS))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        prepare_folder(tmp_path / "save")
    assert list((tmp_path / "save").iterdir()) == []


def test_a_folder_that_vanishes_is_said_at_the_save(world: World, tmp_path: Path) -> None:
    from blspkd_fairseq.tasks.blsp_kd import BlspKdTask

    save_dir, optimizer_step = tmp_path / "save", BlspKdTask.optimizer_step

    def step(self: Any, *args: Any, update_num: int, **kwargs: Any) -> None:
        if update_num == 1:
            shutil.rmtree(save_dir)
        optimizer_step(self, *args, update_num=update_num, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="save, .* is no longer there"):
        patch.setattr(BlspKdTask, "optimizer_step", step)
        world.train(save_dir, *OPTIONS, "--max-update", 3)
    assert not save_dir.exists()


def test_what_a_killed_training_left_is_removed(world: World, folder: Path) -> None:
    (folder / f".{LAST}.123-456.partial").write_bytes(b"half")
    world.train(folder, *OPTIONS, "--max-update", 4)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files, "_sync", lambda path: events.append("folder" if path == tmp_path else "file"))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_checkpoint({"cfg": {}, "model": {}}, tmp_path / LAST)
    assert events == ["file", "rename", "folder"]


def test_asynchronous_writing_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out --write-checkpoints-asynchronously"):
        world.train(tmp_path, *OPTIONS, "--write-checkpoints-asynchronously")


@pytest.fixture(autouse=True)
def warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def test_the_checksums_are_those_of_the_content(saved: Path) -> None:
    """torch can be told to leave them out, and then nothing would be checked."""
    check_whole(saved / LAST)
    assert torch.serialization.get_crc32_options()
