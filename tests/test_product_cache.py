"""Products of many shapes in bfloat16 do not fill the memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blspkd_fairseq.compat.product_cache import KEPT

VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
# The growth of the process's memory in MiB; the first shapes have made what every process needs.
GROWTH = """
import os
import torch
import blspkd_fairseq

def used():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
weight = torch.randn(256, 256, dtype=torch.bfloat16)
for rows in range(100, 900):
    if rows == 300:
        before = used()
    torch.nn.functional.linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
print((used() - before) // 1024, *(os.environ[name] for name in %r))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("given", ["", "32"])
def test_many_shapes_take_no_more_memory(given: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if given:
        environment |= dict.fromkeys(VARIABLES, given)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH % (VARIABLES,)], capture_output=True, text=True, env=environment, check=True
    )
    growth, *kept = done.stdout.split()
    assert kept == [given or str(KEPT)] * 2
    assert int(growth) < 100  # without a bound 300 and more
