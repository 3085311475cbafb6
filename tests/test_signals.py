"""Signals stop a training after the update, with its state saved, in all of its processes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PACKAGE, TRAIN_OPTIONS, arguments, load, program, start
from interruptions import OPTIONS, World, recorded
from test_resume import curve
from tiny import PATIENCE

import blspkd_fairseq
from blspkd_fairseq.compat import signals

blspkd_fairseq.register()

LAST = "checkpoint_last.pt"
SAVED_LATER = ("--batch-size", 2, "--disable-validation", "--no-epoch-checkpoints", "--max-epoch", 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def updates_in(folder: Path) -> int:
    return int(load(folder / LAST)["optimizer_history"][-1]["num_updates"])


class Sender:
    """Sends signals to this process, as ``send`` does, in the midst of one call of a method of the task."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, call: int, send: Callable[[], None]) -> None:
        from blspkd_fairseq.tasks.blsp_kd import BlspKdTask

        original, self.calls = getattr(BlspKdTask, method), 0

        def with_signal(task: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == call:
                send()
            return original(task, *args, **kwargs)

        monkeypatch.setattr(BlspKdTask, method, with_signal)


def to_this_process(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def to_the_group() -> None:
    """As Ctrl-C in a terminal."""
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, number)
    time.sleep(0.3)
    assert all(worker.is_alive() for worker in workers)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", signals.STOPPING, ids=lambda number: number.name)
def test_a_signal_saves_the_update_and_the_code_names_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    former = signal.getsignal(number)
    Sender(monkeypatch, "train_step", 2, to_this_process(number))
    with pytest.raises(SystemExit) as end:
        world.train(tmp_path, *SAVED_LATER)
    assert end.value.code == 128 + number and updates_in(tmp_path) == 2
    name = signal.Signals(number).name
    said = f"{name}: stopped after update 2; it is saved in {tmp_path / LAST}, and the same command goes on from there"
    assert said in caplog.messages and not any("done training" in message for message in caplog.messages)
    assert signal.getsignal(number) is former


@pytest.mark.parametrize(("update", "workers"), [(3, 2), (7, 0), (11, 0)])  # 7: validation is due, 11: an epoch ends
def test_a_training_that_was_stopped_goes_on_exactly(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, update: int
) -> None:
    """Also what was due after the update: validation, the best checkpoint, the schedule."""
    options = (
        *("--batch-size", 1, "--num-workers", workers, "--data-buffer-size", 1, "--adapter-dropout", 0.2),
        *("--lr-scheduler", "reduce_lr_on_plateau", "--lr-threshold", 0.9, "--lr-shrink", 0.5),
        *("--validate-interval-updates", 7, "--max-update", 14, "--patience", 5),
    )
    through, log = world.train(tmp_path / "through", *options)
    with recorded(None) as before, monkeypatch.context() as patch:
        Sender(patch, "train_step", update, to_the_group if workers else to_this_process(signal.SIGTERM))
        with pytest.raises(SystemExit):
            world.train(tmp_path / "stopped", *options)
    after, rest = world.train(tmp_path / "stopped", *options)
    assert before[-1].update == update - 1 and before + after == through
    judged = [line for line in curve(log or "") if "valid on" in line]
    assert len(judged) == 3
    assert [line for line in curve(rest or "") if "valid on" in line] == judged[1 if update == 11 else 0 :]
    assert (tmp_path / "stopped/checkpoint_best.pt").exists() and (tmp_path / "stopped/checkpoint1.pt").exists()
    one, other = (load(tmp_path / name / "checkpoint_best.pt") for name in ("through", "stopped"))
    assert one["extra_state"]["val_loss"] == other["extra_state"]["val_loss"]


def test_a_validation_is_left_and_made_later(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--batch-size", 2, "--max-epoch", 1)
    _, log = world.train(tmp_path / "through", *options)
    with monkeypatch.context() as patch:
        sender = Sender(patch, "valid_step", 1, to_this_process(signal.SIGTERM))
        with pytest.raises(SystemExit):
            world.train(tmp_path / "stopped", *options)
        assert sender.calls == 1 and updates_in(tmp_path / "stopped") == 6  # of two steps
    steps, rest = world.train(tmp_path / "stopped", *options)  # --max-epoch is reached
    assert steps == [] and [line for line in curve(rest or "") if "valid on" in line] == [
        line for line in curve(log or "") if "valid on" in line
    ]
    one, other = (load(tmp_path / name / LAST)["extra_state"] for name in ("through", "stopped"))
    assert one["val_loss"] == other["val_loss"] and one["train_iterator"] == other["train_iterator"]


def test_what_comes_while_the_last_update_is_saved_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sender(monkeypatch, "get_checkpoint_dict", 1, to_this_process(signal.SIGTERM))
    _, log = world.train(tmp_path, *SAVED_LATER, "--max-update", 2)
    assert "done training" in (log or "")


@pytest.mark.parametrize(
    ("options", "said", "is_saved"),
    [
        (("--no-save",), "stopped after update 2; nothing is saved, because of --no-save", False),
        (("--no-last-checkpoints",), "and the same command goes on from there", True),
        (("--restore-file",), "the same command without --restore-file and --reset-* goes on from there", True),
    ],
)
def test_options_about_saving(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    options: tuple[Any, ...], said: str, is_saved: bool,
) -> None:  # fmt: skip
    if options == ("--restore-file",):
        world.train(tmp_path / "other", *SAVED_LATER, "--max-update", 1)
        options = ("--restore-file", tmp_path / "other" / LAST, "--reset-optimizer", "--reset-dataloader")
    Sender(monkeypatch, "train_step", 2, to_this_process(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        world.train(tmp_path / "save", *SAVED_LATER, *options)
    assert end.value.code == 143 and any(said in message for message in caplog.messages)
    assert (tmp_path / "save" / LAST).exists() == is_saved


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal, time; from blspkd_fairseq.compat.signals import stop_signal, watch_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "watch_signals(); os.kill(os.getpid(), signal.SIGINT); print(stop_signal().name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "SIGINT\n"
    assert done.stderr == "SIGINT: stopping after this update; Ctrl-C ends at once\n"


def test_signals_that_are_ignored_or_attended_to_stay_so() -> None:
    def own(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, own)  # nohup, submitit
    try:
        signals.watch_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGTERM) is signals._note
    finally:
        signals.leave_signals()
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def test_processes_agree_by_the_sums_that_they_exchange_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[tuple[Any, ...]] = []

    def of_two(_: Any, outputs: Any, *sums: Any, ignore: bool = False) -> Any:
        """The other process received SIGUSR1 at the second exchange."""
        exchanged.append(sums)
        other = [0, 0, 0] + [float(len(exchanged) == 2 and n == signal.SIGUSR1) for n in signals.STOPPING]
        return outputs, [torch.tensor(one + two) for one, two in zip(sums, other, strict=True)]

    aggregate = signals._with_signals(of_two)
    monkeypatch.setattr(signals, "_agreed", None)
    assert aggregate(None, ["log"], 5, 0, 1.5) == (["log"], [5, 0, 1.5])
    assert signals.stop_signal() is None
    aggregate(None, ["log"], 5, 0, 1.5)
    assert signals.stop_signal() is signal.SIGUSR1
    monkeypatch.setattr(signals, "_received", signal.SIGTERM)
    assert aggregate(None, ["log"], 5, 0, 1.5)[1] == [5, 0, 1.5]
    assert signals.stop_signal() is signal.SIGTERM


# ---- the real commands ---------------------------------------------------------------------------------------------


def wait_for(process: "subprocess.Popen[str]", pattern: str) -> str:
    """What a command has printed when this came."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
    raise AssertionError(printed[-3000:])


def rest_of(process: "subprocess.Popen[str]") -> str:
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()


UPDATE = r"num_updates.{0,4}[2-9]"


def test_hydra_and_a_whole_group(world: World, tmp_path: Path) -> None:
    """fairseq-hydra-train, of whose processes each receives the signal."""
    options = [
        f"+task.data={world.data}", "++task._name=blsp_kd", "++model._name=blsp_kd", f"+model.llm={world.llm}",
        f"+model.speech_encoder={world.whisper}", "+model.llm_dtype=float32", "+model.adapter_heads=2",
        "+criterion._name=kl_distillation", "~criterion", "++optimizer._name=adam", f"common.user_dir={PACKAGE}",
        "common.cpu=True", "dataset.batch_size=1", "optimization.lr=[1e-3]", "common.log_interval=1",
        "common.log_format=simple", f"checkpoint.save_dir={tmp_path / 'save'}", f"hydra.run.dir={tmp_path / 'run'}",
        "dataset.disable_validation=true", "dataset.num_workers=2", "checkpoint.no_epoch_checkpoints=true",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*program("hydra-train"), *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    wait_for(process, UPDATE)
    os.killpg(process.pid, signal.SIGUSR1)
    output = rest_of(process)
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in output, output[-3000:]
    assert f"stopped after update {updates_in(tmp_path / 'save')}; it is saved in" in output


@pytest.mark.parametrize("is_slow", [False, True])  # slow: the signal comes while the training is being launched
@pytest.mark.parametrize(("number", "code", "is_requeued"), [("USR1", 138, True), ("TERM", 143, True), ("", 3, False)])
def test_the_job_script_goes_back_into_the_queue(
    tmp_path: Path, number: str, code: int, is_requeued: bool, is_slow: bool
) -> None:
    training = f"""#!/bin/bash
        echo "$@"; trap 'sleep .5; exit {code}' USR1 TERM
        kill -{number or "WINCH"} $PPID; sleep {9 if number else 0.3} &> /dev/null & wait $!; exit 3"""
    for name, text in (("fairseq-train", training), ("scontrol", '#!/bin/bash\necho "scontrol $@"')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slow").write_text("unset BASH_ENV; trap 'sleep .1' DEBUG" if is_slow else "")
    script = Path(__file__).parents[1] / "examples/slurm.sbatch"
    done = subprocess.run(
        ["bash", script, "a b", "--save-dir", "to/$SLURM_ARRAY_TASK_ID"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4",
             "BASH_ENV": str(tmp_path / "slow")},
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code and done.stderr == ""
    assert done.stdout.splitlines()[0] == "a b --save-dir to/4"
    assert ("scontrol requeue 7_4" in done.stdout) == is_requeued


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_one_of_two_processes_is_told(world: World, tmp_path: Path, workers: int) -> None:
    port = 20_000 + os.getpid() % 20_000
    ranks = [
        start(
            "train", world.data, "--llm", world.llm, "--speech-encoder", world.whisper, "--save-dir", tmp_path,
            *TRAIN_OPTIONS, *OPTIONS, "--num-workers", workers, "--distributed-world-size", 2, "--distributed-rank",
            rank, "--distributed-no-spawn", "--distributed-init-method", f"tcp://127.0.0.1:{port}",
            "--distributed-backend", "gloo", "--ddp-backend", "pytorch_ddp",
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for(ranks[0], UPDATE)
    os.kill(ranks[1].pid, signal.SIGTERM)
    outputs = [rest_of(rank) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], outputs[0][-2000:] + outputs[1][-2000:]
    assert f"stopped after update {updates_in(tmp_path)}; it is saved" in outputs[0]


@pytest.mark.slow
def test_processes_that_fairseq_spawns_are_told_by_their_parent(world: World, tmp_path: Path) -> None:
    """As on a machine with two GPUs."""
    options = arguments(
        "train", world.data, "--llm", world.llm, "--speech-encoder", world.whisper, "--save-dir", tmp_path,
        *TRAIN_OPTIONS, *OPTIONS, "--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend",
        "pytorch_ddp",
    )  # fmt: skip
    code = "import torch; torch.cuda.device_count = lambda: 2\nfrom fairseq_cli.train import cli_main\n"
    script = tmp_path / "two_gpus.py"  # a file, which spawned processes can import
    script.write_text(f"{code}if __name__ == '__main__': cli_main()\n")
    process = subprocess.Popen(
        [sys.executable, script, *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(process, UPDATE)
    os.kill(process.pid, signal.SIGUSR1)
    output = rest_of(process)
    assert process.returncode == 128 + signal.SIGUSR1, output[-3000:]
    assert f"stopped after update {updates_in(tmp_path)}; it is saved" in output and "Traceback" not in output
