"""scripts/soak.sh with a sixteenth of its kills, damages and signals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import PATIENCE

SOAK = Path(__file__).parents[1] / "scripts" / "soak.sh"


@pytest.mark.slow
def test_a_part_of_the_soak_is_clean(tmp_path: Path) -> None:
    environment = {**os.environ, "BLSPKD_VENV": str(Path(sys.executable).parents[1])}
    command = ["bash", str(SOAK), "--out", str(tmp_path), "--share", "0.06"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert sum(row["times"] for row in rows) >= 6
    assert not any(row[name] for row in rows for name in ("lost", "repeated", "differing", "hangs"))
