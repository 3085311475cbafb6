"""Continuous integrate-and-fire (CIF) in closed form.

CIF (Dong & Xu, arXiv 1905.11235) walks over the frames, adds up their weights ``alpha`` and fires a token each time
the sum passes a whole number. With ``c`` the running sum of the weights, frame ``t`` (0-based) covers the interval
``[c[t-1], c[t]]`` of that sum and token ``u`` the interval ``[u, u+1]``, so the share of frame ``t`` in token ``u`` is
the overlap of the two. The T frame ends and U token ends, sorted together, cut the sum into T + U pieces, each of which
lies in one frame and one token: its length is the frame's share. No loop over time or batch is needed, the work grows
with T + U and not with T x U, several tokens may fire inside one frame, and the result of an utterance does not depend
on what it is batched with (the published loop's does).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    *,
    longest: int | None = None,
) -> CifOutput:
    """Integrates frames into tokens, each of which receives a total weight of exactly 1.

    Args:
        features: ``[B, T, D]`` frames.
        alpha: ``[B, T]`` non-negative weights, any floating dtype. They are summed in fp64 (fp32 where the device has
            no fp64): in bf16 the running sum loses whole tokens.
        padding_mask: ``[B, T]`` bool, True on padding; those frames count nothing.
        target_lengths: ``[B]`` tokens per utterance (training). Without it, ``max(1, round(sum(alpha)))``. The
            weights are rescaled to this sum in both cases (BLSP-KD's code does so at inference, too).
        longest: the largest of ``target_lengths``, if known; otherwise a GPU is waited for.

    Returns:
        A :class:`CifOutput`. An utterance whose weights are all zero gives zeros, an utterance of padding alone has
        length 0 unless ``target_lengths`` says otherwise.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    plan = _plan(features, alpha, padding_mask, target_lengths, longest)
    embeddings = _integrate(_zero_padding(features, padding_mask), plan.ends, plan.lengths, plan.tokens)
    return CifOutput(embeddings, plan.lengths, plan.alpha_sum, plan.boundaries)


def parallel_integrate_and_fire(
    features: Tensor,
    alpha: Tensor,
    padding_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
    sharpness: float = 6.0,
    *,
    longest: int | None = None,
) -> CifOutput:
    """A smooth alignment in place of CIF's sharp one, after PIF of E-Paraformer (Zou et al., Interspeech 2024).

    Token u is the mean of all frames, weighted by ``softmax_t(-sharpness (m[t] - (u + 1/2))^2)``, where ``m[t]`` is the
    running sum of the rescaled weights in the middle of frame t (that Gaussian kernel is ours: the paper's text was not
    at hand). Lengths and boundaries are those of CIF.

    Args:
        features, alpha, padding_mask, target_lengths, longest: and errors as of :func:`continuous_integrate_and_fire`.
        sharpness: 1 / (2 variance) of the kernel, in tokens; 6 is as wide as CIF's token. It works on ``B x U x T``.
    """
    plan = _plan(features, alpha, padding_mask, target_lengths, longest)
    middles = plan.ends - torch.diff(plan.ends, dim=1, prepend=torch.zeros_like(plan.ends[:, :1])) / 2  # B x T
    centres = torch.arange(plan.tokens, device=alpha.device, dtype=middles.dtype) + 0.5
    distance = (middles.unsqueeze(1) - centres.unsqueeze(1)).square()  # B x U x T
    if padding_mask is not None:
        distance = distance.masked_fill(padding_mask.unsqueeze(1), torch.finfo(distance.dtype).max / (1 + sharpness))
    wide = features if features.dtype == torch.float64 else features.float()
    shares = (-sharpness * distance).softmax(2).to(wide.dtype) if alpha.shape[1] else distance.to(wide.dtype)
    embeddings = shares @ _zero_padding(wide, padding_mask)
    valid = torch.arange(plan.tokens, device=alpha.device) < plan.lengths.unsqueeze(1)
    embeddings = embeddings.masked_fill(~valid.unsqueeze(2), 0.0).to(features.dtype)
    return CifOutput(embeddings, plan.lengths, plan.alpha_sum, plan.boundaries)


def quantity_loss(alpha_sum: Tensor, tokens: Tensor) -> Tensor:
    """``[B]`` |sum(alpha) / n - 1|, which teaches alpha to count n tokens (BLSP-KD, arXiv 2405.19041, L_CIF)."""
    return (alpha_sum / tokens - 1).abs()


def check_alpha_sum(alpha_sum: Sequence[float], names: Sequence[str]) -> None:
    """Refuses a collapsed adapter in training, whose embeddings would be zeros or NaN.

    Args:
        alpha_sum: sums of the weights of each utterance, as Python numbers: a device is not asked again.
        names: of the utterances.

    Raises:
        ValueError: a sum is not positive or NaN.
    """
    for weight, name in zip(alpha_sum, names, strict=True):
        if not weight > 0:
            raise ValueError(
                f"the CIF weights of utterance {name!r} sum to {weight}: the "
                "adapter has collapsed or holds NaN; lower the learning rate, or use a wider dtype than fp16"
            )


class _Plan(NamedTuple):
    """``ends`` [B, T] are running sums of the rescaled weights, ``tokens`` is U; the rest is that of CifOutput."""

    ends: Tensor
    tokens: int
    lengths: Tensor
    alpha_sum: Tensor
    boundaries: Tensor


def _plan(
    features: Tensor,
    alpha: Tensor,
    padding_mask: Tensor | None,
    target_lengths: Tensor | None,
    longest: int | None,
) -> _Plan:
    """Where tokens begin and end."""
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
    tokens = _longest(lengths) if longest is None else longest
    valid = torch.arange(tokens, device=alpha.device) < lengths.unsqueeze(1)  # B x U

    boundaries = _boundaries(ends.detach(), tokens) * (valid & ~silent.unsqueeze(1))
    return _Plan(ends, tokens, lengths, alpha_sum.to(exact), boundaries.to(exact))


def _longest(lengths: Tensor) -> int:
    fewest, most = (int(bound) for bound in lengths.aminmax()) if lengths.numel() else (0, 0)
    if fewest < 0:
        raise ValueError(f"target_lengths must not be negative, got {fewest}")
    return most


def _integrate(features: Tensor, ends: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """``[B, U, D]`` sums of the frames weighted by their shares, from the running sums ``ends`` ``[B, T]``."""
    batch, frames, width = features.shape
    if tokens == 0 or frames == 0:
        return features.new_zeros(batch, tokens, width)
    cuts = _token_ends(ends.detach(), lengths, tokens)
    places, order = torch.cat([ends, cuts], 1).sort(dim=1, stable=True)
    shares = places.diff(dim=1, prepend=torch.zeros_like(places[:, :1]))
    is_end = order < frames
    frame = (is_end.cumsum(1) - is_end.long()).clamp(max=frames - 1)  # as many as have ended before the piece

    # Pieces are in the order of the tokens, so that those of token u start behind the end of token u - 1.
    token = torch.arange(1, tokens, device=ends.device)
    starts = F.pad(torch.searchsorted(ends.detach(), cuts[:, :-1].contiguous(), right=True) + token, (1, 0))
    row = torch.arange(batch, device=ends.device).unsqueeze(1)
    # In fp32 at least: older torch that we support has no gradient of bf16 shares on CUDA.
    wide = features if features.dtype == torch.float64 else features.float()
    sums = F.embedding_bag(
        (row * frames + frame).flatten(),
        wide.reshape(batch * frames, width),
        (row * (frames + tokens) + starts).flatten(),
        mode="sum",
        per_sample_weights=shares.flatten().to(wide.dtype),
    )
    return sums.view(batch, tokens, width).to(features.dtype)


def _token_ends(ends: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """``[B, U]`` running sums at which the tokens end: u + 1, and nothing is left for tokens behind the last one."""
    cuts = torch.arange(1, tokens + 1, device=ends.device, dtype=ends.dtype).expand(len(ends), -1)
    # The last token ends with the last frame: that sum is n up to rounding only.
    return cuts.masked_fill(cuts >= lengths.unsqueeze(1), torch.inf).minimum(ends[:, -1:])


def _boundaries(ends: Tensor, tokens: int) -> Tensor:
    """``[B, U]`` time at which the running sum reaches u + 1, linear inside a frame."""
    batch, frames = ends.shape
    if frames == 0:
        return ends.new_zeros(batch, tokens)
    # The last sum is n only up to rounding: without the slack its crossing is found in trailing silence, or nowhere.
    targets = torch.arange(1, tokens + 1, device=ends.device, dtype=ends.dtype).expand(batch, -1).contiguous()
    slack = 64 * torch.finfo(ends.dtype).eps * max(tokens, 1)
    frame = torch.searchsorted(ends, targets - slack).clamp(max=frames - 1)
    starts = F.pad(ends, (1, 0))
    start, end = starts.gather(1, frame), starts.gather(1, frame + 1)
    inside = ((targets - start) / (end - start).clamp(min=torch.finfo(ends.dtype).tiny)).clamp(0, 1)
    return frame + inside


def _zero_padding(features: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Padding may hold anything, NaN included, and 0 x NaN is NaN."""
    return features if padding_mask is None else features.masked_fill(padding_mask.unsqueeze(2), 0.0)


def _check_shapes(features: Tensor, alpha: Tensor, padding_mask: Tensor | None, target_lengths: Tensor | None) -> None:
    if features.dim() != 3 or alpha.shape != features.shape[:2]:
        raise ValueError(
            f"CIF needs features [B, T, D] and alpha [B, T], got {tuple(features.shape)} and {tuple(alpha.shape)}"
        )
    if padding_mask is not None and padding_mask.shape != alpha.shape:
        raise ValueError(f"padding_mask must be {tuple(alpha.shape)} like alpha, got {tuple(padding_mask.shape)}")
    if padding_mask is not None and padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool, True on padding, got {padding_mask.dtype}")
    if target_lengths is not None and target_lengths.shape != alpha.shape[:1]:
        raise ValueError(f"target_lengths must be [{alpha.shape[0]}], got {tuple(target_lengths.shape)}")
