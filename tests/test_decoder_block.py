"""Decoder layers that are known against the same layers as transformers runs them, forward and backward."""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from test_llm_families import FAMILIES, make, plan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from blspkd_fairseq.data.batch import Layout, PlanRow, Rows, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules import attention, fused_norm
from blspkd_fairseq.modules.checkpointing import enable_gradient_checkpointing
from blspkd_fairseq.modules.decoder_block import KnownDecoder, _BeforeAttention
from blspkd_fairseq.modules.decoder_trial import known_decoder
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


def read(model: ChatLLM, known: bool, layout: Layout | None = None, is_text: Tensor | None = None) -> list[Tensor]:
    """Hidden states, and the gradients of the input and of LoRA."""
    layout = plan(True).teacher if layout is None else layout
    decoder = model.known_decoder
    assert decoder is not None
    if not known:
        model.known_decoder = None
    embeds = model.embed(layout.ids).requires_grad_()
    torch.manual_seed(1)  # of dropout
    hidden = model.hidden(embeds, layout, model.speech_places(layout, is_text))
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_where_lora_acts_on_some_of_the_speech(kind: str, case: str) -> None:
    model, layout = ChatLLM(adapted(kind, **CASES[case]).train(), "speech"), plan(True).teacher
    is_text = torch.arange(layout.speech) % 3 == 1
    expected, actual = (read(model, known, layout, is_text) for known in (False, True))
    for right, found in zip(expected, actual, strict=True):
        torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-3)
    everywhere = read(model, True, layout)
    assert not torch.allclose(actual[0], everywhere[0], atol=1e-2)
    nowhere = read(model, True, layout, torch.ones(layout.speech, dtype=torch.bool))
    with torch.no_grad():
        assert len(nowhere) == 2 and torch.equal(nowhere[0], model.hidden(model.embed(layout.ids), layout))


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
    assert {kind for kind in FAMILIES if ChatLLM(make(kind)).known_decoder is not None} == set(KNOWN)


HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize(
    ("part", "kind"),
    # The decoder gives no tensor, for which torch has no backward hooks.
    [*product(["layers.1", "layers.1.mlp.gate_proj", "norm"], HOOKS), ("", HOOKS[0]), ("", HOOKS[1])],
)
def test_what_hangs_on_a_module_is_not_passed_over(part: str, kind: str) -> None:
    llm, seen = make("llama").requires_grad_(False), list[Any]()
    model, layout = ChatLLM(llm), plan(True).teacher

    def update() -> None:
        model.hidden(model.embed(layout.ids).requires_grad_(), layout).sum().backward()

    update()
    hook = getattr(llm.get_decoder().get_submodule(part), f"register_{kind}")(lambda *_: seen.append(1))
    update()
    assert seen
    hook.remove()
    update()
    assert len(seen) == 1


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj.base_layer"])
def test_hooks_beside_lora_are_seen(part: str) -> None:
    llm = adapted("llama")
    known, embeds = ChatLLM(llm, "speech").known_decoder, torch.zeros(5, 32)
    assert known is not None and known.reads(llm, embeds)
    hook = llm.get_decoder().get_submodule(part).register_forward_hook(lambda *_: None)
    assert not known.reads(llm, embeds)
    hook.remove()
    assert known.reads(llm, embeds)


def test_another_activation_is_not_known() -> None:
    llm = make("llama")
    assert KnownDecoder.fits(llm)
    llm.get_decoder().layers[1].mlp.act_fn = torch.nn.GELU()
    assert not KnownDecoder.fits(llm)


def without_attention(self: Any, x: Tensor, **_: Any) -> Tensor:
    return x + self.mlp(x)


def weaker(self: Any, x: Tensor, **others: Any) -> Tensor:
    hidden: Tensor = PLAIN_LLAMA(self, x, **others)
    return 0.9 * hidden + 0.1 * x


def steeper(self: Any, x: Tensor, **others: Any) -> Tensor:
    hidden: Tensor = PLAIN_LLAMA(self, x, **others)
    return hidden + (0.5 * hidden - (0.5 * hidden).detach())


