"""What the LLM expects beside what is heard, against a slow version that asks the LLM place by place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_soft_tokens import config_of, likeliest
from tiny import tiny_model, wake_lora
from torch import Tensor, nn

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules import language_prior
from blspkd_fairseq.modules.beam_search import Lattice, search
from blspkd_fairseq.modules.build import SpeechLlmConfig, adopt_options, build_speech_llm
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.distillation_loss import LogitTransform
from blspkd_fairseq.modules.language_prior import LanguagePrior, expect, other_counts
from blspkd_fairseq.modules.partial_lora import speech_positions

RATE = 16_000
COUNTS = (4, 1, 6)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    """Its spelling and its LoRA far from saying nothing."""
    options = {"adapter_soft_tokens": True, "adapter_prior_weight": 0.7, "adapter_dropout": 0.0}
    made = tiny_model(tmp_path_factory.mktemp("prior"), **options)
    torch.manual_seed(3)
    nn.init.normal_(made.model.adapter.soft_tokens.listen.weight)
    wake_lora(made.model)
    return made


@pytest.fixture
def prior(speech: BlspKd) -> LanguagePrior:
    found = speech.model.prior
    assert found is not None and found.weight == 0.7 and found.passes == 1 and found.opening
    return found


def by_sound(speech: BlspKd, counts: tuple[int, ...] = COUNTS) -> AdapterOutput:
    """Pieces of speech as the sound alone says."""
    torch.manual_seed(5)
    waveforms = 0.1 * torch.randn(len(counts), RATE)
    lengths = torch.full((len(counts),), RATE)
    kept, speech.model.prior = speech.model.prior, None
    try:
        with torch.no_grad():
            return speech.model.adapt(waveforms, lengths, torch.tensor(counts))
    finally:
        speech.model.prior = kept


@torch.no_grad()
def slowly(speech: BlspKd, heard: AdapterOutput, row: int, prior: LanguagePrior) -> Tensor:
    """``[n, D]`` of one piece, in float64 but for the LLM's hidden states, which it makes for one place at a time."""
    model = speech.model
    soft, count = model.adapter.soft_tokens, int(heard.lengths[row])
    table, spelt = soft.embeddings.double(), soft.spelling().double()
    points, listening = heard.queries.vectors[row, :count].double().split([table.shape[1], spelt.shape[1]], 1)
    opening = model.embed(torch.tensor(prior.opening, dtype=torch.long))
    weight, transform = model.head[0].double(), model.logit_transform
    tokens = heard.embeddings[row, :count].clone()
    for power in [0.0] + [prior.weight] * prior.passes:
        better = []
        for place in range(count):
            distance = (points[place] - table).square().sum(1) / soft.mean_square
            logits = by_sound_alone = (
                -soft.log_sharpness.double().exp() / 2 * distance + spelt @ listening[place] / spelt.shape[1] ** 0.5
            )
            before = torch.cat([opening, tokens[:place].to(opening.dtype)])
            if len(before):
                is_speech = (torch.arange(len(before)) >= len(opening)).unsqueeze(0)
                with speech_positions(model.llm, is_speech):
                    hidden = model.llm.get_decoder()(inputs_embeds=before.unsqueeze(0)).last_hidden_state[0, -1]
                expected = weight @ hidden.double()
                if transform is not None:
                    expected = transform.cap * torch.tanh(transform.scale * expected / transform.cap)
                logits = logits + power * expected
            by_sound_alone = by_sound_alone + soft.barred.double()
            others = by_sound_alone < by_sound_alone.topk(min(language_prior.CANDIDATES, len(logits))).values[-1]
            logits = logits.masked_fill(others, -torch.inf) + soft.barred.double()
            posterior = (soft.log_focus.double().exp() * logits).softmax(0)
            better.append(posterior @ table * soft.factor)
        tokens = torch.stack(better).to(tokens.dtype)
    return tokens


def assert_as_slowly(speech: BlspKd, heard: AdapterOutput, prior: LanguagePrior) -> None:
    found = expect(speech.model, heard, prior)
    assert found.embeddings.shape == heard.embeddings.shape
    for row, count in enumerate(heard.lengths.tolist()):
        torch.testing.assert_close(
            found.embeddings[row, :count], slowly(speech, heard, row, prior), atol=2e-4, rtol=1e-3
        )
        assert not found.embeddings[row, count:].any()
    assert float((found.embeddings - heard.embeddings).abs().max()) > 0.01


