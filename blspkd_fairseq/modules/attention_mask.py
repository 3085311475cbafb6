"""Who sees whom, where a kernel of attention has to be told."""

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]`` bool, True where query i, at place offset + i, sees key j."""
    places = torch.arange(queries, device=device).unsqueeze(1) + offset
    others = torch.arange(keys, device=device)
    mask = others <= places
    return mask if window is None else mask & (places - others < window)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the products of queries and keys."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
