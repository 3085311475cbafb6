"""A training that is killed anywhere and started again equals an undisturbed one: utterances, losses, schedule, log."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import load, train_on_two
from interruptions import EVENTS_OF_A_COPY, EVENTS_OF_A_SAVE, OPTIONS, Kill, World, train_through

LAST = "checkpoint_last.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def some_kills(updates: int, end_of_epoch: int, seed: int) -> list[Kill]:
    """Early, at the end of an epoch and late, before an update or within a save."""
    rng = random.Random(seed)
    at = sorted({rng.randrange(1, updates // 3), end_of_epoch - 1, rng.randrange(updates // 2, updates - 1)})
    return [Kill(update, rng.choice([None, *range(EVENTS_OF_A_COPY)])) for update in at]


@pytest.mark.parametrize(
    ("options", "updates", "end_of_epoch", "shards"),
    [
        pytest.param(("--max-epoch", 3), 18, 12, 1, id="three epochs"),
        pytest.param(("--max-epoch", 3, "--num-workers", 2), 18, 6, 1, id="workers"),
        pytest.param(
            ("--max-epoch", 4, "--update-freq", "2,4"), 9, 5, 1, id="several batches an update", marks=pytest.mark.slow
        ),
        pytest.param(("--max-epoch", 3, "--update-freq", 2, "--num-workers", 2), 8, 5, 2, id="a folder an epoch"),
        pytest.param(
            ("--max-epoch", 2, "--cache-encoder-features", "--feature-store", "SAVE_DIR/features"),
            12,
            6,
            1,
            id="stored frames",
        ),
        pytest.param(
            (
                *(
                    "--max-epoch",
                    2,
                    "--criterion",
                    "on_policy_distillation",
                    "--rollouts",
                    2,
                    "--rollout-max-tokens",
                    4,
                ),
                *("--adapter-dropout", 0, "--lora-dropout", 0),
            ),
            12,
            6,
            1,
            id="roll-outs",
        ),
        pytest.param(
            ("--max-epoch", 3, "--skip-remainder-batch", "--curriculum", 1),
            15,
            5,
            1,
            id="curriculum",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_utterance_comes_once_and_losses_are_the_same(
    world: World, tmp_path: Path, options: tuple[Any, ...], updates: int, end_of_epoch: int, shards: int
) -> None:
    data = Path(f"{world.data}:{world.other_data}") if shards == 2 else world.data
    through = train_through(world, tmp_path / "through", [], *OPTIONS, *options, data=data)
    assert through[-1].update == updates - 1
    kills = some_kills(updates, end_of_epoch, seed=updates)
    assert train_through(world, tmp_path / "killed", kills, *OPTIONS, *options, data=data) == through
    if "--skip-remainder-batch" not in options:
        of_an_epoch = 11 + (shards == 2) * 7
        count = Counter(one for step in through[: -(-of_an_epoch // 2) + (shards == 2)] for one in step.utterances)
        assert set(count.values()) == {1} if shards == 1 else set(count.values()) <= {1, 2}


def test_killed_at_every_step_of_a_save(world: World, tmp_path: Path) -> None:
    through = train_through(world, tmp_path / "through", [], *OPTIONS, "--max-update", 9)
    kills = [Kill(2, event) for event in range(EVENTS_OF_A_SAVE)]
    kills += [Kill(5, event) for event in range(EVENTS_OF_A_COPY)]  # the end of an epoch
    kills = sorted(random.Random(1).sample(kills, 5))
    assert train_through(world, tmp_path / "killed", kills, *OPTIONS, "--max-update", 9) == through
    assert not list((tmp_path / "killed").glob(".*"))


def test_every_epoch_has_other_batches_in_another_order(world: World, tmp_path: Path) -> None:
    steps = train_through(world, tmp_path, [], *OPTIONS, "--max-epoch", 3)
    epochs = [[step.utterances for step in steps[first : first + 6]] for first in (0, 6, 12)]
    orders = [[batch[0] for batch in epoch] for epoch in epochs]
    batches = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert orders[one] != orders[other] and batches[one] != batches[other]
    for epoch in epochs:
        assert len({one for batch in epoch for one in batch}) == 11


@pytest.mark.slow
def test_two_processes_go_on_exactly(world: World, tmp_path: Path) -> None:
    options = (*OPTIONS, "--save-interval-updates", 2)
    for name, stops in (("through", [5]), ("resumed", [4, 5])):  # an epoch has three updates
        for updates in stops:
            train_on_two(world.data, tmp_path / name, world.llm, world.whisper, *options, "--max-update", updates)
    one, other = (load(tmp_path / name / LAST) for name in ("through", "resumed"))
    assert all((one["model"][name] == other["model"][name]).all() for name in one["model"])


# ---- what fairseq's loop forgets -----------------------------------------------------------------------------------


def curve(log: str) -> list[str]:
    """Lines of training without what depends on the time."""
    lines = re.findall(r"^epoch \d+: .*|.*\| valid on .*|.*\| epoch \d+ \| .*", log, re.M)
    timed = r"(wps|ups|train_wall|wall|wpb)=?\s*[\d.]+"
    return [re.sub(timed, "", line.split("| INFO |")[-1]) for line in lines]


def test_the_log_and_the_schedule_go_on_at_the_end_of_an_epoch(world: World, tmp_path: Path) -> None:
    options = (
        *("--batch-size", 2, "--log-interval", 4, "--lr-scheduler", "reduce_lr_on_plateau", "--lr-threshold", 0.9),
        *("--lr-shrink", 0.5, "--lr-patience", 1, "--save-interval-updates", 2),
    )
    _, through = world.train(tmp_path / "through", *options, "--max-epoch", 4)
    parts = [world.train(tmp_path / "resumed", *options, "--max-epoch", epoch)[1] for epoch in (1, 2, 3, 4)]
    assert curve(through or "") == [line for part in parts for line in curve(part or "")]
    assert len({line.split("lr=")[1].split(",")[0] for line in curve(through or "") if "lr=" in line}) > 1


def test_patience_counts_on(world: World, tmp_path: Path) -> None:
    options = ("--batch-size", 4, "--lr", 0, "--patience", 3, "--save-interval-updates", 1)
    through, _ = world.train(tmp_path / "through", *options, "--max-epoch", 9)
    kills = [Kill(through[-1].update // 3), Kill(through[-1].update, 2)]
    assert train_through(world, tmp_path / "killed", kills, *options, "--max-epoch", 9) == through


@pytest.mark.parametrize("end", [("--max-update", 3), ("--max-epoch", 1), ("--max-epoch", 9, "--patience", 1)])
def test_a_training_that_has_ended_stays_as_it_is(world: World, tmp_path: Path, end: tuple[Any, ...]) -> None:
    options = ("--batch-size", 4, "--lr", 0, *end)
    assert world.train(tmp_path, *options)[0]
    before = (tmp_path / LAST).read_bytes()
    steps, log = world.train(tmp_path, *options)
    assert steps == [] and "done training" in (log or "") and (tmp_path / LAST).read_bytes() == before
