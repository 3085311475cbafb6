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
from typing import Any, Final

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blspkd_fairseq import compat


class AllPositions:
    """Type of :data:`ALL_POSITIONS`."""


ALL_POSITIONS: Final = AllPositions()
"""In place of a mask: every position, cached decoding steps included, which is ordinary LoRA (for the ablation)."""

PositionMask = Tensor | AllPositions | None


class _MaskState:
    """The mask in force, shared by all layers of one LLM. No module: it must not appear in state dicts."""

    def __init__(self) -> None:
        self.mask: PositionMask = None
        self.places: Tensor | None = None  # of the mask's true positions among all B x L

    def set(self, mask: PositionMask) -> None:
        """The places are found once, for all layers: on a GPU each search waits for the device."""
        self.mask = mask
        self.places = mask.flatten().nonzero()[:, 0] if isinstance(mask, Tensor) else None


class PartialLoraLinear(LoraLinear):
    """peft's LoRA layer, its delta computed and added at speech positions only.

    Elsewhere, and everywhere without a mask, the result is the frozen layer's own, bit for bit.
    """

    mask_state: _MaskState
    takes_flat_input: bool
    """Some LLMs (OPT) flatten positions to [B x L]. The inputs of an expert are flat, too, but not those of all."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x: B x L x D
        mask = self.mask_state.mask
        if mask is None or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if isinstance(mask, AllPositions):
            return super().forward(x, *args, **kwargs)
        if mask.shape != x.shape[:-1] and not (self.takes_flat_input and x.shape[:-1] == (mask.numel(),)):
            raise ValueError(
                f"the speech mask is {tuple(mask.shape)} but the layer's input has positions {tuple(x.shape[:-1])}: "
                "set the mask of exactly this forward call (None for cached decoding steps, which see text only)"
            )
        result = self.base_layer(x, *args, **kwargs)
        places = self.mask_state.places
        assert places is not None
        speech = x.flatten(0, -2).index_select(0, places)
        for name in self.active_adapters:
            down, up = self.lora_A[name], self.lora_B[name]
            delta = up(down(self.lora_dropout[name](speech.to(down.weight.dtype)))) * self.scaling[name]
            result = result.flatten(0, -2).index_add(0, places, delta.to(result.dtype)).view_as(result)
        return result

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

    ``None`` switches it off and :data:`ALL_POSITIONS` on everywhere. The mask must have the shape of every forward call
    inside the block; a layer raises a ``ValueError`` otherwise. Blocks nest; the outer mask returns at the end.
    """
    if not isinstance(mask, (Tensor, AllPositions, type(None))):
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
    """Turns on gradient checkpointing so that the mask of a forward call is also that of its recomputation.

    The recomputation runs during backward, when the block of :func:`speech_positions` has long ended.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    state = getattr(llm, "partial_lora_state", None)
    if state is not None:
        options["context_fn"] = lambda: (nullcontext(), _masked(state, state.mask))
    compat.checkpoint_activations(llm, options)
