"""blspkd_fairseq.compat and blspkd_fairseq.check where packages are missing, broken, foreign or doubled.

`python -S` sees no installed package at all, so that each test builds the world it needs from stubs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blspkd_fairseq.check import IMPORT_NAMES, split
from blspkd_fairseq.requirements import REQUIRED

ROOT = Path(__file__).resolve().parent.parent

# How the official fairseq 0.12.2 fails on Python 3.11.
MUTABLE_DEFAULT = """
from dataclasses import dataclass
class Unhashable:
    __hash__ = None
@dataclass
class Config:
    common: Unhashable = Unhashable()
"""
STUB_TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\n"


def run_bare(*arguments: str, world: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python with the standard library, this checkout and the stubs in `world` only."""
    path = os.pathsep.join(map(str, filter(None, [world, ROOT])))
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=dict(os.environ, PYTHONPATH=path),
        text=True,
        capture_output=True,
    )


def install(world: Path, name: str, version: str, package: str, body: str = "", editable: bool = False) -> None:
    """Writes what pip leaves behind for a distribution with one package."""
    info = world / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{package}\n")
    (info / "RECORD").write_text("" if editable else f"{package}/__init__.py,,\n")
    (world / package).mkdir(exist_ok=True)
    (world / package / "__init__.py").write_text(body)


