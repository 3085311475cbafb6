"""Training speech that changes every epoch: each kind against its definition, and the same again from the same seed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import train
from tiny import save_llm, save_whisper, write_split

from blspkd_fairseq.data import augment
from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio
from blspkd_fairseq.data.augment import (
    KINDS,
    AugmentationError,
    Augmenter,
    Others,
    coloured_noise,
    parse_augmentation,
)
from blspkd_fairseq.data.batch import SpeechLengths
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.sound import active_power


def talk(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    """Noise under a slow envelope, with a pause in the middle."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = rng.standard_normal(len(time)) * (0.2 + 0.1 * np.sin(2 * np.pi * 3 * time))
    samples[len(time) // 3 : len(time) // 2] = 0.0
    return samples.astype(np.float32)


def always(kind: str, seed: int = 1) -> Augmenter:
    return Augmenter({kind: 1.0}, seed)


def voices(count: int = 1000, own: int = 0) -> Others:
    return Others(count, lambda number: talk(0.7, seed=100 + number), own)


def snr_of(speech: np.ndarray, changed: np.ndarray) -> float:
    clean = speech.astype(np.float64)
    return 10 * np.log10(active_power(clean) / active_power(changed.astype(np.float64) - clean, clean))


# ---- kinds ---------------------------------------------------------------------------------------------------------


def test_speed_makes_it_shorter_or_longer_by_at_most_a_tenth() -> None:
    lengths = [len(always("speed")(talk(), f"u{i}", 1)) / SAMPLE_RATE for i in range(20)]
    assert min(lengths) >= 1 / 1.1 - 1e-3 and max(lengths) <= 1 / 0.9 + 1e-3
    assert min(lengths) < 0.97 and max(lengths) > 1.03


def test_what_would_become_too_long_keeps_its_speed() -> None:
    speech = talk()
    for i in range(20):
        assert len(always("speed")(speech, f"u{i}", 1, longest=len(speech))) <= len(speech)


@pytest.mark.parametrize(("kind", "levels"), [("noise", augment.NOISE_SNR), ("babble", augment.BABBLE_SNR)])
def test_noise_has_a_ratio_within_its_limits(kind: str, levels: tuple[float, float]) -> None:
    speech = talk()
    ratios = [snr_of(speech, always(kind)(speech, f"u{i}", 1, voices(own=9))) for i in range(20)]
    assert min(ratios) >= levels[0] - 0.01 and max(ratios) <= levels[1] + 0.01
    assert max(ratios) - min(ratios) > 10


def test_babble_is_a_sum_of_other_utterances_each_as_loud() -> None:
    speech = talk()
    loaded: list[int] = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return np.full(4_000, 0.1 * (number + 1))  # equally loud, all of them become ones

    for i in range(20):
        loaded.clear()
        babble = always("babble")(speech, f"u{i}", 1, Others(5, load, 2)) - speech
        assert 2 not in loaded and len(set(loaded)) == len(loaded)
        if len(loaded) < augment.BABBLE_VOICES[0]:
            assert not babble.any()
        else:
            assert babble.std() < 1e-3 * babble.mean()


def test_there_is_no_babble_without_others_and_no_noise_in_silence() -> None:
    speech, silence = talk(), np.zeros(8_000, np.float32)
    assert np.array_equal(always("babble")(speech, "u", 1), speech)
    assert np.array_equal(always("babble")(speech, "u", 1, Others(1, lambda _: talk(), 0)), speech)
    assert np.array_equal(always("babble")(speech, "u", 1, Others(5, lambda _: np.zeros(0), 0)), speech)
    for kind in KINDS:
        assert not always(kind)(silence, "u", 1, voices()).any()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_the_power_of_noise_falls_with_its_slope(slope: float) -> None:
    noise = coloured_noise(1 << 18, slope, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    frequency = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
    low, high = (power[(frequency > f) & (frequency < 1.2 * f)].mean() for f in (200, 3_200))
    assert np.log2(low / high) / 4 == pytest.approx(slope, abs=0.1)  # four octaves


def test_a_narrow_band_has_nothing_above_half_its_rate() -> None:
    changed = always("band")(talk(), "u", 1)
    power = np.abs(np.fft.rfft(changed)) ** 2
    frequency = np.fft.rfftfreq(len(changed), 1 / SAMPLE_RATE)
    assert power[frequency > augment.BAND[1] / 2].sum() < 1e-3 * power.sum()
    rates = [augment.BAND[0] + (augment.BAND[1] - augment.BAND[0]) * share for share in (0.0, 0.5)]
    for rate in rates:
        narrow = np.abs(np.fft.rfft(augment.narrow_band(talk().astype(np.float64), rate))) ** 2
        assert narrow[frequency > 1.02 * rate / 2].sum() < 1e-4 * narrow.sum()


def test_gain_and_room_keep_the_words() -> None:
    speech = talk()
    louder = always("gain")(speech, "u", 1)
    ratio = louder[speech != 0] / speech[speech != 0]
    assert ratio.std() < 1e-5 and augment.GAIN[0] <= 20 * np.log10(ratio.mean()) <= augment.GAIN[1]
    wet = always("reverb")(speech, "u", 1)
    pause = slice(len(speech) // 3 + 200, len(speech) // 2)
    assert len(wet) == len(speech) and not speech[pause].any() and np.abs(wet[pause]).max() > 1e-3


# ---- what it depends on --------------------------------------------------------------------------------------------


def test_the_same_seed_row_and_epoch_give_the_same_sound_and_any_other_gives_another() -> None:
    speech = talk()
    all_kinds = dict.fromkeys(KINDS, 1.0)
    first = Augmenter(all_kinds, 1)(speech, "a", 1, voices())
    assert np.array_equal(pickle.loads(pickle.dumps(Augmenter(all_kinds, 1)))(speech, "a", 1, voices()), first)
    assert first.dtype == np.float32 and np.isfinite(first).all()
    for other in (
        Augmenter(all_kinds, 2)(speech, "a", 1, voices()),
        Augmenter(all_kinds, 1)(speech, "b", 1, voices()),
        Augmenter(all_kinds, 1)(speech, "a", 2, voices()),
    ):
        assert len(other) != len(first) or not np.allclose(other, first)


def test_kinds_happen_as_often_as_they_should_and_independently_of_each_other() -> None:
    speech = talk(0.1)
    half = [not np.array_equal(Augmenter({"gain": 0.5})(speech, f"u{i}", 1), speech) for i in range(400)]
    assert 160 < sum(half) < 240
    with_noise = [Augmenter({"gain": 0.5, "noise": 0.0})(speech, f"u{i}", 1) for i in range(20)]
    without = [Augmenter({"gain": 0.5})(speech, f"u{i}", 1) for i in range(20)]
    assert all(np.array_equal(*pair) for pair in zip(with_noise, without, strict=True))


@pytest.mark.parametrize(("text", "found"), [("all", KINDS), (" noise:0.5, gain:1", {"noise": 0.5, "gain": 1.0})])
def test_a_specification_is_read(text: str, found: dict[str, float]) -> None:
    assert parse_augmentation(text) == found


@pytest.mark.parametrize("text", ["", "noise", "noise:", "noise:2", "noise:-1", "noise:nan", "hiss:0.5", "gain:1,,"])
def test_what_is_no_specification_is_refused(text: str) -> None:
    with pytest.raises(AugmentationError, match=r"--augment .*write all, or some of speed:0\.5"):
        parse_augmentation(text)


# ---- in training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_llm(root / "llm"), save_whisper(root / "whisper")


def test_the_data_set_changes_its_sound_with_the_epoch(tmp_path: Path, models: tuple[Path, Path]) -> None:
    from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format

    chat = load_chat_format(SpeechLlmConfig(llm=str(models[0])))
    manifest = Manifest.load(write_split(tmp_path, "train", 4, teacher_text=""))
    augmenter = Augmenter({"babble": 1.0, "gain": 1.0}, 3)
    data = SpeechTextDataset(manifest, chat, lengths=SpeechLengths(), augmenter=augmenter)

    def sound(epoch: int, row: int = 1) -> np.ndarray:
        data.set_epoch(epoch)
        utterance = data[row]
        assert utterance is not None
        assert utterance.samples == [len(utterance.waveforms[0])]
        return utterance.waveforms[0].numpy()

    plain = [load_audio(row["audio"], tmp_path) for row in manifest]
    expected = augmenter(plain[1], "train-1\0" + "0", 2, Others(4, plain.__getitem__, 1), 30 * SAMPLE_RATE)
    assert np.array_equal(sound(2), expected) and not np.array_equal(sound(1), expected)
    assert torch.equal(data.collater([data[1]])["net_input"]["src_tokens"][0], torch.from_numpy(sound(1)))


def test_noise_for_the_teacher_gets_no_babble(tmp_path: Path, models: tuple[Path, Path]) -> None:
    from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format

    chat = load_chat_format(SpeechLlmConfig(llm=str(models[0])))
    manifest = Manifest.load(write_split(tmp_path, "train", 4, teacher_text="Say that nobody spoke."))
    data = SpeechTextDataset(manifest, chat, augmenter=Augmenter({"babble": 1.0}))
    for row in range(4):
        utterance = data[row]
        assert utterance is not None
        assert np.array_equal(utterance.waveforms[0].numpy(), load_audio(manifest[row]["audio"], tmp_path))


def test_training_takes_it_and_refuses_what_does_not_go_together(tmp_path: Path, models: tuple[Path, Path]) -> None:
    for split in ("train", "valid"):
        write_split(tmp_path / "data", split, 4)
    train(tmp_path / "data", tmp_path / "model", *models, "--augment", "all", "--max-update", 2, "--num-workers", 1)
    assert (tmp_path / "model" / "checkpoint_last.pt").exists()
    with pytest.raises(ValueError, match=r"--augment .*--cache-encoder-features.*leave out one"):
        train(tmp_path / "data", tmp_path / "no", *models, "--augment", "all", "--cache-encoder-features")
    with pytest.raises(AugmentationError, match="--augment 'echo'"):
        train(tmp_path / "data", tmp_path / "no", *models, "--augment", "echo")
    for options, message in {
        ("--augment-variants", 2): "versions that --augment makes",
        ("--augment", "all", "--augment-variants", -1): "--augment-variants must not be negative",
    }.items():
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "data", tmp_path / "no", *models, *options)
    assert not list((tmp_path / "no").glob("*.pt"))


def test_versions_take_turns() -> None:
    augmenter = Augmenter({"gain": 1.0}, 3, variants=2)
    first, second, third = (augmenter(talk(), "a", epoch) for epoch in (1, 2, 3))
    assert np.array_equal(first, third) and not np.array_equal(first, second)
    assert augmenter.key("a", 1) == augmenter.key("a", 3) != augmenter.key("a", 2)
    others = Augmenter({"gain": 0.5}, 3, 2), Augmenter({"gain": 1.0}, 4, 2)
    assert len({one.key("a", 1) for one in (augmenter, *others)} | {augmenter.key("b", 1)}) == 4
