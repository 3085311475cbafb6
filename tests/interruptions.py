"""Trainings that are interrupted anywhere, in this process, and what they did to every utterance."""

import os
from collections.abc import Iterator, Sequence
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
    """Models and data of 11 utterances, some as long as others."""

    def __init__(self, root: Path, utterances: int = 11) -> None:
        self.llm, self.whisper = save_llm(root / "llm"), save_whisper(root / "whisper")
        self.data = root / "data"
        write_split(self.data, "train", utterances)
        write_split(self.data, "valid", 3)
        self.other_data = root / "other"
        write_split(self.other_data, "train", utterances - 4)
        write_split(self.other_data, "valid", 3)

    def train(
        self, save_dir: Path, *options: Any, kill: Kill | None = None, data: Path | None = None
    ) -> tuple[list[Step], str | None]:
        """What a training did, and its log, or None if it was killed."""
        with recorded(kill) as steps:
            try:
                log = train(data or self.data, save_dir, self.llm, self.whisper, *options)
            except Killed:
                return steps, None
        return steps, log


@contextmanager
def recorded(kill: Kill | None) -> Iterator[list[Step]]:
    """Notes every step of training, up to where it is killed."""
    blspkd_fairseq.register()
    from blspkd_fairseq.tasks.blsp_kd import BlspKdTask

    steps: list[Step] = []
    events = [0]
    train_step, sync, replace = BlspKdTask.train_step, files._sync, os.replace

    def step(self: Any, sample: Any, *args: Any, update_num: int, **kwargs: Any) -> Any:
        if kill == Kill(update_num):
            raise Killed
        events[0] = 0
        result = train_step(self, sample, *args, update_num=update_num, **kwargs)
        steps.append(Step(update_num, tuple(row["id"] for row in sample["rows"]), float(result[0].detach())))
        return result

    def event() -> None:
        if kill is not None and kill.event == events[0] and steps and steps[-1].update == kill.update:
            raise Killed
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
        first = steps[0].update if steps else len(lineage)
        lineage = [step for step in lineage if step.update < first] + steps
    return lineage
