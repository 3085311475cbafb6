"""Ragged segments (instruction, speech, response, ...) into one padded sequence."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Attributes: ``embeds`` [B, N, D], of which row b uses the first ``lengths`` [B] entries."""

    embeds: Tensor
    lengths: Tensor


class Sequence(NamedTuple):
    """Attributes: ``embeds`` [B, L, D]; ``segment`` [B, L], the segment each position came from, -1 on padding."""

    embeds: Tensor
    segment: Tensor


def concatenate(segments: list[Segment], pad_left: bool = False) -> Sequence:
    """Joins segments row by row and pads once, on the right by default. Differentiable in the embeddings.

    A causal model with right padding needs no attention mask for its real positions; generation needs the left.
    """
    embeds = torch.cat([s.embeds for s in segments], 1)
    valid = torch.cat([_positions(s) < s.lengths.unsqueeze(1) for s in segments], 1)  # B x sum N
    index = torch.cat([torch.full_like(_positions(s), i) for i, s in enumerate(segments)])
    longest = int(valid.sum(1).max()) if valid.numel() else 0

    # A stable sort by "is padding" moves the padding to one side and keeps the order of everything else.
    order = (valid if pad_left else ~valid).to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, order.shape[1] - longest :] if pad_left else order[:, :longest]
    padding = ~valid.gather(1, order)
    embeds = embeds.take_along_dim(order.unsqueeze(2), 1).masked_fill(padding.unsqueeze(2), 0.0)
    return Sequence(embeds, index[order].masked_fill(padding, -1))


def _positions(segment: Segment) -> Tensor:
    return torch.arange(segment.embeds.shape[1], device=segment.embeds.device)


def predicts(segment: Tensor, index: int) -> Tensor:
    """``[B, L]`` bool: positions whose *next* token belongs to segment ``index`` (the shifted mask of a causal LM)."""
    following = torch.nn.functional.pad(segment[:, 1:], (0, 1), value=-1)
    return following == index


def is_valid(ids: Tensor, lengths: Tensor) -> Tensor:
    """``[B, N]`` bool: where rows of padded ``ids`` [B, N] have entries."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)


def mean_per_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """``[count]`` means of ``values`` [N]; ``values[i]`` belongs to row ``rows[i]``, and a row without any has 0."""
    totals = values.new_zeros(count).index_add(0, rows, values)
    return totals / torch.bincount(rows, minlength=count).clamp(min=1)
