"""Who sees whom, where a kernel of attention has to be told."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Places = TypeVar("Places", Tensor, np.ndarray)


def sees(places: Places, others: Places, window: int | None) -> Places:
    """Bool, where a position sees another one: itself and those before it, of all as many as ``window``."""
    mask = others <= places
    return mask if window is None else mask & (places - others < window)


def causal_mask(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]`` bool, True where query i, at place offset + i, sees key j."""
    places = torch.arange(queries, device=device).unsqueeze(1) + offset
    return sees(places, torch.arange(keys, device=device), window)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the products of queries and keys."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
