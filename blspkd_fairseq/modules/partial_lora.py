"""Partial LoRA: low-rank updates that act on speech positions only (BLSP-KD sec. 3.3; InternLM-XComposer2).

The LLM reading text stays the LLM bit for bit, so the same weights serve as teacher (no mask) and student (a mask of
the speech positions). Which positions are speech is set for the forward calls inside a ``with`` block::

    add_partial_lora(llm, rank=16)
    with speech_positions(llm, mask):          # mask [B, L] bool
        student = llm(inputs_embeds=embeds)    # [B, L, D]
    teacher = llm(input_ids)                   # the base LLM
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blspkd_fairseq.modules.quantized import frozen_weight


class AllPositions:
    """Type of :data:`ALL_POSITIONS`."""


ALL_POSITIONS: Final = AllPositions()
"""In place of a mask: every position, cached decoding steps included, which is ordinary LoRA (for the ablation)."""


class SpeechPlaces(NamedTuple):
    """In place of a mask: speech positions whose places are known, which spares a search on the device.

    Attributes:
        places: how many of the first positions are speech; or ``[S]`` indices among the flattened positions.
        shape: of the forward call's positions, such as (B, L).
    """

    places: int | Tensor
    shape: tuple[int, ...]


PositionMask = Tensor | SpeechPlaces | AllPositions | None


class _Speech(NamedTuple):
    """What layers that read one input share: its speech positions ``[S, D]``, and which entries dropout kept."""

    values: Tensor
    kept: Tensor | None


class _MaskState:
    """The mask in force, shared by all layers of one LLM. No module: it must not appear in state dicts."""

    def __init__(self) -> None:
        self.mask: SpeechPlaces | AllPositions | None = None
        self.whole = True  # calls run all layers, and not one that is recomputed
        self.products: torch.dtype | None = None  # of LoRA; None: float32, or what the layer's input has on a GPU
        self.layers: list[PartialLoraLinear] = []
        self._input: Tensor | None = None
        self._version = -1
        self._speech: _Speech | None = None
        self._copies: dict[int, Tensor] = {}  # of trained matrices, in the dtype of products, each taken once

    def set(self, mask: PositionMask, whole: bool = True) -> None:
        """The places of a mask are found once, for all layers: on a GPU each search waits for the device."""
        if isinstance(mask, Tensor):
            mask = SpeechPlaces(mask.flatten().nonzero()[:, 0], tuple(mask.shape))
        self.mask, self.whole = mask, whole
        self._input = self._speech = None
        self._copies = {}

    @torch.no_grad()
    def speech(self, x: Tensor, dropout: float) -> _Speech:
        """Speech positions of ``x``, gathered and dropped out once for all layers that read the same ``x``."""
        if self._speech is None or self._input is not x or self._version != x._version:
            places, flat = places_of(self.mask), x.flatten(0, -2)
            # A copy, since a slice would keep all of the input alive until backward.
            values = values_at(flat, places).to(self.products_of(x), copy=not isinstance(places, Tensor))
            kept = None
            if dropout:
                values, kept = torch.native_dropout(values, dropout, True)
            self._input, self._version, self._speech = x, x._version, _Speech(values, kept)
        return self._speech

    def products_of(self, x: Tensor) -> torch.dtype:
        return self.products or (x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32))

    @torch.no_grad()
    def matrix(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A trained matrix in the dtype of products, as it is now.

        All are cast at once, at the first one of a pass; where a layer runs alone, each by itself.

        A copy is given once: whoever asks again is in another pass, before which the weights may have changed.
        Their version counters do not tell: fused and foreach optimisers and ``.data`` leave them as they are.
        """
        if weight.dtype == dtype or not self.whole:
            return weight.to(dtype)
        copy = self._copies.pop(id(weight), None)
        if copy is None or copy.dtype != dtype or copy.device != weight.device:
            weights = [matrix.weight for layer in self.layers for matrix in layer.matrices()]
            copies = [torch.empty_like(one, dtype=dtype) for one in weights]
            torch._foreach_copy_(copies, weights)
            self._copies = dict(zip(map(id, weights), copies, strict=True))
            copy = self._copies.pop(id(weight))
        return copy


def places_of(mask: SpeechPlaces | AllPositions | None) -> int | Tensor | None:
    """Where speech is: how many of the first positions, indices, or None for all of them."""
    return mask.places if isinstance(mask, SpeechPlaces) else None


