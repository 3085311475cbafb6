"""scripts/venv.sh with a stand-in for Python and pip that only records what it is asked to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pins
import pytest
from packaging.requirements import Requirement

from blspkd_fairseq.requirements import EXTRAS, FAIRSEQ_NAME, FAIRSEQ_NEEDS, FAIRSEQ_VERSION, REQUIRED

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "venv.sh"

# Imports torch once pip has installed it; FAIL is a pattern of pip calls that fail with MESSAGE.
FAKE_PYTHON = """#!/usr/bin/env bash
home=$(dirname "$(dirname "$0")")
case "$*" in
    "-V") echo Python 3.11.7 ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "$3" >"$3/bin/activate" ;;
    "-m pip --version") [[ -f $home/bin/activate ]] ;;
    "-m pip install "*)
        if [[ -n $FAIL && $* =~ $FAIL ]]; then echo "ERROR: $MESSAGE"; exit 1; fi
        if [[ $* == *torch==* ]]; then touch "$home/torch"; fi
        echo "${@:4}" >>"$LOG" ;;
    "-c import torch") [[ -f $home/torch ]] ;;
    "-c import torchaudio") [[ -z $TORCHAUDIO ]] ;;
    "-m pip show -q torchaudio") [[ -n $TORCHAUDIO ]] ;;
    "-m pip uninstall "*) echo "uninstall ${@:4}" >>"$LOG" ;;
    *pins.py*) exec "$REAL_PYTHON" "$@" ;;
    *fairseq_distributions*) echo "$OTHER_FAIRSEQ" ;;
