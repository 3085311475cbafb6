"""Degradations: as strong as asked for, the same in every run, and finite whatever the input."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.evaluation.plots import plot_boundaries, plot_robustness, plot_scores
from blspkd_fairseq.evaluation.robustness import Condition, Voices, active_power, degrade, parse_condition
from blspkd_fairseq.evaluation.significance import Interval

ALL = ["clean", "white:5", "babble:5", "reverb:0.4", "clip:0.1", "speed:1.25", "8khz"]


def speech(seconds: float = 3.0, seed: int = 0) -> np.ndarray:
    """Noise that speaks for 0.4 s and pauses for 0.6 s, 60 dB lower."""
    rng = np.random.default_rng(seed)
    loudness = np.where(speaks(round(seconds * SAMPLE_RATE), shift=1600 * seed), 0.1, 1e-4)
    return (rng.standard_normal(len(loudness)) * loudness).astype(np.float32)


def speaks(length: int, shift: int = 0) -> np.ndarray:
    return (np.arange(length) + shift) % SAMPLE_RATE < 6400


def tone(frequency: float, seconds: float = 2.0) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def voices(count: int = 9) -> Voices:
    return Voices([f"u{i}" for i in range(count)], lambda name: speech(2, seed=int(name[1:])))


def peak_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(samples))


# --- all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ALL)
def test_same_seed_and_id_give_the_same_samples(text: str) -> None:
    condition, clean = parse_condition(text), speech()
    first = degrade(clean, condition, "u0", seed=3, voices=voices())
    np.testing.assert_array_equal(first, degrade(clean, condition, "u0", seed=3, voices=voices()))
    assert first.dtype == np.float32 and np.isfinite(first).all()
    assert len(first) == (len(clean) if condition.kind != "speed" else round(len(clean) / 1.25))
    if condition.kind in ("white", "babble", "reverb"):
        assert np.abs(first - degrade(clean, condition, "u0", seed=4, voices=voices())).max() > 1e-3
        assert np.abs(first - degrade(clean, condition, "u1", seed=3, voices=voices())).max() > 1e-3
    assert (np.abs(first - clean).max() > 1e-3 if len(first) == len(clean) else True) == (text != "clean")


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("length", [1, 7, 321])
@pytest.mark.parametrize("make", [np.zeros, np.ones, lambda length: np.eye(1, length)[0]])
def test_silence_clicks_and_short_input_stay_finite(make: Callable[[int], np.ndarray], length: int, text: str) -> None:
    clean = make(length).astype(np.float32)
    found = degrade(clean, parse_condition(text), "u0", voices=voices())
    assert np.isfinite(found).all() and found.dtype == np.float32
    if not clean.any():
        assert not found.any()
    elif text == "clip:0.1":
        assert found.any()


def test_input_is_left_as_it_was() -> None:
    for text in ALL:
        clean = speech()
        degrade(clean, parse_condition(text), "u0", voices=voices())
        np.testing.assert_array_equal(clean, speech())


@pytest.mark.parametrize("bad", [np.zeros((2, 5)), np.zeros(0), np.array([0.0, np.nan])])
def test_unusable_input_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="u7 has the shape"):
        degrade(bad, Condition("clean"), "u7")


# --- noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["white", "babble"])
@pytest.mark.parametrize("asked", [-10, 0, 5, 20])
def test_realised_snr_is_the_one_asked_for(kind: str, asked: float) -> None:
    clean = speech().astype(np.float64)
    noise = degrade(clean, Condition(kind, asked), "u0", voices=voices()) - clean
    active = speaks(len(clean))
    realised = 10 * np.log10(np.mean(clean[active] ** 2) / np.mean(noise[active] ** 2))
    assert realised == pytest.approx(asked, abs=0.1)


def test_pauses_do_not_change_the_level_of_speech() -> None:
    talk = np.random.default_rng(0).standard_normal(SAMPLE_RATE) * 0.1
    with_pause = np.concatenate([talk, np.zeros(4 * SAMPLE_RATE)])
    assert active_power(with_pause) == pytest.approx(active_power(talk))


def test_noise_of_an_utterance_is_the_same_at_every_level() -> None:
    clean = speech()
    loud, quiet = (degrade(clean, Condition("white", level), "u0") - clean for level in (0, 20))
    np.testing.assert_allclose(loud, 10 * quiet, atol=1e-5)


def test_babble_is_six_other_utterances() -> None:
    loaded: list[str] = []

    def load(name: str) -> np.ndarray:
        loaded.append(name)
        return speech(1, seed=int(name[1:]))

    for utterance in (f"u{i}" for i in range(9)):
        loaded.clear()
        degrade(speech(), Condition("babble", 5), utterance, voices=Voices([f"u{i}" for i in range(9)], load))
        assert utterance not in loaded and len(set(loaded)) == len(loaded) == 6


def test_babble_is_made_of_the_voices_given() -> None:
    """One other voice, a tone: the noise is that tone."""
    noise = degrade(speech(), Condition("babble", -30), "a", voices=Voices(["a", "b"], lambda _: tone(1000)))
    assert peak_frequency(noise) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("pool", [None, Voices(["u0"], lambda _: speech()), Voices([], lambda _: speech())])
def test_babble_without_others_is_refused(pool: Voices | None) -> None:
    with pytest.raises(ValueError, match="no other utterance to make the babble behind u0"):
        degrade(speech(), Condition("babble", 5), "u0", voices=pool)


@pytest.mark.parametrize("utterance", ["u0", "u5"])
def test_nobody_babbles_behind_himself(utterance: str) -> None:
    loaded: list[str] = []

    def load(name: str) -> np.ndarray:
        loaded.append(name)
        return speech(1, seed=int(name[1:]))

    ids = [f"u{i}" for i in range(12)]
    speakers = {name: f"s{i % 3}" for i, name in enumerate(ids)}
    for seed in range(5):
        degrade(speech(), Condition("babble", 5), utterance, seed, Voices(ids, load, speakers))
    assert {speakers[name] for name in loaded} == {"s0", "s1", "s2"} - {speakers[utterance]}
    with pytest.raises(ValueError, match="by other speakers"):
        degrade(speech(), Condition("babble", 5), utterance, voices=Voices(ids, load, dict.fromkeys(ids, "one")))


def test_babble_of_silence_is_refused() -> None:
    with pytest.raises(ValueError, match="noise is silent"):
        degrade(speech(), Condition("babble", 5), "u0", voices=Voices(["u1"], lambda _: np.zeros(9)))


# --- the others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rt60", [0.3, 0.8])
def test_reverberation_decays_by_60_db_in_its_time(rt60: float) -> None:
    click = np.zeros(2 * SAMPLE_RATE)
    click[0] = 1
    response = degrade(click, Condition("reverb", rt60), "u0").astype(np.float64)
    decay = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1] / np.sum(response[1:] ** 2))  # Schroeder 1965
    reached = [int(np.argmax(decay < level)) / SAMPLE_RATE for level in (-5, -35)]
    assert 2 * (reached[1] - reached[0]) == pytest.approx(rt60, rel=0.05)
    assert np.sum(response[1:] ** 2) == pytest.approx(response[0] ** 2, rel=1e-4)


def test_reverberation_keeps_the_level() -> None:
    clean = speech()
    assert active_power(degrade(clean, Condition("reverb", 0.6), "u0"), clean) == pytest.approx(active_power(clean))


@pytest.mark.parametrize("share", [0.01, 0.25])
def test_the_asked_share_of_samples_is_clipped(share: float) -> None:
    clean = np.concatenate([speech(), np.zeros(SAMPLE_RATE, dtype=np.float32)])
    found = degrade(clean, Condition("clip", share), "u0")
    limit = np.abs(found).max()
    assert np.sum(np.abs(clean) >= limit) / np.sum(clean != 0) == pytest.approx(share, abs=0.001)
    inside = np.abs(clean) < limit
    np.testing.assert_array_equal(found[inside], clean[inside])


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    found = degrade(tone(1000), Condition("speed", factor), "u0")
    assert len(found) == round(2 * SAMPLE_RATE / factor)
    assert peak_frequency(found) == pytest.approx(1000 * factor, abs=1)


def test_telephone_bandwidth_ends_at_4_khz() -> None:
    low, high = (degrade(tone(frequency), Condition("8khz"), "u0") for frequency in (1000, 6000))
    np.testing.assert_allclose(low[500:-500], tone(1000)[500:-500], atol=0.003)
    assert np.abs(high[500:-500]).max() < 0.003


# --- conditions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*ALL, "white:-5", "babble:0", "speed:0.9"])
def test_conditions_are_written_as_they_are_read(text: str) -> None:
    assert str(parse_condition(text)) == text
    assert str(parse_condition(f" {text} ")) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pink:5", "condition 'pink' is unknown: choose among clean, white:<SNR in dB>, babble:<SNR in dB>, reverb:"),
        ("", "condition '' is unknown: choose among clean,"),
        ("white", "condition white is incomplete or has a level too many: choose among"),
        ("clean:3", "condition clean:3 is incomplete or has a level too many"),
        ("white:loud", "condition 'white:loud' has no number after the colon: choose among"),
        ("white:nan", "condition white:nan is out of range: SNR in dB is -30 to 60"),
        ("clip:1", "condition clip:1 is out of range: share of clipped samples is 0.001 to 0.99"),
        ("speed:0", "out of range: factor is 0.25 to 4"),
    ],
)
def test_other_conditions_are_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        parse_condition(text)
    assert "\n" not in str(caught.value)


# --- pictures ---------------------------------------------------------------------------------------


def test_pictures_are_drawn_whatever_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nan = float("nan")
    some = Interval(5.0, 4.0, 6.0)
    scores = {"a": dict.fromkeys(ALL, some), "b": {"clean": some}, "c": {"white:5": Interval(nan, nan, nan)}}
    plot_robustness(scores, "WER", tmp_path / "1.png")
    plot_scores({"a": {"BLEU": some}, "b": {"WER": Interval(nan, nan, nan)}}, tmp_path / "2.png")
    plot_boundaries(np.array([5.0, -3.0]), [(" a", 0.5)], [("a", 0.4)], tmp_path / "3.png")
    plot_boundaries(np.empty(0), [], [], tmp_path / "4.png")
    assert all(path.stat().st_size > 2000 for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 4
