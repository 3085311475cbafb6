"""Decoder layers that are known against the same layers as transformers runs them, forward and backward."""

from typing import Any

import pytest
import torch
from test_llm_families import FAMILIES, make, plan
from torch import Tensor
from transformers import PreTrainedModel

from blspkd_fairseq.modules import packed_llm
from blspkd_fairseq.modules.checkpointing import enable_gradient_checkpointing
from blspkd_fairseq.modules.decoder_block import KnownDecoder
from blspkd_fairseq.modules.fused_norm import rms_norm, rms_norm_backward
from blspkd_fairseq.modules.partial_lora import SpeechPlaces, add_partial_lora, speech_positions
from blspkd_fairseq.modules.speech_llm import ChatLLM

KNOWN = ["llama", "qwen2", "qwen3", "mistral"]


def adapted(kind: str, dropout: float = 0.0, targets: list[str] | None = None, alpha: float = 2.0) -> PreTrainedModel:
    """An LLM whose LoRA does something."""
    llm = make(kind)
    add_partial_lora(llm, rank=2, alpha=alpha, dropout=dropout, target_modules=targets)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name or "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return llm


def read(model: ChatLLM, known: bool, share_prefix: bool = True) -> list[Tensor]:
    """Hidden states, and the gradients of the input and of LoRA."""
    layout = plan(share_prefix).teacher
    decoder = model.known_decoder
    assert decoder is not None
    if not known:
        model.known_decoder = None
    embeds = model.embed(layout.ids).requires_grad_()
    torch.manual_seed(1)  # of dropout
    hidden = model.hidden(embeds, layout, model.speech_places(layout))
    model.known_decoder = decoder
    places = torch.cat([torch.arange(layout.speech), layout.response])
    (hidden[places] * torch.arange(len(places)).unsqueeze(1).cos()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert embeds.grad is not None
    return [hidden.detach(), embeds.grad, *gradients]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "with dropout": {"dropout": 0.3},
    "scaled": {"alpha": 6.0, "dropout": 0.3},
    "some layers": {"targets": ["k_proj", "down_proj"]},
}


@pytest.mark.parametrize("scope", ["speech", "all", "none"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KNOWN)
def test_equals_the_layers_of_transformers(kind: str, case: str, scope: str) -> None:
    model = ChatLLM(adapted(kind, **CASES[case]).train(), scope)
    for expected, actual in zip(read(model, False), read(model, True), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def in_half_precision(dtype: torch.dtype, products: torch.dtype | None, seed: int) -> ChatLLM:
    """The same weights, rounded to bfloat16, in each dtype."""
    llm = adapted("qwen2").train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in llm.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        if "lora_" not in name:
            parameter.data = (parameter.data + ("norm" in name)).bfloat16().to(dtype)
    llm.partial_lora_state.products = products
    return ChatLLM(llm, "speech")


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_float32(products: torch.dtype | None) -> None:
    theirs = ours = 0.0
    for seed in range(6):
        exact = read(in_half_precision(torch.float32, None, seed), False)
        model = in_half_precision(torch.bfloat16, products, seed)
        for right, their, our in zip(exact, read(model, False), read(model, True), strict=True):
            assert our.dtype == their.dtype
            theirs += float((their - right).norm() / right.norm())
            ours += float((our - right).norm() / right.norm())
    assert ours < 1.3 * theirs


def test_only_what_is_known_is_taken() -> None:
    taken = {
        kind for kind in FAMILIES if packed_llm.can_read_packed(make(kind)) and packed_llm.known_decoder(make(kind))
    }
    assert taken == set(KNOWN)


@pytest.mark.parametrize("part", ["", "layers.1", "layers.1.mlp.gate_proj", "norm"])
def test_what_hangs_on_a_module_is_not_passed_over(part: str) -> None:
    llm = make("llama")
    model, seen = ChatLLM(llm), list[Any]()
    model.teach(plan(True).teacher)
    hook = llm.get_decoder().get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    model.teach(plan(True).teacher)
    assert seen
    hook.remove()
    model.teach(plan(True).teacher)
    assert len(seen) == 1


def test_another_activation_is_not_known() -> None:
    llm = make("llama")
    assert KnownDecoder.fits(llm)
    llm.get_decoder().layers[1].mlp.act_fn = torch.nn.GELU()
    assert not KnownDecoder.fits(llm)


def test_layers_that_are_not_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make("llama")
    monkeypatch.setattr(type(llm.get_decoder().layers[0]), "forward", lambda self, x, **_: x + self.mlp(x))
    assert packed_llm.known_decoder(llm) is None


def test_as_the_llm_is_set_up() -> None:
    llm = adapted("llama").train()
    model = ChatLLM(llm, "speech")
    known, embeds = model.known_decoder, torch.zeros(5, 32)
    assert known is not None and known.reads(llm, embeds)
    for mask, can in (
        (SpeechPlaces(2, (1, 5)), True),
        (SpeechPlaces(2, (1, 6)), False),  # the layers say what is wrong
        (torch.tensor([[True, False, True, False, False]]), False),
    ):
        with speech_positions(llm, mask):
            assert known.reads(llm, embeds) == can
    with torch.autocast("cpu", torch.bfloat16):
        assert not known.reads(llm, embeds)
    plain = make("llama")
    before = ChatLLM(plain).known_decoder
    add_partial_lora(plain, rank=2)
    assert before is not None and not before.reads(plain, embeds)
    enable_gradient_checkpointing(llm)
    assert not known.reads(llm, embeds)


def test_the_norm_and_its_gradient() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, gradient = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (5,), weight, 1e-2)
    expected.backward(gradient)
    actual, factor = rms_norm(x.detach(), weight, 1e-2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rms_norm_backward(gradient, x.detach(), factor, weight), x.grad)
