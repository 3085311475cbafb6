"""Attention among packed rows: nobody sees another row, and no mask says so where a kernel needs none.

On a GPU, in half precision, all rows go through one flash attention kernel with variable lengths (``aten``'s, of torch
2.6 and later): no mask, grouped heads not repeated, and the prefix of all rows is only a longer key. Elsewhere rows are
padded for the product of queries and keys alone, and torch's fused attention takes them, or on a CPU, if they are
short, :mod:`blspkd_fairseq.modules.short_attention`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention_mask import added, causal_mask
from blspkd_fairseq.modules.short_attention import MOST_KEYS, attend_short

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # too little for the backward pass of wide heads


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention inside of packed rows.

    Args:
        query: ``[N, H, d]`` in packed order.
        key, value: ``[N, K, d]``, K dividing H (grouped heads).
        rows: who attends to whom.
        scale: of the products; default 1 / sqrt(d).
        window: positions that each one sees, itself included (sliding windows); None: all.
        softcap: products x become ``softcap * tanh(x / softcap)`` (Gemma 2).
        sinks: ``[H]`` logits of a place that takes probability and gives nothing (gpt-oss).
        dropout: of the probabilities.

    Returns:
        ``[N, H, d]`` in packed order.
    """
    options = _Options(scale, window, softcap, sinks, dropout)
    if _is_for_flash(query, options):
        return _flash(query, key, value, rows, scale, window, dropout)
    if _is_short(query, rows, options) and value.shape[-1] == query.shape[-1]:
        return attend_short(torch.cat([query, key, value], 1), query.shape[1], rows, scale, window, dropout)
    plan = _padding_plan(rows)
    query, key, value = (_Rearrange.apply(one, plan.places, plan.inverse) for one in (query, key, value))
    return _attend_gathered(query, key, value, rows, options, query.dtype)


def attend_stacked(
    stacked: Tensor, heads: int, rows: Rows, scale: float | None = None, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """:func:`attend` of queries, keys and values that lie side by side, ``[N, H + 2 K, d]``, H being ``heads``."""
    options = _Options(scale, window, None, None, dropout)
    groups = (stacked.shape[1] - heads) // 2
    if _is_for_flash(stacked, options):
        query, key, value = stacked.split((heads, groups, groups), 1)
        return _flash(query, key, value, rows, scale, window, dropout)
    if _is_short(stacked, rows, options):
        return attend_short(stacked, heads, rows, scale, window, dropout)
    plan = _padding_plan(rows)
    gathered = _wide(_Rearrange.apply(stacked, plan.places, plan.inverse))
    query, key, value = gathered.split((heads, groups, groups), 1)
    return _attend_gathered(query, key, value, rows, options, stacked.dtype)


class _Options(NamedTuple):
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float


def _is_for_flash(query: Tensor, options: _Options) -> bool:
    plain = options.softcap is None and options.sinks is None
    if not (plain and query.is_cuda and query.dtype in _FLASH_DTYPES):
        return False
    return _has_flash(query.device, query.shape[-1], options.dropout > 0)


@cache
def _has_flash(device: torch.device, width: int, drops_out: bool) -> bool:
    """Whether the card has the kernel for heads of this width, forward and backward, as torch's own choice has it."""
    generation = torch.cuda.get_device_capability(device)
    has_little_memory = generation in _LITTLE_SHARED_MEMORY and width > 192 and (width <= 224 or drops_out)
    return generation >= (8, 0) and width % 8 == 0 and width <= 256 and not has_little_memory


def _is_short(query: Tensor, rows: Rows, options: _Options) -> bool:
    """Whether the products are better written out: on a CPU, for short rows, and with dropout for all."""
    plain = options.softcap is None and options.sinks is None
    few = rows.prefix + rows.longest <= MOST_KEYS or options.dropout > 0
    return plain and few and query.device.type == "cpu" and rows.longest > 0 and (rows.causal or not rows.prefix)


def _wide(one: Tensor) -> Tensor:
    """torch's fused attention for the CPU takes 15.7 ms for a backward pass in bfloat16 that takes 3.5 in float32."""
    return one.float() if one.device.type == "cpu" and one.dtype in _FLASH_DTYPES else one


def _attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, options: _Options, dtype: torch.dtype
) -> Tensor:
    """Attention of the prefix and then of the padded rows, in the order of :class:`_PaddingPlan`; packed again."""
    plan = _padding_plan(rows)
    prefix = [one[: rows.prefix].unsqueeze(0) for one in (query, key, value)] if rows.prefix else []
    q, k, v = (one[rows.prefix :].unflatten(0, (-1, rows.longest)) for one in (query, key, value))
    if prefix:
        k, v = (
            torch.cat([one.expand(len(q), -1, -1, -1), padded], 1)
            for one, padded in zip(prefix[1:], (k, v), strict=True)
        )
    out = _padded(q, k, v, rows, rows.prefix, not rows.causal, options).flatten(0, 1)
    if prefix:
        out = torch.cat([_padded(prefix[0], prefix[1], prefix[2], rows, 0, False, options)[0], out])
    return _Rearrange.apply(out.to(dtype), plan.inverse, plan.places, None, plan.is_padding)