class _SpeechLinear(torch.autograd.Function):
    """The frozen layer's product, and at the speech positions ``scale * speech @ down.T @ up.T`` besides.

    One step forward and one back, in place of a dozen each: a GPU waits for Python between them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Any,
        speech: _Speech,
        down: Tensor,
        up: Tensor,
        matrices: tuple[Tensor, Tensor],
        scale: float,
        dropout: float,
        places: int | Tensor | None,
    ) -> Tensor:
        narrow, wide = matrices
        result = nn.functional.linear(x, frozen_weight(layer, x.dtype), layer.bias)
        low = speech.values @ narrow.t()
        add_product(result.view(-1, result.shape[-1]), places, low, wide.t(), scale)
        ctx.save_for_backward(speech.values, speech.kept, low, narrow, wide)
        ctx.layer, ctx.scale, ctx.dropout, ctx.places = layer, scale, dropout, places
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        speech, kept, low, narrow, wide = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        d_delta = values_at(flat, ctx.places).to(low.dtype)
        d_low = d_delta @ wide
        if ctx.scale != 1.0:
            d_low.mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = flat @ frozen_weight(ctx.layer, flat.dtype)
            if kept is None:
                add_product(d_x, ctx.places, d_low, narrow, 1.0)
            else:
                d_speech = (d_low @ narrow).mul_(kept).mul_(1.0 / (1.0 - ctx.dropout))
                add_values(d_x, ctx.places, d_speech)
            d_x = d_x.view(*gradient.shape[:-1], -1)
        # In the dtype of products: autograd casts them to that of the weights.
        d_up = d_delta.t() @ low
        if ctx.scale != 1.0:
            d_up.mul_(ctx.scale)
        return d_x, None, None, d_low.t() @ speech, d_up, None, None, None, None


def values_at(values: Tensor, places: int | Tensor | None) -> Tensor:
    """The rows of ``values`` at places."""
    return values.index_select(0, places) if isinstance(places, Tensor) else values[:places]


def add_product(result: Tensor, places: int | Tensor | None, one: Tensor, other: Tensor, scale: float = 1.0) -> None:
    """Adds ``scale * one @ other`` to places of ``result``."""
    if not isinstance(places, Tensor) and result.dtype == one.dtype:
        result[:places].addmm_(one, other, alpha=scale)
    else:
        product = one @ other
        add_values(result, places, product.mul_(scale) if scale != 1.0 else product)


def add_values(result: Tensor, places: int | Tensor | None, values: Tensor) -> None:
    """Adds ``values`` to places of ``result``."""
    if isinstance(places, Tensor):
        result.index_add_(0, places, values.to(result.dtype))
    else:
        result[:places].add_(values)


class PartialLoraLinear(LoraLinear):
    """peft's LoRA layer, its delta computed and added at speech positions only.

    Elsewhere, and everywhere without a mask, the result is the frozen layer's own, bit for bit.
    """

    mask_state: _MaskState
    takes_flat_input: bool
    """True if ``[B*L, D]`` input matches the mask (OPT). False in experts, which see only tokens routed to them."""

    def matrices(self) -> tuple[nn.Linear, nn.Linear]:
        """The trained layers, down and up."""
        name = self.active_adapters[0]
        return self.lora_A[name], self.lora_B[name]

    def dropout_now(self) -> float:
        """The probability of LoRA's dropout, 0 in evaluation."""
        dropout = self.lora_dropout[self.active_adapters[0]]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x: B x L x D
        state = self.mask_state
        if state.mask is None or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if isinstance(state.mask, SpeechPlaces):
            self._check_shape(x, state.mask.shape)
        name, (down, up) = self.active_adapters[0], self.matrices()
        p = self.dropout_now()
        speech, dtype = state.speech(x, p), state.products_of(x)
        matrices = state.matrix(down.weight, dtype), state.matrix(up.weight, dtype)
        base, places = self.get_base_layer(), places_of(state.mask)
        return _SpeechLinear.apply(x, base, speech, down.weight, up.weight, matrices, self.scaling[name], p, places)

    def _check_shape(self, x: Tensor, shape: tuple[int, ...]) -> None:
        positions = tuple(x.shape[:-1])
        if positions != shape and not (self.takes_flat_input and positions == (torch.Size(shape).numel(),)):
            raise ValueError(
                f"the speech mask is {shape} but the layer's input has positions {positions}: "
                "set the mask of exactly this forward call (None for cached decoding steps, which see text only)"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("Partial LoRA acts on speech positions only and cannot be merged into the LLM's weights")


def add_partial_lora(
    llm: PreTrainedModel,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Freezes ``llm`` and adds Partial LoRA to it in place, switched off until :func:`speech_positions`.

    Args:
        llm: any causal LLM of transformers.
        rank, alpha, dropout: of LoRA (arXiv 2106.09685); the delta is scaled by alpha / rank. Defaults of blsp-emo.
        target_modules: names of linear layers such as ``["q_proj", "v_proj"]``; by default every linear layer of the
            decoder, fused or split, but not the output head.

    Returns:
        The same object. Its LoRA parameters are in fp32 and the only ones that require a gradient.

    Raises:
        ValueError: a rank below 1, no layer of the given names, or an LLM that has LoRA already.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"the LoRA dropout must be at least 0 and below 1, got {dropout}")
    if target_modules is not None:
        _check_targets(llm, target_modules)
    if getattr(llm, "partial_lora_state", None) is not None:
        raise ValueError("this LLM has Partial LoRA already")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else _linear_layers(llm),
        bias="none",
    )
    config._register_custom_module({nn.Linear: PartialLoraLinear, Conv1D: PartialLoraLinear})
    llm.requires_grad_(False)
    inject_adapter_in_model(config, llm)

    state = _MaskState()
    llm.partial_lora_state = state
    for name, module in llm.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PartialLoraLinear):
            raise ValueError(
                f"{name} is a {type(module.get_base_layer()).__name__}, to which peft added a LoRA that would act on "
                "text, too: give target_modules linear layers only, and load the LLM anew"
            )
        if isinstance(module, PartialLoraLinear):
            module.mask_state = state
            state.layers.append(module)
            module.takes_flat_input = ".experts." not in name
            module.lora_A.float()
            module.lora_B.float()
    return llm


