"""Signals that ask a training to stop: it finishes the update, saves, and ends.

Its exit code is 128 + the number of the signal: what a shell shows for a program that the signal ended, so that a
script sees one code whether the signal came before the first update, when there is nothing to save, or after it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from blspkd_fairseq.compat.replacing import replace

# The end of a job's time or place (TERM; Slurm's --signal sends what it is told, mostly USR1 or USR2), Ctrl-C, and the
# end of the terminal.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

_received: signal.Signals | None = None  # by this process
_agreed: Any = None  # a tensor for each of STOPPING: how many processes had received it at the last reduction
_former: dict[signal.Signals, Any] = {}


class StopValidation(Exception):
    """The validation is left, to be made when the training goes on."""


def exit_code(number: int) -> int:
    """Returns the exit code of a training that this signal has stopped."""
    return 128 + number


def watch_signals(forward: bool = False) -> None:
    """Notes the first signal of this process from here on. Those that are ignored, or that others attend to, stay so.

    Args:
        forward: it trains in processes that it has spawned, and tells them.
    """
    for number in STOPPING:
        if number not in _former and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # not in the main thread
                _former[number] = signal.signal(number, _tell if forward else _note)


def leave_signals() -> None:
    """Restores what signals did before :func:`watch_signals`."""
    global _received, _agreed
    for number, handler in _former.items():
        signal.signal(number, handler)
    _former.clear()
    _received = _agreed = None


def _note(number: int, _: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
        os.write(2, f"{_received.name}: stopping after this update; Ctrl-C ends at once\n".encode())
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # even if Python does not get to run


def _tell(number: int, frame: FrameType | None) -> None:
    """Tells spawned processes, too: by SIGTERM, since Ctrl-C has reached them already, and a second would end them."""
    _note(number, frame)
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)


def stop_signal() -> signal.Signals | None:
    """The signal for which a training is to stop now, the same in all its processes; None to go on."""
    if _agreed is None:
        return _received
    import torch

    counts = torch.as_tensor(_agreed) if not torch.is_tensor(_agreed[0]) else torch.stack(_agreed)
    return next((number for number, count in zip(STOPPING, counts.tolist(), strict=True) if count > 0), None)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hides signals to the whole group from processes that this thread begins: their parent decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def agree_on_signals() -> None:
    """Lets the processes of a training know of each other's signals, at no cost.

    Every update and every step of a validation sums its numbers over the processes: those of the signals travel with
    them, and are looked at where fairseq has just waited for the device to see whether gradients are finite.
    """
    from fairseq.trainer import Trainer

    replace(Trainer, "_aggregate_logging_outputs", _with_signals)
    replace(Trainer, "valid_step", _until_a_signal)


def _with_signals(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(aggregate)
    def aggregate_with_signals(self: Any, outputs: Any, *sums: Any, ignore: bool = False) -> Any:
        global _agreed
        own = [float(number == _received) for number in STOPPING]
        outputs, reduced = aggregate(self, outputs, *sums, *own, ignore=ignore)
        _agreed = reduced[len(sums) :]
        return outputs, reduced[: len(sums)]

    return aggregate_with_signals


def _until_a_signal(valid_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(valid_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = valid_step(self, *args, **kwargs)
        if stop_signal() is not None:
            raise StopValidation
        return output

    return step


def exit_as_spawned(error: Exception) -> int | None:
    """The exit code for a training whose spawned processes a signal has stopped; None for any other error of theirs."""
    code = getattr(error, "exit_code", None)
    if code not in [exit_code(number) for number in STOPPING]:
        return None
    return code if _received is None else exit_code(_received)
