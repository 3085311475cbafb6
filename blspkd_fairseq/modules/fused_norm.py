"""RMSNorm in one kernel on a GPU, where transformers' modules launch eight, and its gradient written down."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOLERANCE = (
    2.0**-6
)  # transformers rounds to the input's precision before it multiplies by the weight, the kernel after


def fuse_norms(model: nn.Module) -> int:
    """Lets every RMSNorm of a model take torch's kernel while its input is on a GPU; elsewhere nothing changes.

    A module counts as one if its class is called so and its result is that of :func:`torch.nn.functional.rms_norm`:
    some multiply by 1 + weight, and stay as they are.

    Returns:
        How many there are.
    """
    norms = [module for module in model.modules() if is_plain_norm(module)]
    for module in norms:
        if "forward" not in vars(module):
            module.forward = _fused(module)
    return len(norms)


def norm_eps(module: nn.Module) -> float:
    """The epsilon of an RMSNorm of transformers."""
    eps: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        raise ValueError(f"{type(module).__name__} has no epsilon")
    return eps


@torch.no_grad()
def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm that multiplies by its weight, and does nothing else."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        return False
    x = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    try:
        expected = type(module).forward(module, x)
    except Exception:  # it wants more than its input
        return False
    actual = F.rms_norm(x, weight.shape, weight, eps)
    return bool(torch.allclose(actual.float(), expected.float(), rtol=_TOLERANCE, atol=_TOLERANCE))


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    plain, eps = module.forward, norm_eps(module)

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else plain(x)

    return forward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``[..., D]``, and the factor ``[..., 1]`` (fp32) of each row, for :func:`rms_norm_backward`."""
    if _has_kernel(x):
        return torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * factor).to(x.dtype) * weight, factor


def rms_norm_backward(gradient: Tensor, x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to ``x``; the weight is frozen."""
    if _has_kernel(x):
        kernel = torch.ops.aten._fused_rms_norm_backward
        return kernel(gradient.contiguous(), x, weight.shape, factor, weight, [True, False])[0]
    scaled = (gradient * weight).to(factor.dtype).mul_(factor)
    normed = x.to(factor.dtype) * factor
    mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1]).unsqueeze(-1)
    return scaled.addcmul_(normed, mean, value=-1).to(x.dtype)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward")
