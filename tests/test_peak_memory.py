"""Peak memory, in a process of its own: what other tests held may be freed or taken again meanwhile."""

import subprocess
import sys

import pytest


def test_what_was_held_and_freed_again_is_seen() -> None:
    program = (
        "import torch; from blspkd_fairseq.systems.peak_memory import PeakMemory\n"
        "peak = PeakMemory(on_gpu=False)\n"
        "torch.ones(64, 2**20, dtype=torch.uint8)  # 64 MiB, gone at once\n"
        "print(peak.held, peak.mib(), peak.added())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if "None" in done.stdout:
        pytest.skip("this system does not tell")
    held, most, added = map(float, done.stdout.split())
    assert held > 30 and 60 < added < 80 and most == pytest.approx(held + added)
