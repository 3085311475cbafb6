"""Student and teacher in one model: same sequence, same positions, and the levers that must not change a number."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import wake_lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

from blspkd_fairseq.generation.hearing import nearest_tokens
from blspkd_fairseq.modules.cformer import AdapterOutput, CFormer
from blspkd_fairseq.modules.checkpointing import enable_gradient_checkpointing
from blspkd_fairseq.modules.distillation_loss import linear_kl_div
from blspkd_fairseq.modules.partial_lora import add_partial_lora
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder

WIDTH, HIDDEN, VOCABULARY = 16, 32, 60


def text_batch() -> dict[str, Tensor]:
    lengths = {"before": [2, 0, 1], "transcript": [3, 5, 1], "after": [2, 2, 2], "response": [4, 1, 2]}
    generator = torch.Generator().manual_seed(0)
    text = {"prefix": torch.tensor([7, 8, 9])}
    for name, rows in lengths.items():
        text[name] = torch.randint(1, VOCABULARY, (3, max(rows)), generator=generator)
        text[f"{name}_lengths"] = torch.tensor(rows)
    return text


def speech_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 16_000, generator=generator), torch.tensor([16_000, 9_000, 12_345])


@pytest.fixture
def build() -> Callable[..., SpeechLLM]:
    def build(lora_scope: str = "speech", adapter: nn.Module | None = None, **options: Any) -> SpeechLLM:
        torch.manual_seed(0)
        whisper = WhisperModel(
            WhisperConfig(
                d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
                decoder_attention_heads=2, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
                attention_dropout=0.5,
            )
        )  # fmt: skip
        if lora_scope != "none":
            add_partial_lora(llm, rank=4, dropout=0.0)
            wake_lora(llm)
        adapter = adapter or CFormer(WIDTH, HIDDEN, 0.3, pre_layers=1, post_layers=1, heads=2, dropout=0.0)
        return SpeechLLM(SpeechEncoder(whisper.encoder), adapter, llm, lora_scope, **options)

    return build


class TranscriptInPlaceOfSpeech(nn.Module):
    """An adapter that cheats: it returns the transcript's own embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.embeddings = torch.zeros(0)

    def forward(self, features: Tensor, padding_mask: Tensor, target_lengths: Tensor) -> AdapterOutput:
        return AdapterOutput(self.embeddings + self.weight, target_lengths)


def kl(model: SpeechLLM, compared: Any) -> Tensor:
    return linear_kl_div(compared.student, compared.teacher, model.head[0])


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_transcripts_own_embeddings_give_no_divergence(build: Callable[..., SpeechLLM], share_prefix: bool) -> None:
    adapter = TranscriptInPlaceOfSpeech()
    model = build("none", adapter, share_prefix=share_prefix).train()
    text = text_batch()
    adapter.embeddings = model.embed(text["transcript"])
    out = model(*speech_batch(), text)
    for compared, count in ((out.input, 9), (out.response, 7)):
        assert len(compared.student) == count
        assert kl(model, compared).abs().max() < 1e-5
    # ... and another sentence's do
    adapter.embeddings = adapter.embeddings.roll(1, 0)
    out = model(*speech_batch(), text)
    assert kl(model, out.input).max() > 0.01 and kl(model, out.response).max() > 0.01


def test_hidden_states_equal_those_of_each_utterance_written_out(build: Callable[..., SpeechLLM]) -> None:
    """The batched, shared-prefix, shifted selection against plain indexing of one sequence."""
    model = build("none").eval()
    text = text_batch()
    with torch.no_grad():
        out = model(*speech_batch(), text)
        for b in range(3):
            part = {n: text[n][b, : text[f"{n}_lengths"][b]] for n in ("before", "transcript", "after", "response")}
            ids = torch.cat([text["prefix"], *part.values()])[None]
            hidden = model.llm.get_decoder()(input_ids=ids).last_hidden_state[0]
            start = len(text["prefix"]) + len(part["before"])
            n, r = len(part["transcript"]), len(part["response"])
            torch.testing.assert_close(out.input.teacher[out.input.rows == b], hidden[start : start + n])
            # the position before the first response token is in, the last token is out
            torch.testing.assert_close(out.response.teacher[out.response.rows == b], hidden[-r - 1 : -1])
            assert torch.equal(out.response.targets[out.response.rows == b], part["response"])
            assert torch.equal(out.input.targets[out.input.rows == b], part["transcript"])


