"""Tries decoder layers that are known against the LLM's own, on the device and in the precision where they will run."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blspkd_fairseq.data.batch import Layout, PlanRow, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules.decoder_block import KnownDecoder
from blspkd_fairseq.modules.packed_llm import packed_rows, read_packed, relative_difference, watched_attention
from blspkd_fairseq.modules.partial_lora import PartialLoraLinear, SpeechPlaces, speech_positions

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02  # relative, of one layer; TF32 makes .003, what is wrong makes 1
_TOLERANCE_HALF = 0.1
_MANY_LAYERS = 4  # times as much after all of them


def known_decoder(llm: PreTrainedModel) -> KnownDecoder | None:
    """The layers of an LLM that reads packed rows, if they are known and their numbers are the LLM's own.

    Each layer's output and the gradients of its input and of Partial LoRA are compared, where the LLM is now. If they
    differ or cannot be computed, the log says why, and the layers run as transformers has them.
    """
    if not KnownDecoder.fits(llm):
        return None
    try:
        with watched_attention(llm) as calls, _stirred_lora(llm):
            return _tried(llm, calls)
    except Exception as error:  # whatever a kernel of this device raises
        reason = f"{type(error).__name__}: {error}"
        logger.warning(f"the LLM's layers run as transformers has them, which takes more time and memory ({reason})")
        return None


def _tried(llm: PreTrainedModel, calls: dict[int, Any]) -> KnownDecoder:
    """The known layers.

    Raises:
        Exception: they are not the LLM's, or do not run here.
    """
    layout, layers = _layout(llm), llm.get_decoder().layers
    with torch.no_grad():
        embeds = llm.get_input_embeddings()(layout.ids)
    mask = SpeechPlaces(layout.speech, (1, len(embeds))) if hasattr(llm, "partial_lora_state") else None
    # Without LoRA, each layer is near enough to the one before that rounding stays small over all of them.
    with speech_positions(llm, None), torch.no_grad(), _inputs_of(layers) as inputs:
        expected = read_packed(llm, embeds, layout.positions, layout.rows)
    missing = set(range(len(layers))) - set(calls)
    if missing:
        raise ValueError(f"layer {min(missing)} calls no attention")
    known = KnownDecoder(llm, calls)
    with speech_positions(llm, None), torch.no_grad():
        whole = relative_difference(known(embeds, layout.positions, layout.rows), expected)
    tolerance = _TOLERANCE_HALF if embeds.dtype.itemsize < 4 else _TOLERANCE
    if not whole < _MANY_LAYERS * tolerance:
        raise ValueError(f"hidden states differ by {whole:.1e}")
    for number, (layer, (args, options)) in enumerate(zip(layers, inputs, strict=True)):
        one_layer = speech_positions(llm, mask, whole=False)
        with packed_rows(llm.get_decoder().config, layout.rows), one_layer, torch.enable_grad():
            hidden = args[0].detach().requires_grad_()
            theirs = _with_gradients(layer, hidden, layer(hidden, *args[1:], **options))
            hidden = hidden.detach().squeeze(0).requires_grad_()
            ours = _with_gradients(layer, hidden, known.run_layer(number, hidden, layout.positions, layout.rows))
        worst = max(relative_difference(*pair) for pair in zip(ours, theirs, strict=True))
        if not worst < tolerance:
            raise ValueError(f"layer {number} or its gradient differs by {worst:.1e}")
    return known


@contextmanager
def _inputs_of(layers: Iterable[nn.Module]) -> Iterator[list[tuple[Any, Any]]]:
    """The arguments with which layers are called, one after another."""
    inputs: list[tuple[Any, Any]] = []
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda _, *given: inputs.append(given), with_kwargs=True)
            stack.callback(hook.remove)
        yield inputs


def _with_gradients(layer: Any, hidden: Tensor, output: Tensor) -> list[Tensor]:
    """A layer's output ``[N, D]``, and the gradients of its input and of LoRA's matrices."""
    lora = [
        matrix.weight
        for module in layer.modules()
        if isinstance(module, PartialLoraLinear)
        for matrix in module.matrices()
        if matrix.weight.requires_grad
    ]
    weights = torch.arange(output.numel(), device=output.device).cos().view_as(output).to(output.dtype)
    gradient, *others = torch.autograd.grad(output, [hidden, *lora], weights)
    return [output.detach().flatten(0, -2), gradient.flatten(0, -2), *others]


def _layout(llm: PreTrainedModel) -> Layout:
    """Rows of different lengths that share a prefix, with speech in both."""
    ids = [number % llm.get_input_embeddings().num_embeddings for number in range(14)]
    rows = [
        PlanRow([ids[:2], Speech(0), ids[2:4]], [ids[4:7]], [1], ids[7:9], [0]),
        PlanRow([ids[:2], Speech(0), ids[3:4]], [ids[9:11]], [1], ids[11:14], [1]),
    ]
    return plan_batch(rows, [3, 2]).to(llm.get_input_embeddings().weight.device).teacher


@contextmanager
def _stirred_lora(llm: PreTrainedModel) -> Iterator[None]:
    """LoRA adds something: at the beginning of a training its second matrices are 0."""
    state = getattr(llm, "partial_lora_state", None)
    weights = [] if state is None else [layer.matrices()[1].weight for layer in state.layers]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.normal_(0.0, 0.1, generator=torch.Generator(weight.device).manual_seed(0))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