PLAIN_LLAMA = LlamaDecoderLayer.forward


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (without_attention, "layer 0 calls no"),
        (weaker, "layer 0 or its gradient differs"),
        (steeper, "layer 0 or its gradient differs"),
    ],
)
def test_layers_that_are_not_what_their_names_say(
    forward: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make("llama")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert known_decoder(llm) is None
    assert [reason in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_kernel_that_fails_here_is_done_without(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = adapted("qwen2")
    before = {name: weight.clone() for name, weight in llm.state_dict().items()}

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(_BeforeAttention, step, staticmethod(fails))
    model = ChatLLM(llm, "speech")
    assert model.known_decoder is None
    assert ["no such kernel" in message for message in caplog.messages] == [True]
    assert all(torch.equal(weight, before[name]) for name, weight in llm.state_dict().items())
    assert all(weight.grad is None for weight in llm.parameters())
    model.teach(plan(True).teacher)


def test_rotary_positions_of_a_part_of_each_head_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make("llama")
    plain = type(llm.get_decoder().rotary_emb).forward
    monkeypatch.setattr(
        type(llm.get_decoder().rotary_emb), "forward", lambda *args: tuple(one[..., :4] for one in plain(*args))
    )
    assert known_decoder(llm) is None


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_quantized_layer_is_not_known(kind: str) -> None:
    llm = make(kind)
    layer = llm.get_decoder().layers[1].mlp.up_proj
    assert KnownDecoder.fits(llm)
    llm.get_decoder().layers[1].mlp.up_proj = type("Quantized", (nn.Linear,), {})(*layer.weight.shape[::-1], bias=False)
    assert not KnownDecoder.fits(llm)


def test_the_trial_leaves_no_trace() -> None:
    llm = adapted("qwen2", dropout=0.3).train()
    llm.get_decoder().layers[1].eval()
    modes = [module.training for module in llm.modules()]
    before = {name: weight.clone() for name, weight in llm.state_dict().items()}
    state = torch.random.get_rng_state()
    assert known_decoder(llm) is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in llm.modules()] == modes
    assert all(torch.equal(weight, before[name]) for name, weight in llm.state_dict().items())
    assert all(weight.grad is None for weight in llm.parameters())


def test_it_is_tried_once_in_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = adapted("llama")
    model, layout = ChatLLM(llm, "speech"), plan(True).teacher
    tried = model.known_decoder
    assert tried is not None
    assert model.float().known_decoder is tried
    llm.bfloat16()  # past the model: tried in float32 alone
    assert not tried.reads(llm, model.embed(layout.ids))
    model.bfloat16()
    assert model.known_decoder not in (None, tried)
    assert model.known_decoder.reads(llm, model.embed(layout.ids))
    llm.partial_lora_state.products = torch.bfloat16
    assert not model.known_decoder.reads(llm, model.embed(layout.ids))
    model.settle_precision()
    assert model.known_decoder.reads(llm, model.embed(layout.ids))


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.bias", "mlp.gate_proj.weight"])
def test_weights_that_are_trained_get_their_gradients(name: str) -> None:
    llm, layout = adapted("qwen2", targets=["down_proj"]), plan(True).teacher
    model = ChatLLM(llm, "speech")
    weight = llm.get_decoder().layers[1].get_parameter(name).requires_grad_()
    embeds = model.embed(layout.ids)
    model.hidden(embeds, layout, model.speech_places(layout)).square().sum().backward()
    assert weight.grad is not None and weight.grad.any()
    with torch.no_grad():
        assert model.known_decoder is not None and model.known_decoder.reads(llm, embeds)


def test_the_gradient_of_a_trained_embedding() -> None:
    llm, layout = make("llama").requires_grad_(False), plan(True).teacher
    model, found = ChatLLM(llm), []
    table = llm.get_input_embeddings().requires_grad_()
    known = model.known_decoder
    for model.known_decoder in (None, known):
        model.hidden(table(layout.ids), layout).square().sum().backward()
        assert table.weight.grad is not None
        found.append(table.weight.grad)
        table.weight.grad = None
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def one_token() -> Layout:
    place, none = torch.tensor([0]), torch.tensor([], dtype=torch.long)
    return Layout(torch.tensor([5]), place, 1, place, none, Rows(torch.tensor([1]), (1,)))


def no_words() -> Layout:
    """Silence: speech of no tokens."""
    rows = [PlanRow([[5, 6], Speech(0), [7]], [[]], [1], [8, 9], [i]) for i in range(2)]
    return plan_batch(rows, [0, 0]).teacher


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "no shared prefix": lambda: plan(False).teacher,
    "no words": no_words,
    "one token": one_token,
}


@pytest.mark.parametrize("scope", ["speech", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_layouts(kind: str, layout: str, scope: str) -> None:
    model = ChatLLM(adapted(kind, dropout=0.3).train(), scope)
    expected, actual = (read(model, known, LAYOUTS[layout]()) for known in (False, True))
    for right, found in zip(expected, actual, strict=True):
        torch.testing.assert_close(found, right, atol=2e-4, rtol=1e-3)


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    model, layout = ChatLLM(adapted("qwen2"), "speech"), plan(True).teacher
    embeds, places = model.embed(layout.ids), model.speech_places(layout)
    expected = model.hidden(embeds.clone().requires_grad_(), layout, places)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            hidden = model.hidden(embeds, layout, places)
        assert not hidden.requires_grad and torch.equal(hidden, expected)


@pytest.mark.parametrize("kind", KNOWN)
def test_lora_that_adds_nothing_changes_no_bit(kind: str) -> None:
    llm = make(kind)
    add_partial_lora(llm, rank=2, dropout=0.0)
    model, layout = ChatLLM(llm, "speech"), plan(True).teacher
    assert model.known_decoder is not None
    assert torch.equal(model.hidden(model.embed(layout.ids), layout, model.speech_places(layout)), model.teach(layout))
    plain = ChatLLM(make(kind))
    assert plain.known_decoder is not None and torch.equal(plain.teach(layout), model.teach(layout))


def test_a_copy_has_weights_of_its_own() -> None:
    model, layout = ChatLLM(adapted("llama"), "speech"), plan(True).teacher
    model.llm.partial_lora_state.products = torch.bfloat16
    model.settle_precision()
    read(model, True)  # casts LoRA's matrices
    twin, places = copy.deepcopy(model), model.speech_places(layout)
    embeds = model.embed(layout.ids)
    expected = model.hidden(embeds, layout, places)
    assert torch.equal(twin.hidden(embeds, layout, places), expected)
    with torch.no_grad():
        for layer in twin.llm.partial_lora_state.layers:
            layer.matrices()[1].weight.zero_()
    assert twin.known_decoder is not None and twin.known_decoder.reads(twin.llm, embeds)
    assert torch.equal(twin.hidden(embeds, layout, places), twin.teach(layout))
    assert torch.equal(model.hidden(embeds, layout, places), expected)


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
    attention = llm.get_decoder().layers[0].self_attn
    attention.attention_dropout = 0.1
    assert not known.reads(llm, embeds)
    attention.eval()
    assert known.reads(llm, embeds)
    plain = make("llama")
    before = ChatLLM(plain).known_decoder
    add_partial_lora(plain, rank=2)
    assert before is not None and not before.reads(plain, embeds)
    enable_gradient_checkpointing(llm)
    assert not known.reads(llm, embeds)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.act_fn", "input_layernorm"])
def test_modules_in_the_place_of_others_are_seen(name: str) -> None:
    llm = make("llama").requires_grad_(False)
    known, embeds = ChatLLM(llm).known_decoder, torch.zeros(5, 32)
    assert known is not None and known.reads(llm, embeds)
    layer = llm.get_decoder().layers[1]
    layer.set_submodule(name, copy.deepcopy(layer.get_submodule(name)))
    assert not known.reads(llm, embeds)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_of_a_gpu_take_what_they_get(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without numbers, as torch describes its flash attention and RMSNorm: their arguments, shapes and precisions."""
    llm = adapted(kind, dropout=0.1).to(dtype)
    for name, parameter in llm.named_parameters():
        parameter.data = parameter.float() if "lora_" in name else parameter
    model = ChatLLM(llm, "speech")
    known, layout = model.known_decoder, plan(True).to(torch.device("meta")).student
    assert known is not None
    llm.train().to("meta").partial_lora_state.products = torch.bfloat16
    monkeypatch.setattr(attention, "_is_for_flash", lambda *_: True)
    monkeypatch.setattr(fused_norm, "_has_kernel", lambda _: True)
    embeds = torch.empty(layout.rows.total, 32, dtype=dtype, device="meta", requires_grad=True)
    with Operators() as seen, speech_positions(llm, model.speech_places(layout)):
        hidden = known(embeds, layout.positions, layout.rows)
        hidden.sum().backward()
    layers = len(llm.get_decoder().layers)
    assert seen.count["_flash_attention_forward"] == seen.count["_flash_attention_backward"] == layers
    assert seen.count["_fused_rms_norm_backward"] >= 2 * layers
    assert hidden.dtype == dtype and embeds.grad is not None and embeds.grad.shape == hidden.shape
    gradients = [p.grad for p in llm.parameters() if p.requires_grad]
    assert gradients and all(one is not None and one.dtype == torch.float32 for one in gradients)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B", "lora_dropout.default"])
def test_parts_of_lora_in_the_place_of_others_are_seen(part: str) -> None:
    llm = adapted("llama", dropout=0.1)
    known, embeds = ChatLLM(llm, "speech").known_decoder, torch.zeros(5, 32)
    assert known is not None and known.reads(llm, embeds)
    layer = llm.get_decoder().layers[1].self_attn.v_proj
    layer.set_submodule(part, copy.deepcopy(layer.get_submodule(part)))
    assert not known.reads(llm, embeds)


def test_the_modules_are_looked_at_without_a_step_of_python_for_each() -> None:
    llm = adapted("llama")
    known = ChatLLM(llm, "speech").known_decoder
    assert known is not None
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        is_watched = known._is_watched()
    finally:
        sys.setprofile(None)
    assert not is_watched and len(calls) < 10 < len(list(llm.modules()))


def test_the_norm_and_its_gradient() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, gradient = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (5,), weight, 1e-2)
    expected.backward(gradient)
    actual, factor = rms_norm(x.detach(), weight, 1e-2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rms_norm_backward(gradient, x.detach(), factor, weight), x.grad)