def refusal(world: Path) -> str:
    """The message of `require_fairseq()`; empty when it is content."""
    code = (
        "from blspkd_fairseq import compat\n"
        "try: compat.require_fairseq()\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    done = run_bare("-c", code, world=world)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def warning(world: Path) -> str:
    done = run_bare("-c", "from blspkd_fairseq import compat; print(compat.fairseq_warning())", world=world)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- fairseq


def test_no_fairseq(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("FairseqError fairseq is not installed: run `pip install ve-fairseq==0.12.3`")


def test_fairseq_that_cannot_be_imported_is_named_with_its_remedy(tmp_path: Path) -> None:
    install(tmp_path, "fairseq", "0.12.2", "fairseq", MUTABLE_DEFAULT)
    message = refusal(tmp_path)
    assert message.startswith("FairseqError fairseq 0.12.2 cannot be imported by Python 3.")
    assert "(ValueError: mutable default" in message
    assert message.endswith("run `pip uninstall -y fairseq` and then `pip install ve-fairseq==0.12.3`")
    assert "\n" not in message


def test_editable_and_plain_source_fairseq_are_recognised(tmp_path: Path) -> None:
    install(tmp_path / "editable", "fairseq", "0.12.2", "fairseq", MUTABLE_DEFAULT, editable=True)
    assert "fairseq 0.12.2 cannot be imported" in refusal(tmp_path / "editable")
    package = tmp_path / "source" / "fairseq"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(MUTABLE_DEFAULT)
    assert "the fairseq on your Python path cannot be imported" in refusal(tmp_path / "source")


def test_what_fairseq_lacks_is_named(tmp_path: Path) -> None:
    install(tmp_path, "ve-fairseq", "0.12.3", "fairseq", "import torch.nn")
    assert "fairseq needs the Python package torch, which is missing: install torch" in refusal(tmp_path)


def test_tested_fairseq_passes(tmp_path: Path) -> None:
    install(tmp_path, "ve-fairseq", "0.12.3", "fairseq")
    assert refusal(tmp_path) == ""
    assert warning(tmp_path) == "None"


def test_a_distribution_is_known_by_its_files_where_it_declares_nothing(tmp_path: Path) -> None:
    install(tmp_path, "fairseq-fixed", "0.12.3.1", "fairseq")
    install(tmp_path, "other", "1.0", "other")
    for declared in tmp_path.rglob("top_level.txt"):
        declared.unlink()
    assert "fairseq comes from fairseq-fixed 0.12.3.1, and" in warning(tmp_path)


def test_importable_fork_is_a_warning_only(tmp_path: Path) -> None:
    install(tmp_path, "fairseq-fixed", "0.12.3.1", "fairseq")
    assert refusal(tmp_path) == ""
    assert "fairseq comes from fairseq-fixed 0.12.3.1, and only ve-fairseq 0.12.3 is tested" in warning(tmp_path)


def test_two_distributions_in_one_folder_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "ve-fairseq", "0.12.3", "fairseq")
    install(tmp_path, "fairseq-fixed", "0.12.3.1", "fairseq")
    message = refusal(tmp_path)
    assert "fairseq-fixed 0.12.3.1 and ve-fairseq 0.12.3 have written into the same folder" in message
    assert str(tmp_path / "fairseq") in message
    assert "`pip uninstall -y fairseq-fixed ve-fairseq` and then `pip install ve-fairseq==0.12.3`" in message


def test_two_distributions_in_two_folders_are_a_warning_only(tmp_path: Path) -> None:
    install(tmp_path, "ve-fairseq", "0.12.3", "fairseq")
    install(tmp_path, "fairseq", "0.12.2", "fairseq", editable=True)
    assert refusal(tmp_path) == ""
    assert "fairseq 0.12.2 and ve-fairseq 0.12.3" in warning(tmp_path)


# --- torchaudio


@pytest.mark.parametrize(("body", "expected"), [("raise OSError('libc10_cuda.so')", "None"), ("", "ModuleSpec")])
def test_transformers_sees_torchaudio_only_if_it_works(tmp_path: Path, body: str, expected: str) -> None:
    install(tmp_path, "torchaudio", "2.11.0", "torchaudio", body)
    install(
        tmp_path,
        "transformers",
        "5.23.0",
        "transformers",
        "import importlib.util\nprint(importlib.util.find_spec('torchaudio'))",
    )
    done = run_bare("-c", "import blspkd_fairseq, transformers", world=tmp_path)
    assert done.stdout.startswith(expected), done.stderr


def test_torchaudio_is_not_touched_before_transformers(tmp_path: Path) -> None:
    install(tmp_path, "torchaudio", "2.11.0", "torchaudio", "print('imported')")
    assert run_bare("-c", "import blspkd_fairseq", world=tmp_path).stdout == ""


def test_torchaudio_is_hidden_when_transformers_came_first(tmp_path: Path) -> None:
    install(tmp_path, "torchaudio", "2.11.0", "torchaudio", "raise OSError")
    install(tmp_path, "transformers", "5.23.0", "transformers")
    code = "import transformers, blspkd_fairseq, sys; print(sys.modules['torchaudio'])"
    assert run_bare("-c", code, world=tmp_path).stdout == "None\n"


# --- the package itself


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import blspkd_fairseq, sys; print({'torch', 'fairseq', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_a_second_name_for_the_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "copied").mkdir()
    shutil.copy(ROOT / "blspkd_fairseq" / "__init__.py", tmp_path / "copied")
    done = run_bare("-c", "import copied", world=tmp_path)
    assert "ImportError: imported as 'copied': this package must be" in done.stderr


def test_unknown_attribute() -> None:
    import blspkd_fairseq

    with pytest.raises(AttributeError, match="no attribute 'Blsp'"):
        _ = blspkd_fairseq.Blsp


def test_fairseq_checkpoints_load_with_weights_only(tmp_path: Path) -> None:
    code = """
import sys, argparse, numpy, torch
from blspkd_fairseq import compat
state = {"args": argparse.Namespace(lr=1.0), "meter": numpy.float64(0.5)}
torch.save(state, sys.argv[1])
try: torch.load(sys.argv[1], weights_only=True)
except Exception as error: print(type(error).__name__)
compat.allow_safe_checkpoint_globals()
print(torch.load(sys.argv[1], weights_only=True) == state)
"""
    output = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "checkpoint.pt")], text=True)
    assert output == "UnpicklingError\nTrue\n"


# --- python -m blspkd_fairseq.check


def run_check(world: Path) -> subprocess.CompletedProcess[str]:
    done = run_bare("-m", "blspkd_fairseq", "check", world=world)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def install_all(world: Path, **bodies: str) -> None:
    """Stubs for all that is required, in the lowest version allowed; `packaging` is the real one."""
    bodies = {"torch": STUB_TORCH, "ve_fairseq": "", **bodies}
    for requirement in REQUIRED:
        name, specifier = split(requirement)
        package = "fairseq" if name == "ve-fairseq" else IMPORT_NAMES.get(name, name)
        install(world, name, specifier.split(",")[0].lstrip("=>"), package, bodies.get(name.replace("-", "_"), ""))
    spec = importlib.util.find_spec("packaging")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, world / "packaging", dirs_exist_ok=True)


