"""Sounds in which nobody says anything: silence, hum, coloured noise, and many voices at once.

    python examples/open_vocabulary/no_speech.py --out DIR --count 100 --voices MANIFEST

writes DIR/nothing.tsv and its clips, to test on; babble is made of the voices.

The teacher cannot hear that there is nothing to hear: it reads an instruction that makes it say so (``teacher_text``),
which depends on the prompt. ``src_text`` is one token that stands for nothing.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio
from blspkd_fairseq.data.augment import coloured_noise
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import PROMPTS, SPEECH_SLOT
from blspkd_fairseq.data.sound import equally_loud
from blspkd_fairseq.files import whole_file

ANSWER = "I could not hear you."
NOTHING = "..."  # what stands for the speech; one token of most LLMs
SECONDS = (0.6, 6.0)
BABBLE_VOICES = (8, 16)  # of so many no word can be heard

# What a small LLM reads and then says ANSWER, under each prompt.
TEACHER_TEXTS = {
    "chat": PROMPTS["repeat"].replace(SPEECH_SLOT, ANSWER),
    "repeat": ANSWER,
    "continue": f"Reply with: {ANSWER}",
}

COLUMNS = ("id", "audio", "n_frames", "src_text", "speaker", "src_lang")

Load = Callable[[int], np.ndarray]


def silence(length: int, rng: np.random.Generator, load: Load, voices: int) -> np.ndarray:
    """Nothing but the last bits of a converter."""
    return rng.standard_normal(length) * 1e-4


def hum(length: int, rng: np.random.Generator, load: Load, voices: int) -> np.ndarray:
    """Mains at 50 or 60 Hz with overtones, and some noise."""
    time = np.arange(length) / SAMPLE_RATE
    base = rng.choice([50.0, 60.0])
    tones = (np.sin(2 * np.pi * base * n * time + rng.uniform(0, 6.28)) / n for n in range(1, 9))
    return np.sum(list(tones), axis=0) + 0.1 * coloured_noise(length, 1.0, rng)


def noise(length: int, rng: np.random.Generator, load: Load, voices: int) -> np.ndarray:
    """White to brown, slowly louder and softer."""
    swell = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.1, 1.0) * np.arange(length) / SAMPLE_RATE)
    return coloured_noise(length, rng.uniform(0.0, 2.0), rng) * swell


def babble(length: int, rng: np.random.Generator, load: Load, voices: int) -> np.ndarray:
    """Too many voices at once."""
    count = int(rng.integers(BABBLE_VOICES[0], BABBLE_VOICES[1] + 1))
    drawn = (load(int(number)).astype(np.float64) for number in rng.integers(voices, size=count))
    return np.sum([equally_loud(voice, length, rng) for voice in drawn], axis=0)


KINDS = {"silence": silence, "hum": hum, "noise": noise, "babble": babble}


def clip(kind: str, seed: int, load: Load, voices: int) -> np.ndarray:
    """``[samples]`` float32, its loudest sample between .01 and .9, but for silence."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    samples = KINDS[kind](int(rng.uniform(*SECONDS) * SAMPLE_RATE), rng, load, voices)
    if kind != "silence":
        samples = samples / np.abs(samples).max() * 10 ** rng.uniform(-2, -0.05)
    return samples.astype(np.float32)


def write_clips(
    out: Path, split: str, count: int, voices: Manifest, audio_root: Path | None
) -> list[dict[str, object]]:
    """Rows of ``count`` clips in OUT/audio, the kinds in turn; those that are there are kept.

    Args:
        out: folder of the manifests.
        split: other splits have other clips.
        count: how many.
        voices: what babble is made of.
        audio_root: of their audio; None if it is named by whole paths.
    """
    (out / "audio").mkdir(parents=True, exist_ok=True)

    def load(number: int) -> np.ndarray:
        return load_audio(voices[number]["audio"], audio_root)

    rows: list[dict[str, object]] = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        name = f"audio/nothing-{split}-{i:05d}.flac"
        if not (out / name).exists():
            seed = random.Random(f"{split} {i}").getrandbits(32)
            with whole_file(out / name) as unfinished:
                soundfile.write(
                    unfinished, clip(kind, seed, load, len(voices)), SAMPLE_RATE, subtype="PCM_16", format="FLAC"
                )
        frames = soundfile.info(out / name).frames
        cells: Sequence[object] = (f"nothing-{split}-{i:05d}", name, frames, NOTHING, kind, "en")
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--voices", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")
    voices = Manifest.load(args.voices)
    is_whole = len(voices) > 0 and Path(voices[0]["audio"]).is_absolute()
    rows = write_clips(args.out, "test", args.count, voices, None if is_whole else args.voices.parent)
    write_manifest(args.out / "nothing.tsv", rows, COLUMNS)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"no_speech: {error}")
