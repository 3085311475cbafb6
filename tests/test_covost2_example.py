"""examples/covost2/run.sh as it is typed, on real recordings and the small real models."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import tiny

from blspkd_fairseq.data.manifest import Manifest

RUN = Path(__file__).parents[1] / "examples" / "covost2" / "run.sh"

pytestmark = [pytest.mark.real, pytest.mark.recordings]


def run(out: Path, *options: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    command = ["bash", str(RUN), "--small", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_every_stage_runs_and_a_second_run_skips_them(tmp_path: Path) -> None:
    first = run(tmp_path, "--max-update", "4")
    work = tmp_path / "en_fr"
    test = Manifest.load(work / "data" / "test.tsv")
    assert "BLEU" in first and (work / "generated" / "generate-test.txt").exists()
    assert len(tiny.read_jsonl(work / "generated" / "generate-test.jsonl")) == len(test) >= 20
    report = json.loads((work / "report" / "report.json").read_text())
    assert set(report["tasks"]["translation"]["scores"]) == {"blsp_kd", "cascade", "text"}
    # tiny.en hears these recordings well, in MP3, too; its errors are counted against the text as it was written.
    assert report["tasks"]["asr"]["scores"]["cascade"]["WER (normalized)"]["score"] < 15
    assert report["alignment"]["blsp_kd"][0]["matched"] > 100
    begin = time.monotonic()
    assert run(tmp_path, "--max-update", "4").count("done before") == 6
    assert time.monotonic() - begin < 60


def test_what_is_missing_is_said() -> None:
    done = subprocess.run(["bash", str(RUN)], capture_output=True, text=True)
    assert done.returncode == 2 and "--common-voice and --direction are needed" in done.stderr
    done = subprocess.run(["bash", str(RUN), "--direktion", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown option --direktion" in done.stderr
