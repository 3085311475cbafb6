"""The search for what was said, against slow versions: every hypothesis there is, and a beam that reads all afresh."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from blspkd_fairseq.modules import beam_search
from blspkd_fairseq.modules.beam_search import Lattice, check_can_search, search
from blspkd_fairseq.modules.distillation_loss import LogitTransform
from blspkd_fairseq.modules.speech_llm import SpeechLLM

OPENING = (5, 9)
WEIGHT = 0.6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpeechLLM:
    return tiny_model(tmp_path_factory.mktemp("search")).model


def lattice(counts: tuple[int, ...], choices: int = 3, seed: int = 0, words: int = 6) -> Lattice:
    """Tokens 20 and more, several of which write one word; every fifth writes none."""
    torch.manual_seed(seed)
    shape = (len(counts), max(counts), choices)
    ids = torch.stack([20 + torch.randperm(30)[:choices] for _ in range(shape[0] * shape[1])]).view(shape)
    numbers = torch.where(ids % 5 == 0, -1, ids % words)
    logits = (2 * torch.randn(shape)).sort(dim=2, descending=True).values
    return Lattice(ids, logits, numbers, counts)


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]  # of each piece, -1 where it says on
    score: float
    last: int


class Slowly:
    """Scores in float64, the LLM's from texts read as a whole."""

    def __init__(self, model: SpeechLLM, sound: Lattice, row: int, opening: tuple[int, ...] = OPENING) -> None:
        self.model, self.opening, self.count = model, opening, sound.counts[row]
        self.ids, self.words = sound.ids[row].tolist(), sound.words[row].tolist()
        self.sound = sound.logits[row].double().log_softmax(1)

    @torch.no_grad()
    def expected(self, said: tuple[int, ...]) -> Tensor:
        before = [*self.opening, *(token for token in said if token >= 0)]
        weight, transform = self.model.head[0].double(), self.model.logit_transform
        if not before:
            return torch.zeros(len(weight), dtype=torch.float64)
        hidden = self.model.llm.get_decoder()(input_ids=torch.tensor([before])).last_hidden_state[0, -1]
        logits = weight @ hidden.double()
        if transform is not None:
            logits = transform.cap * torch.tanh(transform.scale * logits / transform.cap)
        return logits.log_softmax(0)

    def is_certain(self, piece: int) -> bool:
        if not piece or self.sound[piece, 0].exp() <= beam_search.CERTAIN:
            return False
        word = self.words[piece][0]
        before = zip(self.words[piece - 1], self.sound[piece - 1].exp().tolist(), strict=True)
        return word < 0 or not any(other == word and share > beam_search.UNLIKELY for other, share in before)

    def extended(self, one: Hypothesis, may_continue: bool = True) -> list[Hypothesis]:
        piece = len(one.tokens)
        sound, expected = self.sound[piece], self.expected(one.tokens)
        choices = list(zip(self.ids[piece], self.words[piece], sound.tolist(), strict=True))
        found = [
            Hypothesis((*one.tokens, token), one.score + heard + WEIGHT * float(expected[token]), word)
            for token, word, heard in choices
        ]
        if self.is_certain(piece):
            return found[:1]
        again = [heard for _, word, heard in choices if word == one.last and word >= 0]
        if again and may_continue:
            nats = float(torch.tensor(again, dtype=torch.float64).logsumexp(0)) + beam_search.CONTINUED
            found.append(Hypothesis((*one.tokens, -1), one.score + nats, one.last))
        return found

    def search(self, beam: int, may_continue: bool = True) -> list[Hypothesis]:
        kept = [Hypothesis((), 0.0, -1)]
        for _ in range(self.count):
            found = itertools.chain.from_iterable(self.extended(one, may_continue) for one in kept)
            kept = sorted(found, key=lambda one: -one.score)[:beam]
        return kept


def assert_as_slowly(model: SpeechLLM, sound: Lattice, beam: int, **how: bool) -> int:
    """The number of pieces that say on."""
    found = search(model, sound, OPENING, WEIGHT, beam, **how)
    for row, count in enumerate(sound.counts):
        expected = Slowly(model, sound, row).search(beam, **how)
        assert [one.tokens for one in expected] == [tuple(one[:count]) for one in found.tokens[row].tolist()][
            : len(expected)
        ]
        torch.testing.assert_close(
            found.scores[row, : len(expected)].double(),
            torch.tensor([one.score for one in expected], dtype=torch.float64), atol=1e-3, rtol=1e-4,
        )  # fmt: skip
        assert (found.tokens[row, :, count:] == -1).all()
    return int((found.tokens == -1).sum())


