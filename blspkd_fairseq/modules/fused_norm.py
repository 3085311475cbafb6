"""RMSNorm in one kernel on a GPU, where transformers' modules launch eight."""

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
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and _is_plain(module)]
    for module in norms:
        if "forward" not in vars(module):
            module.forward = _fused(module)
    return len(norms)


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), _eps(module)
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
    plain, eps = module.forward, _eps(module)

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else plain(x)

    return forward
