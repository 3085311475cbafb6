"""The encoder's frames on disk: whole entries only, whoever writes, and trainings that hear each utterance once."""

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import train
from test_fairseq_commands import assert_same_weights, weights
from tiny import save_llm, save_whisper, write_speech, write_split
from torch import Tensor

from blspkd_fairseq.data import dataset, feature_store
from blspkd_fairseq.data.audio import AudioError, audio_identity
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.feature_store import FeatureStore, FeatureStoreError, entry_key, with_features
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format
from blspkd_fairseq.modules.fingerprint import identity
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder, frame_counts

WIDTH = 16


def key(name: object) -> bytes:
    return entry_key(str(name), 320)


def frames_of(number: int) -> Tensor:
    """A few frames that only this number has."""
    return torch.full((1 + number % 5, WIDTH), float(number)).bfloat16()


def add(store: FeatureStore, numbers: list[int]) -> None:
    frames = [frames_of(number) for number in numbers]
    counts = [len(one) for one in frames]
    store.add([key(n) for n in numbers], [320 * count for count in counts], counts, torch.cat(frames))


def found(store: FeatureStore, number: int) -> Tensor | None:
    one = store.find(key(number))
    assert one is None or one.samples == 320 * len(one.frames)
    return None if one is None else feature_store.join([one], WIDTH)


def open_store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, "encoder", WIDTH)


def test_of_what_was_written_twice_the_whole_one_is_taken(tmp_path: Path) -> None:
    """One that is damaged is not heard and written again by every run."""
    stores = [open_store(tmp_path) for _ in range(3)]
    for store in stores:  # none knows of the others'
        store._refreshed = time.monotonic() + 1e9
        add(store, [1, 2])
    files = sorted(tmp_path.rglob("*.frames"))
    assert len(files) == 3
    for damaged in (files[:1], files[1:2], files[:2], files[2:]):
        whole = {file: file.read_bytes() for file in files}
        for file in damaged:
            file.write_bytes(bytes([whole[file][0] ^ 1]) + whole[file][1:])
        again = open_store(tmp_path)
        for number in (1, 2, 1):
            one = found(again, number)
            assert one is not None and torch.equal(one, frames_of(number))
        for file, content in whole.items():
            file.write_bytes(content)