class _PaddingPlan(NamedTuple):
    """``places`` [P + R x T]: packed places of the prefix and of the padded rows; ``inverse`` [N]; ``is_padding``."""

    places: Tensor
    inverse: Tensor
    is_padding: Tensor


def _padding_plan(rows: Rows) -> _PaddingPlan:
    """Made once for all layers."""
    made: _PaddingPlan | None = rows.__dict__.get("padding_plan")
    if made is None:
        device = rows.lengths.device
        within = torch.arange(rows.prefix, device=device)
        index = torch.cat([within, rows.prefix + rows.padded.flatten()])
        inverse = torch.cat([within, rows.prefix + rows.unpadded])
        if rows.order is not None and rows.place is not None:
            index, inverse = rows.order[index], inverse[rows.place]
        is_padding = F.pad(rows.is_padding.flatten(), (rows.prefix, 0))
        made = rows.__dict__["padding_plan"] = _PaddingPlan(index, inverse, is_padding[:, None, None])
    return made


def _padded(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, offset: int, hides_padding: bool, options: _Options
) -> Tensor:
    """Attention of padded rows ``[R, T, heads, d]``: query i stands ``offset`` behind key i.

    Padding on the right needs no mask where attention is causal.
    """
    scale, window, softcap, sinks, dropout = options
    query, key, value = (_wide(one).transpose(1, 2) for one in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    windowed = window is not None and window < key.shape[2]
    plain = softcap is None and sinks is None
    is_causal = rows.causal and offset == 0 and not windowed and plain
    mask = None
    if hides_padding:
        mask = _mask(rows, None, None if not plain else query.dtype)
    elif rows.causal and not is_causal:
        mask = _mask(rows, (query.shape[2], key.shape[2], offset, window), None if not plain else query.dtype)
    if not plain:
        return _explicit(query, key, value, mask, scale, softcap, sinks, dropout).transpose(1, 2)
    repeats = groups > 1 and not query.is_cuda  # the CPU's fused kernel wants as many heads everywhere
    if repeats:
        key, value = (one.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for one in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=groups > 1 and not repeats
    )
    return out.transpose(1, 2)


def _mask(rows: Rows, causal: tuple[int, int, int, int | None] | None, dtype: torch.dtype | None) -> Tensor:
    """What is seen, by places (queries, keys, offset, window) or all but padding; made once for all layers.

    With a dtype it is what is added to the products, as which torch's kernels take it: else each call would make it.
    """
    masks: dict[Any, Tensor] = rows.__dict__.setdefault("masks", {})
    if (causal, dtype) not in masks:
        device = rows.lengths.device
        mask = ~rows.is_padding[:, None, None, :] if causal is None else causal_mask(*causal, device)
        masks[causal, dtype] = mask if dtype is None else added(mask, dtype)
    return masks[causal, dtype]


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """The formula, written out; softmax in float32 at least."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    logits = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)], 3)
    weights = logits.softmax(3, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights = weights[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


# ---- flash attention with variable lengths ------------------------------------------------------------------------


def _flash(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    plan = _flash_plan(rows)
    if rows.order is not None:
        query = _Rearrange.apply(query, rows.order, rows.place)
    if rows.order is not None or rows.prefix:
        key, value = (_Rearrange.apply(one, plan.keys, plan.own, plan.repeats) for one in (key, value))
    out = torch.ops.aten._flash_attention_forward(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        plan.query_starts,
        plan.key_starts,
        max(rows.longest, rows.prefix),
        rows.longest + rows.prefix,
        dropout,
        rows.causal,
        False,
        scale=scale,
        # Positions to the left that are seen beside itself.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return out if rows.order is None else _Rearrange.apply(out, rows.place, rows.order)


class _FlashPlan(NamedTuple):
    """Index tensors of a layout's keys.

    Attributes:
        keys: ``[M]`` packed place of each key: the prefix's own, then of each row the prefix and itself.
        own: ``[N]`` where the key of each packed place stands among them for its own row.
        repeats: ``[R x P]`` where the rows' prefixes stand, and ``[P]`` the prefix's packed places.
        query_starts, key_starts: int32, of the prefix and of each row, and the end.
    """

    keys: Tensor
    own: Tensor
    repeats: tuple[Tensor, Tensor] | None
    query_starts: Tensor
    key_starts: Tensor


def _flash_plan(rows: Rows) -> _FlashPlan:
    """Made once for all layers."""
    made: _FlashPlan | None = rows.__dict__.get("flash_plan")
    if made is not None:
        return made
    device, prefix, count = rows.lengths.device, rows.prefix, len(rows.counts)
    order = torch.arange(rows.total, device=device) if rows.order is None else rows.order
    place = order if rows.place is None else rows.place
    ends = rows.lengths.cumsum(0)
    key_begins = prefix + rows.begins + prefix * torch.arange(count, device=device)  # of each row's prefix
    own = key_begins[rows.row] + prefix + rows.within
    within = torch.arange(prefix, device=device)
    repeats = (key_begins.unsqueeze(1) + within).flatten()
    keys = torch.empty(rows.total + count * prefix, dtype=torch.long, device=device)
    keys[:prefix] = order[:prefix]
    keys[own] = order[prefix:]
    keys[repeats] = order[:prefix].repeat(count)
    starts = F.pad(ends, (1, 0))
    if prefix:
        starts = F.pad(starts + prefix, (1, 0))
    query_starts = starts.int()
    prefixes = prefix * torch.arange(len(starts), device=device).sub(1).clamp(min=0)
    key_starts = (starts + prefixes).int() if prefix else query_starts
    made = rows.__dict__["flash_plan"] = _FlashPlan(
        keys,
        torch.cat([within, own])[place],
        (repeats, order[:prefix]) if prefix else None,
        query_starts,
        key_starts,
    )
    return made


class _Rearrange(torch.autograd.Function):
    """Rows in another order, some repeated; its backward pass gathers too, where torch's own would scatter.

    ``index`` says which value each result is, ``inverse`` which result each value is. What stands ``repeats[0]`` are
    repetitions of the values at ``repeats[1]``, and results that are ``dropped`` pass no gradient on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        index: Tensor,
        inverse: Tensor,
        repeats: tuple[Tensor, Tensor] | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(inverse, dropped, *(repeats or ()))
        return values.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, dropped, *repeats = ctx.saved_tensors
        result = gradient.index_select(0, inverse)
        if dropped is not None:
            result.masked_fill_(dropped, 0.0)
        if repeats:
            where, prefix = repeats
            shared = gradient.index_select(0, where).unflatten(0, (-1, len(prefix))).sum(0)
            result.index_add_(0, prefix, shared)
        return result, None, None, None, None
