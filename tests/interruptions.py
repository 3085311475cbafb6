"""Trainings that are interrupted anywhere, in this process, and what they did to every utterance."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from commands import train
from tiny import save_llm, save_whisper, write_split

import blspkd_fairseq
from blspkd_fairseq import files

# Everything that draws numbers, and a checkpoint after every update.
OPTIONS = (
    "--batch-size", 2, "--adapter-dropout", 0.2, "--lora-dropout", 0.2, "--disable-validation",
    "--save-interval-updates", 1, "--keep-interval-updates", 2, "--no-epoch-checkpoints",
)  # fmt: skip
EVENTS_OF_A_COPY = 3  # written, renamed, folder written
EVENTS_OF_A_SAVE = 2 * EVENTS_OF_A_COPY  # the checkpoint of an update, and checkpoint_last.pt


class Killed(BaseException):
    """The end of a process."""


class Step(NamedTuple):
    """A batch of an update: its number, the utterances, and their loss."""

    update: int
    utterances: tuple[str, ...]
    loss: float


class Kill(NamedTuple):
    """Where a training ends: before an update, or if ``event`` is given, in the midst of saving it."""

    update: int
    event: int | None = None


class World:
    """Models and data of 11 utterances, some as long as others; those of a folder that is there already are taken."""

    def __init__(self, root: Path, utterances: int = 11) -> None:
        self.llm, self.whisper, self.data, self.other_data = (
            root / name for name in ("llm", "whisper", "data", "other")
        )
        if self.other_data.exists():
            return
        save_llm(self.llm)
        save_whisper(self.whisper)
        for data, count in ((self.data, utterances), (self.other_data, utterances - 4)):
            write_split(data, "train", count)
            write_split(data, "valid", 3)

    def train(
        self, save_dir: Path, *options: Any, kill: Kill | None = None, data: Path | None = None
    ) -> tuple[list[Step], str | None]:
        """What a training did, and its log, or None if it was killed; SAVE_DIR in an option is ``save_dir``."""
        options = tuple(str(option).replace("SAVE_DIR", str(save_dir)) for option in options)
        with recorded(kill) as steps:
            try:
                log = train(data or self.data, save_dir, self.llm, self.whisper, *options)
            except Killed:
                return steps, None
        return steps, log


def die() -> None:
    """Ends this process, as far as a test can do that to its own."""
    raise Killed


@contextmanager
def recorded(
    kill: Kill | None, end: Callable[[], None] = die, note: Callable[[Step], None] | None = None
) -> Iterator[list[Step]]:
    """Notes every step of training, up to where it is killed by calling ``end``."""
    blspkd_fairseq.register()
    from blspkd_fairseq.tasks.blsp_kd import BlspKdTask

    steps: list[Step] = []
    events = [0]
    train_step, sync, replace = BlspKdTask.train_step, files._sync, os.replace

    def step(self: Any, sample: Any, *args: Any, update_num: int, **kwargs: Any) -> Any:
        if kill == Kill(update_num):
            end()
        events[0] = 0
        result = train_step(self, sample, *args, update_num=update_num, **kwargs)
        steps.append(Step(update_num, tuple(row["id"] for row in sample["rows"]), float(result[0].detach())))
        if note is not None:
            note(steps[-1])
        return result

    def event() -> None:
        if kill is not None and kill.event == events[0] and steps and steps[-1].update == kill.update:
            end()
        events[0] += 1

    def synced(path: Path) -> None:
        event()
        sync(path)

    def replaced(source: Any, target: Any) -> None:
        if str(target).endswith(".pt"):
            event()
        replace(source, target)

    with (
        mock.patch.object(BlspKdTask, "train_step", step),
        mock.patch.object(files, "_sync", synced),
        mock.patch.object(os, "replace", replaced),
    ):
        yield steps


def train_through(
    world: World, save_dir: Path, kills: Sequence[Kill], *options: Any, data: Path | None = None
) -> list[Step]:
    """The steps that made the model of a training which is killed and started again with the same command."""
    lineage: list[Step] = []
    for kill in (*kills, None):
        steps, log = world.train(save_dir, *options, kill=kill, data=data)
        assert (log is None) == (kill is not None), f"{kill} did not happen"
        lineage = gone_on(lineage, steps)
    return lineage


def gone_on(before: list[Step], steps: list[Step]) -> list[Step]:
    """The steps that made a model which was trained on from one of those before."""
    first = steps[0].update if steps else math.inf
    return [step for step in before if step.update < first] + steps
