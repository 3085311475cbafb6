"""Attention among packed rows on a CPU, its products written out: for short rows, and where there is dropout.

torch's fused kernel for the CPU takes 10 ms forward and back for what these products do in 6 (16 rows of 30 queries and
62 keys, 9 heads in 3 groups), since heads of one group become one larger product. It has no dropout, either. But all
probabilities are kept for the gradient, which for long rows would be much.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention_mask import sees

MOST_KEYS = 128
"""Of a short row."""


class _Part(NamedTuple):
    """Rows of one length, the heads of a group stacked: B groups, M queries and T keys in each.

    Attributes:
        queries: ``[B x M]`` where each comes from among all heads of all positions.
        keys: ``[2 x B x T]`` the same, of the keys and then of the values.
        outputs: ``[B x M]`` where each query's result goes to.
        is_padding: ``[B x M, 1]`` bool, or None if no query is.
        mask: what is added to the products, ``[1 or B, 1 or M, T]``.
        groups: B.
    """

    queries: Tensor
    keys: Tensor
    outputs: Tensor
    is_padding: Tensor | None
    mask: Tensor
    groups: int


class _Plan(NamedTuple):
    """Where everything goes.

    Attributes:
        parts: the rows, and the prefix if there is one.
        outputs: ``[N x H]`` place of each result among those of all parts.
        gradients: ``[N x (H + 2 K)]`` place of each gradient among those of all parts: queries, then keys and values.
        shared: ``[2 x K x P]`` the prefix's keys and values among all heads, and ``(R, K, T, P)``; None without prefix.
    """

    parts: list[_Part]
    outputs: Tensor
    gradients: Tensor
    shared: tuple[Tensor, tuple[int, int, int, int]] | None


def attend_short(
    stacked: Tensor, heads: int, rows: Rows, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    """``[N, H, d]`` of queries, keys and values side by side, ``[N, H + 2 K, d]``; see :func:`attention.attend`."""
    plans: dict[Any, _Plan] = rows.__dict__.setdefault("short_plans", {})
    shape, dtype = _Shape(heads, (stacked.shape[1] - heads) // 2, window), _wide_dtype(stacked)
    if (shape, dtype) not in plans:
        plans[shape, dtype] = _make_plan(rows, shape, dtype)
    scale = stacked.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(stacked.device.type, enabled=False):  # which is off in backward, too
        out: Tensor = _ShortAttention.apply(stacked, heads, plans[shape, dtype], scale, dropout)
    return out


def _wide_dtype(one: Tensor) -> torch.dtype:
    return torch.promote_types(one.dtype, torch.float32)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stacked: Tensor, heads: int, plan: _Plan, scale: float, dropout: float) -> Tensor:
        count, _, width = stacked.shape
        flat = stacked.to(_wide_dtype(stacked)).reshape(-1, width)
        outs: list[Tensor] = []
        saved: list[Tensor | None] = []
        for part in plan.parts:
            query = flat.index_select(0, part.queries).view(part.groups, -1, width)
            key, value = flat.index_select(0, part.keys).view(2, part.groups, -1, width)
            weights, kept = _product(query, key.mT, scale, part.mask).softmax(-1), None
            dropped = weights
            if dropout:
                dropped, kept = torch.native_dropout(weights, dropout, True)
            outs.append(torch.bmm(dropped, value).view(-1, width))
            saved += [query, key, value, weights, kept]
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.dropout = plan, scale, dropout
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out.index_select(0, plan.outputs).view(count, heads, width).to(stacked.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        width = gradient.shape[-1]
        flat = gradient.to(_wide_dtype(gradient)).reshape(-1, width)
        sizes = [len(part.queries) for part in plan.parts] + [len(part.keys) for part in plan.parts]
        gradients = flat.new_empty(sum(sizes), width)
        places, saved = gradients.split(sizes), ctx.saved_tensors  # asked for once: they may have to be recomputed
        for i, part in enumerate(plan.parts):
            query, key, value, weights, kept = saved[5 * i : 5 * i + 5]
            d_out = flat.index_select(0, part.outputs)
            if part.is_padding is not None:
                d_out.masked_fill_(part.is_padding, 0.0)
            d_out = d_out.view(part.groups, -1, width)
            d_query = places[i].view(part.groups, -1, width)
            d_key, d_value = places[len(plan.parts) + i].view(2, part.groups, -1, width)
            d_weights = torch.bmm(d_out, value.mT)
            dropped = weights
            if kept is not None:
                factor = 1.0 / (1.0 - ctx.dropout)
                d_weights = torch.ops.aten.native_dropout_backward(d_weights, kept, factor)
                dropped = torch.ops.aten.native_dropout_backward(weights, kept, factor)
            torch.bmm(dropped.mT, d_out, out=d_value)
            d_products = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _product(d_products, key, ctx.scale, out=d_query)
            _product(d_products.mT, query, ctx.scale, out=d_key)
        result = gradients.index_select(0, plan.gradients)
        if plan.shared is not None:
            where, (count, groups, keys, prefix) = plan.shared
            rows = places[len(plan.parts)].view(2, count, groups, keys, width)
            result.index_add_(0, where, rows[:, :, :, :prefix].sum(1).view(-1, width))
        return result.view(len(gradient), -1, width).to(gradient.dtype), None, None, None, None


def _product(
    one: Tensor, other: Tensor, scale: float, added: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``scale * one @ other + added``."""
    beta = 0 if added is None else 1
    return torch.baddbmm(one.new_empty(1) if added is None else added, one, other, beta=beta, alpha=scale, out=out)


