"""Soft tokens and the spelling of tokens, against slow versions in float64."""

from pathlib import Path

import pytest
import torch
from tiny import SMALL, save_llm, save_whisper, tiny_model
from torch import nn

from blspkd_fairseq.modules import soft_tokens
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm, load_chat_format
from blspkd_fairseq.modules.soft_tokens import SoftTokens, TokenQueries
from blspkd_fairseq.modules.spelling import Spelling, number_words, pieces_of, speakable_tokens
from blspkd_fairseq.modules.trained_state import deepen_adapter, load_trained_state_dict, trained_state_dict

WORDS = ["Ġcat", "Ġcats", "Ġcar", "cat", "ĠCat", None, "Ġdog", "."]


@pytest.fixture
def soft() -> SoftTokens:
    """Of eight tokens with embeddings of five numbers, with all parameters at random."""
    table = nn.Embedding(len(WORDS), 5).requires_grad_(False)
    made = SoftTokens(table, WORDS, input_dim=6, dim=4)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def slow_posterior(soft: SoftTokens, points: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """``[N, V]`` token by token, as the docstring says it."""
    table, spelt = soft.embeddings.double(), soft.spelling().double()
    words = [i for i, word in enumerate(WORDS) if word is not None]
    mean_square = torch.stack([table[i] @ table[i] for i in words]).mean()
    heard = states.double() @ soft.listen.weight.double().T + soft.listen.bias.double()
    logits = torch.full((len(points), len(WORDS)), -torch.inf, dtype=torch.float64)
    for n in range(len(points)):
        for i in words:
            distance = (points[n].double() - table[i]).square().sum() / mean_square
            logits[n, i] = -soft.log_sharpness.double().exp() / 2 * distance + heard[n] @ spelt[i] / 2
    return logits.softmax(1)


def likeliest(soft: SoftTokens, queries: TokenQueries) -> torch.Tensor:
    """``[N]`` the token of the smallest cross-entropy."""
    count, tokens = len(queries.vectors), len(soft.words)
    repeated = queries.of(torch.arange(count).repeat_interleave(tokens))
    return soft.cross_entropy(repeated, torch.arange(tokens).repeat(count)).view(count, tokens).argmin(1)


def test_the_posterior_is_of_nearness_and_spelling(soft: SoftTokens) -> None:
    points, states = torch.randn(3, 5), torch.randn(3, 6)
    expected = slow_posterior(soft, points, states)
    queries = soft.queries(points, states)
    focused = expected ** soft.log_focus.double().exp()
    mean = focused / focused.sum(1, keepdim=True) @ soft.embeddings.double()
    torch.testing.assert_close(soft(queries).double(), mean, rtol=1e-4, atol=1e-5)
    assert likeliest(soft, queries).tolist() == expected.argmax(1).tolist()
    targets = torch.tensor([0, 6, 2])
    nats = -expected.gather(1, targets.unsqueeze(1)).squeeze(1).log()
    torch.testing.assert_close(soft.cross_entropy(queries, targets).double(), nats, rtol=1e-4, atol=1e-5)


def test_the_cross_entropy_among_some_tokens(soft: SoftTokens) -> None:
    points, states = torch.randn(2, 5), torch.randn(2, 6)
    some = torch.tensor([0, 2, 7])
    expected = slow_posterior(soft, points, states)[:, some]
    nats = -(expected / expected.sum(1, keepdim=True))[[0, 1], [2, 0]].log()
    for spells in (True, False):
        found = soft.cross_entropy(soft.queries(points, states, spells), torch.tensor([2, 0]), some)
        torch.testing.assert_close(found.double(), nats, rtol=1e-4, atol=1e-5)
    # 0 and 7 stand there twice, and count once
    found = soft.cross_entropy(
        soft.queries(points, states, False), torch.tensor([3, 0]), torch.tensor([0, 0, 2, 7, 7, 7])
    )
    torch.testing.assert_close(found.double(), nats, rtol=1e-4, atol=1e-5)


def test_in_parts_it_is_the_same_with_the_same_gradients(soft: SoftTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    points, states = torch.randn(5, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4])

    def everything() -> list[torch.Tensor]:
        queries = soft.queries(points, states)
        entropy, mean = soft.cross_entropy(queries, targets), soft(queries)
        inputs = [points, states, *soft.parameters()]
        return [entropy, mean, *torch.autograd.grad(entropy.sum() + mean.square().sum(), inputs)]

    whole = everything()
    monkeypatch.setattr(soft_tokens, "LOGITS_AT_ONCE", 2 * len(WORDS))
    for one, other in zip(everything(), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_that_of_finite_differences(soft: SoftTokens) -> None:
    points, states, direction = torch.randn(2, 5), torch.randn(2, 6), torch.randn(2, 5)
    weights = torch.randn(2, 5)

    def mean(step: float) -> torch.Tensor:
        posterior = slow_posterior(soft, points.double() + step * direction.double(), states)
        posterior = posterior ** soft.log_focus.double().exp()
        return (posterior / posterior.sum(1, keepdim=True) @ soft.embeddings.double() * weights.double()).sum()

    moved = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((soft(soft.queries(moved, states)) * weights).sum(), moved)
    expected = float((mean(1e-5) - mean(-1e-5)).detach()) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_stands_for_no_text_is_never_chosen(soft: SoftTokens) -> None:
    queries = soft.queries(soft.embeddings[5:6], torch.zeros(1, 6))  # right at the embedding of what is no token
    assert int(likeliest(soft, queries)) != 5


def test_an_llm_that_scales_its_table(soft: SoftTokens) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3

    table = Scaled(len(WORDS), 5)
    table.weight = nn.Parameter(soft.embeddings.clone(), requires_grad=False)
    scaled = SoftTokens(table, WORDS, 6, 4)
    scaled.load_state_dict(soft.state_dict())
    queries, states = torch.randn(2, 5), torch.randn(2, 6)
    torch.testing.assert_close(scaled(scaled.queries(3 * queries, states)), 3 * soft(soft.queries(queries, states)))


def test_a_table_that_begins_with_zeros() -> None:
    table = nn.Embedding(200, 5).requires_grad_(False)
    table.weight[:100] = 0
    assert SoftTokens(table, ["Ġa"] * 200, 6).factor == pytest.approx(1)


def test_an_llm_whose_embeddings_are_no_table() -> None:
    class Odd(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).sin() + ids.unsqueeze(1)

    with pytest.raises(ValueError, match="rows of one table"):
        SoftTokens(Odd(len(WORDS), 5), WORDS, 6)


def test_in_use_the_spelling_is_computed_once(soft: SoftTokens) -> None:
    points, states = torch.randn(2, 5), torch.randn(2, 6)
    with torch.no_grad():
        before = soft.queries(points, states)
        assert soft.queries(points, states).spelt is before.spelt
        soft.spelling.table.weight.mul_(2)
        assert not torch.equal(soft(soft.queries(points, states)), soft(before))


# ---- spelling --------------------------------------------------------------------------------------------------------


def test_pieces_of_a_token() -> None:
    assert list(pieces_of("ĠA")) == ["<Aa>", "<", "_", "a", ">", "<_", "_a", "a>", "<_a", "_a>"]
    assert list(pieces_of("▁ok"))[:2] == ["<", "_"]
    assert [piece for piece in pieces_of("OK") if len(piece) > 3] == ["<Aa>", "<AA>"]
    assert set(pieces_of("Ġcat")) - set(pieces_of("cat")) == {"_", "<_", "_c", "<_c", "_ca"}


def test_tokens_with_words() -> None:
    cat, seven, a, other, again = number_words(["Ġcat", "▁7", "A", "Ġ't", "Cat"])
    assert cat == again and len({cat, seven, a, other}) == 4 and min(cat, seven, a, other) >= 0
    assert number_words(["Ġ...", "▁", "Ċ", "Ġ", ",", None]) == [-1] * 6


def test_vectors_are_sums_of_pieces_transformed() -> None:
    spelling = Spelling(WORDS, 3)
    known = sorted({piece for word in WORDS if word for piece in pieces_of(word)})
    counts = {piece: sum(word is not None and piece in pieces_of(word) for word in WORDS) for piece in known}
    order = sorted(known, key=lambda piece: (-counts[piece], piece))
    for i, word in enumerate(WORDS):
        rows = [order.index(piece) for piece in pieces_of(word)] if word else []
        expected = spelling.transform(spelling.table.weight[rows].sum(0))
        torch.testing.assert_close(spelling()[i], expected)
    some = torch.tensor([6, 5, 1, 6])
    torch.testing.assert_close(spelling(some), spelling()[some])


def test_of_too_many_pieces_the_rarest_are_left_out() -> None:
    spelling = Spelling(WORDS, 3, pieces=4)  # of seven tokens all have both ends, and most a space
    assert int(spelling.pieces.max()) == 3
    assert spelling.table.weight.shape[0] == 4


def test_tokens_that_texts_have(tmp_path: Path) -> None:
    chat = load_chat_format(SpeechLlmConfig(llm=str(save_llm(tmp_path / "llm"))))
    tokenizer = chat.tokenizer
    tokens = speakable_tokens(chat, len(tokenizer) + 3)
    assert len(tokens) == len(tokenizer) + 3
    assert tokens[-3:] == [None] * 3
    assert all(tokens[i] is None for i in tokenizer.all_special_ids)
    assert sum(token is None for token in tokens) == 3 + len(
        {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    )


def test_tokens_that_were_never_said_are_found_by_their_spelling() -> None:
    """Sounds are sums over syllables, so that what is said of some words says something of all."""
    syllables = [a + b for a in "bdgkm" for b in "aeiou"]
    chosen = torch.randint(len(syllables), (200, 3))
    words = [f"Ġ{''.join(syllables[i] for i in row)}" for row in chosen.tolist()]
    sounds = torch.randn(len(syllables), 24)[chosen].sum(1)
    soft = SoftTokens(nn.Embedding(200, 8).requires_grad_(False), words, input_dim=24, dim=32)
    said = torch.arange(150)
    optimizer = torch.optim.Adam(soft.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        queries = soft.queries(torch.zeros(200, 8), sounds)
        soft.cross_entropy(queries.of(said), said, said).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = likeliest(soft, soft.queries(torch.zeros(200, 8), sounds))
    assert float((found[150:] == torch.arange(150, 200)).float().mean()) > 0.5  # by chance: 0.005


# ---- in the model ----------------------------------------------------------------------------------------------------


def config_of(folder: Path, **options: object) -> SpeechLlmConfig:
    llm, whisper = str(save_llm(folder / "llm")), str(save_whisper(folder / "whisper"))
    return SpeechLlmConfig(speech_encoder=whisper, llm=llm, **{**SMALL, **options})


def test_the_llm_reads_means_of_its_embeddings(tmp_path: Path) -> None:
    speech = tiny_model(tmp_path, adapter_soft_tokens=True)
    adapted = speech.adapt(((0.1 * torch.randn(16000)).numpy(), 16000), 4)
    table = speech.model.llm.get_input_embeddings().weight.detach()
    assert adapted.embeddings.shape == (1, 4, table.shape[1])
    assert bool((adapted.embeddings <= table.amax(0) + 1e-5).all()) and bool(
        (adapted.embeddings >= table.amin(0) - 1e-5).all()
    )


def test_a_model_without_them_goes_on_with_them(tmp_path: Path) -> None:
    plain, _ = build_speech_llm(config_of(tmp_path))
    model, _ = build_speech_llm(config_of(tmp_path, adapter_soft_tokens=True))
    state = trained_state_dict(plain)
    with pytest.raises(ValueError, match=r"adapter\.soft_tokens\S+ is missing"):
        load_trained_state_dict(model, state)
    load_trained_state_dict(model, deepen_adapter(model, state))
    torch.testing.assert_close(model.adapter.project.weight, plain.adapter.project.weight)
    load_trained_state_dict(model, trained_state_dict(model))


def test_an_adapter_that_has_no_embedding_for_each_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--adapter-soft-tokens needs an embedding for each token"):
        build_speech_llm(config_of(tmp_path, adapter="cnn", adapter_soft_tokens=True))