def in_processes(*calls: Any) -> list[Any]:
    """Runs each in a process of its own, all at once; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# ---- the store -----------------------------------------------------------------------------------------------------


def test_processes_write_one_folder_at_once_and_see_what_others_wrote(tmp_path: Path) -> None:
    early = open_store(tmp_path)

    def write(first: int) -> None:
        store = open_store(tmp_path)
        for number in range(first, 200, 2):
            add(store, [number, number + 1000])
        assert all(torch.equal(found(store, n), frames_of(n)) for n in range(first, 200, 2))

    assert in_processes(lambda: write(0), lambda: write(1)) == [0, 0]
    early.refresh()
    for store in (early, open_store(tmp_path)):
        assert len(store) == 400
        assert all(torch.equal(found(store, n), frames_of(n)) for m in (0, 1000) for n in range(m, m + 200))
    size = early.size
    add(early, [3, 3, 500, 500])  # what is there is not written again
    assert early.size == size + frames_of(500).nbytes and early.size == sum(
        path.stat().st_size for path in early.folder.glob("*.frames")
    )


def test_a_miss_finds_what_others_have_added_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "_REFRESH_SECONDS", 0.0)
    reader = open_store(tmp_path)
    assert found(reader, 1) is None
    add(open_store(tmp_path), [1])
    assert torch.equal(found(reader, 1), frames_of(1))


def test_a_killed_writer_leaves_whole_entries(tmp_path: Path) -> None:
    def write() -> None:
        store = open_store(tmp_path)
        for number in range(1_000_000):
            add(store, [number])

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    while not len(store := open_store(tmp_path)) and process.is_alive():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.refresh()
    assert len(store) and all(torch.equal(found(store, n), frames_of(n)) for n in range(len(store)))
    add(store, [len(store)])
    assert torch.equal(found(open_store(tmp_path), len(store) - 1), frames_of(len(store) - 1))


def test_half_an_entry_is_none_and_damage_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path)
    add(store, [1, 2, 3])
    index, frames = (next(store.folder.glob(f"*.{end}")) for end in ("index", "frames"))
    content = index.read_bytes()
    index.write_bytes(content[:-1])
    assert [found(open_store(tmp_path), n) is None for n in (1, 2, 3)] == [False, False, True]
    index.write_bytes(content[:50] + b"x" + content[51:])
    assert [found(open_store(tmp_path), n) is None for n in (1, 2, 3)] == [False, True, False]
    assert not caplog.records
    index.write_bytes(content)
    with open(frames, "r+b") as file:
        file.write(b"x")
        file.truncate(frames.stat().st_size - 1)
    store = open_store(tmp_path)
    assert [found(store, n) is None for n in (1, 2, 3)] == [True, False, True]
    assert len(caplog.records) == 1 and "delete it and its .index" in caplog.text


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add(store, [5, 10, 15])  # 32 bytes each, and a record of 40
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 130):  # the frames do not fit; then their record
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(FeatureStoreError, match="cannot be written to .*make room or choose another --feature"):
                add(store, [20])
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        add(store, [6])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(found(store, 6), frames_of(6)) and len(open_store(tmp_path)) == 4
    assert torch.equal(found(open_store(tmp_path), 6), frames_of(6))


def test_size_is_said_and_what_does_not_fit_or_cannot_be_written_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    store = open_store(tmp_path)
    store.check_room(3 * 2**30)
    assert "take 3.0 GiB" in caplog.text and "holds 0.0 MiB" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(FeatureStoreError, match=r"take 3.0 GiB more in .*1.0 MiB are free.*--cache-encoder-features"):
        store.check_room(3 * 2**30)
    (tmp_path / "file").touch()
    with pytest.raises(FeatureStoreError, match="cannot be written to .*file.*--feature-store"):
        open_store(tmp_path / "file")
    shutil.rmtree(store.folder)
    with pytest.raises(FeatureStoreError, match="cannot be written to"):
        add(store, [1])


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_another_encoder_has_another_identity(tmp_path: Path) -> None:
    one, other = (SpeechEncoder.from_pretrained(str(save_whisper(tmp_path / str(s), seed=s))) for s in (1, 2))
    assert identity(one, False) == identity(one, False)
    named = [identity(one, False), identity(one, True), identity(other, False), identity(one.bfloat16(), False)]
    one.float().encoder.layer_norm.bias.data[0] += 1  # one number
    assert len({*named, identity(one, False)}) == 5
    assert one.settings == (False,) != one.bfloat16().settings  # whose frames were others when first stored


def test_audio_is_what_it_was_while_place_size_and_time_are(tmp_path: Path) -> None:
    write_speech(tmp_path / "a.wav", 0.1, seed=1)
    first, copy = audio_identity("a.wav", tmp_path), shutil.copy2(tmp_path / "a.wav", tmp_path / "b")
    assert first == audio_identity(tmp_path / "a.wav") != audio_identity(copy)
    os.utime(tmp_path / "a.wav", ns=(0, 10**18))
    assert audio_identity("a.wav", tmp_path) != first
    shutil.make_archive(str(tmp_path / "c"), "zip", tmp_path, "a.wav")
    assert audio_identity(f"{tmp_path}/c.zip:30:9") != audio_identity(f"{tmp_path}/c.zip:40:9")
    for name in ("../a.wav", "none.wav"):
        with pytest.raises(AudioError):
            audio_identity(name, tmp_path)


# ---- batches -------------------------------------------------------------------------------------------------------


class World:
    """Models and data that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"
        self.llm, self.whisper = save_llm(root / "llm"), save_whisper(root / "whisper")
        write_split(self.data, "train", 6)
        write_split(self.data, "valid", 2)

    def train(self, save_dir: Path, *options: Any) -> str:
        return train(self.data, save_dir, self.llm, self.whisper, "--batch-size", 2, *options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was decoded."""
    counts: Counter[str] = Counter()
    load = dataset.load_audio

    def counting(audio: str, *args: Any) -> Any:
        counts[Path(audio).name] += 1
        return load(audio, *args)

    monkeypatch.setattr(dataset, "load_audio", counting)
    return counts


def encode(waveforms: Tensor, lengths: Tensor, samples: list[int]) -> Tensor:
    """Frames that show their waveform."""
    assert lengths.tolist() == samples
    counts = frame_counts(samples)
    return torch.cat([w[: n * 320 : 320, None].expand(n, WIDTH) for w, n in zip(waveforms, counts, strict=True)])


def test_batches_mix_what_is_stored_and_what_is_new(world: World, tmp_path: Path, decoded: Counter[str]) -> None:
    """A conversation of two pieces, one of which a row before has brought; a changed file; a shorter limit."""
    write_split(tmp_path, "train", 4)
    chat = load_chat_format(SpeechLlmConfig(llm=str(world.llm)))
    manifest = Manifest.load(tmp_path / "train.tsv")
    rows: list[dict[str, Any]] = [{**manifest[i], "conversation": ""} for i in range(4)]
    parts = [{"type": "audio", "audio": row["audio"], "text": row["src_text"]} for row in rows[2:]]
    total = sum(int(row["n_frames"]) for row in rows[2:])
    rows[3] |= {"n_frames": total, "conversation": json.dumps([{"role": "user", "content": parts}])}
    write_manifest(tmp_path / "train.tsv", rows, list(rows[0]))

    def batch(places: list[int], **options: Any) -> Any:
        data = SpeechTextDataset(Manifest.load(tmp_path / "train.tsv"), chat, **options)
        plain = data.collater([data[i] for i in places])["net_input"]
        decoded.clear()
        data.store = open_store(tmp_path / "store")
        mixed = data.collater([data[i] for i in places])
        inputs = with_features(mixed, encode, data.store, 320)["net_input"]
        assert inputs["src_tokens"] is None and inputs["samples"] == plain["samples"]
        expected = encode(plain["src_tokens"], plain["src_lengths"], plain["samples"]).bfloat16()
        assert torch.equal(inputs["features"], expected) and torch.equal(inputs["plan"], plain["plan"])
        return sorted(decoded)

    files = [f"train-{i}.flac" for i in range(4)]
    assert batch([2, 0]) == [files[0], files[2]]
    assert batch([0, 3, 1, 2]) == files[1:]  # a row is decoded if one of its pieces must be
    assert batch([3, 0, 2, 1]) == []
    write_speech(tmp_path / "audio" / files[0], 0.6, seed=9)
    assert batch([1, 0]) == [files[0]]
    assert batch([0, 1]) == []
    (tmp_path / "audio" / files[1]).unlink()
    with pytest.raises(AudioError, match=f"{files[1]} does not exist"):
        batch([1])


# ---- training ------------------------------------------------------------------------------------------------------


def losses(log: str) -> list[float]:
    """Of each update."""
    return [float(loss) for loss in re.findall(r"^epoch \d+: +\d+ / \d+ loss=([\d.]+)", log, re.M)]


TRAIN = [f"train-{i}.flac" for i in range(6)]


def test_training_hears_each_utterance_once_and_loses_the_same(
    world: World, tmp_path: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    forward = SpeechEncoder.forward
    monkeypatch.setattr(SpeechEncoder, "forward", lambda *a, **k: (heard.append(len(a[2])), forward(*a, **k))[1])
    expected = losses(world.train(tmp_path / "plain", "--max-epoch", 3))
    assert len(expected) == 9 and sum(heard) == 3 * (6 + 2)
    heard.clear(), decoded.clear()
    log = world.train(tmp_path / "one", "--max-epoch", 3, "--cache-encoder-features")
    assert (world.data / "encoder-features").is_dir() and "of this training data take 0.0 MiB" in log
    assert sum(heard) == 6 + 3 * 2
    # fairseq reads the first batch before training, to have one for processes that have none left
    assert sorted(decoded[name] for name in TRAIN) == [1, 1, 1, 1, 2, 2] and decoded["valid-0.flac"] > 3
    assert losses(log) == pytest.approx(expected, rel=5e-3)

    heard.clear()  # trainings that find all there: workers read, and the training data is validated on
    main, load = os.getpid(), dataset.load_audio
    monkeypatch.setattr(
        dataset, "load_audio", lambda *a: load(*a) if os.getpid() == main or "valid" in a[0] else pytest.fail("decoded")
    )
    options = ("--cache-encoder-features", "--max-epoch", 2)
    log = world.train(tmp_path / "two", *options, "--num-workers", 1)
    assert losses(log) == pytest.approx(expected[:6], rel=5e-3) and sum(heard) == 2 * 2
    answers = ("--valid-subset", "train", "--eval-wer", "--eval-max-tokens", 4)
    log = world.train(tmp_path / "three", *options, *answers)
    assert losses(log) and "valid on 'train' subset" in log and sum(heard) == 2 * 2


def test_versions_of_the_sound_are_heard_once_and_lose_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--augment", "speed:1,gain:1", "--augment-variants", 2, "--disable-validation", "--max-epoch", 4)
    expected = losses(world.train(tmp_path / "plain", *options))
    clean = losses(world.train(tmp_path / "clean", "--disable-validation", "--max-epoch", 2))
    heard = []
    forward = SpeechEncoder.forward
    monkeypatch.setattr(SpeechEncoder, "forward", lambda *a, **k: (heard.append(len(a[2])), forward(*a, **k))[1])
    kept = ("--cache-encoder-features", "--feature-store", tmp_path / "store")
    assert losses(world.train(tmp_path / "stored", *options, *kept)) == pytest.approx(expected, rel=5e-3)
    assert sum(heard) == 2 * 6 and expected[:6] != pytest.approx(clean, rel=5e-3)
    world.train(tmp_path / "of_itself", "--disable-validation", "--max-epoch", 1, *kept)
    assert sum(heard) == 3 * 6  # the sound as it is is none of the versions


def test_a_resumed_training_has_the_same_frames(world: World, tmp_path: Path) -> None:
    options = ("--disable-validation", "--cache-encoder-features", "--save-interval-updates", 2, "--feature-store")
    world.train(tmp_path / "through", *options, tmp_path / "a", "--max-update", 7)
    world.train(tmp_path / "resumed", *options, tmp_path / "b", "--max-update", 2)
    world.train(tmp_path / "resumed", *options, tmp_path / "b", "--max-update", 7)
    assert_same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "through"), tolerance=0)


def test_bad_audio_is_left_out_and_a_store_without_its_option_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "data", ignore=shutil.ignore_patterns("encoder-features"))
    (tmp_path / "data" / "audio" / TRAIN[2]).write_bytes(b"none")
    (tmp_path / "data" / "audio" / TRAIN[3]).unlink()
    options = ("--cache-encoder-features", "--skip-bad-audio", "--max-epoch", 2, "--batch-size", 1,
               "--max-bad-audio-share", 1)  # fmt: skip
    log = train(tmp_path / "data", tmp_path / "save", world.llm, world.whisper, *options)
    assert log.count(f"left out: {tmp_path / 'data'}/train.tsv") == 2
    (store,) = (tmp_path / "data" / "encoder-features").iterdir()
    assert len(list(store.glob("*.index"))) == 1 and store.name.startswith("16-")
    with pytest.raises(ValueError, match="--feature-store is the folder of --cache-encoder-features"):
        world.train(tmp_path / "none", "--feature-store", tmp_path / "store")
