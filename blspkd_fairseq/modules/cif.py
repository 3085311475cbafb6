"""Continuous integrate-and-fire (CIF) in closed form.

CIF (Dong & Xu, arXiv 1905.11235) walks over the frames, adds up their weights ``alpha`` and fires a token each time
the sum passes a whole number. With ``c`` the running sum of the weights, frame ``t`` (0-based) covers the interval
``[c[t-1], c[t]]`` of that sum and token ``u`` the interval ``[u, u+1]``, so the share of frame ``t`` in token ``u`` is
the overlap of the two. No loop over time or batch is needed, several tokens may fire inside one frame, and the result
of an utterance does not depend on what it is batched with (the published loop's does).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CifOutput(NamedTuple):
    """What :func:`continuous_integrate_and_fire` returns.

    Attributes:
        embeddings: ``[B, U, D]``, zeros behind ``lengths``.
        lengths: ``[B]`` int64, tokens of each utterance; U is their maximum.
        alpha_sum: ``[B]`` fp32 or fp64, sum of the weights before they were rescaled (differentiable).
        boundaries: ``[B, U]`` fractional frame at which each token ends (no gradient), zeros behind ``lengths``.
            Frame t covers the times t to t + 1, so multiply by the seconds per frame.
    """

    embeddings: Tensor
    lengths: Tensor
    alpha_sum: Tensor
    boundaries: Tensor


def continuous_integrate_and_fire(
    features: Tensor,
    alpha: Tensor,
    padding_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
) -> CifOutput:
    """Integrates frames into tokens, each of which receives a total weight of exactly 1.

    Args:
        features: ``[B, T, D]`` frames.
        alpha: ``[B, T]`` non-negative weights, any floating dtype. They are summed in fp64 (fp32 where the device has
            no fp64): in bf16 the running sum loses whole tokens.
        padding_mask: ``[B, T]`` bool, True on padding; those frames count nothing.
        target_lengths: ``[B]`` tokens per utterance (training). Without it, ``max(1, round(sum(alpha)))``. The
            weights are rescaled to this sum in both cases (BLSP-KD's code does so at inference, too).

    Returns:
        A :class:`CifOutput`. An utterance whose weights are all zero gives zeros, an utterance of padding alone has
        length 0 unless ``target_lengths`` says otherwise.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_shapes(features, alpha, padding_mask, target_lengths)
    exact = alpha.dtype if alpha.dtype == torch.float64 else torch.float32  # of what is returned
    alpha = alpha.to(torch.float32 if alpha.device.type == "mps" else torch.float64)
    if padding_mask is not None:
        alpha = alpha.masked_fill(padding_mask, 0.0)
    alpha_sum = alpha.sum(1)
    if target_lengths is None:
        lengths = alpha_sum.detach().round().long().clamp(min=1)
        if padding_mask is not None:
            lengths = lengths.masked_fill(padding_mask.all(1), 0)
    else:
        lengths = target_lengths.to(alpha.device, torch.long)

    silent = alpha_sum <= 0
    scale = lengths / alpha_sum.masked_fill(silent, 1.0)
    ends = (alpha * scale.unsqueeze(1)).cumsum(1)  # B x T, running sum after each frame
    tokens = int(lengths.max()) if lengths.numel() else 0
    valid = torch.arange(tokens, device=alpha.device) < lengths.unsqueeze(1)  # B x U

    weights = _overlap(ends, tokens) * valid.unsqueeze(2)
    embeddings = weights.to(features.dtype) @ _zero_padding(features, padding_mask)
    boundaries = _boundaries(ends.detach(), tokens) * (valid & ~silent.unsqueeze(1))
    return CifOutput(embeddings, lengths, alpha_sum.to(exact), boundaries.to(exact))


def _overlap(ends: Tensor, tokens: int) -> Tensor:
    """``[B, U, T]`` share of frame t in token u, from the running sums ``[B, T]``."""
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    token = torch.arange(tokens, device=ends.device, dtype=ends.dtype).view(1, -1, 1)
    upper = torch.minimum(ends.unsqueeze(1), token + 1)
    lower = torch.maximum(starts.unsqueeze(1), token)
    return (upper - lower).relu()


def _boundaries(ends: Tensor, tokens: int) -> Tensor:
    """``[B, U]`` time at which the running sum reaches u + 1, linear inside a frame."""
    batch, frames = ends.shape
    # The last sum is n only up to rounding: without the slack its crossing is found in trailing silence, or nowhere.
    targets = torch.arange(1, tokens + 1, device=ends.device, dtype=ends.dtype).expand(batch, -1).contiguous()
    slack = 64 * torch.finfo(ends.dtype).eps * max(tokens, 1)
    frame = torch.searchsorted(ends, targets - slack).clamp(max=frames - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))
    start, end = starts.gather(1, frame), starts.gather(1, frame + 1)
    inside = ((targets - start) / (end - start).clamp(min=torch.finfo(ends.dtype).tiny)).clamp(0, 1)
    return frame + inside


def _zero_padding(features: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Padding may hold anything, NaN included, and 0 x NaN is NaN."""
    return features if padding_mask is None else features.masked_fill(padding_mask.unsqueeze(2), 0.0)


def _check_shapes(
    features: Tensor, alpha: Tensor, padding_mask: Tensor | None, target_lengths: Tensor | None
) -> None:
    if features.dim() != 3 or alpha.shape != features.shape[:2]:
        raise ValueError(
            f"CIF needs features [B, T, D] and alpha [B, T], got {tuple(features.shape)} and {tuple(alpha.shape)}"
        )
    if padding_mask is not None and padding_mask.shape != alpha.shape:
        raise ValueError(f"padding_mask must be {tuple(alpha.shape)} like alpha, got {tuple(padding_mask.shape)}")
    if target_lengths is not None and target_lengths.shape != alpha.shape[:1]:
        raise ValueError(f"target_lengths must be [{alpha.shape[0]}], got {tuple(target_lengths.shape)}")
