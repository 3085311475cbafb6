"""Which precisions a device computes in, and which it only emulates."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)

_HALVES = (torch.bfloat16, torch.float16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products in bfloat16: GPUs from Ampere on, CPUs with AVX-512, AMX or Arm's own.

    Elsewhere torch emulates them: cards before Ampere (T4, V100) are slow at it, and a CPU with AVX2 alone takes 20 to
    100 times as long as in float32 (torch 2.13, AMD Zen 3).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _cpu_has_bfloat16()


def usable_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or float32 in place of a half precision on a CPU that only emulates it, which is said once.

    float16 goes the same way: what is said of bfloat16 holds of it on the same CPUs.
    """
    if device.type != "cpu" or dtype not in _HALVES or has_bfloat16(device):
        return dtype
    _say(str(dtype).removeprefix("torch."))
    return torch.float32


@functools.cache
def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _say(dtype: str) -> None:
    logger.warning(
        f"this CPU only emulates products in {dtype} (it has no AVX-512): float32 is used in place of it, the same "
        "weights in twice the memory"
    )