@pytest.mark.parametrize("at_once", [1, 30, 10_000])
@pytest.mark.parametrize("certain", [0.3, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_beam_that_reads_all_afresh(
    model: SpeechLLM, monkeypatch: pytest.MonkeyPatch, beam: int, seed: int, certain: float, at_once: int
) -> None:
    monkeypatch.setattr(beam_search, "CERTAIN", certain)
    monkeypatch.setattr(beam_search, "TOKENS_AT_ONCE", at_once)
    assert_as_slowly(model, lattice((1, 7, 4), seed=seed, words=15), beam)


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("certain", [0.3, 2.0])
def test_spans_have_every_piece_once_and_rows_end_one_by_one(
    monkeypatch: pytest.MonkeyPatch, certain: float, most: int
) -> None:
    monkeypatch.setattr(beam_search, "CERTAIN", certain)
    sound = lattice((1, 7, 4, 7), words=15)
    order, spans = beam_search._spans(sound, most)
    pieces: list[list[int]] = [[] for _ in order]
    for span in spans:
        assert span.width == int((span.end - span.begin).max()) <= most
        for row, begin, end, sure in zip(
            order[: len(span.begin)], *(v.tolist() for v in (span.begin, span.end, span.is_certain)), strict=True
        ):
            assert pieces[row] == list(range(begin)) and begin < end and not (sure and begin == 0)
            pieces[row] += range(begin, end)
    assert [len(row) for row in pieces] == list(sound.counts)
    read = [len(span.begin) for span in spans]
    assert read == sorted(read, reverse=True)
    assert (len(spans) < 7) == (certain < 1 < most)
    assert any(bool(span.is_certain.any()) for span in spans) == (certain < 1 and most < 100)


def test_every_hypothesis_there_is(model: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_search, "CERTAIN", 2.0)
    sound = lattice((3,), words=2)
    everything = assert_as_slowly(model, sound, 4**3)
    assert everything > 0
    slowly = Slowly(model, sound, 0)
    hypotheses = [Hypothesis((), 0.0, -1)]
    for _ in range(3):
        hypotheses = [longer for one in hypotheses for longer in slowly.extended(one)]
    best = max(hypotheses, key=lambda one: one.score)
    assert tuple(search(model, sound, OPENING, WEIGHT, 4**3).tokens[0, 0].tolist()) == best.tokens


def test_a_wider_beam_finds_no_worse(model: SpeechLLM) -> None:
    sound = lattice((8, 8, 8), choices=5, seed=2)
    scores = torch.stack([search(model, sound, OPENING, WEIGHT, beam).scores[:, 0] for beam in (1, 3, 9, 50)])
    assert (scores[-1] >= scores[0]).all() and (scores[-1] > scores[0]).any()


def test_one_token_for_each_piece(model: SpeechLLM) -> None:
    sound = lattice((6, 4), words=2)
    joined = search(model, sound, OPENING, WEIGHT, 4).tokens[:, 0]
    assert (joined[0] == -1).any()
    assert_as_slowly(model, sound, 4, may_continue=False)
    told = search(model, sound, OPENING, WEIGHT, 4, may_continue=False).tokens[:, 0]
    assert (told[0] >= 0).all() and (told[1, :4] >= 0).all()


def test_a_word_heard_twice_running_is_one_and_marks_are_not(model: SpeechLLM) -> None:
    """Both pieces are certain; the LLM expects neither token."""
    for word, expected in ((3, [21, -1]), (-1, [21, 21])):
        ids = torch.tensor([[[21, 22], [21, 22]]])
        words = torch.tensor([[[word, -1], [word, -1]]])
        sound = Lattice(ids, torch.tensor([[[9.0, 0.0], [9.0, 0.0]]]), words, (2,))
        assert search(model, sound, OPENING, 2.0, 3).tokens[0, 0].tolist() == expected


def test_a_row_does_not_depend_on_the_others(model: SpeechLLM) -> None:
    sound = lattice((6, 2, 5), seed=3)
    together = search(model, sound, OPENING, WEIGHT, 3)
    for row, count in enumerate(sound.counts):
        alone = Lattice(*(one[row : row + 1, :count] for one in sound[:3]), (count,))
        found = search(model, alone, OPENING, WEIGHT, 3)
        assert found.tokens[0].tolist() == together.tokens[row, :, :count].tolist()
        torch.testing.assert_close(found.scores[0], together.scores[row], atol=1e-4, rtol=1e-4)


def test_nothing_is_expected_where_nothing_is_before(model: SpeechLLM) -> None:
    sound = lattice((4,), seed=1)
    expected = Slowly(model, sound, 0, opening=()).search(3)
    found = search(model, sound, (), WEIGHT, 3)
    assert [one.tokens for one in expected] == [tuple(one) for one in found.tokens[0].tolist()]


def test_logits_that_the_llm_scales_and_caps(model: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.llm, "logit_transform", LogitTransform(0.5, 2.0))
    assert_as_slowly(model, lattice((5, 3)), 3)


def test_the_llm_takes_a_step_for_each_piece_that_is_not_certain_of_rows_that_go_on(
    model: SpeechLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = model.llm.get_decoder().forward

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.llm.get_decoder(), "forward", counted)
    sound = lattice((6, 4), words=100)
    sound = sound._replace(logits=torch.zeros_like(sound.logits))
    search(model, sound, OPENING, WEIGHT, 3)
    assert shapes == [(1, 2)] + [(2 * 3, 1)] * 4 + [(3, 1)]
    shapes.clear()
    sound.logits[0, 2:4, 0] = sound.logits[1, 1, 0] = 50.0
    search(model, sound, OPENING, WEIGHT, 3)
    assert shapes == [(1, 2), (6, 2), (6, 3), (6, 1)]


def test_an_llm_that_reads_on_otherwise_is_refused(
    model: SpeechLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_can_search(model)
    monkeypatch.setattr(beam_search._Reader, "go_on", _ignoring_what_is_said(beam_search._Reader.go_on))
    with pytest.raises(ValueError, match="--adapter-prior-beam: this LLM cannot be searched by .it reads on otherwise"):
        check_can_search(model)


def _ignoring_what_is_said(go_on):  # type: ignore[no-untyped-def]
    return lambda self, parents, tokens: go_on(self, parents, tokens.clamp(min=0))