def test_the_posterior_is_of_sound_and_prediction(speech: BlspKd, prior: LanguagePrior) -> None:
    assert_as_slowly(speech, by_sound(speech), prior)


@pytest.mark.parametrize("at_most", [1, 5, 10_000])
def test_it_is_among_the_tokens_that_the_sound_finds_likeliest(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    monkeypatch.setattr(language_prior, "CANDIDATES", at_most)
    heard = by_sound(speech)
    if at_most > 1:
        assert_as_slowly(speech, heard, prior)
    else:
        nearest = speech.model.adapter.soft_tokens.embeddings[
            likeliest(speech.model.adapter.soft_tokens, heard.queries._replace(vectors=heard.queries.vectors[2]))
        ]
        torch.testing.assert_close(expect(speech.model, heard, prior).embeddings[2], nearest)


@pytest.mark.parametrize("passes", [2, 3])
def test_the_llm_reads_what_is_heard_so_far_as_often_as_asked(
    speech: BlspKd, prior: LanguagePrior, passes: int
) -> None:
    assert_as_slowly(speech, by_sound(speech), prior._replace(passes=passes))


def test_nothing_is_expected_where_nothing_is_before(speech: BlspKd, prior: LanguagePrior) -> None:
    heard = by_sound(speech)
    assert_as_slowly(speech, heard, prior._replace(opening=()))
    found = expect(speech.model, heard, prior._replace(opening=()))
    torch.testing.assert_close(found.embeddings[:, 0], heard.embeddings[:, 0])


@pytest.mark.parametrize("changed", ["share_prefix", "reads_packed"])
def test_it_is_the_same_however_the_llm_reads(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    heard = by_sound(speech)
    expected = expect(speech.model, heard, prior).embeddings
    monkeypatch.setattr(speech.model, changed, False)
    torch.testing.assert_close(expect(speech.model, heard, prior).embeddings, expected, atol=1e-4, rtol=1e-3)


def test_it_is_the_same_alone_and_beside_silence(speech: BlspKd, prior: LanguagePrior) -> None:
    heard = by_sound(speech, (4, 0, 6))
    together = expect(speech.model, heard, prior).embeddings
    alone = heard._replace(
        embeddings=heard.embeddings[2:], lengths=heard.lengths[2:],
        queries=heard.queries._replace(vectors=heard.queries.vectors[2:]),
    )  # fmt: skip
    torch.testing.assert_close(expect(speech.model, alone, prior).embeddings[0], together[2], atol=1e-4, rtol=1e-3)
    assert not together[1].any()
    nothing = heard._replace(lengths=torch.zeros_like(heard.lengths))
    assert expect(speech.model, nothing, prior) is nothing


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_so_many_pieces_at_once_as_memory_holds(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    heard = by_sound(speech, (2, 4, 0, 6, 3, 5))
    expected = expect(speech.model, heard, prior).embeddings
    words = len(speech.model.adapter.soft_tokens.words)
    monkeypatch.setattr(language_prior, "LOGITS_AT_ONCE", tokens * words)
    torch.testing.assert_close(expect(speech.model, heard, prior).embeddings, expected, atol=1e-4, rtol=1e-3)


def test_logits_that_the_llm_scales_and_caps(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech.model.llm, "logit_transform", LogitTransform(0.5, 2.0))
    assert_as_slowly(speech, by_sound(speech), prior)


def test_it_is_there_in_use_and_not_in_training(speech: BlspKd, prior: LanguagePrior) -> None:
    sound = (0.1 * np.random.default_rng(1).standard_normal(RATE)).astype(np.float32)
    model, heard = speech.model, by_sound(speech)
    torch.manual_seed(5)
    arguments = 0.1 * torch.randn(3, RATE), torch.full((3,), RATE), torch.tensor(COUNTS)
    torch.testing.assert_close(model.adapt(*arguments).embeddings, expect(model, heard, prior).embeddings)
    model.train()
    try:
        torch.testing.assert_close(model.adapt(*arguments).embeddings, heard.embeddings)
    finally:
        model.eval()
    answers = {}
    for weight in (0.0, 500.0):
        model.prior = prior._replace(weight=weight)
        answers[weight] = speech.transcripts([(sound, RATE)], prompt=None)[0].text
    model.prior = prior
    assert answers[0.0] != answers[500.0]


def test_whether_anybody_speaks_is_for_the_sound_to_say(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, soft = by_sound(speech), speech.model.adapter.soft_tokens
    helped = expect(speech.model, heard, prior).embeddings
    said = [False] * 4 + [True] + [False, False, True, False, False, False]  # no word in the first of the pieces
    monkeypatch.setattr(soft, "says_word", lambda candidates: torch.tensor(said))
    found = expect(speech.model, heard, prior).embeddings
    torch.testing.assert_close(found, torch.cat([heard.embeddings[:1], helped[1:]]))


def test_what_says_a_word_is_the_likeliest_token(speech: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, soft = by_sound(speech), speech.model.adapter.soft_tokens
    queries = heard.queries._replace(vectors=heard.queries.vectors[2])
    tokens = likeliest(soft, queries)
    for is_word in (True, False):
        words = torch.full_like(soft.words, -1 if is_word else 0)
        words[tokens] = 0 if is_word else -1
        monkeypatch.setitem(soft._buffers, "words", words)
        assert soft.says_word(soft.candidates(queries, 3)).tolist() == [is_word] * COUNTS[2]


# ---- a search -------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(prior: LanguagePrior) -> LanguagePrior:
    return prior._replace(beam=4)


def twice(speech: BlspKd, heard: AdapterOutput) -> AdapterOutput:
    """Every piece at a token of its own, but for the third of the last row, which is heard twice running."""
    soft = speech.model.adapter.soft_tokens
    tokens = (soft.words >= 0).nonzero()[:, 0][: 3 * 6].view(3, 6).clone()
    tokens[2, 3] = tokens[2, 2]
    points = soft.embedded(tokens)
    vectors = torch.cat([points, torch.zeros(3, 6, heard.queries.vectors.shape[2] - points.shape[2])], 2)
    return heard._replace(queries=heard.queries._replace(vectors=vectors))


def test_a_search_gives_tokens_as_the_llm_reads_them(speech: BlspKd, searched: LanguagePrior) -> None:
    heard, model = by_sound(speech, (4, 0, 6)), speech.model
    found = expect(model, heard, searched)
    ids = [speech.nearest_tokens(one[:count]) for one, count in zip(found.embeddings, found.lengths, strict=True)]
    assert ids[1] == [] and 0 < len(ids[0]) <= 4
    for one, tokens in zip(found.embeddings, ids, strict=True):
        torch.testing.assert_close(one[: len(tokens)], model.embed(torch.tensor(tokens, dtype=torch.long)))
        assert not one[len(tokens) :].any()
    by_one = expect(model, heard, searched, may_join=False)
    assert by_one.lengths.tolist() == [4, 0, 6] and by_one.queries is heard.queries


def test_pieces_that_say_one_word_are_joined(speech: BlspKd, searched: LanguagePrior) -> None:
    heard = twice(speech, by_sound(speech))
    found = expect(speech.model, heard, searched)
    assert found.lengths.tolist() == [4, 1, 5]
    # The piece ends where the second one did, and what comes behind moves up.
    assert found.boundaries[2].tolist() == heard.boundaries[2, [0, 1, 3, 4, 5]].tolist()
    assert len(set(found.boundaries[2].tolist())) == 5
    # Nothing is wider than the longest row.
    assert found.embeddings.shape[:2] == found.queries.vectors.shape[:2] == found.boundaries.shape == (3, 5)
    torch.testing.assert_close(found.queries.vectors[2, :5], heard.queries.vectors[2, [0, 1, 2, 4, 5]])
    torch.testing.assert_close(found.boundaries[:2], heard.boundaries[:2, :5])


def test_a_search_of_so_many_pieces_at_once_as_memory_holds(
    speech: BlspKd, searched: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = by_sound(speech, (2, 4, 0, 6, 3, 5))
    together = expect(speech.model, heard, searched)
    monkeypatch.setattr(language_prior, "LOGITS_AT_ONCE", 7 * len(speech.model.adapter.soft_tokens.words))
    for one, other in zip(expect(speech.model, heard, searched)[:2], together[:2], strict=True):
        torch.testing.assert_close(one, other)


def best_score(speech: BlspKd, heard: AdapterOutput, row: int, prior: LanguagePrior) -> float:
    """Of the hypotheses of one piece of speech alone."""
    soft, count = speech.model.adapter.soft_tokens, int(heard.lengths[row])
    sound = soft.candidates(heard.queries._replace(vectors=heard.queries.vectors[row, :count]), 128)
    lattice = Lattice(sound.ids[None], sound.logits[None], soft.words[sound.ids][None], [count])
    return float(search(speech.model, lattice, prior.opening, prior.weight, prior.beam).scores[0, 0])


def assert_row(found: AdapterOutput, expected: AdapterOutput, row: int) -> None:
    count = int(expected.lengths[row])
    assert int(found.lengths[row]) == count
    assert found.is_text[row, :count].tolist() == expected.is_text[row, :count].tolist()
    for one, other in (
        (found.embeddings, expected.embeddings),
        (found.boundaries, expected.boundaries),
        (found.queries.vectors, expected.queries.vectors),
    ):
        torch.testing.assert_close(one[row, :count], other[row, :count], atol=1e-4, rtol=1e-3)
        assert not one[row, count:].any()


@pytest.mark.parametrize("left_out", [-1000.0, -3.0, 0.0, 6.0, 1000.0])
@pytest.mark.parametrize("tokens", [7, 10_000])
def test_the_likelier_number_of_pieces_is_taken(
    speech: BlspKd, searched: LanguagePrior, monkeypatch: pytest.MonkeyPatch, left_out: float, tokens: int
) -> None:
    monkeypatch.setattr(language_prior, "LEFT_OUT", left_out)
    monkeypatch.setattr(language_prior, "HOPELESS", 10_000.0)
    monkeypatch.setattr(language_prior, "LOGITS_AT_ONCE", tokens * len(speech.model.adapter.soft_tokens.words))
    heard, other = by_sound(speech, (4, 2, 6, 0, 3)), by_sound(speech, (5, 1, 5, 0, 4))
    found = expect(speech.model, heard, searched, other=other)
    alone = [expect(speech.model, one, searched) for one in (heard, other)]
    for row in (0, 1, 2, 4):
        fewer = left_out if other.lengths[row] < heard.lengths[row] else 0.0
        scores = [best_score(speech, one, row, searched) for one in (heard, other)]
        assert_row(found, alone[scores[1] > scores[0] + fewer], row)
        if abs(left_out) == 1000 and other.lengths[row] < heard.lengths[row]:
            assert_row(found, alone[left_out < 0], row)
    assert int(found.lengths[3]) == 0 and found.embeddings.shape[1] == int(found.lengths.max())


def test_where_either_number_says_no_word_it_is_as_cif_counts(
    speech: BlspKd, searched: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_prior, "LEFT_OUT", -1000.0)
    monkeypatch.setattr(language_prior, "HOPELESS", 10_000.0)
    heard, other = by_sound(speech, (4, 2)), by_sound(speech, (3, 1))
    soft = speech.model.adapter.soft_tokens
    assert expect(speech.model, heard, searched, other=other).lengths[0] <= 3
    by_one = expect(speech.model, heard, searched)
    # In the first pair the first says no word, in the second the second.
    says = [False] * 4 + [True] * 3 + [True] * 2 + [False]
    monkeypatch.setattr(soft, "says_word", lambda candidates: torch.tensor(says))
    found = expect(speech.model, heard, searched, other=other)
    assert not found.is_text[0].any() and int(found.lengths[0]) == 4
    assert_row(found, by_one, 1)


def test_a_number_of_pieces_that_sounds_much_worse_is_not_searched(
    speech: BlspKd, searched: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(model: object, sound: Lattice, *how: object) -> object:
        rows.append(len(sound.counts))
        return search(model, sound, *how)

    monkeypatch.setattr(language_prior, "search", counted)
    heard, other = by_sound(speech, (4, 2, 6)), by_sound(speech, (5, 3, 7))
    for hopeless in (1000.0, -1000.0):
        monkeypatch.setattr(language_prior, "HOPELESS", hopeless)
        found = expect(speech.model, heard, searched, other=other)
    assert rows == [6, 3]
    for row in range(3):
        assert_row(found, expect(speech.model, heard, searched), row)


def test_the_other_number_of_pieces() -> None:
    sums, lengths = torch.tensor([7.3, 6.7, 7.0, 0.4, 0.0, 1.2]), torch.tensor([7, 7, 7, 1, 0, 1])
    heard = AdapterOutput(torch.zeros(6, 7, 1), lengths, alpha_sum=sums)
    assert other_counts(heard).tolist() == [8, 6, 6, 1, 0, 2]


@pytest.mark.parametrize(("beam", "told", "cut"), [(3, False, 2), (3, True, 1), (0, False, 1)])
def test_speech_is_cut_twice_where_nobody_tells_the_number(
    speech: BlspKd, prior: LanguagePrior, monkeypatch: pytest.MonkeyPatch, beam: int, told: bool, cut: int
) -> None:
    model, numbers = speech.model, []
    adapt = model.adapter.adapt

    def adapted(frames: object, tokens: Rows | None, **options: object) -> AdapterOutput:
        output = adapt(frames, tokens, **options)
        numbers.append(output.lengths.tolist())
        return output

    monkeypatch.setattr(model.adapter, "adapt", adapted)
    monkeypatch.setattr(model, "prior", prior._replace(beam=beam))
    torch.manual_seed(5)
    waveforms = 0.1 * torch.randn(3, RATE)
    heard = model.adapt(waveforms, torch.full((3,), RATE), torch.tensor(COUNTS) if told else None)
    assert len(numbers) == cut
    if cut == 2:
        assert all(abs(one - other) == 1 or one == other == 1 for one, other in zip(*numbers, strict=True))
        assert all(length <= max(row) for length, row in zip(heard.lengths, zip(*numbers, strict=True), strict=True))


def test_where_the_sound_says_no_word_nothing_is_searched(
    speech: BlspKd, searched: LanguagePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, soft = twice(speech, by_sound(speech)), speech.model.adapter.soft_tokens
    as_heard = soft.mean(soft.candidates(heard.queries._replace(vectors=heard.queries.vectors[2]), 128))
    monkeypatch.setattr(soft, "says_word", lambda candidates: torch.tensor([True] * 5 + [False] * 6))
    found = expect(speech.model, heard, searched)
    assert found.lengths.tolist() == [4, 1, 6]
    torch.testing.assert_close(found.embeddings[2], as_heard)


def test_lora_learns_to_read_what_is_heard_in_use_and_the_adapter_by_its_tokens(speech: BlspKd, tmp_path: Path) -> None:
    options = {
        "adapter_soft_tokens": True,
        "adapter_prior_weight": 0.7,
        "adapter_prior_beam": 3,
        "adapter_dropout": 0.0,
    }
    model = tiny_model(tmp_path, **options, adapter_prior_training=True).model
    assert model.hears_in_training
    model.train()
    torch.manual_seed(5)
    sound = 0.1 * torch.randn(1, RATE), torch.tensor([RATE]), torch.tensor([4])
    heard = model.adapt(*sound)
    assert not heard.embeddings.requires_grad and heard.queries.vectors.requires_grad
    model.eval()
    torch.testing.assert_close(model.adapt(*sound).embeddings, heard.embeddings, atol=1e-3, rtol=1e-3)
    assert not speech.model.hears_in_training


def test_training_goes_on_with_the_prior_of_a_trained_model() -> None:
    config = SpeechLlmConfig()
    trained = {
        "adapter_soft_tokens": True, "adapter_prior_weight": 0.5, "adapter_prior_passes": 3, "adapter_prior_beam": 6,
        "adapter_prior_training": True,
    }  # fmt: skip
    assert adopt_options(config, trained) == trained
    assert config.adapter_prior_weight == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_prior_weight": 0.5}, "--adapter-prior-weight is of the posterior of soft tokens"),
        ({"adapter_soft_tokens": True, "adapter_prior_weight": -1.0}, "must not be negative"),
        ({"adapter_soft_tokens": True, "adapter_prior_weight": 1.0, "adapter_prior_passes": 0}, "at least 1"),
        ({"adapter_soft_tokens": True, "adapter_prior_beam": 6}, "--adapter-prior-beam goes by what the LLM expects"),
        ({"adapter_soft_tokens": True, "adapter_prior_training": True}, "--adapter-prior-training goes by"),
        ({"adapter_soft_tokens": True, "adapter_prior_weight": 1.0, "adapter_prior_beam": -1}, "must be 0 to 256"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_speech_llm(config_of(tmp_path, **options))
