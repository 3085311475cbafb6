"""Speaks sentences of the grammar and writes the manifests of the quickstart.

    python examples/quickstart/make_speech.py --out DIR --sentences 2500

DIR/train.tsv, valid.tsv and test.tsv are in the voice joe, test_unheard.tsv is the test in a voice that never occurs in
training; no sentence is in two of train, valid and test. Clips are 16 kHz FLAC in DIR/audio, named by what they say and
how. Those that are there already are kept, so a killed run goes on where it was.
"""

import argparse
import hashlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import soundfile
import soxr
from sentences import sentences
from tqdm import tqdm
from voices import SAMPLE_RATE, VOICES, Speak

from blspkd_fairseq.data.manifest import write_manifest
from blspkd_fairseq.data.preparation import end_with_parent
from blspkd_fairseq.files import whole_file

COLUMNS = ("id", "audio", "n_frames", "src_text", "speaker", "src_lang", "tgt_lang")
TRAINING_TEMPO = (0.85, 1.1)  # length scales; 1 in all other splits
MAX_PROCESSES = 16  # each holds a copy of the voice, about 250 MB


class Clip(NamedTuple):
    """One sentence, who speaks it, how slowly, and how much higher than the voice is."""

    text: str
    voice: str
    length_scale: float
    pitch: float = 1.0

    @property
    def name(self) -> str:
        """File in the audio folder; another text, tempo or pitch is another file: none is taken for another."""
        key = f"{self.text}\n{self.length_scale}" + (f"\n{self.pitch}" if self.pitch != 1 else "")
        return f"{self.voice}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.flac"


class Manifest(NamedTuple):
    """What goes into one manifest."""

    name: str
    clips: list[Clip]


def plan(train: int, valid: int, test: int, seed: int) -> list[Manifest]:
    """The manifests and their clips; more sentences with the same seed only add clips."""
    heard = sentences(test, seed, "test")
    return [
        Manifest("train", [Clip(text, "joe", training_tempo(text)) for text in sentences(train, seed, "train")]),
        Manifest("valid", [Clip(text, "joe", 1.0) for text in sentences(valid, seed, "valid")]),
        Manifest("test", [Clip(text, "joe", 1.0) for text in heard]),
        Manifest("test_unheard", [Clip(text, "espeak", 1.0) for text in heard]),
    ]


def training_tempo(text: str) -> float:
    """As random as the text is; a string seeds the same way in every process and Python."""
    return round(random.Random(text).uniform(*TRAINING_TEMPO), 3)


# --- speaking -------------------------------------------------------------------------------------

_speak: Speak | None = None  # of this worker process


def speak_missing(
    clips: Sequence[Clip], folder: Path, processes: int, voices: dict[str, Callable[[], Speak]] = VOICES
) -> None:
    """Makes the clips that ``folder`` does not hold yet; each file appears when it is complete.

    Raises:
        ValueError: a voice is not installed or cannot say a sentence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    missing = [clip for clip in dict.fromkeys(clips) if clip.name not in there]
    for voice in dict.fromkeys(clip.voice for clip in missing):
        _speak_all([clip for clip in missing if clip.voice == voice], folder, processes, voices[voice])


def _speak_all(clips: list[Clip], folder: Path, processes: int, load: Callable[[], Speak]) -> None:
    workers = max(1, min(processes, MAX_PROCESSES, len(clips) // 16))
    bar = partial(tqdm, total=len(clips), desc=f"speech of {clips[0].voice}", unit="clip", smoothing=0.05)
    if workers == 1:  # another process would take longer to begin than a few clips
        speak = load()
        for clip in bar(clips):
            _make_clip(speak, clip, folder)
        return
    # Spawned, so that no thread of this process is copied halfway; a voice per process, since it is loaded for long.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(load,))
    try:
        for _ in bar(pool.map(_work, clips, [folder] * len(clips), chunksize=4)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(load: Callable[[], Speak]) -> None:
    global _speak
    end_with_parent()
    _speak = load()


def _work(clip: Clip, folder: Path) -> None:
    assert _speak is not None
    _make_clip(_speak, clip, folder)


def _make_clip(speak: Speak, clip: Clip, folder: Path) -> None:
    # A voice that is played faster is higher, as one of a smaller person is: it speaks slower by as much before.
    samples = speak(clip.text, clip.length_scale * clip.pitch)
    if clip.pitch != 1:
        samples = soxr.resample(samples, SAMPLE_RATE * clip.pitch, SAMPLE_RATE)
    with whole_file(folder / clip.name) as unfinished:
        soundfile.write(unfinished, samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")


# --- manifests ------------------------------------------------------------------------------------


def write_rows(manifest: Manifest, out: Path) -> int:
    """Writes OUT/NAME.tsv; audio is relative to OUT.

    Raises:
        ValueError: a clip is no readable audio.
    """
    rows = [clip_row(f"{manifest.name}-{i:05d}", clip, out) for i, clip in enumerate(manifest.clips)]
    return write_manifest(out / f"{manifest.name}.tsv", rows, COLUMNS)


def clip_row(row_id: str, clip: Clip, out: Path) -> dict[str, object]:
    audio = f"audio/{clip.name}"
    try:
        n_frames = soundfile.info(out / audio).frames
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{out / audio} is damaged ({error}): delete it and run this again") from error
    cells = (row_id, audio, n_frames, clip.text, clip.voice, "en", "en")
    return dict(zip(COLUMNS, cells, strict=True))


def make_speech(
    manifests: Sequence[Manifest], out: Path, processes: int, voices: dict[str, Callable[[], Speak]] = VOICES
) -> None:
    """Speaks what is missing, then writes the manifests, so that a manifest names only what exists."""
    speak_missing([clip for manifest in manifests for clip in manifest.clips], out / "audio", processes, voices)
    for manifest in manifests:
        print(f"{out / manifest.name}.tsv: {write_rows(manifest, out)} utterances")


def main(arguments: Sequence[str] | None = None) -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the manifests and of audio/")
    parser.add_argument("--sentences", type=int, default=2500, help="for training (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=64, help="for validation (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="in either test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=cores, help="default: the cores of this machine")
    args = parser.parse_args(arguments)
    make_speech(plan(args.sentences, args.valid, args.test, args.seed), args.out, args.processes)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"make_speech: {error}")
