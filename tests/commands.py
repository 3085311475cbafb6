"""Runs fairseq's commands on tiny models, in this process (an import of fairseq takes seconds).

They run on the CPU, or on the device that the environment's BLSPKD_TEST_DEVICE names.
"""

import contextlib
import io
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import warm_python
from tiny import PATIENCE

import blspkd_fairseq

PACKAGE = Path(blspkd_fairseq.__file__).parent
DEVICE = os.environ.get("BLSPKD_TEST_DEVICE", "cpu")
_TINY = """
    --arch blsp_kd --criterion kl_distillation --llm-dtype float32 --adapter-pre-layers 1 --adapter-post-layers 1
    --adapter-heads 2 --adapter-dropout 0 --lora-rank 4 --lora-dropout 0 --optimizer adamw --lr 1e-3 --clip-norm 1.0
    --batch-size 4 --log-format simple --log-interval 1 --seed 1 --num-workers 0 --no-progress-bar
"""
TRAIN_OPTIONS = tuple(_TINY.split())


def arguments(command: str, data: Path, *options: Any) -> list[str]:
    """The command line of ``fairseq-<command>``."""
    base = ["--user-dir", str(PACKAGE), "--task", "blsp_kd", *(["--cpu"] if DEVICE == "cpu" else [])]
    first = [] if command == "hydra-train" else [str(data)]
    return [*first, *base, *map(str, options)]


def fairseq(command: str, data: Path, *options: Any, stdin: str = "") -> str:
    """Runs ``fairseq-<command> DATA --task blsp_kd OPTIONS`` and returns what it printed and logged."""
    blspkd_fairseq.register()
    import fairseq_cli.generate
    import fairseq_cli.interactive
    import fairseq_cli.train
    import fairseq_cli.validate
    from fairseq.checkpoint_utils import save_checkpoint

    # The best loss so far, which fairseq keeps for the process: another training's best is none of this one.
    vars(save_checkpoint).pop("best", None)
    argv = [f"fairseq-{command}", *arguments(command, data, *options)]
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    patches = mock.patch.multiple(sys, argv=argv, stdin=io.StringIO(stdin))
    try:
        with patches, contextlib.redirect_stdout(output):
            getattr(fairseq_cli, command).cli_main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return output.getvalue()


def train(data: Path, save_dir: Path, llm: Path, whisper: Path, *options: Any) -> str:
    """``fairseq-train`` with tiny settings."""
    return fairseq(
        "train", data, "--llm", llm, "--speech-encoder", whisper, "--save-dir", save_dir, *TRAIN_OPTIONS, *options
    )


def program(command: str) -> list[str]:
    """What the script ``fairseq-<command>`` runs, wherever an installation put that script, if anywhere."""
    module = f"fairseq_cli.{command.replace('-', '_')}"
    return [sys.executable, "-c", f"from {module} import cli_main; cli_main()"]


def start(command: str, data: Path, *options: Any, warm: bool = False) -> "subprocess.Popen[str]":
    """The real command in a process of its own, which may be :mod:`warm_python`."""
    python, *code = program(command)
    return subprocess.Popen(
        [warm_python.commands() / "python" if warm else python, *code, *arguments(command, data, *options)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def train_on_two(
    data: Path,
    save_dir: Path,
    llm: Path,
    whisper: Path,
    *options: Any,
    backend: str = "pytorch_ddp",
    collectives: str = "gloo",
    seconds: float = PATIENCE,
) -> None:
    """``fairseq-train`` in two processes that share the CPU or one card."""
    port = free_port()
    workers = [
        start(
            "train", data, "--llm", llm, "--speech-encoder", whisper, "--save-dir", save_dir, *TRAIN_OPTIONS, *options,
            "--distributed-world-size", 2, "--distributed-rank", rank, "--distributed-no-spawn",
            "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-backend", collectives,
            "--ddp-backend", backend, warm=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    end_together(workers, seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def end_together(workers: "list[subprocess.Popen[str]]", seconds: float = PATIENCE) -> None:
    """Waits for processes that wait for each other; all must end well, or none is left."""
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=seconds)
            assert worker.returncode == 0, output[-3000:]
            assert "FutureWarning" not in output, output[-3000:]
    finally:  # one that waits for the other, which has failed, would wait for ever
        for worker in workers:
            worker.kill()
            worker.wait()


def load(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint, read as anyone may read a file from others."""
    from blspkd_fairseq import compat

    compat.allow_safe_checkpoint_globals()
    return torch.load(checkpoint, map_location="cpu", weights_only=True)