esac
"""


class World:
    """A folder with the stand-in, and the environment that makes venv.sh use it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv, self.log = folder, folder / "venv", folder / "log"
        self.commands = folder / "bin"
        self.commands.mkdir()
        self.add_command("python3.11", FAKE_PYTHON)
        self.environment = dict(
            os.environ,
            PATH=f"{self.commands}:{os.environ['PATH']}",
            BLSPKD_VENV=str(self.venv),
            LOG=str(self.log),
            REAL_PYTHON=sys.executable,
            FAIL="",
            TORCHAUDIO="",
            OTHER_FAIRSEQ="",
        )
        self.environment.pop("PYTHON", None)
        self.add_command("nvidia-smi", "#!/bin/sh\nexit 1\n")

    def add_command(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text)
        (self.commands / name).chmod(0o755)

    def run(self, extras: str = "dev", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), extras],
            env={**self.environment, **environment},
            cwd=self.folder,
            text=True,
            capture_output=True,
        )

    def installed(self) -> list[str]:
        """The arguments of each `pip install` that succeeded, without the options common to all."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix("--disable-pip-version-check --no-input ") for line in lines]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_installs_cpu_torch_then_fairseq_by_hash_then_the_rest(world: World) -> None:
    done = world.run("dev,quickstart")
    assert done.returncode == 0, done.stderr
    torch, fairseq, packages, project = world.installed()
    assert torch == "torch==2.13.0+cpu"
    assert fairseq.startswith("--no-deps --require-hashes")
    assert packages == f"-r {world.venv}/requirements.txt"
    assert project == f"--no-deps --no-build-isolation -e {ROOT}"
    asked = {pins.name_of(line) for line in (world.venv / "requirements.txt").read_text().splitlines()}
    assert {"transformers", "cffi", "pytest", "piper-tts", "setuptools"} < asked
    assert asked.isdisjoint({FAIRSEQ_NAME, "torchaudio"})
    assert "\ntransformers==" in (world.venv / "constraints.txt").read_text()
    assert [line.split(" ...")[0] for line in done.stdout.splitlines()][1:] == [
        "venv: torch 2.13.0",
        "venv: fairseq",
        "venv: packages of dev,quickstart",
        "venv: blspkd-fairseq",
    ]


def test_an_unknown_extra_is_named(world: World) -> None:
    done = world.run("dve")
    assert (done.returncode, world.installed()) == (1, [])
    assert done.stderr == f"there is no extra dve: choose from {', '.join(EXTRAS)}\n"


def test_a_torchaudio_that_cannot_be_loaded_is_removed(world: World) -> None:
    world.run(TORCHAUDIO="broken")
    assert "uninstall -y torchaudio" in world.installed()


def test_second_run_does_nothing_and_says_nothing(world: World) -> None:
    world.run()
    before = world.installed()
    done = world.run()
    assert (done.returncode, done.stdout, world.installed()) == (0, "", before)


def test_other_extras_are_added_and_torch_is_kept(world: World) -> None:
    world.run("dev")
    world.run("bench")
    assert [line for line in world.installed() if line.startswith("torch==")] == ["torch==2.13.0+cpu"]
    assert "--no-deps liger-kernel" in world.installed()


def test_gpu_machine_gets_the_default_torch(world: World) -> None:
    world.add_command("nvidia-smi", "#!/bin/sh\n")
    world.run()
    assert world.installed()[0] == "torch==2.13.0"


def test_cpu_wheels_are_sought_elsewhere_when_not_found_at_first(world: World) -> None:
    message = "No matching distribution found for torch==2.13.0+cpu"
    done = world.run(FAIL=r"2\.13\.0\+cpu$", MESSAGE=message)
    assert done.returncode == 0, done.stderr
    assert re.match(r"torch==2\.13\.0\+cpu --extra-index-url https://\S+/cpu ", world.installed()[0])


def test_any_torch_does_where_there_is_no_cpu_build(world: World) -> None:
    message = "No matching distribution found for torch==2.13.0+cpu"
    assert world.run(FAIL=r"2\.13\.0\+cpu", MESSAGE=message).returncode == 0
    assert world.installed()[0] == "torch==2.13.0"


def test_no_torch_anywhere_ends_with_a_remedy(world: World) -> None:
    done = world.run(FAIL="torch==", MESSAGE="No matching distribution found for torch==2.13.0+cpu")
    assert done.returncode == 1
    assert "You may install one of torch 2.6 or later" in done.stderr
    assert world.installed() == []


@pytest.mark.parametrize("step", ["torch==", "require-hashes", "-r .*/requirements", "-e "])
def test_failure_shows_the_message_and_the_next_run_finishes(world: World, step: str) -> None:
    done = world.run(FAIL=step, MESSAGE="no space left")
    assert done.returncode == 1
    assert "ERROR: no space left" in done.stderr
    assert world.run().returncode == 0
    assert world.installed()[-1].endswith(f"-e {ROOT}")


def test_what_the_registry_lacks_is_named(world: World) -> None:
    """pip itself only says that a pinned version conflicts."""
    message = "No matching distribution\n    The user requested (constraint) idna==3.20"
    done = world.run(FAIL="requirements.txt|idna", MESSAGE=message)
    assert done.returncode == 1
    assert "venv.sh: the package registry has no idna==3.20 for Python 3.11.7 on this machine;" in done.stderr


def test_two_at_once_install_once(world: World) -> None:
    command = ["bash", str(SCRIPT), "dev"]
    both = [subprocess.Popen(command, env=world.environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert len(world.installed()) == 4


def test_another_fairseq_is_not_overwritten(world: World) -> None:
    done = world.run(OTHER_FAIRSEQ="fairseq 0.12.2")
    assert done.returncode == 1
    assert "already has fairseq 0.12.2, which this would overwrite: set BLSPKD_VENV" in done.stderr
    assert world.installed() == []


def test_shims_that_do_not_run_are_passed_over(world: World) -> None:
    (world.commands / "python3.11").rename(world.commands / "python3.12")
    world.add_command("python3.11", "#!/bin/sh\necho no such version >&2\nexit 127\n")
    # Only the stand-ins: the machine's own Python 3.11 would come first.
    for tool in (
        "bash",
        "cat",
        "cp",
        "dirname",
        "flock",
        "grep",
        "head",
        "ls",
        "rm",
        "sed",
        "mkdir",
        "sha256sum",
        "tail",
        "touch",
        "env",
    ):
        (world.commands / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    done = world.run(PATH=str(world.commands), PYENV_ROOT=str(world.folder))
    assert done.returncode == 0, done.stderr
    (world.commands / "python3.12").unlink()
    done = world.run(PATH=str(world.commands), PYENV_ROOT=str(world.folder), BLSPKD_VENV=str(world.folder / "new"))
    assert done.returncode == 1
    assert done.stderr.startswith("venv.sh: no Python 3.11 or 3.12 with the venv module was found: install one")


def test_a_python_is_found_by_its_name(world: World) -> None:
    versions = world.folder / "versions" / "3.12.1" / "bin"
    versions.mkdir(parents=True)
    (world.commands / "python3.11").rename(versions / "python3.12")
    world.add_command("python3.12", "#!/bin/sh\necho no such version >&2\nexit 127\n")
    done = world.run(PYTHON="python3.12", PYENV_ROOT=str(world.folder))
    assert done.returncode == 0, done.stderr


def test_an_environment_of_another_python_is_refused(world: World) -> None:
    world.run()
    world.add_command("python3.12", FAKE_PYTHON.replace("3.11.7", "3.12.1"))
    done = world.run(PYTHON="python3.12")
    assert done.returncode == 1
    assert "holds Python 3.11.7, not that of PYTHON=python3.12: delete it or set BLSPKD_VENV" in done.stderr


def test_named_python_must_fit(world: World) -> None:
    done = world.run(PYTHON="/bin/false")
    assert done.returncode == 1
    assert "PYTHON=/bin/false is no Python 3.11 or 3.12" in done.stderr


def test_environment_that_was_moved_is_refused(world: World) -> None:
    world.run()
    world.venv.rename(world.folder / "moved")
    done = world.run(BLSPKD_VENV=str(world.folder / "moved"))
    assert done.returncode == 1
    assert "was made in another place" in done.stderr


# --- scripts/constraints.txt


def test_another_torch_keeps_what_it_requires() -> None:
    lines = ["# versions", "sympy==1.14.0", "torch==2.13.0", "tqdm==4.70.1"]
    assert pins.fitting(lines, "2.13.0+cpu", ["sympy>=1"]) == ["torch==2.13.0+cpu", "sympy==1.14.0", "tqdm==4.70.1"]
    assert pins.fitting(lines, "2.6.0", ["sympy==1.13.1; python_version >= '3.9'"]) == ["torch==2.6.0", "tqdm==4.70.1"]
    assert pins.fitting(lines, "", []) == ["sympy==1.14.0", "tqdm==4.70.1"]


def test_versions_of_each_python_are_kept_apart() -> None:
    versions = {"3.11": {"a": "1", "b": "1"}, "3.12": {"a": "1", "b": "2", "c": "3"}}
    text = pins.render(versions)
    assert text.splitlines()[-4:] == [
        "a==1",
        'b==1 ; python_version == "3.11"',
        'b==2 ; python_version == "3.12"',
        'c==3 ; python_version == "3.12"',
    ]
    assert pins.parse(text.splitlines()) == versions


def test_all_requirements_have_a_tested_version() -> None:
    for versions in pins.parse(pins.FILE.read_text().splitlines()).values():
        for line in [*pins.needs(",".join(EXTRAS)), "liger-kernel", f"{FAIRSEQ_NAME}=={FAIRSEQ_VERSION}"]:
            requirement = Requirement(line)
            assert requirement.specifier.contains(versions[pins.name_of(requirement.name)]), line
        assert "torchaudio" not in versions


def test_requirements_are_well_formed_and_agree_with_the_script() -> None:
    for line in [*REQUIRED, *FAIRSEQ_NEEDS, *(one for extra in EXTRAS.values() for one in extra)]:
        assert str(Requirement(line).specifier), line
    assert f"{FAIRSEQ_NAME}=={FAIRSEQ_VERSION} " in SCRIPT.read_text()
