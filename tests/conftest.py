"""Settings for all tests: this checkout, offline, the same random numbers and few threads."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent

# Before torch and transformers are imported, and inherited by the commands that tests start. This checkout
# comes first, whichever one is installed. One thread: the models are too tiny to gain from a second one.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell in the background hands on that it ignores Ctrl-C, and nohup the end of a terminal; tests send both.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# For the real models. Two processes of two threads on two cores wait for each other most of the time.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))

import blspkd_fairseq  # noqa: E402, F401  (hides a broken torchaudio before any test imports transformers)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run that can run anywhere: the environment's BLSPKD_TEST_DEVICE, or the CPU."""
    import torch

    return torch.device(os.environ.get("BLSPKD_TEST_DEVICE", "cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that the last ones do not keep one process busy while the others wait."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("real", "slow"))))


@pytest.fixture(autouse=True)
def in_half_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests say of half precisions they say on every CPU; the real models take too long where it emulates them."""
    from blspkd_fairseq.modules import precision

    if request.node.get_closest_marker("real") is None:
        monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest) -> None:
    """Seeds every generator; tests on the real models get all cores."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    is_real = request.node.get_closest_marker("real") is not None
    torch.set_num_threads(THREADS if is_real else 1)
