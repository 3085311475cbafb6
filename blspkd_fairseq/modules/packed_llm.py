"""Runs a causal LLM of transformers over packed rows; see :mod:`blspkd_fairseq.data.batch`.

Layers that treat every position by itself do not care where it lies. Attention does, and transformers lets one be put
in its place: for the time of a call the LLM's configuration names :func:`_packed_attention`, which knows the rows. An
LLM that mixes positions in another way (recurrent or convolutional layers, relative positions in the logits) is found
out by a trial and reads padded rows instead, each with the whole prefix: the same numbers, more slowly.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention import attend
from blspkd_fairseq.modules.decoder_block import KnownDecoder, LayerAttention

logger = logging.getLogger(__name__)

_NAME = "packed_rows"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
TOLERANCE = 0.05  # of a trial, relative; bfloat16 alone makes .01, a row that sees another one makes 1


class _Active:
    """The rows of the call that runs now; the backward pass of a checkpointed layer, on another thread, asks, too."""

    rows: Rows | None = None
    calls: dict[int, LayerAttention] | None = None  # of the layers, while a trial runs


@contextmanager
def packed_rows(config: PreTrainedConfig, rows: Rows | None) -> Iterator[None]:
    """Lets the attention of the model with this configuration see these rows in the calls inside of the block."""
    outer = _Active.rows, config._attn_implementation
    _Active.rows = rows
    if rows is not None:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        _Active.rows, config._attn_implementation = outer


def active_rows() -> Rows | None:
    """The rows of the innermost :func:`packed_rows`."""
    return _Active.rows


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the place of transformers' attention functions; query, key and value are ``[1, heads, N, d]``."""
    rows = _Active.rows
    if rows is None or attention_mask is not None or position_bias is not None:
        raise ValueError("packed rows: this attention has a mask or a bias of its own")
    if not rows.causal == (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("packed rows: this attention does not look where the rows say")
    if _Active.calls is not None:
        _Active.calls[int(module.layer_idx)] = LayerAttention(scaling, sliding_window)  # type: ignore[arg-type]
    query, key, value = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    out = attend(query, key, value, rows, scaling, sliding_window, softcap, s_aux, dropout)
    return out.unsqueeze(0), None


AttentionInterface.register(_NAME, _packed_attention)


def read_packed(
    llm: PreTrainedModel, embeds: Tensor, positions: Tensor, rows: Rows, known: KnownDecoder | None = None
) -> Tensor:
    """Hidden states ``[N, D]`` before the output head, of input embeddings ``[N, D]`` at ``positions`` [N].

    With a decoder whose layers are known (:mod:`.decoder_trial`), where that can run: the same numbers in fewer steps.
    """
    if known is not None and known.reads(llm, embeds):
        return known(embeds, positions, rows)
    with packed_rows(llm.get_decoder().config, rows):
        output = llm.get_decoder()(
            inputs_embeds=embeds.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
        )
    hidden: Tensor = output.last_hidden_state.squeeze(0)
    return hidden


def read_padded(llm: PreTrainedModel, embeds: Tensor, rows: Rows) -> Tensor:
    """As :func:`read_packed`, of rows padded on the right, each with the whole prefix."""
    index, place = padded_places(rows)
    padded = embeds.index_select(0, index.flatten()).view(*index.shape, -1)
    with packed_rows(llm.get_decoder().config, None):
        hidden = llm.get_decoder()(inputs_embeds=padded, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, place)


def padded_places(rows: Rows) -> tuple[Tensor, Tensor]:
    """Between packed and padded order.

    Returns:
        ``[R, prefix + longest]`` packed place of each padded one (padding repeats some), and ``[N]`` the flat padded
        place of each packed one, the prefix's in the first row.
    """
    width = rows.prefix + rows.longest
    within = torch.arange(rows.prefix, device=rows.lengths.device)
    index = torch.cat([within.expand(len(rows.counts), -1), rows.prefix + rows.padded], 1)
    place = torch.cat([within, rows.row * width + rows.prefix + rows.within])
    if rows.order is None or rows.place is None:
        return index, place
    return rows.order[index], place[rows.place]


# ---- whether an LLM can ---------------------------------------------------------------------------------------------


class _Trial(NamedTuple):
    """Two rows of a few words, and the arguments with which they are read."""

    embeds: Tensor
    positions: Tensor
    rows: Rows


@torch.no_grad()
def _trial(llm: PreTrainedModel) -> _Trial:
    table = llm.get_input_embeddings()
    device = table.weight.device
    ids = torch.arange(10, device=device) % table.num_embeddings
    positions = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4, 5, 6], device=device)
    return _Trial(table(ids), positions, Rows(torch.tensor([3, 5], device=device), (3, 5), prefix=2))


@contextmanager
def watched_attention(llm: PreTrainedModel) -> Iterator[dict[int, LayerAttention]]:
    """In evaluation, how the layers call their attention."""
    modes = [(module, module.training) for module in llm.modules()]
    _Active.calls = {}
    llm.eval()
    try:
        yield _Active.calls
    finally:
        _Active.calls = None
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def can_read_packed(llm: PreTrainedModel) -> bool:
    """Tries whether packed rows give the LLM's own hidden states, windows of attention included."""
    config = llm.get_decoder().config
    types = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if types - _LAYER_TYPES:
        return False
    trial = _trial(llm)
    with watched_attention(llm) as calls:
        try:
            expected = read_padded(llm, trial.embeds, trial.rows)
            packed = read_packed(llm, *trial)
        except Exception as error:  # whatever an architecture raises that has another kind of attention
            logger.info(f"the LLM reads padded rows ({type(error).__name__}: {error})")
            return False
    if {layer: call.window for layer, call in calls.items()} != _expected_windows(config):
        logger.info("the LLM reads padded rows (its attention does not tell its windows)")
        return False
    return relative_difference(packed, expected) < TOLERANCE


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Of the norm, to what is expected."""
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-9))


def _expected_windows(config: Any) -> dict[int, int | None]:
    """The window of each layer, by the configuration."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {i: window if kind == "sliding_attention" else None for i, kind in enumerate(types)}