class _Shape(NamedTuple):
    """H heads of queries in K groups, which see as many positions as ``window`` (None: all)."""

    heads: int
    groups: int
    window: int | None

    @property
    def all(self) -> int:
        """Heads of queries, keys and values."""
        return self.heads + 2 * self.groups


def _make_plan(rows: Rows, shape: _Shape, dtype: torch.dtype) -> _Plan:
    """Made once for an update, and in numpy: no operators of torch for so many small steps."""
    heads, groups, _ = shape
    count, longest, prefix = len(rows.counts), rows.longest, rows.prefix
    first: np.ndarray = np.arange(prefix)
    # Of each packed position: in the prefix, or among padded rows.
    place = np.concatenate([first, prefix + np.from_dlpack(rows.unpadded)])
    padded = prefix + np.from_dlpack(rows.padded)
    if rows.order is not None and rows.place is not None:
        order = np.from_dlpack(rows.order)
        place, padded, first = place[np.from_dlpack(rows.place)], order[padded], order[:prefix]
    seen = np.concatenate([np.broadcast_to(first, (count, prefix)), padded], 1)
    keys = prefix + longest

    is_padding = np.arange(longest) >= np.array(rows.counts)[:, None]
    mask = _causal(longest, keys, prefix, shape) if rows.causal else ~is_padding.repeat(groups, 0)[:, None]
    parts = [_part(padded, seen, shape, torch.from_numpy(is_padding.repeat(heads, 0).reshape(-1, 1)), mask, dtype)]
    if prefix:
        mask = _causal(prefix, prefix, 0, shape)
        parts.append(_part(first[None], first[None], shape, None, mask, dtype))

    # All results stand in the order row, head, step, and those of the prefix behind; so do the gradients of queries,
    # and then those of keys and of values, in the order row, group, step.
    place = place[:, None]
    is_first = place < prefix
    row, step = np.divmod(np.maximum(place - prefix, 0), longest)
    head, group = np.arange(heads), np.arange(groups)
    begin = count * heads * longest
    outputs = np.where(is_first, begin + head * prefix + place, (row * heads + head) * longest + step)
    gradients, begin = [outputs], begin + heads * prefix
    for kind in range(2):
        own = begin + ((kind * count + row) * groups + group) * keys + prefix + step
        of_prefix = begin + 2 * count * groups * keys + (kind * groups + group) * prefix + place
        gradients.append(np.where(is_first, of_prefix, own))
    shared = None
    if prefix:
        stacked = np.arange(heads, shape.all)[:, None]
        shared = (_flat(first * shape.all + stacked), (count, groups, keys, prefix))
    return _Plan(parts, _flat(outputs), _flat(np.concatenate(gradients, 1)), shared)


def _causal(queries: int, keys: int, offset: int, shape: _Shape) -> np.ndarray:
    """``[1, H / K x queries, keys]`` bool, True where query i of a head, at place offset + i, sees key j."""
    mask = sees(np.arange(queries)[:, None] + offset, np.arange(keys), shape.window)
    return np.tile(mask, (shape.heads // shape.groups, 1))[None]


def _part(
    queries: np.ndarray,
    keys: np.ndarray,
    shape: _Shape,
    is_padding: Tensor | None,
    mask: np.ndarray,
    dtype: torch.dtype,
) -> _Part:
    """Of packed places ``[R, M']`` of the queries and ``[R, T]`` of the keys, who may see whom of them in ``mask``."""
    heads, groups, _ = shape
    head = np.arange(heads)[:, None]
    group = np.arange(heads, shape.all).reshape(2, 1, groups, 1)
    return _Part(
        _flat(queries[:, None] * shape.all + head),
        _flat(keys[:, None] * shape.all + group),
        _flat(queries[:, None] * heads + head),
        is_padding,
        torch.from_numpy(np.where(mask, 0.0, torch.finfo(dtype).min)).to(dtype),
        len(queries) * groups,
    )


def _flat(places: np.ndarray) -> Tensor:
    return torch.from_numpy(places.reshape(-1))
