"""Peak memory of a stretch of code above what was held before: resident memory on the CPU, allocated on CUDA."""

from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``, then ``peak.mib``: None where the system does not tell (not Linux).

    On the CPU this counts what the process touched, freed memory that the allocator kept for later included only if
    it was used again: take the largest of several runs.
    """

    def __init__(self, device: str) -> None:
        self.on_cuda = device.startswith("cuda")
        self.mib: float | None = None

    def __enter__(self) -> "PeakMemory":
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before: float | None = torch.cuda.memory_allocated() / 2**20
        else:
            self.before = _status_mib("VmRSS") if _reset_resident_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
        after = torch.cuda.max_memory_allocated() / 2**20 if self.on_cuda else _status_mib("VmHWM")
        if self.before is not None and after is not None:
            self.mib = after - self.before


def _reset_resident_peak() -> bool:
    """Whether VmHWM starts from the present size now."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_mib(field: str) -> float | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None