def test_check_is_content_when_all_is_there(tmp_path: Path) -> None:
    install_all(tmp_path)
    done = run_check(tmp_path)
    assert "everything needed is there" in done.stdout
    assert done.returncode == 0, done.stdout


def test_check_with_nothing_installed_names_every_package(tmp_path: Path) -> None:
    done = run_check(tmp_path)
    assert done.returncode == 1
    for requirement in REQUIRED:
        name = split(requirement)[0].removeprefix("ve-")
        assert f"problem: {name} is not installed\n remedy: run `" in done.stdout
    assert f"{len(REQUIRED)} problem(s) found" in done.stdout
    for optional in ("av", "sounddevice", "silero-vad", "bitsandbytes", "ray[data]", "fastapi"):
        assert re.search(rf"^{re.escape(optional)} +- .* optional$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("body", ["raise OSError('libsndfile not found')", "raise SystemExit('libsndfile not found')"])
def test_check_names_a_package_that_does_not_import(tmp_path: Path, body: str) -> None:
    install_all(tmp_path, soundfile=body)
    done = run_check(tmp_path)
    assert done.returncode == 1
    assert "problem: soundfile 0.12 cannot be imported" in done.stdout
    assert "libsndfile not found" in done.stdout
    assert "1 problem(s) found" in done.stdout


def test_check_names_a_wrong_version(tmp_path: Path) -> None:
    install_all(tmp_path)
    (tmp_path / "transformers-5.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.57.0\n")
    done = run_check(tmp_path)
    assert done.returncode == 1
    needed = next(one for one in REQUIRED if one.startswith("transformers"))
    assert f"problem: transformers 4.57.0 does not satisfy {split(needed)[1]}" in done.stdout
    assert f'remedy: run `pip install "{needed}"`' in done.stdout


def test_check_warns_of_what_is_newer_than_tested(tmp_path: Path) -> None:
    install_all(tmp_path)
    (tmp_path / "transformers-5.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.99.0\n")
    done = run_check(tmp_path)
    needed = next(one for one in REQUIRED if one.startswith("transformers"))
    assert f"warning: transformers 5.99.0 is newer than tested ({split(needed)[1]})" in done.stdout
    assert f'remedy: if something fails, run `pip install "{needed}"`' in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(("body", "warned"), [("raise OSError('libc10_cuda.so')", True), ("", False)])
def test_check_warns_of_a_torchaudio_that_cannot_be_loaded(tmp_path: Path, body: str, warned: bool) -> None:
    install_all(tmp_path)
    install(tmp_path, "torchaudio", "2.11.0", "torchaudio", body)
    done = run_check(tmp_path)
    assert ("remedy: run `pip uninstall -y torchaudio`" in done.stdout) == warned
    assert done.returncode == 0


def test_check_with_broken_torch_and_fairseq(tmp_path: Path) -> None:
    install_all(tmp_path, torch="raise RuntimeError('no libtorch')", ve_fairseq=MUTABLE_DEFAULT)
    done = run_check(tmp_path)
    assert done.returncode == 1
    assert "problem: torch 2.6 cannot be imported (RuntimeError: no libtorch)" in done.stdout
    assert "problem: ve-fairseq 0.12.3 cannot be imported by Python" in done.stdout
    assert "2 problem(s) found" in done.stdout


def test_check_warns_of_a_fork_and_succeeds(tmp_path: Path) -> None:
    install_all(tmp_path)
    shutil.rmtree(tmp_path / "ve_fairseq-0.12.3.dist-info")
    install(tmp_path, "fairseq-fixed", "0.12.3.1", "fairseq")
    done = run_check(tmp_path)
    assert "warning: fairseq comes from fairseq-fixed 0.12.3.1" in done.stdout
    assert done.returncode == 0


def test_logging_stays_as_the_program_set_it_up() -> None:
    """fairseq's own import makes all libraries print their debugging messages."""
    for module in ("blspkd_fairseq.data.dataset", "blspkd_fairseq.tasks"):
        program = f"import logging, {module}; root = logging.getLogger(); print(root.level, root.handlers)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "30 []", done.stdout
