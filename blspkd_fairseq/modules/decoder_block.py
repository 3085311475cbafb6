"""Decoder layers that are known, over packed rows: forward and backward in as few steps as there are products.

The layers of Llama, Mistral, Qwen2 and Qwen3 are RMSNorm, attention with rotary positions, RMSNorm, SwiGLU. Their
weights are frozen but for Partial LoRA, so that a layer's gradient can be written down: two autograd functions around
the attention take the place of some hundred operators, between which a GPU waits for Python. Whether the result is the
LLM's own is tried before (:mod:`blspkd_fairseq.modules.decoder_trial`); other LLMs run as transformers has them.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention import attend_stacked
from blspkd_fairseq.modules.fused_norm import is_plain_norm, norm_eps, rms_norm, rms_norm_backward
from blspkd_fairseq.modules.partial_lora import (
    AllPositions,
    PartialLoraLinear,
    SpeechPlaces,
    add_product,
    add_values,
    values_at,
)

_KNOWN = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayerAttention(NamedTuple):
    """How a layer calls its attention: a factor of the products, and positions that are seen (None: all)."""

    scale: float | None
    window: int | None


class KnownDecoder:
    """The decoder of an LLM, layer by layer.

    Args:
        llm: one that :meth:`fits`.
        attention: of each layer, by its number.
    """

    def __init__(self, llm: PreTrainedModel, attention: Mapping[int, LayerAttention]) -> None:
        self._decoder = llm.get_decoder()
        self._lora = getattr(llm, "partial_lora_state", None)
        layers = self._decoder.layers
        self._blocks = [_Block(layer, attention[i], self._decoder.config) for i, layer in enumerate(layers)]
        self._siblings = [module._modules for module in layers.modules() if module._modules]
        self._parts = _values(self._siblings)
        # What peft keeps for LoRA is read and not called, by transformers' layers, too.
        called = [module for name, module in layers.named_modules() if ".lora_" not in name]
        self._called = [self._decoder, *called]
        linear = [base for block in self._blocks for linears in block.linears for base in linears.bases]
        norms = [norm for block in self._blocks for norm in block.norms]
        self._frozen: list[Any] = [*linear, *norms]
        self._setting = self._setting_now()

    @staticmethod
    def fits(llm: PreTrainedModel) -> bool:
        """Whether all layers are of a kind that is known."""
        decoder = llm.get_decoder()
        if type(decoder).__name__ not in _KNOWN or not type(decoder).__module__.startswith("transformers.models."):
            return False
        weights = list(decoder.layers.parameters())
        frozen = [w for name, w in decoder.layers.named_parameters() if "lora_" not in name]
        return (
            not any("forward" in vars(module) and not is_plain_norm(module) for module in decoder.modules())
            and all(_is_known(layer) for layer in decoder.layers)
            and len({weight.dtype for weight in frozen}) == len({weight.device for weight in weights}) == 1
        )

    def reads(self, llm: PreTrainedModel, embeds: Tensor) -> bool:
        """Whether it can run now, as the LLM is set up; if not, transformers' own layers can."""
        state, first = getattr(llm, "partial_lora_state", None), self._decoder.layers[0]
        mask = None if state is None else state.mask
        is_checkpointed = first.training and getattr(first, "gradient_checkpointing", False)
        drops_out = first.self_attn.training and getattr(first.self_attn, "attention_dropout", 0.0) > 0
        knows_places = not isinstance(mask, SpeechPlaces) or (
            isinstance(mask.places, int) and mask.shape == (1, len(embeds))
        )
        return (
            state is self._lora
            and knows_places
            and not is_checkpointed
            and not drops_out
            and not torch.is_autocast_enabled(embeds.device.type)
            and (embeds.device, embeds.dtype) == self._setting[:2]
            and self._setting_now() == self._setting
            and not self._is_watched()
            and not (torch.is_grad_enabled() and self._is_trained())
        )

    def _setting_now(self) -> tuple[torch.device, torch.dtype, torch.dtype | None]:
        """Where it runs, and in which precision: it is tried in one."""
        weight = self._blocks[0].norm.weight
        return weight.device, weight.dtype, None if self._lora is None else self._lora.products

    def _is_watched(self) -> bool:
        """Whether hooks hang on the modules, or others have taken their place.

        It is asked at each call, of thousands of modules, and so without a step of Python for each.
        """
        return any(chain.from_iterable(map(_HOOKS, self._called))) or _values(self._siblings) != self._parts

    def _is_trained(self) -> bool:
        """Whether a weight beside LoRA's wants a gradient."""
        return any(
            weight is not None and weight.requires_grad for part in self._frozen for weight in part._parameters.values()
        )

    def __call__(self, embeds: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        """Hidden states ``[N, D]`` before the output head, of input embeddings ``[N, D]`` at ``positions`` [N]."""
        call, hidden = self._call(embeds, positions), embeds
        for block in self._blocks:
            hidden = block(hidden, rows, call)
        result: Tensor = self._decoder.norm(hidden)
        return result

    def run_layer(self, number: int, hidden: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        """One layer's output ``[N, D]`` of its input."""
        return self._blocks[number](hidden, rows, self._call(hidden, positions))

    def _call(self, embeds: Tensor, positions: Tensor) -> "_Call":
        cos, sin = self._decoder.rotary_emb(embeds.unsqueeze(0), positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        return _Call(cos.transpose(0, 1), signed.transpose(0, 1), self._speech(embeds))

    def _speech(self, embeds: Tensor) -> "_Speech | None":
        state = self._lora
        if state is None or state.mask is None or state.layers[0].disable_adapters:
            return None
        places = len(embeds) if isinstance(state.mask, AllPositions) else state.mask.places
        dropout = state.layers[0].dropout_now()
        return _Speech(places, state.products_of(embeds), dropout, state)


def _values(parts: Iterable[dict[str, Any]]) -> list[Any]:
    """The values of all, which are compared by identity where they are modules."""
    return list(chain.from_iterable(map(dict.values, parts)))


def _is_known(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    linear = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    linear += [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    bases = [module.get_base_layer() if isinstance(module, PartialLoraLinear) else module for module in linear]
    return (
        all(type(base) is nn.Linear for base in bases)
        and all(map(is_plain_norm, norms))
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


class _Speech(NamedTuple):
    """Where and how Partial LoRA acts: on the first ``places`` positions, or on those; ``state`` has its matrices."""

    places: int | Tensor
    products: torch.dtype
    dropout: float
    state: Any


class _Call(NamedTuple):
    """What all layers of a forward call share; ``cos`` and ``sin`` ``[N, 1, d]``, the first half of sin negated."""

    cos: Tensor
    sin: Tensor
    speech: _Speech | None


class _Block:
    """One layer."""

    def __init__(self, layer: Any, attention: LayerAttention, config: Any) -> None:
        inner = layer.self_attn
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = inner.head_dim
        self.attention = attention
        self.norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = [getattr(inner, name) for name in ("q_norm", "k_norm") if hasattr(inner, name)]
        self.norms = [self.norm, self.second_norm, *self.head_norms]
        self.qkv = _Linears([inner.q_proj, inner.k_proj, inner.v_proj])
        self.out = _Linears([inner.o_proj])
        self.gate_up = _Linears([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = _Linears([layer.mlp.down_proj])
        self.linears = [self.qkv, self.out, self.gate_up, self.down]

    def __call__(self, hidden: Tensor, rows: Rows, call: _Call) -> Tensor:
        adapted = call.speech is not None
        before = self.qkv.trained if adapted else []
        after = [*self.out.trained, *self.gate_up.trained, *self.down.trained] if adapted else []
        stacked = _BeforeAttention.apply(hidden, self, call, *before)
        scale, window = self.attention
        attended = attend_stacked(stacked, self.heads, rows, scale, window)
        return _AfterAttention.apply(attended.flatten(1), hidden, self, call, *after)


class _BeforeAttention(torch.autograd.Function):
    """Hidden states ``[N, D]`` to rotated queries, rotated keys and values ``[N, H + 2 K, d]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: _Block, call: _Call, *trained: Tensor) -> Tensor:
        normed, scale = rms_norm(hidden, block.norm.weight, norm_eps(block.norm))
        stacked, lora = block.qkv.forward(normed, call.speech)
        stacked = stacked.view(len(hidden), -1, block.head_dim)
        heads = []
        for part, norm in _per_head(stacked, block):
            copy = part.clone(memory_format=torch.contiguous_format)  # of one position, the part itself is contiguous
            values, head_scale = rms_norm(copy, norm.weight, norm_eps(norm))
            part.copy_(values)
            heads += [copy, head_scale]
        _rotate(stacked[:, : block.heads + block.groups], call, 1)
        ctx.block, ctx.call, ctx.kept = block, call, len(heads)
        ctx.save_for_backward(hidden, scale, *heads, *lora)
        return stacked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        block, call = ctx.block, ctx.call
        hidden, scale, *saved = ctx.saved_tensors
        heads, lora = saved[: ctx.kept], saved[ctx.kept :]
        gradient = gradient.contiguous()
        # In place: what goes to the attention goes nowhere else, so that nobody holds this gradient besides.
        _rotate(gradient[:, : block.heads + block.groups], call, -1)
        for i, (part, norm) in enumerate(_per_head(gradient, block)):
            part.copy_(rms_norm_backward(part, heads[2 * i], heads[2 * i + 1], norm.weight))
        needs = ctx.needs_input_grad[0]
        d_normed, trained = block.qkv.backward(gradient.flatten(1), call.speech, lora, needs)
        d_hidden = rms_norm_backward(d_normed, hidden, scale, block.norm.weight) if needs else None
        return d_hidden, None, None, *trained


class _AfterAttention(torch.autograd.Function):
    """The attention's output ``[N, H d]`` and the layer's input ``[N, D]`` to the layer's output ``[N, D]``."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, hidden: Tensor, block: _Block, call: _Call, *trained: Tensor) -> Tensor:
        middle, lora_out = block.out.forward(attended, call.speech)
        middle.add_(hidden)
        normed, scale = rms_norm(middle, block.second_norm.weight, norm_eps(block.second_norm))
        gate_up, lora_gate_up = block.gate_up.forward(normed, call.speech)
        gate, up = gate_up.chunk(2, 1)
        opened = F.silu(gate)
        result, lora_down = block.down.forward(opened * up, call.speech)
        ctx.block, ctx.call = block, call
        ctx.save_for_backward(middle, scale, gate_up, opened, *lora_out, *lora_gate_up, *lora_down)
        return result.add_(middle)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        block, speech = ctx.block, ctx.call.speech
        middle, scale, gate_up, opened, *lora = ctx.saved_tensors
        after = (block.out, block.gate_up, block.down)
        lora_out, lora_gate_up, lora_down = _split(lora, [layers.saves(speech) for layers in after])
        d_product, t_down = block.down.backward(gradient, speech, lora_down)
        d_gate_up = torch.empty_like(gate_up)
        (d_gate, d_up), (gate, up) = d_gate_up.chunk(2, 1), gate_up.chunk(2, 1)
        torch.mul(d_product, opened, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        d_normed, t_gate_up = block.gate_up.backward(d_gate_up, speech, lora_gate_up)
        d_middle = rms_norm_backward(d_normed, middle, scale, block.second_norm.weight).add_(gradient)
        d_attended, t_out = block.out.backward(d_middle, speech, lora_out)
        return d_attended, d_middle, None, None, *t_out, *t_gate_up, *t_down


def _per_head(stacked: Tensor, block: _Block) -> list[tuple[Tensor, Any]]:
    """Queries and keys of ``[N, H + 2 K, d]``, each with its norm, if there is one."""
    if not block.head_norms:
        return []
    parts = stacked[:, : block.heads], stacked[:, block.heads : block.heads + block.groups]
    return list(zip(parts, block.head_norms, strict=True))


def _rotate(heads: Tensor, call: _Call, direction: int) -> None:
    """Rotary positions of ``[N, H, d]``, in place; the gradient turns the other way."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(call.cos).addcmul_(swapped, call.sin, value=direction)


class _Linears:
    """Frozen linear layers that read one input, their results side by side, and what Partial LoRA adds to them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.bases = [one.get_base_layer() if isinstance(one, PartialLoraLinear) else one for one in layers]
        ends = list(accumulate(base.out_features for base in self.bases))
        self.parts = [slice(end - base.out_features, end) for end, base in zip(ends, self.bases, strict=True)]
        self.width = ends[-1]
        pairs = zip(self.parts, layers, strict=True)
        self.adapted = [(part, one) for part, one in pairs if isinstance(one, PartialLoraLinear)]

    @property
    def trained(self) -> list[Tensor]:
        """LoRA's matrices, down and up of each layer."""
        return [matrix.weight for _, layer in self.adapted for matrix in layer.matrices()]

    def forward(self, x: Tensor, speech: _Speech | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of ``[N, D]``: ``[N, width]``, and what the gradient needs: LoRA's input, what its dropout kept, and of each
        adapted layer the product with the first matrix, and both matrices."""
        if len(self.bases) == 1:
            result = F.linear(x, self.bases[0].weight, self.bases[0].bias)
        else:
            result = x.new_empty(len(x), self.width)
            for base, part in zip(self.bases, self.parts, strict=True):
                if base.bias is None:
                    torch.mm(x, base.weight.t(), out=result[:, part])
                else:
                    torch.addmm(base.bias, x, base.weight.t(), out=result[:, part])
        if speech is None or not self.adapted:
            return result, ()
        # A copy, since a slice would keep all of the input alive until backward.
        values, kept = values_at(x, speech.places).to(speech.products, copy=True), None
        if speech.dropout:
            values, kept = torch.native_dropout(values, speech.dropout, True)
        saved: list[Tensor | None] = [values, kept]
        for part, layer in self.adapted:
            down, up = (speech.state.matrix(one.weight, speech.products) for one in layer.matrices())
            low = _scaled(torch.mm(values, down.t()), layer)
            add_product(result[:, part], speech.places, low, up.t())
            saved += [low, down, up]
        return result, tuple(saved)

    def saves(self, speech: _Speech | None) -> int:
        """How many tensors :meth:`forward` gives for the gradient."""
        return 0 if speech is None or not self.adapted else 2 + 3 * len(self.adapted)

    def backward(
        self, gradient: Tensor, speech: _Speech | None, saved: Sequence[Any], needs_input: bool = True
    ) -> tuple[Any, list[Tensor]]:
        """Of the gradient ``[N, width]``: that of the input, if it is asked for, and those of :attr:`trained`."""
        d_x: Tensor | None = None
        for base, part in zip(self.bases, self.parts, strict=True) if needs_input else ():
            d_x = (
                torch.mm(gradient[:, part], base.weight) if d_x is None else d_x.addmm_(gradient[:, part], base.weight)
            )
        if speech is None or not saved:
            return d_x, []
        values, kept, *rest = saved
        trained: list[Tensor] = []
        d_values: Tensor | None = None  # before dropout's mask, where there is one
        for i, (part, layer) in enumerate(self.adapted):
            low, down, up = rest[3 * i : 3 * i + 3]
            delta = values_at(gradient[:, part], speech.places).to(low.dtype)
            d_low = _scaled(torch.mm(delta, up), layer)
            trained += [torch.mm(d_low.t(), values), torch.mm(delta.t(), low)]
            if d_x is None:
                continue
            if kept is None:
                add_product(d_x, speech.places, d_low, down)
            else:
                d_values = torch.mm(d_low, down) if d_values is None else d_values.addmm_(d_low, down)
        if d_x is not None and d_values is not None:
            scale = 1.0 / (1.0 - speech.dropout)
            add_values(d_x, speech.places, torch.ops.aten.native_dropout_backward(d_values, kept, scale))
        return d_x, trained


def _scaled(product: Tensor, layer: PartialLoraLinear) -> Tensor:
    scale = layer.scaling[layer.active_adapters[0]]
    return product if scale == 1.0 else product.mul_(scale)


def _split(saved: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = list(accumulate(counts))
    return [saved[end - count : end] for end, count in zip(ends, counts, strict=True)]