def losses_and_gradients(model: SpeechLLM, rows: slice = slice(None)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    text = {name: value if name == "prefix" else value[rows] for name, value in text_batch().items()}
    waveforms, lengths = speech_batch()
    model.zero_grad()
    out = model(waveforms[rows], lengths[rows], text)
    input_kl, response_kl = kl(model, out.input), kl(model, out.response)
    (input_kl.sum() + response_kl.sum() + out.adapter.alpha_sum.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return input_kl.detach(), response_kl.detach(), gradients


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("train_speech_encoder", [False, True])
def test_sharing_the_prefix_changes_nothing(build: Callable[..., SpeechLLM], train_speech_encoder: bool) -> None:
    expected = losses_and_gradients(build(share_prefix=False, train_speech_encoder=train_speech_encoder).train())
    model = build(share_prefix=True, train_speech_encoder=train_speech_encoder).train()
    assert_same(losses_and_gradients(model), expected)
    assert_same(losses_and_gradients(model), expected)  # the second time from memory
    assert any("speech_encoder" in name for name in expected[2]) == train_speech_encoder


def test_gradient_checkpointing_changes_nothing(build: Callable[..., SpeechLLM]) -> None:
    expected = losses_and_gradients(build().train())
    model = build()
    enable_gradient_checkpointing(model.llm)
    assert_same(losses_and_gradients(model.train()), expected)


def test_modes_change_without_a_walk_over_the_modules(
    build: Callable[..., SpeechLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    enable_gradient_checkpointing(model.llm)
    model.train()
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("the modules are walked again"))
    states = [[module.training for module in (model, model.adapter.pre[0], model.llm.model.layers[0])]]
    for mode in (False, True):
        model.train(mode)
        states.append([module.training for module in (model, model.adapter.pre[0], model.llm.model.layers[0])])
    assert states == [[True] * 3, [False] * 3, [True] * 3]
    assert not model.llm.training and not model.speech_encoder.training and not model.llm.model.layers[0].mlp.training


def test_losses_do_not_depend_on_the_batch(build: Callable[..., SpeechLLM]) -> None:
    model = build().train()
    together = losses_and_gradients(model)
    alone = [losses_and_gradients(model, slice(b, b + 1)) for b in range(3)]
    summed = {name: sum(gradients[name] for _, _, gradients in alone) for name in together[2]}
    assert_same((torch.cat([a[0] for a in alone]), torch.cat([a[1] for a in alone]), summed), together)


def test_the_teacher_is_the_base_llm_while_lora_moves_the_student(build: Callable[..., SpeechLLM]) -> None:
    text = text_batch()
    base = build("none").eval()(*speech_batch(), text)
    for scope in ("speech", "all"):
        out = build(scope).eval()(*speech_batch(), text)
        torch.testing.assert_close(out.response.teacher, base.response.teacher)
        torch.testing.assert_close(out.input.teacher, base.input.teacher)
        assert (out.response.student - base.response.student).abs().max() > 1e-3


def test_only_the_chosen_parts_are_trained_and_frozen_parts_have_no_dropout(build: Callable[..., SpeechLLM]) -> None:
    names = {
        (scope, unfreeze): {n.split(".")[0] for n in build(scope, train_speech_encoder=unfreeze).trained_names}
        for scope in ("speech", "none")
        for unfreeze in (False, True)
    }
    assert names == {
        ("speech", False): {"adapter", "llm"},
        ("none", False): {"adapter"},
        ("speech", True): {"adapter", "llm", "speech_encoder"},
        ("none", True): {"adapter", "speech_encoder"},
    }
    model = build().train()
    assert all("lora_" in n for n in model.trained_names if n.startswith("llm."))
    # attention_dropout of this LLM is .5: in training mode two runs would differ
    text, speech = text_batch(), speech_batch()
    assert torch.equal(model(*speech, text).response.student, model(*speech, text).response.student)


def test_without_response_terms_the_llm_stops_at_the_speech(build: Callable[..., SpeechLLM]) -> None:
    model = build().eval()
    text = text_batch()
    full = model(*speech_batch(), text)
    seen = []
    hook = model.llm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    short = model(
        *speech_batch(), {**text, "response": text["response"][:, :0], "response_lengths": torch.zeros(3)}, ["input"]
    )
    assert short.response is None and seen == [15, 15]  # prefix, what comes before and transcripts of all rows
    torch.testing.assert_close(short.input.student, full.input.student)
    assert model(*speech_batch(), text, []).input is None and len(seen) == 2  # the warm-up runs no LLM
    hook.remove()


def test_frames_take_the_place_of_waveforms(build: Callable[..., SpeechLLM]) -> None:
    expected = losses_and_gradients(build().train())
    model, text, (waveforms, lengths) = build().train(), text_batch(), speech_batch()
    frames = model.encode(waveforms, lengths, lengths.tolist()).values
    model.speech_encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    out = model(None, lengths, text, features=frames)
    torch.testing.assert_close(kl(model, out.input), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kl(model, out.response), expected[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="waveforms or features"):
        model.adapt(None, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_encoder_is_in_its_own_precision(build: Callable[..., SpeechLLM], dtype: torch.dtype) -> None:
    """Heard now or stored before, the frames are the same, whatever the products are in."""
    model = build(product_dtype=torch.bfloat16, speech_encoder_dtype=dtype).eval()
    waveforms, lengths = speech_batch()
    frames = model.encode(waveforms, lengths, lengths.tolist()).values
    assert frames.dtype == dtype
    heard, stored = (model.adapt(*given, samples=lengths.tolist(), features=features) for given, features in (
        ((waveforms, lengths), None), ((None, lengths), frames),
    ))  # fmt: skip
    assert torch.equal(heard.embeddings, stored.embeddings)


def test_an_encoder_in_training_multiplies_in_the_products_precision(build: Callable[..., SpeechLLM]) -> None:
    model = build(product_dtype=torch.bfloat16, train_speech_encoder=True)
    dtypes = []
    model.speech_encoder.encoder.layers[0].fc1.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
    model.adapt(*speech_batch())
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize(("generation", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_products_are_in_bfloat16_on_cards_that_have_it(
    generation: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says that a T4 supports it, which emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    model = SimpleNamespace(product_dtype=None, device=torch.device("cuda"))
    assert SpeechLLM.products.fget(model) == dtype  # type: ignore[attr-defined]


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
def test_the_vocabulary_is_kept_until_it_changes(build: Callable[..., SpeechLLM], table: type[nn.Embedding]) -> None:
    model = build()
    model.llm.set_input_embeddings(table(VOCABULARY, HIDDEN).requires_grad_(False))
    seen = []
    for change in (lambda: None, lambda: model.llm.get_input_embeddings().weight.mul_(2), model.bfloat16):
        change()
        vectors, squares = model.vocabulary
        torch.testing.assert_close(vectors, model.embed(torch.arange(VOCABULARY)))
        assert squares.dtype == torch.float32 and model.vocabulary[1] is squares
        torch.testing.assert_close(squares, vectors.float().square().sum(1))
        seen.append(squares)
    assert len({id(one) for one in seen}) == 3
    at = torch.tensor([5, 0, VOCABULARY - 1])
    assert nearest_tokens(model, 1.01 * model.embed(at)) == at.tolist()
