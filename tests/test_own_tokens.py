"""What a search finds are the LLM's own tokens, which it reads as text; LoRA acts on speech that stays sound."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, wake_lora
from torch import Tensor, nn

from blspkd_fairseq.data.batch import PlanRow, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.generation.decoding import DecodingOptions, Hypothesis, answer_heard, answer_prompts, build_prompts
from blspkd_fairseq.generation.hearing import Heard, hear, hear_windows
from blspkd_fairseq.generation.streaming import Sampling
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules import language_prior
from blspkd_fairseq.modules.cformer import AdapterOutput

RATE = 16_000
OPTIONS = DecodingOptions(max_new_tokens=6)
SEARCHED = {"adapter_soft_tokens": True, "adapter_prior_weight": 0.7, "adapter_prior_beam": 3, "adapter_dropout": 0.0}


def make(folder: Path, **options: Any) -> BlspKd:
    """Its spelling and its LoRA far from saying nothing."""
    made = tiny_model(folder, **SEARCHED, **options)
    torch.manual_seed(3)
    nn.init.normal_(made.model.adapter.soft_tokens.listen.weight)
    wake_lora(made.model)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return make(tmp_path_factory.mktemp("own"))


@pytest.fixture
def silent(model: BlspKd, monkeypatch: pytest.MonkeyPatch) -> BlspKd:
    """Hears no word, but a mark, in what is quiet."""
    soft, adapt, plain, quiet = model.model.adapter.soft_tokens, model.model.adapt, model.model._adapted, []

    def adapted(waveforms: Tensor, *arguments: Any, **options: Any) -> AdapterOutput:
        quiet[:] = [waveforms.abs().amax(1) < 0.05]
        return adapt(waveforms, *arguments, **options)

    def with_marks(*arguments: Any) -> AdapterOutput:
        output = plain(*arguments)
        vectors, embeddings = output.queries.vectors.clone(), output.embeddings.clone()
        width = embeddings.shape[2]
        vectors[quiet[0], :, :width] = 3 * soft.embedded((soft.words < 0).nonzero()[40])
        vectors[quiet[0], :, width:] = 0.0
        embeddings[quiet[0]] = soft(output.queries._replace(vectors=vectors[quiet[0]].flatten(0, 1))).unflatten(
            0, (-1, vectors.shape[1])
        )
        return output._replace(embeddings=embeddings, queries=output.queries._replace(vectors=vectors))

    monkeypatch.setattr(model.model, "adapt", adapted)
    monkeypatch.setattr(model.model, "_adapted", with_marks)
    return model


def sounds(*loudness: float) -> list[np.ndarray]:
    """A second each."""
    noise = np.random.default_rng(1).standard_normal((len(loudness), RATE)).astype(np.float32)
    return list(noise * np.array(loudness, np.float32)[:, None])


def heard_in(model: BlspKd, *loudness: float) -> Heard:
    return hear_windows(model.model, [[one] for one in sounds(*loudness)])


def tokens(model: BlspKd, heard: Heard) -> list[list[int]]:
    return [model.nearest_tokens(one[:count]) for one, count in zip(heard.embeddings, heard.counts, strict=True)]


def answers(model: BlspKd, heard: Heard) -> list[Hypothesis]:
    prompts = ["Repeat: {speech}"] * len(heard.counts)
    return [group[0] for group in answer_heard(model.model, model.chat_format, heard, prompts, OPTIONS, True)]


def read_as_text(model: BlspKd, heard: Heard) -> list[Hypothesis]:
    before, after = model.chat_format.prompt_ids("Repeat: {speech}")
    conversations = [[before, Speech(0), after]] * len(heard.counts)
    asked = build_prompts(model.model, conversations, transcripts=tokens(model, heard), student=False)
    return [group[0] for group in answer_prompts(model.model, model.chat_format, asked, OPTIONS, True)]


def assert_alike(one: Hypothesis, other: Hypothesis) -> None:
    assert one.ids == other.ids
    assert one.token_scores == pytest.approx(other.token_scores, abs=1e-3)


def test_found_tokens_are_answered_as_text_is(model: BlspKd) -> None:
    heard = heard_in(model, 0.1, 0.2)
    assert all(heard.counts)
    assert heard.is_text.tolist() == [[i < count for i in range(max(heard.counts))] for count in heard.counts]
    for spoken, read in zip(answers(model, heard), read_as_text(model, heard), strict=True):
        assert_alike(spoken, read)


def test_lora_acts_where_no_word_is_heard(silent: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = heard_in(silent, 0.1, 0.01)
    assert heard.is_text.any(1).tolist() == [True, False]
    spoken, sound = answers(silent, heard)
    assert_alike(spoken, read_as_text(silent, heard)[0])
    monkeypatch.setattr(silent.model, "prior", None)
    by_sound = heard_in(silent, 0.1, 0.01)
    assert not by_sound.is_text.any()
    assert_alike(sound, answers(silent, by_sound)[1])
    # LoRA is what makes the difference.
    monkeypatch.setattr(silent.model, "lora_scope", "none")
    assert sound.token_scores != pytest.approx(answers(silent, by_sound)[1].token_scores, abs=1e-3)


def test_lora_acts_on_found_tokens_if_it_learnt_to_read_them(model: BlspKd, tmp_path: Path) -> None:
    trained = make(tmp_path, adapter_prior_training=True)
    heard = heard_in(trained, 0.1, 0.2)
    assert tokens(trained, heard) == tokens(model, heard_in(model, 0.1, 0.2)) and not heard.is_text.any()
    spoken, read = answers(trained, heard)[0], read_as_text(trained, heard)[0]
    assert spoken.token_scores != pytest.approx(read.token_scores, abs=1e-3)


def test_in_one_piece_some_windows_may_be_words_and_some_sound(silent: BlspKd) -> None:
    loud, quiet, other = sounds(0.1, 0.01, 0.2)
    separate = [hear_windows(silent.model, [[one]]) for one in (loud, quiet, other)]
    heard = hear_windows(silent.model, [[loud, quiet, other], [quiet]])
    counts = [one.counts[0] for one in separate]
    assert heard.is_text[0].tolist() == [True] * counts[0] + [False] * counts[1] + [True] * counts[2]
    assert not heard.is_text[1].any() and heard.counts == [sum(counts), counts[1]]
    second = heard.of([1])
    torch.testing.assert_close(second.embeddings, separate[1].embeddings, atol=1e-4, rtol=1e-3)
    assert second.counts == separate[1].counts and second.is_text.shape == second.embeddings.shape[:2]
    assert heard.of([]).counts == []


def test_token_by_token_it_is_the_same(silent: BlspKd) -> None:
    parts = [{"type": "audio", "audio": (one, RATE)} for one in sounds(0.1, 0.01, 0.2)]
    messages = [{"role": "user", "content": parts}]
    decoder = silent.streaming_decoder()
    request = silent.request(messages, Sampling(max_new_tokens=6))
    streamed = "".join(delta.text for delta in decoder.stream(request))
    assert streamed == silent.generate(messages=messages, max_new_tokens=6)
    ahead = silent.streaming_decoder()
    ahead.read_ahead(request)
    deltas = list(ahead.stream(request))
    assert "".join(delta.text for delta in deltas) == streamed
    assert deltas[-1].usage is not None and deltas[-1].usage.reused > 0


@pytest.mark.parametrize("packed", [True, False])
def test_read_with_a_response_it_is_the_teacher_who_reads_found_tokens(
    silent: BlspKd, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    model = silent.model
    monkeypatch.setattr(model, "reads_packed", packed)
    waveforms, lengths = torch.from_numpy(np.stack(sounds(0.1, 0.2, 0.01))), torch.full((3,), RATE)
    counts = [3, 5, 4]
    rows = [PlanRow([[5, 6], Speech(0), [7]], [[0] * n], [n], [8, 9], [i]) for i, n in enumerate(counts)]
    with torch.no_grad():
        output = model(waveforms, lengths, plan_batch(rows, counts), ("response",), teacher=False)
        adapted = model.adapt(waveforms, lengths, torch.tensor(counts))
        assert adapted.is_text is not None and adapted.is_text.sum(1).tolist() == [3, 5, 0]
        found = [silent.nearest_tokens(one[:n]) for one, n in zip(adapted.embeddings, counts, strict=True)]
        read = [replace(row, transcripts=[ids]) for row, ids in zip(rows, found, strict=True)]
        taught = model.teach((plan := plan_batch(read, counts)).teacher).index_select(0, plan.teacher.response)
    assert output.response is not None
    student = output.response.student
    spoken = output.response.rows < 2
    torch.testing.assert_close(student[spoken], taught[spoken], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(student[~spoken], taught[~spoken], atol=1e-2)


def test_of_speech_without_a_search_there_is_no_text(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path)
    heard = hear(plain.model, torch.from_numpy(np.stack(sounds(0.1, 0.2))), torch.full((2,), RATE))
    assert heard.is_text.shape == heard.embeddings.shape[:2] and not heard.is_text.any()


def test_who_knows_what_was_said_asks_no_llm(model: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("nobody reads it")

    sound = np.concatenate([*sounds(0.1, 0.2), np.zeros(RATE, np.float32), *sounds(0.1)])
    spans = [(token.start, token.end) for token in model.align((sound, RATE), "Turn on the light.")]
    monkeypatch.setattr(language_prior, "search", refuse)
    assert [(token.start, token.end) for token in model.align((sound, RATE), "Turn on the light.")] == spans
    assert len(model.segment(model.timed_windows((sound, RATE))[0], "Turn on the light.").words) == 4
    with pytest.raises(AssertionError, match="nobody reads it"):
        model.align((sound, RATE))
