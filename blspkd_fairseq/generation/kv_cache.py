"""Keys and values of rows that come and go: rows of transformers' caches, taken out, cut, and put side by side.

Rows end in the same column: shorter ones are padded on the left, where nobody looks. Layers of full and of sliding
attention can be taken apart by rows; recurrent states cannot be cut, and caches that hold them stay as they are.
A step of decoding writes its column behind the others (:class:`GrowingLayer`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64  # columns: of so many steps one copies all keys and values, as every step of a DynamicLayer does


class GrowingLayer(DynamicLayer):
    """Keys and values of all positions, with room behind them.

    ``keys`` and ``values`` show what is filled. Who puts others in their place, as beam search does, is right, and gets
    new room at the next step; no gradient goes through them.
    """

    keys: Any
    values: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rooms = (_Room(), _Room())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._rooms[0].append(self.keys, key_states)
        self.values = self._rooms[1].append(self.values, value_states)
        return self.keys, self.values


class _Room:
    """A tensor ``[B, H, T, D]`` of which the first columns are filled."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._filled: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """``held`` and behind it ``new``; where ``held`` is what this gave before, only ``new`` is written."""
        begin = held.shape[2] if held.numel() else 0
        end = begin + new.shape[2]
        if self._whole is None or held is not self._filled or end > self._whole.shape[2]:
            self._whole = new.new_empty(*new.shape[:2], end + _ROOM, new.shape[3])
            if begin:
                self._whole[:, :, :begin] = held
        self._whole[:, :, begin:end] = new
        self._filled = self._whole[:, :, :end]
        return self._filled


def give_room(cache: Any) -> Any:
    """The same cache, whose layers of full attention grow in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = GrowingLayer()
            cache.layers[index].update(layer.keys, layer.values)
    return cache


def has_plain_layers(cache: Any) -> bool:
    """Whether all layers hold keys and values alone, of all positions or of the last ones."""
    return all(type(layer) in (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def can_cut(cache: Any, length: int, width: int) -> bool:
    """Whether the first ``length`` of ``width`` columns are all there: a window that has slid has lost some."""
    return has_plain_layers(cache) and all(
        length == width or not layer.is_sliding or width < layer.sliding_window for layer in cache.layers
    )


def take_row(cache: Any, row: int, length: int) -> Cache:
    """A cache of one row, of the last ``length`` columns."""
    return Cache(layers=[_of_layer(layer, [_fit(layer, length, slice(row, row + 1))]) for layer in cache.layers])


def cut_to(cache: Any, length: int) -> Cache:
    """A cache of the first ``length`` columns; see :func:`can_cut`."""
    return Cache(layers=[_first_columns(layer, length) for layer in cache.layers])


def keep_rows(cache: Any, rows: Sequence[int], width: int) -> Any:
    """The cache of some rows and of the last ``width`` columns; one with other layers keeps all columns."""
    if not has_plain_layers(cache):
        cache.reorder_cache(torch.tensor(rows))
        return cache
    chosen = torch.tensor(rows)
    return Cache(layers=[_of_layer(layer, [_fit(layer, width, chosen)]) for layer in cache.layers])


def join(caches: Sequence[Any], width: int) -> Cache:
    """One cache of ``width`` columns with the rows of all, one after another."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return Cache(layers=[_of_layer(same[0], [_fit(layer, width) for layer in same]) for same in layers])


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "is_initialized", False)
    )


_Columns = tuple[Tensor, Tensor, int] | None
"""Keys and values ``[B, H, T, D]`` of a layer and the columns that it has seen; None: it holds nothing itself."""


def _fit(layer: Any, width: int, rows: Any = slice(None)) -> _Columns:
    """Keys and values of the last ``width`` columns, or as many of them as a sliding window keeps."""
    if not layer.is_initialized:
        return None
    kept = min(width, layer.sliding_window - 1) if layer.is_sliding else width
    return _align(layer.keys[rows], kept), _align(layer.values[rows], kept), width


def _align(states: Tensor, width: int) -> Tensor:
    columns = states.shape[2]
    if columns >= width:
        return states[:, :, columns - width :]
    return torch.nn.functional.pad(states, (0, 0, width - columns, 0))


def _first_columns(layer: Any, length: int) -> Any:
    whole = None if not layer.is_initialized else (layer.keys[:, :, :length], layer.values[:, :, :length], length)
    return _of_layer(layer, [whole])


def _of_layer(layer: Any, rows: Sequence[_Columns]) -> Any:
    """A layer of the same kind with these rows."""
    new = DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else GrowingLayer()
    held = [one for one in rows if one is not None]
    if held:
        new.lazy_initialization(held[0][0], held[0][1])
        # `cat` copies a single tensor, too: a slice would keep the rows alive that have left.
        new.keys = torch.cat([keys for keys, _, _ in held])
        new.values = torch.cat([values for _, values, _ in held])
        if layer.is_sliding:
            new.cumulative_length = held[0][2]
    return new
