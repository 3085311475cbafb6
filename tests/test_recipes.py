"""What the recipes' shell does with several GPUs and nodes; `python` is a stand-in that writes down its calls."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fairseq.dataclass.utils import gen_parser_from_dataclass

from blspkd_fairseq.base_models import PUBLISHED
from blspkd_fairseq.models.blsp_kd import BlspKdModelConfig

EXAMPLES = Path(__file__).parents[1] / "examples"

# Answers how many GPUs there are; fails for the shard in $FAILS; waits for $HANGS seconds.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "${FOUND:-8}"; exit; fi
echo "${CUDA_VISIBLE_DEVICES:-all} $*" >>"$CALLS"
[[ "$*" != *"--shard ${FAILS:-none}" ]] || exit 1
exec sleep "${HANGS:-0}"
"""


class Shell:
    """Functions of common.sh in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_text(PYTHON)
        (folder / "bin" / "python").chmod(0o755)
        self.calls_file = folder / "calls"

    def begin(self, script: str, **variables: object) -> "subprocess.Popen[str]":
        self.calls_file.unlink(missing_ok=True)
        own = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CALLS": self.calls_file, **variables}
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        begin = (
            f"set -euo pipefail; out={shlex.quote(str(self.folder))} root=$out stage=0 stop_stage=9 nodes=1 node_rank=0"
        )
        return subprocess.Popen(
            ["bash", "-c", f"{begin}\nsource {EXAMPLES}/common.sh\n{script}", "run.sh"],
            text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=self.folder, env=environment | {k: str(v) for k, v in own.items()},
        )  # fmt: skip

    def run(self, script: str, **variables: object) -> tuple[int, str]:
        process = self.begin(script, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# ---- responses -----------------------------------------------------------------------------------------------------

ANSWER = "answer_on_gpus --rows 9 --output {out}/o.tsv"


def answer(shell: Shell, gpus: int, **variables: object) -> tuple[int, str]:
    return shell.run(f"gpus={gpus}; {ANSWER.format(out=shell.folder)}", **variables)


def shards_of(shell: Shell, shards: int, devices: list[str]) -> list[str]:
    """The calls of a whole run, sorted."""
    base = f"scripts/generate_responses.py --rows 9 --output {shell.folder}/o.tsv --num-shards {shards}"
    return sorted([*(f"{device} {base} --shard {i}" for i, device in enumerate(devices)), f"all {base}"])


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_process_answers_where_there_is_one_gpu_or_none(shell: Shell, gpus: int) -> None:
    assert answer(shell, gpus) == (0, "")
    assert shell.calls() == [f"all scripts/generate_responses.py --rows 9 --output {shell.folder}/o.tsv"]


def test_every_gpu_answers_a_shard_and_they_are_joined_last(shell: Shell) -> None:
    assert answer(shell, 4) == (0, "")
    assert sorted(shell.calls()) == shards_of(shell, 4, ["0", "1", "2", "3"])
    assert "--shard " not in shell.calls()[-1]


def test_gpus_are_those_that_the_caller_may_use(shell: Shell) -> None:
    assert answer(shell, 2, CUDA_VISIBLE_DEVICES="5,7")[0] == 0
    base = f"scripts/generate_responses.py --rows 9 --output {shell.folder}/o.tsv --num-shards 2"
    assert sorted(shell.calls()) == [f"5 {base} --shard 0", f"5,7 {base}", f"7 {base} --shard 1"]


@pytest.mark.parametrize(("gpus", "devices"), [(2, ["0", "1", "0"]), (8, ["0", "1", "2"]), (1, ["0", "0", "0"])])
def test_another_number_of_gpus_goes_on_with_the_shards_that_there_are(
    shell: Shell, gpus: int, devices: list[str]
) -> None:
    assert answer(shell, 3)[0] == 0
    assert answer(shell, gpus) == (0, "")
    assert sorted(shell.calls()) == shards_of(shell, 3, devices)


def test_a_store_of_one_process_is_gone_on_with(shell: Shell) -> None:
    (shell.folder / "o.tsv.responses.jsonl").touch()
    assert answer(shell, 4)[0] == 0 and len(shell.calls()) == 1


def test_a_shard_that_fails_is_named_and_the_others_end(shell: Shell) -> None:
    status, output = answer(shell, 4, FAILS=2)
    assert status == 2 and "run.sh: responses: shard 2 of 4 failed" in output
    assert len(shell.calls()) == 4  # and none that joins them


def test_missing_gpus_are_said(shell: Shell) -> None:
    for script in (ANSWER.format(out=shell.folder), "train_on_gpus data"):
        status, output = shell.run(f"gpus=8; {script}", FOUND=0)
        assert status == 2 and "run.sh: --gpus 8, but torch finds 0 on this machine" in output and not shell.calls()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shards_end_with_the_recipe(shell: Shell, number: int) -> None:
    process = shell.begin(f"gpus=3; {ANSWER.format(out=shell.folder)}", HANGS=30)
    while len(shell.calls()) < 3:
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)  # which all of them hold open
    assert process.returncode != 0 and time.monotonic() - begin < 15


# ---- nodes ---------------------------------------------------------------------------------------------------------

STAGES = """
one() { echo "node $node_rank does one"; sleep 2; echo 1 >"$out/made"; }
two() { echo "node $node_rank does two with $(cat "$out/made")"; sleep 2; }
run_stage 1 "first" one "$out" "a setting"
on_all_nodes=yes run_stage 2 "second" two "$out"
"""
QUICK = {"BLSPKD_SIGN_SECONDS": 0.2, "BLSPKD_WAIT_SECONDS": 5}


def test_one_node_works_and_the_others_wait(shell: Shell) -> None:
    processes = [shell.begin(f"nodes=3 node_rank={rank}{STAGES}", **QUICK) for rank in (1, 2, 0)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    for rank, output in zip((1, 2, 0), outputs, strict=True):
        assert ("does one" in output) == (rank == 0) and f"node {rank} does two with 1" in output
        assert (f"node {rank} waits for node 0: first" in output) == (rank > 0)
    assert not list(shell.folder.glob("*.[0-9]*"))  # of notes that were half written
    status, output = shell.run(f"nodes=3 node_rank=1{STAGES}", **QUICK)
    assert status == 0 and output.count("done before") == 2


def test_the_life_of_node_0_may_be_longer_than_the_limit(shell: Shell) -> None:
    stages = STAGES.replace("sleep 2", "sleep 4")
    limits = QUICK | {"BLSPKD_WAIT_SECONDS": 3}
    processes = [shell.begin(f"nodes=2 node_rank={rank}{stages}", **limits) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]


@pytest.mark.parametrize("is_killed", [True, False])
def test_without_node_0_the_others_end(shell: Shell, is_killed: bool) -> None:
    """It never began, or was killed."""
    first = (
        shell.begin(f"nodes=2 node_rank=0{STAGES.replace('sleep 2', 'exec sleep 2')}", **QUICK) if is_killed else None
    )
    if first:
        while not (shell.folder / ".alive").exists():
            time.sleep(0.05)
        first.kill()
        first.wait()  # a process that nobody has asked for is not gone
    status, output = shell.run(f"nodes=2 node_rank=1{STAGES}", **QUICK)
    assert status == 2 and f"run.sh: node 0 gave no sign of life in {shell.folder} for 5 s" in output, output
    assert "before it had ended 'first'" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "--master HOST:PORT of node 0 must be given with --nodes 2"),
        (["--nodes", "2", "--master", "a:1", "--node-rank", "2"], "--node-rank must be below --nodes 2, not 2"),
        (["--nodes", "2", "--master", "a:1", "--stage", "2"], "--stage 2 is run by one node: first --nodes 1"),
    ],
)
@pytest.mark.parametrize("recipe", ["blsp_kd", "covost2"])
def test_nodes_must_know_each_other(tmp_path: Path, recipe: str, options: list[str], message: str) -> None:
    data = {
        "blsp_kd": ["--train", "t", "--valid", "v", "--test", "t"],
        "covost2": ["--common-voice", "c", "--direction", "en_de"],
    }[recipe]
    command = ["bash", str(EXAMPLES / recipe / "run.sh"), "--out", str(tmp_path / "out"), *data, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


# ---- options of a saved model --------------------------------------------------------------------------------------

OTHERWISE = {"adapter_soft_tokens": False, "adapter_pre_layers": 2, "lora_target_modules": "q_proj,v_proj"}


@pytest.mark.parametrize("changed", [{}, OTHERWISE], ids=["published", "otherwise"])
def test_training_reads_the_options_of_a_saved_model_as_they_were_saved(tmp_path: Path, changed: dict) -> None:
    saved = json.loads((PUBLISHED / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(saved))
    script = f"source {EXAMPLES}/common.sh; sizes_of {shlex.quote(str(tmp_path))}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, BlspKdModelConfig())
    read = vars(parser.parse_args(words))
    shaping = [name for name in saved if name.startswith(("adapter", "lora", "transcript"))]
    assert len(shaping) > 10 and {name: read[name] for name in shaping} == {name: saved[name] for name in shaping}
