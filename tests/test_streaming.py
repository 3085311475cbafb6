"""Answers token by token, of requests that come and go: the same as each by itself."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from test_llm_families import FAMILIES
from test_llm_families import make as make_llm
from tiny import save_whisper, tiny_model, wake_lora

from blspkd_fairseq.data.audio import AudioError
from blspkd_fairseq.data.chat import Marks
from blspkd_fairseq.data.conversation import ConversationError, Speech
from blspkd_fairseq.data.prompts import PROMPTS
from blspkd_fairseq.generation import streaming
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech, answer_text
from blspkd_fairseq.generation.streaming import Delta, Request, Sampling, StreamingDecoder
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.cformer import CFormer
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder
from blspkd_fairseq.session import ChatSession

NOISE = np.random.default_rng(0).normal(size=40_000).astype(np.float32) / 10


def speech(begin: int, seconds: float) -> tuple[np.ndarray, int]:
    return NOISE[begin : begin + int(seconds * 16_000)], 16_000


SEARCHED = {"adapter_soft_tokens": True, "adapter_prior_weight": 0.7, "adapter_prior_beam": 3}
MODELS: dict[str, dict[str, Any]] = {"speech": {}, "all": {"lora_scope": "all"}, "searched": SEARCHED}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    root = tmp_path_factory.mktemp("streaming")
    model = tiny_model(root, **MODELS[request.param])
    wake_lora(model.model.llm)
    return model


def said(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part}
            for part in parts
        ],
    }


CONVERSATIONS = [
    [said(speech(0, 0.7))],
    [said("Repeat: ", speech(3000, 1.3), " Now.")],
    [said("Call my mother.")],
    [said(speech(0, 0.4), speech(9000, 0.9)), {"role": "assistant", "content": "Of what?"}, said(speech(5, 0.5))],
]


def run(decoder: StreamingDecoder, rows: Sequence[int] = ()) -> dict[int, list[Delta]]:
    """Steps until nothing is active."""
    deltas: dict[int, list[Delta]] = {row: [] for row in rows}
    while decoder.active:
        for delta in decoder.step():
            deltas.setdefault(delta.row, []).append(delta)
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_it_says_what_generate_says(model: BlspKd) -> None:
    for messages in CONVERSATIONS[:2] + CONVERSATIONS[3:]:
        expected = model.generate(messages=messages, max_new_tokens=12)
        assert model.chat(messages, max_new_tokens=12) == expected
        pieces = list(model.chat(messages, stream=True, max_new_tokens=12))
        assert "".join(pieces) == expected and all(pieces)


def test_it_says_how_probable_an_answer_was(model: BlspKd) -> None:
    decoder = model.streaming_decoder()
    rows = [decoder.add(model.request(one, Sampling(max_new_tokens=9))) for one in (CONVERSATIONS[0], CONVERSATIONS[2])]
    usages = [deltas[-1].usage for row, deltas in sorted(run(decoder, rows).items())]
    asked = dataclasses.replace(DecodingOptions(), max_new_tokens=9)
    waveform = torch.from_numpy(speech(0, 0.7)[0])
    heard = answer_speech(
        model.model, model.chat_format, waveform[None], torch.tensor([len(waveform)]), [PROMPTS["chat"]], asked,
        with_scores=True,
    )[0][0]  # fmt: skip
    assert usages[0] is not None and usages[0].log_probability == pytest.approx(sum(heard.token_scores), abs=1e-3)
    read = answer_text(model.model, model.chat_format, ["Call my mother."], [PROMPTS["chat"]], asked, with_scores=True)
    # With LoRA everywhere the LLM reads text otherwise, too, and answer_text is the teacher's.
    if model.model.lora_scope != "all":
        assert usages[1].log_probability == pytest.approx(sum(read[0][0].token_scores), abs=1e-3)


def test_rows_that_come_and_go_say_what_each_says_alone(model: BlspKd) -> None:
    alone = [model.chat(messages, max_new_tokens=n) for n, messages in zip((20, 6, 14, 9), CONVERSATIONS, strict=True)]
    decoder = model.streaming_decoder(kept_bytes=0)
    requests = [
        model.request(messages, Sampling(max_new_tokens=n))
        for n, messages in zip((20, 6, 14, 9), CONVERSATIONS, strict=True)
    ]
    rows = [decoder.add(requests[0])]
    deltas: dict[int, list[Delta]] = {}
    for number in range(60):
        if number in (3, 5, 6):  # in the midst of the first one
            rows.append(decoder.add(requests[len(rows)]))
        for delta in decoder.step():
            deltas.setdefault(delta.row, []).append(delta)
    assert decoder.active == 0
    assert [text_of(deltas[row]) for row in rows] == alone
    assert all(deltas[row][-1].finish in ("stop", "length") for row in rows)
    assert deltas[rows[1]][-1].usage is not None and deltas[rows[1]][-1].usage.answer <= 6


def test_each_row_draws_by_itself(model: BlspKd) -> None:
    drawn = Sampling(max_new_tokens=10, temperature=1.5, top_p=0.9, top_k=50, seed=3)
    alone = model.chat(CONVERSATIONS[0], max_new_tokens=10, temperature=1.5, top_p=0.9, top_k=50, seed=3)
    decoder = model.streaming_decoder()
    samplings = [Sampling(max_new_tokens=10), drawn, Sampling(max_new_tokens=10, temperature=1.5, seed=4), drawn]
    rows = [decoder.add(model.request(CONVERSATIONS[0], one)) for one in samplings]
    deltas = run(decoder)
    texts = [text_of(deltas[row]) for row in rows]
    assert texts[1] == texts[3] == alone
    assert texts[0] == model.chat(CONVERSATIONS[0], max_new_tokens=10)
    assert len(set(texts)) == 3


def test_the_first_token_alone_is_drawn_from_as_narrow_a_choice_as_asked(model: BlspKd) -> None:
    greedy = model.chat(CONVERSATIONS[1], max_new_tokens=8)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert model.chat(CONVERSATIONS[1], max_new_tokens=8, temperature=3.0, seed=1, **narrow) == greedy


@pytest.mark.parametrize(
    ("narrow", "kept"),
    [({}, range(6)), ({"top_k": 3}, (1, 3, 4)), ({"top_p": 0.6}, (1, 4)), ({"top_k": 3, "top_p": 0.7}, (1, 4))],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(narrow: dict[str, Any], kept: Sequence[int]) -> None:
    probabilities, generator = torch.tensor([0.05, 0.35, 0.0, 0.2, 0.3, 0.1]), torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=2.0, **narrow)
    drawn = torch.stack([streaming._draw(2 * probabilities.log(), sampling, generator) for _ in range(4000)])
    expected = torch.zeros(6).index_copy(0, torch.tensor(kept), probabilities[list(kept)])
    torch.testing.assert_close(drawn.bincount(minlength=6) / 4000, expected / expected.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("narrow", [{}, {"top_k": 3, "top_p": 0.5}])
def test_drawing_asks_the_device_for_nothing(narrow: dict[str, Any]) -> None:
    token = streaming._draw(torch.empty(9, device="meta"), Sampling(temperature=1.0, **narrow), torch.Generator())
    assert token.device.type == "meta" and token.shape == ()


def test_what_a_conversation_has_heard_and_read_is_not_read_again(
    model: BlspKd, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [said("Listen: ", speech(0, 1.5), " Well?")]
    decoder = model.streaming_decoder()
    answer = text_of(list(decoder.stream(model.request(first, Sampling(max_new_tokens=8)))))
    longer = [*first, {"role": "assistant", "content": answer or "a"}, said("And now? ", speech(9000, 0.5))]
    request = model.request(longer, Sampling(max_new_tokens=8))
    heard: list[int] = []
    adapt = model.model.adapt
    monkeypatch.setattr(model.model, "adapt", lambda w, *a, **k: (heard.append(len(w)), adapt(w, *a, **k))[1])
    deltas = list(decoder.stream(request))
    assert heard == [1]  # the new piece alone
    usage = deltas[-1].usage
    assert usage is not None and usage.prompt / 2 < usage.reused < usage.prompt
    fresh = list(model.streaming_decoder(kept_bytes=0).stream(request))
    assert text_of(deltas) == text_of(fresh)
    again = fresh[-1].usage
    assert again is not None and again[:3] == (usage.prompt, usage.answer, 0)
    assert again.log_probability == pytest.approx(usage.log_probability, abs=1e-3)


def test_what_is_kept_is_bounded(model: BlspKd) -> None:
    decoder = model.streaming_decoder(kept_bytes=60_000)
    for number in range(6):
        list(decoder.stream(model.request([said(f"{number} apples.")], Sampling(max_new_tokens=4))))
        assert sum(one.bytes for one in decoder._kept.values()) <= 60_000
    assert decoder._kept


def test_a_long_prompt_is_read_in_portions_while_others_answer(model: BlspKd) -> None:
    long = [said("Turn on the light in the kitchen. " * 8, speech(0, 0.5))]
    expected = model.chat(long, max_new_tokens=6)
    decoder = model.streaming_decoder(chunk=16, kept_bytes=0)
    short = decoder.add(model.request(CONVERSATIONS[2], Sampling(max_new_tokens=30)))
    while not decoder.step():
        pass
    row = decoder.add(model.request(long, Sampling(max_new_tokens=6)))
    meanwhile: list[Delta] = []
    deltas: list[Delta] = []
    while decoder.active:
        for delta in decoder.step():
            (deltas if delta.row == row else meanwhile if not deltas else []).append(delta)
    assert text_of(deltas) == expected
    assert len([delta for delta in meanwhile if delta.row == short]) > 2


def test_speech_longer_than_a_window_is_one_piece_for_the_llm(model: BlspKd) -> None:
    long = (np.tile(NOISE, 14), 16_000)  # 35 s
    assert len(model.windows(long)) == 2
    request = model.request([said(long)], Sampling(max_new_tokens=4))
    decoder = model.streaming_decoder(seconds=20.0)  # a window at a time
    deltas = list(decoder.stream(request))
    assert text_of(deltas) == model.generate(long, max_new_tokens=4)


def test_a_conversation_without_room_is_refused_and_the_others_go_on(model: BlspKd) -> None:
    decoder = model.streaming_decoder()
    full = decoder.add(model.request([said("light " * 600)]))
    fits = decoder.add(model.request(CONVERSATIONS[0], Sampling(max_new_tokens=4)))
    deltas = run(decoder)
    assert deltas[full][-1].finish == "error" and "the LLM reads 512 together with its answer" in str(
        deltas[full][-1].error
    )
    assert text_of(deltas[fits]) == model.chat(CONVERSATIONS[0], max_new_tokens=4)
    for ask in (model.chat, lambda messages: model.generate(messages=messages)):
        with pytest.raises(ValueError, match="shorten the audio or the text, or leave out earlier turns"):
            ask([said("light " * 600)])


def test_the_answer_ends_where_the_context_does(model: BlspKd) -> None:
    prompt = [said("Play. " * 60)]
    request = model.request(prompt, Sampling(max_new_tokens=10_000, temperature=2.0, seed=0))
    usage = list(model.streaming_decoder().stream(request))[-1].usage
    assert usage is not None and usage.prompt + usage.answer <= 513


def test_a_stream_that_is_closed_frees_its_place(model: BlspKd) -> None:
    answer = model.chat(CONVERSATIONS[0], stream=True, max_new_tokens=50)
    other = model.chat(CONVERSATIONS[1], stream=True, max_new_tokens=12)
    first = next(answer)
    assert isinstance(first, str) and model.decoder.active >= 1
    second = "".join([next(other), *other])  # both at once
    assert second == model.chat(CONVERSATIONS[1], max_new_tokens=12)
    answer.close()  # type: ignore[attr-defined]
    assert model.decoder.active == 0
    model.decoder.cancel(12345)  # unknown: nothing happens


def test_stop_strings_end_the_answer_and_never_show(model: BlspKd) -> None:
    whole = model.chat(CONVERSATIONS[0], max_new_tokens=30)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    pieces = list(model.chat(CONVERSATIONS[0], stream=True, max_new_tokens=30, stop=("nonesuch", stop)))
    assert "".join(pieces) == whole[: whole.index(stop)]


def test_audio_in_every_shape_is_the_same(model: BlspKd, tmp_path: Any) -> None:
    samples, rate = speech(100, 0.8)
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    shapes = [str(path), path, path.read_bytes(), (samples, rate), {"array": samples, "sampling_rate": rate}]
    messages = [[{"role": "user", "content": [{"type": "audio", "audio": one}]}] for one in shapes]
    assert len({model.chat(one, max_new_tokens=6) for one in messages}) == 1
    assert len({model.generate(one, max_new_tokens=6) for one in shapes}) == 1
    with pytest.raises(ValueError, match="audio cannot be decoded"):
        model.chat([said(b"no audio" * 100)])
    with pytest.raises(ValueError, match="rate"):
        model.chat([said({"array": samples})])
    with pytest.raises(ConversationError, match="take turns"):
        model.chat([said("a"), said("b")])


def test_silence_is_answered_by_nothing_where_asked(model: BlspKd) -> None:
    silence = (np.zeros(32_000, np.float32), 16_000)
    for vad in ("energy",):
        assert model.chat([said(silence)], vad=vad) == ""
        assert model.generate([silence, speech(0, 1.0), silence], vad=vad, max_new_tokens=4)[::2] == ["", ""]
        assert model.transcribe(silence, vad=vad) == ""
        assert model.chat([said("Hello", silence)], vad=vad, max_new_tokens=4) != ""  # something was written
    assert model.chat([said(silence)], max_new_tokens=4) != ""


def test_where_no_word_is_heard_the_llm_is_asked_if_the_request_says_so(
    model: BlspKd, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [model.chat(messages, max_new_tokens=5) for messages in CONVERSATIONS[:2]]
    for heard, answers in (("Hello", expected), ("", ["", expected[1]])):
        monkeypatch.setattr(streaming, "nearest_texts", lambda *args, heard=heard: [heard] * len(args[2]))
        decoder = model.streaming_decoder()
        samplings = Sampling(max_new_tokens=5, if_spoken=True), Sampling(max_new_tokens=5)
        pairs = zip(CONVERSATIONS[:2], samplings, strict=True)
        rows = [decoder.add(model.request(messages, sampling)) for messages, sampling in pairs]
        deltas = run(decoder, rows)
        assert [text_of(deltas[row]) for row in rows] == answers
        assert deltas[rows[0]][-1].finish is not None and deltas[rows[0]][-1].usage is not None
        text = decoder.add(model.request(CONVERSATIONS[2], Sampling(max_new_tokens=5, if_spoken=True)))
        assert text_of(run(decoder)[text]) == model.chat(CONVERSATIONS[2], max_new_tokens=5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "0 < top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k >= 0"),
        ({"stop": "text"}, "stop must be a list"),
        ({"stop": ("",)}, "not empty"),
        ({"stop": None}, "stop must be a list"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": "x"}, "top_p must be a number"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must have at most 63 bits"),
    ],
)
def test_wrong_sampling_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("narrow", [{"temperature": 1e-300}, {"temperature": 1e-42}, {"top_p": 1e-300}], ids=str)
def test_the_narrowest_choice_is_the_likeliest_token(narrow: dict[str, float], model: BlspKd) -> None:
    messages = CONVERSATIONS[0]
    drawn = model.chat(messages, max_new_tokens=8, **{"temperature": 1.0, "seed": np.int64(1), **narrow})
    assert drawn == model.chat(messages, max_new_tokens=8)


# --- families of LLMs -----------------------------------------------------------------------------


class Numbers:
    """Stands for a chat format: tokens are shown as numbers."""

    eos_ids = (59,)
    control_ids: frozenset[int] = frozenset()
    marks = Marks(frozenset(), frozenset(), None, None)

    def decode(self, ids: Any) -> str:
        return "".join(f" {token}" for token in ids)

    decode_answer = decode


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_come_and_go_in_every_family(kind: str, tmp_path: Path) -> None:
    encoder = SpeechEncoder.from_pretrained(str(save_whisper(tmp_path)))
    llm = SpeechLLM(encoder, CFormer(16, 32, 0.3, 1, 1, heads=2), make_llm(kind)).eval()
    prompts = [list(range(3, 20)), [7, 5, 8], [9] * 11, list(range(3, 26))]
    requests = [
        Request([prompt[:2], Speech(0), prompt[2:]], [[NOISE[: 9000 + 3000 * i]]], Sampling(max_new_tokens=4 + 3 * i))
        for i, prompt in enumerate(prompts)
    ]
    chat: Any = Numbers()
    alone = [text_of(list(StreamingDecoder(llm, chat, kept_bytes=0).stream(one))) for one in requests]
    decoder = StreamingDecoder(llm, chat, chunk=8)
    rows: list[int] = []
    deltas: dict[int, list[Delta]] = {}
    while decoder.active or len(rows) < len(requests):
        if len(rows) < len(requests):
            rows.append(decoder.add(requests[len(rows)]))
        for delta in decoder.step():
            deltas.setdefault(delta.row, []).append(delta)
    assert [text_of(deltas[row]) for row in rows] == alone
    # Again, with what was kept: the same, and less to read where states can be cut.
    again = [list(decoder.stream(one)) for one in requests]
    assert [text_of(one) for one in again] == alone


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_what_is_fed_while_it_is_spoken_is_heard_as_a_whole(
    model: BlspKd, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    syllables = np.abs(np.sin(np.arange(10 * rate) / rate * 2)) > 0.3  # a pause each 1.6 s
    samples = np.tile(NOISE, 12)[: 10 * rate] * syllables
    model.model.window_seconds = 3.0
    try:
        session = ChatSession(model, vad=None, window_seconds=3.0)
        for begin in range(0, len(samples), rate // 10):
            session.feed(samples[begin : begin + rate // 10], rate)
        heard: list[int] = []
        adapt = model.model.adapt
        monkeypatch.setattr(model.model, "adapt", lambda w, *a, **k: (heard.append(w.shape[1]), adapt(w, *a, **k))[1])
        answer = "".join(session.answer(max_new_tokens=8))
        assert len(heard) == 1 and heard[0] <= 3 * 16_000  # the last window alone
        assert len(session._speech[0]) > 3
        deltas = list(model.decoder.stream(session.model.request([said((samples, rate))], Sampling(max_new_tokens=1))))
        assert deltas[-1].usage is not None
        if rate == 16_000:
            assert answer == model.chat([said((samples, rate))], max_new_tokens=8)
    finally:
        model.model.window_seconds = 30.0


def test_reading_ahead_spares_reading_later_and_changes_nothing(model: BlspKd) -> None:
    request = model.request([said("Listen: ", speech(0, 2.0))], Sampling(max_new_tokens=8))
    decoder = model.streaming_decoder(chunk=16)
    decoder.read_ahead(request)
    deltas = list(decoder.stream(request))
    assert deltas[-1].usage is not None and deltas[-1].usage.reused > deltas[-1].usage.prompt / 2
    assert text_of(deltas) == text_of(list(model.streaming_decoder().stream(request)))
    decoder.read_ahead(model.request([said("No speech.")]))  # nothing to do
    with pytest.raises(ValueError, match="the LLM reads 512"):
        decoder.read_ahead(model.request([said("light " * 600, speech(0, 1.0))]))


def test_a_session_remembers_its_turns(model: BlspKd) -> None:
    session = ChatSession(model, system="Be short.", vad="energy")
    session.say("Call my mother.")
    first = "".join(session.answer(max_new_tokens=6))
    session.feed(np.zeros(16_000, np.float32))
    assert list(session.answer()) == []  # nobody spoke: no turn
    session.say("Listen: ")
    session.say({"audio": speech(0, 1.0)})
    session.say({"array": speech(9000, 0.8)[0], "sampling_rate": 16_000})
    session.vad = None
    second = "".join(session.answer(max_new_tokens=6))
    assert [turn.role for turn in session.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert session.turns[2].parts == (first,) and session.turns[4].parts == (second,)
    with pytest.raises(ValueError, match="the user has said nothing"):
        list(session.answer())
    turns, pieces = list(session.turns), len(session._speech)
    session.say("Never mind ")
    session.feed(NOISE[:9000])
    session.discard()
    with pytest.raises(ValueError, match="the user has said nothing"):
        list(session.answer())
    with pytest.raises(ValueError, match=r"after [\\]ud800.*holds half of a surrogate pair"):
        session.say("after " * 20 + "\ud800")
        list(session.answer())
    assert (session.turns, len(session._speech), session._parts) == (turns, pieces, [])
    for first, then in ((8_000, 44_100), (8_000, 16_000), (16_000, 8_000)):
        session.feed(NOISE[:4000], first)
        with pytest.raises(AudioError, match=f"from {first} to {then} Hz"):
            session.feed(NOISE[:4000], then)
        session.discard()


@pytest.mark.parametrize(
    ("chunk", "rate", "message"),
    [
        (np.full(100, np.nan, np.float32), 16_000, "NaN or infinite"),
        (np.full(100, 3e4, np.float32), 16_000, r"in \[-1, 1\]"),
        (np.zeros((100, 1)), 16_000, r"shape \[100, 1\]"),
        ([1, 2], 16_000, "type int64"),
        (b"ab", 16_000, "type"),
        (NOISE[:100], 16, "the sample rate 16: give its number of samples per second"),
        (NOISE[:100], 0, "sample rate 0"),
        (NOISE[:100], float("nan"), "sample rate nan"),
        (NOISE[:100], "fast", "sample rate fast"),
    ],
)
def test_a_portion_that_is_no_speech_is_refused_and_changes_nothing(
    chunk: Any, rate: Any, message: str, model: BlspKd
) -> None:
    session = ChatSession(model)
    with pytest.raises(AudioError, match=f"a portion .*{message}"):
        session.feed(chunk, rate)
    assert session._parts == [] and session._speech == []


def test_portions_of_integers_are_scaled_as_elsewhere(model: BlspKd) -> None:
    samples = (np.sin(np.arange(9_000) / 9) * 9_000).astype(np.int16)
    session = ChatSession(model, vad=None)
    session.feed(samples)
    assert "".join(session.answer(max_new_tokens=6)) == model.chat([said((samples, 16_000))], max_new_tokens=6)
    assert np.array_equal(session._speech[0][0], samples / np.float32(32768))