def lora_alpha(llm: PreTrainedModel) -> float | None:
    """Alpha of the LLM's LoRA, or None if it has none."""
    for module in llm.modules():
        if isinstance(module, PartialLoraLinear):
            return float(module.lora_alpha[module.active_adapters[0]])
    return None


def _check_targets(llm: PreTrainedModel, target_modules: Sequence[str]) -> None:
    """peft passes over a name that fits nothing as long as another fits."""
    layers = _linear_layers(llm)
    unknown = [target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise ValueError(
            f"the LLM has no linear layers named {', '.join(unknown)}: choose target modules from {', '.join(known)}"
        )


def _linear_layers(llm: PreTrainedModel) -> list[str]:
    """Full names of all linear layers but the output head; peft's own choice takes a mixture's fused experts, too."""
    head = llm.get_output_embeddings()
    return [
        name for name, module in llm.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def speech_positions(llm: nn.Module, mask: PositionMask, whole: bool = True) -> AbstractContextManager[None]:
    """Switches Partial LoRA on at the positions where ``mask`` [B, L] is true, for the forward calls inside the block.

    ``None`` switches it off and :data:`ALL_POSITIONS` on everywhere; :class:`SpeechPlaces` says where without a mask.
    The mask must have the shape of every forward call inside the block; a layer raises a ``ValueError`` otherwise.
    Blocks nest; the outer mask returns at the end. With ``whole`` false, calls are of single layers, for which the
    matrices of all others are not prepared.
    """
    if not isinstance(mask, (Tensor, SpeechPlaces, AllPositions, type(None))):
        raise ValueError(f"the speech mask must be a tensor [B, L], ALL_POSITIONS or None, not a {type(mask).__name__}")
    state = getattr(llm, "partial_lora_state", None)
    if state is None:
        if mask is None:
            return nullcontext()
        raise ValueError("this LLM has no Partial LoRA: call add_partial_lora first")
    return _masked(state, mask.bool() if isinstance(mask, Tensor) else mask, whole)


@contextmanager
def _masked(state: _MaskState, mask: PositionMask, whole: bool) -> Iterator[None]:
    outer = state.mask, state.whole
    state.set(mask, whole)
    try:
        yield
    finally:
        state.set(*outer)
