"""What fairseq's commands leave behind: no thread, no process, and nothing for the interpreter's end to clean up."""

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fairseq, train
from tiny import save_llm, save_whisper, write_split
from torch.utils.data import DataLoader, dataloader
from torch.utils.data._utils import pin_memory

import blspkd_fairseq
from blspkd_fairseq import compat

blspkd_fairseq.register()

from fairseq.data import iterators  # noqa: E402


class Numbers(torch.utils.data.Dataset[int]):
    """Numbers, of which one cannot be read."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise ValueError("unreadable")
        return index


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders have the thread that pins memory, as beside a GPU; it pins nothing."""
    begin = dataloader._BaseDataLoaderIter.__init__

    def with_accelerator(self: Any, *args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "is_available", lambda *_, **__: True)
            patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
            begin(self, *args)

    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(pin_memory, "pin_memory", lambda data, device=None: data)
    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__init__", with_accelerator)


@pytest.fixture
def left_over(pinning: None) -> Iterator[Callable[..., list[str]]]:
    """Names of the threads and processes that the test has begun and not ended.

    A worker process that ends may take the lock of its queue with it. Whoever waits for that lock is a daemon that
    nobody waits for.
    """
    before = {*threading.enumerate(), *multiprocessing.active_children()}

    def names(seconds: float = 10) -> list[str]:
        end = time.monotonic() + seconds  # torch tells threads of its queues to end and does not wait for them
        while True:
            now = {*threading.enumerate(), *multiprocessing.active_children()} - before
            left = [one.name for one in now if one.name not in ("tqdm_monitor", "QueueFeederThread")]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.01)

    yield names


def read(dataset: Numbers, batches: int, **options: Any) -> list[int]:
    """Sums of the first batches of a fairseq iterator, 12 of two numbers each in all."""
    sampler = [[2 * i, 2 * i + 1] for i in range(12)]
    epochs = iterators.EpochBatchIterator(dataset, sum, sampler, disable_shuffling=True, **options)
    epoch = epochs.next_epoch_itr()
    return [next(epoch) for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 10])
def test_reading_ends_when_it_is_told(left_over: Callable[..., list[str]], workers: int, ahead: int) -> None:
    held = []

    def main() -> None:
        held.append(read(Numbers(), 3, num_workers=workers, buffer_size=ahead))
        if workers:
            assert any("pin_memory" in name for name in left_over(seconds=0))

    compat.commands._followed_by_an_end(main)()
    assert held == [[1, 5, 9]] and left_over() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ends_with_the_epoch_and_with_an_error(left_over: Callable[..., list[str]], workers: int) -> None:
    options = {"num_workers": workers, "buffer_size": 10}
    assert read(Numbers(), 12, **options)[-1] == 45
    with pytest.raises(ValueError, match="unreadable"):
        read(Numbers(bad=9), 12, **options)
    assert left_over() == []


def test_a_loader_of_others_is_left_alone() -> None:
    loader = DataLoader(Numbers(), batch_sampler=[[1], [2]], num_workers=1, persistent_workers=True)
    assert [int(one) for one in loader] == [1, 2] and loader.persistent_workers


def test_training_that_stops_in_mid_epoch_or_by_an_error(left_over: Callable[..., list[str]], tmp_path: Path) -> None:
    llm, whisper = save_llm(tmp_path / "llm"), save_whisper(tmp_path / "whisper")
    write_split(tmp_path / "data", "train", 16)
    write_split(tmp_path / "data", "valid", 2)
    options = ("--num-workers", 2, "--batch-size", 1, "--validate-interval-updates", 2, "--no-save")
    import fairseq_cli.train  # as it is in the real command, so that its functions are found

    train(tmp_path / "data", tmp_path / "save", llm, whisper, *options, "--max-update", 3)
    assert left_over() == []
    main = fairseq_cli.train.main
    assert hasattr(main, "_is_ours") and pickle.loads(pickle.dumps(main)) is main  # for processes that are spawned
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairseq.trainer.Trainer.train_step", lambda *_: 1 / 0)
        train(tmp_path / "data", tmp_path / "save", llm, whisper, *options)
    assert left_over() == []


# ---- precision -----------------------------------------------------------------------------------------------------

OWN = "what blsp_kd trains stays in float32"


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        *(("train", name, f"leave out {name}: {OWN}") for name in ("--fp16", "--bf16", "--amp")),
        ("train", "--memory-efficient-fp16", f"leave out --memory-efficient-fp16: {OWN}"),
        ("train", "--memory-efficient-bf16", f"leave out --memory-efficient-bf16: {OWN}"),
        ("train", "--ddp-backend=fully_sharded", "--ddp-backend fully_sharded cannot .* use --ddp-backend pytorch_ddp"),
        *((command, "--fp16", f"leave out --fp16: {OWN}") for command in ("generate", "interactive", "validate")),
    ],
)
def test_half_precision_of_fairseq_is_refused_before_anything_is_loaded(
    tmp_path: Path, command: str, option: str, message: str
) -> None:
    model = ["--arch", "blsp_kd", "--criterion", "kl_distillation", "--llm", "/no/such/llm", "--optimizer", "adam"]
    options = [*model, "--batch-size", 1] if command == "train" else ["--path", tmp_path / "no.pt"]
    with pytest.raises(ValueError, match=message):
        fairseq(command, tmp_path, *options, option)


def test_the_command_counts_and_not_the_training_of_a_checkpoint() -> None:
    """fairseq-hydra-train sets up a task without a command that we know; a checkpoint's own options do not matter."""
    from fairseq import tasks
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(
        {
            "common": {"fp16": False, "bf16": True, "amp": False},
            "distributed_training": {"ddp_backend": "pytorch_ddp"},
            "task": {"_name": "blsp_kd", "data": "data"},
        }
    )
    with pytest.raises(ValueError, match=f"leave out --bf16: {OWN}"):
        tasks.setup_task(cfg.task)
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    assert "fp16" not in task.cfg and "bf16" not in task.cfg  # a checkpoint holds nothing of it
