"""Peak memory from a moment on: allocated on a GPU, else resident, which Linux tells."""

from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Memory in MiB that is held at most from its making on.

    On a CPU this counts what the process touched: memory that was freed and kept by the allocator counts as held, and
    if it is used again, it is not seen.

    Args:
        on_gpu: asks the GPU; by default where there is one.

    Attributes:
        held: in the beginning, weights included; None where the system does not tell.
    """

    def __init__(self, on_gpu: bool | None = None) -> None:
        self._on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        self.held: float | None = None
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20
        elif _reset_resident_peak():
            self.held = _resident("VmRSS")

    def mib(self) -> float | None:
        """The peak so far; None where the system does not tell."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20
        return None if self.held is None else _resident("VmHWM")

    def added(self) -> float | None:
        """How far the peak is above what was held in the beginning."""
        peak = self.mib()
        return None if peak is None or self.held is None else peak - self.held


def _reset_resident_peak() -> bool:
    """Whether the peak of resident memory starts from the present size now."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> float | None:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None
