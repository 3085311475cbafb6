"""An LLM of transformers: attention on a CPU, bars, the name of its cache, recomputed activations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

CPU_ATTENTION = "sdpa_float32_on_cpu"


def use_fast_cpu_attention(llm: Any) -> None:
    """Lets an LLM in bfloat16 or float16 compute attention in float32 while it is on a CPU.

    torch's fused attention for the CPU takes 15.7 ms for a backward pass in bfloat16 that takes 3.5 ms in float32
    (torch 2.13, 16 x 9 heads, 35 queries, 66 keys), a sixth of a whole training step. Decoding has no backward pass,
    and copies of all keys and values in float32 would cost a step more than their product. On a GPU nothing changes,
    nor for an LLM that does not use it.
    """
    import torch.nn.functional as F
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        dtype = query.dtype
        if query.device.type != "cpu" or not dtype.is_floating_point or dtype.itemsize > 2:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        heads, key_heads, queries = query.shape[1], key.shape[1], query.shape[2]
        is_plain = all(options.get(name) is None for name in ("softcap", "position_bias"))
        has_one_mask = mask is None or mask.shape[1] == 1
        if queries == 1 and heads > key_heads and is_plain and has_one_mask and not query.requires_grad:
            # The heads that share keys ask together.
            grouped = query.reshape(len(query), key_heads, -1, query.shape[3])
            scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
            return out.reshape(len(query), 1, heads, -1), None
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
        return out.to(dtype), weights

    if llm.config._attn_implementation == "sdpa":
        AttentionInterface.register(CPU_ATTENTION, attention)
        AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
        llm.set_attn_implementation(CPU_ATTENTION)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the bar that transformers shows, for each model that it loads, in the midst of a command's own lines."""
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


@functools.cache
def _cache_name() -> str:
    """Finds the name of the cache in the installed transformers: ``past_key_values`` before 5.24, then ``cache``."""
    import dataclasses

    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which an LLM's ``forward`` and ``generate`` take a cache."""
    return {_cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in what an LLM's ``forward`` returned."""
    return getattr(output, _cache_name())


def checkpoint_activations(llm: Any, options: dict[str, Any]) -> None:
    """Lets an LLM recompute its activations in backward, by the method that the installed transformers has."""
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable(options)  # by position: the argument was renamed with the method
