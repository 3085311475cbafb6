"""fairseq's commands: their options, and the end of what they have begun."""

from __future__ import annotations

import contextlib
import functools
import inspect
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from blspkd_fairseq.compat import signals
from blspkd_fairseq.compat.distributed import ending_together, is_launched, join_launcher
from blspkd_fairseq.compat.replacing import is_wrapped, replace

_commands: list[Any] = []  # configurations of those that run
_readers: weakref.WeakSet[Any] = weakref.WeakSet()  # threads that read batches ahead
_LONGEST_READ = 30.0  # seconds for the batch that is being read when its reader is told to end


def attend_commands() -> None:
    """Knows the options of fairseq's commands, and ends what they have begun.

    To be called when this package is loaded and when a task begins. fairseq-hydra-train and the processes that torch
    spawns load it when ``main`` runs already: there it is ``train``, which ``main`` calls, that is attended.
    """
    from fairseq.distributed import utils

    _end_reading_with_commands()
    replace(utils, "call_main", _remembered)
    for name, module in list(sys.modules.items()):
        if name in ("__main__", "__mp_main__") or name.startswith("fairseq_cli."):
            for function in ("main", "train"):
                if _is_of_a_command(getattr(module, function, None)):
                    replace(module, function, _followed_by_an_end if function == "main" else _epoch)


def _is_of_a_command(function: Any) -> bool:
    if not inspect.isfunction(function):
        return False
    return Path(inspect.unwrap(function).__code__.co_filename).parent.name == "fairseq_cli"


def _remembered(call_main: Any) -> Any:
    @functools.wraps(call_main)
    def call(cfg: Any, main: Any, **kwargs: Any) -> Any:
        if getattr(cfg.task, "_name", None) == "blsp_kd":
            refuse_precision(cfg)
            if Path(inspect.unwrap(main).__code__.co_filename).stem == "train":
                join_launcher(cfg)
        _commands.append(cfg)
        if _will_spawn(cfg.distributed_training):
            signals.watch_signals(forward=True)
        elif not is_wrapped(main, _followed_by_an_end):
            main = _followed_by_an_end(main)  # of a command that was imported after this package
        try:
            return call_main(cfg, main, **kwargs)
        except Exception as error:
            code = signals.exit_as_spawned(error)
            if code is None:
                raise
            raise SystemExit(code) from None
        finally:
            _commands.pop()
            signals.leave_signals()

    return call


def _will_spawn(cfg: Any) -> bool:
    """Whether a command trains in processes of its own, and not in those of torchrun or Slurm."""
    return cfg.distributed_world_size > 1 and not cfg.distributed_no_spawn and not is_launched()


def _followed_by_an_end(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with ending_together():
                return function(*args, **kwargs)
        finally:
            for reader in list(_readers):
                reader.end()

    return run


def _epoch(train: Any) -> Any:
    """An epoch of training, which the task may end, too."""

    @functools.wraps(train)
    def run(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        result = train(cfg, trainer, task, epoch_itr)
        if hasattr(task, "end_epoch"):
            task.end_epoch(epoch_itr.epoch)
        return result

    return _followed_by_an_end(run)


def _end_reading_with_commands() -> None:
    """Lets fairseq's data loading end before the interpreter does.

    fairseq leaves a thread that reads ahead, loader processes and the thread that pins memory to the interpreter's end.
    torch's clean-up starts a thread, which Python 3.12 refuses by then, and the pinning thread lives on while CUDA is
    torn down: a training that stopped in mid-epoch never exits. Here the reading thread ends on request or with an
    error, and takes the rest with it; loader processes that would outlive their epoch are not kept.
    """
    from fairseq.data import iterators

    replace(iterators, "BackgroundConsumer", _that_can_be_ended)
    replace(iterators.EpochBatchIterator, "__init__", _read_by_a_thread)


def _that_can_be_ended(consumer: Any) -> Any:
    """Makes the class of fairseq's thread that reads ahead into one that ends on request."""

    class Reader(consumer):
        def __init__(self, ahead: Any, loader: Any, most: int | None, cuda_device: int | None) -> None:
            self.is_ended = threading.Event()
            super().__init__(ahead, self._batches(loader, most), None, cuda_device)
            _readers.add(self)

        def _batches(self, loader: Any, most: int | None) -> Iterator[Any]:
            with signals.held_back():
                batches = iter(loader)
            for worker in getattr(batches, "_workers", ()):
                worker._popen.terminate = worker._popen.kill  # since it does not hear of SIGTERM
            try:
                for batch in islice(batches, most):
                    yield batch
                    if self.is_ended.is_set():
                        return
            finally:
                if hasattr(batches, "_shutdown_workers"):  # not where this process loads
                    batches._shutdown_workers()

        def end(self) -> None:
            self.is_ended.set()
            deadline = time.monotonic() + _LONGEST_READ
            while self.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):  # room for the batch that it wants to hand over
                    self._queue.get(timeout=0.01)

    return Reader


def _read_by_a_thread(begin: Any) -> Any:
    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.persistent_workers = False
        self.buffer_size = max(self.buffer_size, int(self.num_workers > 0))

    return __init__


def refuse_precision_of_command(cfg: Any, from_checkpoint: bool) -> None:
    """Checks the options of the command that sets up a task with this configuration.

    Args:
        cfg: of the task, within that of the command or, if ``from_checkpoint``, of the training that ended with it.
        from_checkpoint: fairseq-validate takes the task from there.
    """
    parent = cfg._get_parent() if hasattr(cfg, "_get_parent") and not from_checkpoint else None
    for command in (parent, *_commands[-1:]):
        if command is not None:
            refuse_precision(command)


_PRECISIONS = ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")


def refuse_precision(command: Any) -> None:
    """Refuses fairseq's kinds of half precision, which halve what is trained, or fail (fairseq#4696).

    Raises:
        ValueError: names the options and what to use.
    """
    if getattr(getattr(command, "checkpoint", None), "write_checkpoints_asynchronously", False):
        raise ValueError(
            "leave out --write-checkpoints-asynchronously: checkpoints are written whole and checked, before training "
            "goes on"
        )
    given = [name for name in _PRECISIONS if getattr(command.common, name, False)]
    given = [name for name in given if f"memory_efficient_{name}" not in given]  # which implies it
    if given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"leave out {options}: what blsp_kd trains stays in float32 and its products run in bfloat16 on a GPU that "
            "has it, by themselves; --llm-dtype says in which precision the frozen LLM is held"
        )
    if command.distributed_training.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded cannot hold blsp_kd's trained parameters beside a frozen LLM: use "
            "--ddp-backend pytorch_ddp or legacy_ddp"
        )
