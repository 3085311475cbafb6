"""What pip installs keeps a torchaudio that cannot be loaded from transformers, in programs that know nothing of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "blspkd_fairseq", source / "blspkd_fairseq", ignore=shutil.ignore_patterns("__pycache__", "pretrained")
    )
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return folder


def run(built: Path, world: Path, code: str, *options: str) -> str:
    """Runs code in a Python that looks for packages in ``world``, and into whose site-packages ``built`` was put."""
    begin = f"import sys, site; sys.path[:0] = [{str(world)!r}]; site.addsitedir({str(built)!r}); "
    done = subprocess.run(
        [sys.executable, "-S", *options, "-c", begin + code], text=True, capture_output=True, cwd=world
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("body", "expected"), [("raise OSError('libc10_cuda.so')", "None"), ("x = 1", "1")])
def test_transformers_sees_a_torchaudio_that_works_and_no_other(
    built: Path, tmp_path: Path, body: str, expected: str
) -> None:
    (tmp_path / "torchaudio.py").write_text(body)
    (tmp_path / "transformers.py").write_text("import sys\nsys.modules['torchaudio'] and sys.modules['torchaudio'].x\n")
    code = "import transformers; print(getattr(sys.modules['torchaudio'], 'x', None), 'blspkd_fairseq' in sys.modules)"
    assert run(built, tmp_path, code) == f"{expected} False"  # and this package is not loaded for it


def test_other_programs_do_not_notice(built: Path, tmp_path: Path) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError")
    code = "import json; print(sorted({'torchaudio', 'importlib.util', 'blspkd_fairseq'} & set(sys.modules)))"
    before = run(tmp_path, tmp_path, code)
    assert run(built, tmp_path, code) == before
    assert run(built, tmp_path, "print('fine')", "-W", "error") == "fine"
