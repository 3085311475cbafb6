"""Rows of different lengths without padding, and back, without asking the device how long they are."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from blspkd_fairseq.data.batch import Rows


class Ragged(NamedTuple):
    """Attributes: ``values`` [N, D], rows end to end; ``rows``, their lengths and who attends to whom."""

    values: Tensor
    rows: Rows


def rows_of(lengths: Tensor, counts: Sequence[int] | None = None) -> Rows:
    """Rows that see all of themselves.

    Args:
        lengths: ``[R]`` int64.
        counts: the same numbers, where they are known; otherwise the device is asked.
    """
    return Rows(lengths, tuple(lengths.tolist() if counts is None else counts), causal=False)


def pack(padded: Tensor, rows: Rows) -> Tensor:
    """``[N, D]`` of ``padded`` [R, T, D] with T >= the longest row."""
    return padded.flatten(0, 1).index_select(0, rows.row * padded.shape[1] + rows.within)


def pad(values: Tensor, rows: Rows) -> Tensor:
    """``[R, longest, D]`` of ``values`` [N, D], zeros on padding; the inverse of :func:`pack`."""
    if not len(values):
        return values.new_zeros(len(rows.counts), rows.longest, values.shape[1])
    return values[rows.padded].masked_fill(rows.is_padding.unsqueeze(2), 0.0)


def crop(ragged: Ragged, rows: Rows) -> Ragged:
    """The first ``rows.lengths`` of each row."""
    return Ragged(ragged.values.index_select(0, ragged.rows.begins[rows.row] + rows.within), rows)
