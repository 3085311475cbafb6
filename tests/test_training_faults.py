"""What a training does that has no memory, meets NaN, cannot read, waits for ever, or is one of several processes."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from commands import TRAIN_OPTIONS, arguments, free_port, load, train
from tiny import PATIENCE, save_llm, save_whisper, write_split
from torch import Tensor

import blspkd_fairseq
from blspkd_fairseq.faults.errors import TrainingError, is_out_of_memory, listed
from blspkd_fairseq.faults.limits import FaultLimits, check_limits
from blspkd_fairseq.faults.update import UpdateGuard

blspkd_fairseq.register()

from fairseq.trainer import Trainer  # noqa: E402

from blspkd_fairseq.criterions.kl_distillation import KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.data import dataset  # noqa: E402
from blspkd_fairseq.tasks.blsp_kd import BlspKdTask  # noqa: E402

ROWS = 12


class World:
    """Models and data that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.llm, self.whisper, self.data = save_llm(root / "llm"), save_whisper(root / "whisper"), root / "data"
        write_split(self.data, "train", ROWS)

    def train(self, save_dir: Path, *options: Any, data: Path | None = None) -> str:
        options = ("--disable-validation", "--max-epoch", 1, *options)
        return train(data or self.data, save_dir, self.llm, self.whisper, *options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def weights(save_dir: Path) -> dict[str, Tensor]:
    return load(save_dir / "checkpoint_last.pt")["model"]


def updates(save_dir: Path) -> int:
    return int(load(save_dir / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"])


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=2e-6, rtol=1e-4)


def assert_one_sentence(error: Exception, *parts: str) -> None:
    for part in parts:
        assert re.search(part, str(error)), (part, str(error))
    assert "\n" not in str(error)


# ---- memory --------------------------------------------------------------------------------------------------------


def no_room_on_a_cpu() -> None:
    torch.empty(1 << 55)  # torch's own words


def no_room(error: BaseException) -> Callable[[], None]:
    def ask() -> None:
        raise error

    return ask


OUT_OF_MEMORY = {
    "cpu": no_room_on_a_cpu,
    "cuda": no_room(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "cublas": no_room(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "python": no_room(MemoryError()),
}


class Memory:
    """Batches of more than ``most`` utterances, or with one of ``names``, do not fit where ``place`` says."""

    def __init__(self, patch: pytest.MonkeyPatch, ask: Callable[[], None], most: int, names: tuple[str, ...] = ()):
        self.ask, self.most, self.names, self.patch = ask, most, names, patch

    def check(self, sample: Any) -> None:
        names = [row["id"] for row in sample["rows"]]
        if len(names) > self.most or set(names) & set(self.names):
            self.ask()

    def in_forward(self) -> None:
        forward = KlDistillationCriterion.forward

        def checked(criterion: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
            result = forward(criterion, model, sample, reduce)
            self.check(sample)
            return result

        self.patch.setattr(KlDistillationCriterion, "forward", checked)

    def in_backward(self) -> None:
        """When all gradients were added already."""
        step = BlspKdTask.__mro__[1].train_step

        def checked(task: Any, sample: Any, *args: Any) -> Any:
            result = step(task, sample, *args)
            self.check(sample)
            return result

        self.patch.setattr(BlspKdTask.__mro__[1], "train_step", checked)

    def on_the_way_to_the_device(self) -> None:
        prepare = Trainer._prepare_sample

        def checked(trainer: Any, sample: Any, is_dummy: bool = False) -> Any:
            self.check(sample)
            return prepare(trainer, sample, is_dummy)

        self.patch.setattr(Trainer, "_prepare_sample", checked)


ONE_UPDATE = ("--optimizer", "sgd", "--lr", 1, "--max-update", 1)  # Adam blows up the rounding of zeros


@pytest.fixture(scope="module")
def one_update(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Of all rows, as three batches of four."""
    save_dir = tmp_path_factory.mktemp("undisturbed")
    world.train(save_dir, *ONE_UPDATE, "--update-freq", 3)
    return weights(save_dir)


@pytest.mark.parametrize(
    ("kind", "place", "most"),
    [
        ("cpu", "in_forward", 1),
        ("cuda", "in_forward", 3),
        ("cublas", "in_backward", 3),
        ("python", "in_forward", 3),
        ("cuda", "on_the_way_to_the_device", 3),
    ],
)
def test_batches_that_do_not_fit_are_taken_in_halves_to_the_same_gradient(
    world: World, one_update: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, place: str,
    most: int,
) -> None:  # fmt: skip
    getattr(Memory(monkeypatch, OUT_OF_MEMORY[kind], most), place)()
    log = world.train(tmp_path, *ONE_UPDATE, "--update-freq", 3)
    assert_same(weights(tmp_path), one_update)
    assert log.count("in halves") == {3: 3, 1: 9}[most] and "left out" not in log
    assert re.search(r"no memory for 4 utterances of \d+ tokens, the longest audio 1.4 s \(train-\d+, ", log)
    assert not (tmp_path / "crash.pt").exists()


def test_an_utterance_that_does_not_fit_alone_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The update is that of the other rows."""
    rest = tmp_path / "rest"
    lines = write_split(rest, "train", ROWS).read_text().splitlines(keepends=True)
    (rest / "train.tsv").write_text("".join(line for line in lines if not line.startswith("train-6\t")))
    update = (*ONE_UPDATE, "--batch-size", ROWS)
    world.train(tmp_path / "without", *update, data=rest)
    Memory(monkeypatch, no_room_on_a_cpu, ROWS, ("train-6",)).in_forward()
    log = world.train(tmp_path / "with", *update)
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert log.count("in halves") == 3 or log.count("in halves") == 4
    assert re.search(r"no memory for 1 utterances .*\(train-6\): left out, the 1. of at most 5 \(.*allocate", log)
    assert "1 utterances did not fit the memory" in log


NEVER_FITS = {
    "utterances in all": (("--batch-size", 2, "--max-oom", 2), "3 utterances do not even fit alone .*--max-oom 2"),
    "updates in a row": (("--batch-size", 4, "--max-oom", 0), "1 updates in a row had no memory"),
    "an epoch of nothing": (("--batch-size", 6, "--max-oom", ROWS), "epoch 1 has ended without a single update"),
}


@pytest.mark.parametrize(("options", "message"), NEVER_FITS.values(), ids=NEVER_FITS)
def test_a_training_that_never_fits_ends_with_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: Any, message: str
) -> None:
    Memory(monkeypatch, no_room_on_a_cpu, 0).in_forward()
    with pytest.raises(TrainingError) as error:
        world.train(tmp_path, *options, "--max-epoch", 2)
    assert_one_sentence(error.value, message)
    if "fit alone" in message or "in a row" in message:
        assert_one_sentence(error.value, "--batch-size", "--max-tokens", "--gradient-checkpointing", "train-")


def test_validation_and_the_optimizer_without_memory_say_what_to_change(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BlspKdTask, "optimizer_step", lambda *_, **__: no_room_on_a_cpu())
        with pytest.raises(TrainingError, match="optimizer's step: give a smaller --batch-size"):
            world.train(tmp_path)
    monkeypatch.setattr(BlspKdTask, "valid_step", lambda *_: OUT_OF_MEMORY["cuda"]())
    with pytest.raises(TrainingError, match="--batch-size-valid"):
        train(world.data, tmp_path, world.llm, world.whisper, "--max-update", 1, "--valid-subset", "train")


def test_exit_status(world: World, tmp_path: Path) -> None:
    """Of a process in which nothing ever fits."""
    fault = (
        "import torch\nfrom blspkd_fairseq.criterions.kl_distillation import KlDistillationCriterion as C\n"
        "C.forward = lambda *_: torch.empty(1 << 55)"
    )
    worker = process(fault, world, tmp_path, "--max-epoch", 2)
    output, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 1 and "done training" not in output and "--max-oom 5 may be left out" in output
    assert not list(tmp_path.glob("*.pt"))


def process(
    fault: str, world: World, save_dir: Path, *options: Any, python: Path = Path(sys.executable), **environment: Any
) -> "subprocess.Popen[str]":
    """``fairseq-train`` in a process of its own, with a fault."""
    program = (
        f"import blspkd_fairseq\nblspkd_fairseq.register()\n{fault}\nfrom fairseq_cli.train import cli_main\ncli_main()"
    )
    command = arguments(
        "train", world.data, "--llm", world.llm, "--speech-encoder", world.whisper, "--save-dir", save_dir,
        *TRAIN_OPTIONS, "--disable-validation", *options,
    )  # fmt: skip
    variables = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(
        [python, "-c", program, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=variables,
    )  # fmt: skip


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whether each update that was not made left weights, optimizer and count as they were."""
    found: list[Any] = []

    def state(trainer: Any) -> list[Any]:
        moments = trainer.optimizer.optimizer.state.values()
        tensors = [*trainer.model.parameters(), *(t for m in moments for t in m.values() if torch.is_tensor(t))]
        return [trainer.get_num_updates(), trainer.get_lr(), *(tensor.clone() for tensor in tensors)]

    step = Trainer.train_step

    def watched(trainer: Any, samples: Any, raise_oom: bool = False) -> Any:
        before = state(trainer)
        result = step(trainer, samples, raise_oom)
        if result is None:
            after = state(trainer)
            found.append(len(before) == len(after) and all(map(_equal, before, after)))
        return result

    monkeypatch.setattr(Trainer, "train_step", watched)
    yield found


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


class Numbers:
    """Batches with one of ``names`` (with any, if there are none) get a number that is none."""

    def __init__(self, patch: pytest.MonkeyPatch, value: float, *names: str) -> None:
        self.patch, self.value, self.names = patch, value, names

    def _hits(self, sample: Any) -> bool:
        return not self.names or bool({row["id"] for row in sample["rows"]} & set(self.names))

    def in_the_loss(self) -> None:
        forward = KlDistillationCriterion.forward

        def spoiled(criterion: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
            loss, size, log = forward(criterion, model, sample, reduce)
            if self._hits(sample):
                log = log | {"loss": self.value}  # of which the gradient knows nothing
            return loss, size, log

        self.patch.setattr(KlDistillationCriterion, "forward", spoiled)

    def in_the_gradient(self) -> None:
        forward = KlDistillationCriterion.forward

        def spoiled(criterion: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
            loss, size, log = forward(criterion, model, sample, reduce)
            if self._hits(sample):
                loss.register_hook(lambda gradient: gradient * self.value)
            return loss, size, log

        self.patch.setattr(KlDistillationCriterion, "forward", spoiled)

    def in_the_audio(self) -> None:
        """Where CIF's weights are made of it, too."""
        read = dataset.SpeechTextDataset._read

        def spoiled(data: Any, index: int, row: Any) -> Any:
            utterance = read(data, index, row)
            if self._hits({"rows": [row]}):
                utterance.waveforms[0][100] = self.value
            return utterance

        self.patch.setattr(dataset.SpeechTextDataset, "_read", spoiled)


@pytest.mark.parametrize(
    ("place", "value", "optimizer"),
    [
        ("in_the_loss", math.nan, "adamw"),
        ("in_the_loss", math.inf, "adamw"),
        ("in_the_gradient", math.nan, "adamw"),
        ("in_the_gradient", math.inf, "adam"),
        ("in_the_audio", math.nan, "adam"),
        ("in_the_audio", math.inf, "adamw"),
    ],
)
def test_what_is_not_finite_makes_no_update_and_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, states: list[Any], tmp_path: Path,
    place: str, value: float, optimizer: str,
) -> None:  # fmt: skip
    getattr(Numbers(monkeypatch, value, "train-5"), place)()
    log = world.train(tmp_path, "--batch-size", 2, "--max-epoch", 2, "--optimizer", optimizer)
    assert states == [True, True] and updates(tmp_path) == 2 * (ROWS // 2 - 1)
    (first, second) = re.findall(r"in the batch of (.*): no update \((\d) so far, 1 in a row\)", log)
    assert "train-5" in first[0] and len(first[0].split(", ")) == 2 and (first[1], second[1]) == ("1", "2")
    assert "2 updates were not finite" in log and "nan" not in re.sub(r"a loss of nan", "", log)
    assert all(bool(weight.isfinite().all()) for weight in weights(tmp_path).values())
    assert not (tmp_path / "crash.pt").exists()


@pytest.mark.parametrize("place", ["in_the_loss", "in_the_gradient"])
def test_of_several_batches_the_one_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, states: list[Any], tmp_path: Path, place: str
) -> None:
    getattr(Numbers(monkeypatch, math.nan, "train-5"), place)()
    log = world.train(tmp_path, "--batch-size", 1, "--update-freq", 4)
    assert " in the batch of train-5: no update" in log and updates(tmp_path) == 2 and states == [True]


def test_too_many_in_a_row_end_training(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Numbers(monkeypatch, math.nan).in_the_gradient()
    with pytest.raises(TrainingError) as error:
        world.train(tmp_path, "--batch-size", 2, "--max-non-finite", 2)
    assert_one_sentence(
        error.value, "3 updates in a row were not finite, but --max-non-finite is 2", r"train-\d", "--lr"
    )
    with pytest.raises(TrainingError, match="epoch 1 has ended without a single update"):
        world.train(tmp_path, "--batch-size", ROWS)
    assert not list(tmp_path.glob("*.pt")) or not (tmp_path / "crash.pt").exists()


def test_parameters_that_are_not_finite_end_training_and_are_not_saved(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = BlspKdTask.optimizer_step

    def spoil(task: Any, optimizer: Any, model: Any, update_num: int) -> None:
        step(task, optimizer, model, update_num)
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = math.nan

    monkeypatch.setattr(BlspKdTask, "optimizer_step", spoil)
    for options in (("--max-update", 2), ("--max-update", 1)):
        with pytest.raises(TrainingError) as error:
            world.train(tmp_path, *options)
        assert_one_sentence(error.value, "lora_A.*NaN or Inf in what is trained", "--restore-file")
    assert not list(tmp_path.glob("*.pt"))


def test_validation_that_is_not_finite_ends_training(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Numbers(monkeypatch, math.nan, "valid-1").in_the_loss()
    write_split(world.data, "valid", 3)
    with pytest.raises(TrainingError, match="validation has a loss of nan in the batch of .*valid-1"):
        train(world.data, tmp_path, world.llm, world.whisper, "--max-update", 1)


# ---- audio ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(world: World, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the data whose rows with these numbers cannot be read."""

    def spoil(*rows: int) -> Path:
        folder = tmp_path / "spoiled"
        path = write_split(folder, "train", ROWS)
        for row in rows:
            (folder / f"audio/train-{row}.flac").write_bytes(b"no audio")
        return path.parent

    return spoil


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_bad_audio_is_said_once_and_summed_up(
    world: World, spoiled: Callable[..., Path], tmp_path: Path, workers: int, batch: int
) -> None:
    options = ("--batch-size", batch, "--num-workers", workers, "--max-epoch", 2, "--max-bad-audio-share", 0.5)
    log = world.train(tmp_path / "save", "--skip-bad-audio", *options, data=spoiled(0, 3, 4, 7, 9))
    assert log.count("left out: ") == 5
    for row in (0, 3, 4, 7, 9):
        assert re.search(rf"left out: .*train.tsv line {row + 2} \(id train-{row}\)", log)
    for epoch in (1, 2):
        assert f"by the end of epoch {epoch}, --skip-bad-audio has left out 5 of 12 rows (0.00 hours)" in log
    losses = [float(loss) for loss in re.findall(r"\bloss[ =](-?[\d.]+)", log)]
    assert losses and min(losses) > 0 and "did not log a 'loss'" not in log
    assert batch > 1 or updates(tmp_path / "save") == 2 * 7


@pytest.mark.parametrize(
    ("bad", "options", "allowed"),
    [((0, 3), (), 1), ((0, 3, 4), ("--max-bad-audio-share", 0.2), 2), ((0, 3, 4), ("--max-bad-audio", 2), 1)],
)
def test_beyond_the_budget_training_ends(
    world: World, spoiled: Callable[..., Path], tmp_path: Path, bad: tuple[int, ...], options: Any, allowed: int
) -> None:
    with pytest.raises(TrainingError) as error:
        world.train(tmp_path / "save", "--skip-bad-audio", *options, data=spoiled(*bad))
    assert_one_sentence(
        error.value, rf"left out {allowed + 1} of the 12 rows of .*train.tsv, but at most {allowed} may be",
        "--max-bad-audio", "--max-bad-audio-share", r"line \d+ \(id train-\d\)",
    )  # fmt: skip


def test_within_the_budget_one_row_may_always_be_bad(
    world: World, spoiled: Callable[..., Path], tmp_path: Path
) -> None:
    assert "has left out 1 of 12 rows" in world.train(tmp_path / "save", "--skip-bad-audio", data=spoiled(3))


def test_no_row_that_can_be_read(world: World, spoiled: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="none of the first 12 rows can be read, as .*is --audio-root right"):
        world.train(tmp_path / "save", "--skip-bad-audio", "--batch-size", 1, data=spoiled(*range(ROWS)))


# ---- loader processes ----------------------------------------------------------------------------------------------


def end_at_once() -> None:
    os._exit(3)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(PATIENCE)


STUCK = {
    "ends": (end_at_once, r"a loader process has died while it read .*tsv line 9 \(id train-7\), .*train-7.flac"),
    "is killed": (be_killed, r"a loader process has died while it read .*\(id train-7\).*--num-workers"),
    "hangs": (
        hang,
        r"no batch for 3 s, the limit of --loader-timeout: .*hangs while it reads .*\(id train-7\), .*flac",
    ),
}


@pytest.mark.parametrize(("fault", "message"), STUCK.values(), ids=STUCK)
@pytest.mark.parametrize("validating", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loader_process_that_brings_nothing_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Any, message: str, validating: bool
) -> None:
    read, parent = dataset.SpeechTextDataset._read, os.getpid()

    def stuck(data: Any, index: int, row: Any) -> Any:
        if row["id"] == "train-7" and os.getpid() != parent and data.shuffle != validating:
            fault()
        return read(data, index, row)

    monkeypatch.setattr(dataset.SpeechTextDataset, "_read", stuck)
    options = ("--num-workers", 2, "--batch-size", 2, "--loader-timeout", 3)
    begin = time.monotonic()
    with pytest.raises(TrainingError) as error:
        if validating:
            (world.data / "valid_too.tsv").write_bytes((world.data / "train.tsv").read_bytes())
            options += ("--valid-subset", "valid_too")
            train(world.data, tmp_path, world.llm, world.whisper, "--max-update", 1, *options)
        else:
            world.train(tmp_path, *options)
    assert_one_sentence(error.value, message)
    assert time.monotonic() - begin < 30


# ---- texts ---------------------------------------------------------------------------------------------------------


def test_a_long_response_is_cut_and_counts_in_the_size_of_a_batch(world: World, tmp_path: Path) -> None:
    path = write_split(tmp_path, "train", ROWS)
    lines = path.read_text().splitlines()
    lines[4] += " and on" * 3000
    path.write_text("\n".join(lines) + "\n")
    log = world.train(tmp_path / "save", "--max-tokens", 100_000, "--max-response-tokens", 20, data=tmp_path)
    assert log.count("tgt_text has") == 1 and re.search(
        r"line 5 \(id train-3\): tgt_text has \d{4,} tokens, of which the first 20 are kept", log
    )
    assert "line 5 (id train-3): its texts count as more than --max-tokens, as do those of 0 more rows" in log
    assert "by the end of epoch 1, --max-response-tokens has cut" in log


@pytest.mark.parametrize("texts", [1, 200, 2000])
def test_sizes_are_those_of_the_audio_unless_texts_are_long(tmp_path: Path, texts: int) -> None:
    manifest = dataset.Manifest.load(write_split(tmp_path, "train", 4, texts=["word" * texts]))
    data = dataset.SpeechTextDataset(manifest, chat=None)  # type: ignore[arg-type]
    size = 8 * texts // 4 * 640
    assert data.num_tokens_vec(range(4)).tolist() == [max(size, int(n)) for n in manifest.n_frames]  # type: ignore[arg-type]
    batches = [len(batch) for batch in data.batch_by_size(data.ordered_indices(), max_tokens=60_000, max_sentences=3)]
    assert batches == ([3, 1] if texts == 1 else [1, 1, 1, 1])


# ---- several processes ---------------------------------------------------------------------------------------------


def launched(fault: str, world: World, save_dir: Path, *options: Any) -> "list[tuple[int, str]]":
    """Exit status and output of two processes, started as torchrun starts them."""
    python = warm_python.commands() / "python"
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    workers = [
        process(fault, world, save_dir, *options, python=python, RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
        return [(worker.returncode, output) for worker, output in zip(workers, outputs, strict=True)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.slow
def test_processes_of_a_launcher_train_together_on_cpus(world: World, tmp_path: Path) -> None:
    """Two processes with half of the batch each make the update of one."""
    world.train(tmp_path / "one", *ONE_UPDATE, "--batch-size", ROWS)
    results = launched("", world, tmp_path / "two", *ONE_UPDATE, "--batch-size", ROWS // 2)
    assert [status for status, _ in results] == [0, 0], results
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"))


FAILS_ON_ONE = {
    "memory": (
        "C.forward = lambda *_: torch.empty(1 << 55)",
        "has no memory for a batch of 2 utterances .*--batch-size",
    ),
    "any error": ("C.forward = lambda *_: 1 / 0", "division by zero"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("fault", "message"), FAILS_ON_ONE.values(), ids=FAILS_ON_ONE)
def test_one_process_that_fails_ends_all_with_its_words(
    world: World, tmp_path: Path, fault: str, message: str, rank: int
) -> None:
    fault = (
        "import os, torch\nfrom blspkd_fairseq.criterions.kl_distillation import KlDistillationCriterion as C\n"
        f"if os.environ['RANK'] == '{rank}': {fault}"
    )
    results = launched(fault, world, tmp_path, "--batch-size", 2, "--max-epoch", 1)
    for number, (status, output) in enumerate(results):
        assert status == 1 and re.search(message, output), output[-3000:]
        if number != rank:
            assert f"another process has ended, and this one with it: rank {rank}: " in output


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_no_update_in_any(world: World, tmp_path: Path) -> None:
    """Nor is what none of them can read."""
    fault = """
import math
from blspkd_fairseq.criterions.kl_distillation import KlDistillationCriterion as C
forward = C.forward
def spoiled(self, model, sample, reduce=True):
    loss, size, log = forward(self, model, sample, reduce)
    return loss, size, log | ({"loss": math.nan} if any(r["id"] == "train-5" for r in sample["rows"]) else {})
C.forward = spoiled
"""
    results = launched(fault, world, tmp_path, "--batch-size", 2, "--max-epoch", 1)
    assert [status for status, _ in results] == [0, 0], results
    assert updates(tmp_path) == 2
    assert sum("a loss of nan in the batch of" in output for _, output in results) == 1
    assert all(": no update (1 so far" in output for _, output in results)
    assert sum("NaN or Inf in the gradient of another process" in output for _, output in results) == 1


@pytest.mark.slow
def test_rows_that_no_process_can_read_are_no_update_and_counted_together(
    world: World, spoiled: Callable[..., Path], tmp_path: Path
) -> None:
    data = spoiled(0, 1, 2, 3)
    both = World.__new__(World)
    both.llm, both.whisper, both.data = world.llm, world.whisper, data
    options = ("--batch-size", 1, "--max-epoch", 1, "--skip-bad-audio", "--max-bad-audio-share")
    results = launched("", both, tmp_path / "save", *options, 0.5)
    assert [status for status, _ in results] == [0, 0], results
    assert all("has left out 4 of 12 rows" in output for _, output in results)
    assert "loss -" not in results[0][1]
    results = launched("", both, tmp_path / "over", *options, 0.25)
    assert [status for status, _ in results] == [1, 1], results
    assert all("has left out 4 of the 12 rows" in output for _, output in results)


def test_a_process_beside_others_that_it_does_not_know_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in fairseq-hydra-train, which loads this package when it is too late to join them."""
    from blspkd_fairseq.compat import commands

    monkeypatch.setattr(commands, "join_launcher", lambda cfg: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but this process would train alone"):
        world.train(tmp_path)
    assert not list(tmp_path.glob("*.pt"))


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_limits_are_checked() -> None:
    check_limits(FaultLimits())
    for name in ("max_oom", "max_non_finite", "max_bad_audio", "loader_timeout"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must not be negative"):
            check_limits(FaultLimits(**{name: -1}))
    with pytest.raises(ValueError, match="--max-bad-audio-share must be between 0 and 1"):
        check_limits(FaultLimits(max_bad_audio_share=1.5))


def test_words_of_allocators_are_known_and_others_are_not() -> None:
    for ask in OUT_OF_MEMORY.values():
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert listed(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_updates_in_a_row_are_counted_anew_after_one_that_fits() -> None:
    from blspkd_fairseq.faults.errors import DoesNotFit

    def batch(*names: str) -> dict[str, Any]:
        return {
            "rows": [{"id": name} for name in names], "nsentences": len(names), "ntokens": 9, "left_out": False,
            "bad_rows": [], "shortened": [], "net_input": {"samples": [16_000]},
        }  # fmt: skip

    def step(samples: list[Any]) -> str:
        for sample in samples:
            if len(sample["rows"]) > 1 and sample["rows"][0]["id"] == "large":
                raise DoesNotFit([row["id"] for row in sample["rows"]], "why")
        return "made"

    guard = UpdateGuard(FaultLimits(max_oom=2), lambda sample: [batch(row["id"]) for row in sample["rows"]], lambda: [])
    for large in (True, True, False, True, True):
        assert guard.update([batch("large" if large else "small", "other")], step, alone=True) == "made"
    with pytest.raises(TrainingError, match="3 updates in a row had no memory"):
        guard.update([batch("large", "other")], step, alone=True)
