"""Partial LoRA: low-rank updates that act on speech positions only (BLSP-KD sec. 3.3; InternLM-XComposer2).

The LLM reading text stays the LLM bit for bit, so the same weights serve as teacher (no mask) and student (a mask of
the speech positions). Which positions are speech is set for the forward calls inside a ``with`` block::

    add_partial_lora(llm, rank=16)
    with speech_positions(llm, mask):          # mask [B, L] bool
        student = llm(inputs_embeds=embeds)    # [B, L, D]
    teacher = llm(input_ids)                   # the base LLM
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blspkd_fairseq import compat
from blspkd_fairseq.modules.packed_llm import active_rows, packed_rows


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


class _MaskState:
    """The mask in force, shared by all layers of one LLM. No module: it must not appear in state dicts."""

    def __init__(self) -> None:
        self.mask: SpeechPlaces | AllPositions | None = None
        self.products: torch.dtype | None = None  # of LoRA; None: float32, or what the layer's input has on a GPU
        self._input: Tensor | None = None
        self._version = -1
        self._fork: tuple[Tensor, Tensor] | None = None

    def set(self, mask: PositionMask) -> None:
        """The places of a mask are found once, for all layers: on a GPU each search waits for the device."""
        if isinstance(mask, Tensor):
            mask = SpeechPlaces(mask.flatten().nonzero()[:, 0], tuple(mask.shape))
        self.mask = mask
        self._input = self._fork = None

    def fork(self, x: Tensor, dropout: nn.Module) -> tuple[Tensor, Tensor]:
        """``x``, and its speech positions ``[S, D]``, gathered and dropped out once for all layers that read x."""
        if self._fork is None or self._input is not x or self._version != x._version:
            assert self.mask is not None
            places = None if isinstance(self.mask, AllPositions) else self.mask.places
            dtype = self.products or (x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32))
            same, speech = _Fork.apply(x, places, dtype)
            self._input, self._version, self._fork = x, x._version, (same, dropout(speech))
        return self._fork


class _Fork(torch.autograd.Function):
    """An input, and a copy of its speech positions; in backward the gradient of these is added to that of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: int | Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.places = places
        ctx.set_materialize_grads(False)
        flat = x.flatten(0, -2)
        if isinstance(places, Tensor):
            speech = flat.index_select(0, places)
        else:
            speech = flat if places is None else flat[:places]
        return x.view_as(x), speech.to(dtype, copy=not isinstance(places, Tensor))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_speech: Tensor | None) -> tuple[Tensor | None, None, None]:
        if d_speech is None or d_x is None:
            return d_x, None, None
        # In place: d_x is the sum of what the frozen layers gave back, and nobody else's.
        flat = d_x.contiguous().view(-1, d_x.shape[-1])
        if isinstance(ctx.places, Tensor):
            flat.index_add_(0, ctx.places, d_speech.to(flat.dtype))
        else:
            flat[: ctx.places].add_(d_speech)
        return flat.view_as(d_x), None, None


class _AddDelta(torch.autograd.Function):
    """Adds ``scale * speech @ down.T @ up.T`` to the speech positions of ``result``, in place."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, speech: Tensor, down: Tensor, up: Tensor, scale: float, places: int | Tensor | None
    ) -> Tensor:
        low = speech @ down.to(speech.dtype).t()
        ctx.save_for_backward(speech, low, down, up)
        ctx.scale, ctx.places = scale, places
        ctx.mark_dirty(result)
        flat, wide = result.view(-1, result.shape[-1]), up.to(speech.dtype).t()
        if isinstance(places, Tensor):
            flat.index_add_(0, places, (low @ wide).mul_(scale).to(result.dtype))
        elif result.dtype == speech.dtype:
            flat[:places].addmm_(low, wide, alpha=scale)
        else:
            flat[:places].add_((low @ wide).mul_(scale).to(result.dtype))
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        speech, low, down, up = ctx.saved_tensors
        flat = d_result.flatten(0, -2)
        d_delta = flat.index_select(0, ctx.places) if isinstance(ctx.places, Tensor) else flat[: ctx.places]
        d_delta = d_delta.to(speech.dtype)
        d_low = (d_delta @ up.to(speech.dtype)).mul_(ctx.scale)
        d_up = (d_delta.t() @ low).mul_(ctx.scale).to(up.dtype) if ctx.needs_input_grad[3] else None
        d_down = (d_low.t() @ speech).to(down.dtype) if ctx.needs_input_grad[2] else None
        d_speech = d_low @ down.to(speech.dtype) if ctx.needs_input_grad[1] else None
        return d_result, d_speech, d_down, d_up, None, None


class PartialLoraLinear(LoraLinear):
    """peft's LoRA layer, its delta computed and added at speech positions only.

    Elsewhere, and everywhere without a mask, the result is the frozen layer's own, bit for bit.
    """

    mask_state: _MaskState
    takes_flat_input: bool
    """True if ``[B*L, D]`` input matches the mask (OPT). False in experts, which see only tokens routed to them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x: B x L x D
        mask = self.mask_state.mask
        if mask is None or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if isinstance(mask, SpeechPlaces):
            self._check_shape(x, mask.shape)
        places = None if isinstance(mask, AllPositions) else mask.places
        x, speech = self.mask_state.fork(x, self.lora_dropout[self.active_adapters[0]])
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            result = _AddDelta.apply(result, speech, down, up, self.scaling[name], places)
        return result

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


def speech_positions(llm: nn.Module, mask: PositionMask) -> AbstractContextManager[None]:
    """Switches Partial LoRA on at the positions where ``mask`` [B, L] is true, for the forward calls inside the block.

    ``None`` switches it off and :data:`ALL_POSITIONS` on everywhere; :class:`SpeechPlaces` says where without a mask.
    The mask must have the shape of every forward call inside the block; a layer raises a ``ValueError`` otherwise.
    Blocks nest; the outer mask returns at the end.
    """
    if not isinstance(mask, (Tensor, SpeechPlaces, AllPositions, type(None))):
        raise ValueError(f"the speech mask must be a tensor [B, L], ALL_POSITIONS or None, not a {type(mask).__name__}")
    state = getattr(llm, "partial_lora_state", None)
    if state is None:
        if mask is None:
            return nullcontext()
        raise ValueError("this LLM has no Partial LoRA: call add_partial_lora first")
    return _masked(state, mask.bool() if isinstance(mask, Tensor) else mask)


@contextmanager
def _masked(state: _MaskState, mask: PositionMask) -> Iterator[None]:
    outer = state.mask
    state.set(mask)
    try:
        yield
    finally:
        state.set(outer)


def enable_gradient_checkpointing(llm: PreTrainedModel) -> None:
    """Turns on gradient checkpointing so that mask and rows of a forward call are also those of its recomputation.

    The recomputation runs during backward, when the block of :func:`speech_positions` has long ended.
    """
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _as_now(llm))}
    compat.checkpoint_activations(llm, options)


def _as_now(llm: PreTrainedModel) -> AbstractContextManager[None]:
    """Brings back, later, what is in force now."""
    state, rows = getattr(llm, "partial_lora_state", None), active_rows()
    mask = None if state is None else state.mask

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(packed_rows(llm.get_decoder().config, rows))
            if state is not None:
                stack.enter_context(_masked(state, mask))
            yield

    return again()
