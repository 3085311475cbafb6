"""examples/notebook.ipynb runs, cell by cell, in an empty folder."""

import json
import os
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from tiny import PATIENCE

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_it_loads_listens_aligns_distils_and_plots(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(sources), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg"}
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    # How CPUs round decides about a word or two.
    said, repeated = "But I guess that's just how college life is.", done.stdout.splitlines()[1]
    assert SequenceMatcher(None, said, repeated).ratio() > 0.8 and "after " in done.stdout, done.stdout
    assert (tmp_path / "alignment.png").stat().st_size > 10_000
    assert (tmp_path / "more" / "checkpoint_last.pt").exists()


def test_its_outputs_are_of_its_cells_and_name_no_machine() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert "Traceback" not in outputs and str(Path.home()) not in outputs and "/tmp/" not in outputs
