"""What fairseq's commands leave behind: no thread, no process, and nothing for the interpreter's end to clean up."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train
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
    """Names of the threads and processes that the test has begun and not ended."""
    before = {*threading.enumerate(), *multiprocessing.active_children()}

    def names(seconds: float = 10) -> list[str]:
        end = time.monotonic() + seconds  # torch tells threads of its queues to end and does not wait for them
        while True:
            now = {*threading.enumerate(), *multiprocessing.active_children()} - before
            left = [one.name for one in now if one.name != "tqdm_monitor"]
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

    compat._followed_by_an_end(main)()
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
    import fairseq_cli.train  # noqa: F401  (for its functions to be found; as it is in the real command)

    train(tmp_path / "data", tmp_path / "save", llm, whisper, *options, "--max-update", 3)
    assert left_over() == []
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairseq.trainer.Trainer.train_step", lambda *_: 1 / 0)
        train(tmp_path / "data", tmp_path / "save", llm, whisper, *options)
    assert left_over() == []
