"""Speaks sentences in fast voices, each with its own tempo and pitch, and writes the manifests.

    python examples/open_vocabulary/speak.py --sentences DIR --out DIR --train 36000 --lists 12000 [--speech DIR]

OUT/train.tsv, valid.tsv and test.tsv have sentences of their own in the voices of flite and joe, train.tsv lists of
words, too; OUT/audio holds the clips, which are kept when they are there already. --speech adds speech made before: a
folder with the manifests train.tsv, valid.tsv, test.tsv and test_unheard.tsv, in voices that training never hears, and
the archives they name.
"""

import argparse
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples" / "quickstart"), str(ROOT / "scripts")]

import fetch_recordings  # noqa: E402
import make_speech  # noqa: E402
import voices  # noqa: E402

from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402
from blspkd_fairseq.data.validate import sentence_key  # noqa: E402
from blspkd_fairseq.files import whole_file  # noqa: E402

VOICES = (*voices.FLITE_VOICES, "joe")
TEMPO = (0.8, 1.25)  # length scales, evenly on a logarithmic scale
PITCH = (0.85, 1.18)
READY_SPLITS = ("train", "valid", "test", "test_unheard")
LIST_ID = "train-list-"  # with which the ids of lists of words begin, which nobody would say to an LLM
COLUMNS = ("id", "audio", "n_frames", "src_text", "speaker", "src_lang")


def clip_of(text: str, names: Sequence[str]) -> make_speech.Clip:
    """Who says a sentence and how: drawn by its text alone."""
    rng = random.Random(f"clip {text}")
    tempo, pitch = (round(low * (high / low) ** rng.random(), 3) for low, high in (TEMPO, PITCH))
    return make_speech.Clip(text, rng.choice(sorted(names)), tempo, pitch)


def speakers(cache: Path, names: Sequence[str]) -> dict[str, Callable[[], voices.Speak]]:
    """What loads each voice."""
    loaders: dict[str, Callable[[], voices.Speak]] = dict(voices.VOICES)
    if set(names) & set(voices.FLITE_VOICES):
        packages = fetch_recordings.fetch_debian(cache / "flite", voices.FLITE_PACKAGES)
        loaders |= {name: partial(voices.load_flite, str(packages), name) for name in voices.FLITE_VOICES}
    return {name: loaders[name] for name in names}


def ready_rows(speech: Path | None, split: str) -> list[dict[str, str]]:
    """The rows of speech made before, their archives named as they will lie in OUT/ready.

    Raises:
        ValueError: the folder lacks a manifest.
    """
    if speech is None:
        return []
    rows = Manifest.load(speech / f"{split}.tsv", ("src_text", "speaker"), ("src_text",))
    return [{**{name: row.get(name, "") for name in COLUMNS}, "audio": f"ready/{row['audio']}"} for row in rows]


def copy_archives(speech: Path, out: Path, rows: Sequence[dict[str, str]]) -> None:
    """Brings the archives, or files, that the rows name into OUT/ready, so that OUT may be moved as a whole."""
    for name in sorted({archive_of(row["audio"]) for row in rows}):
        source, target = speech / name.removeprefix("ready/"), out / name
        if target.exists() and target.stat().st_size == source.stat().st_size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            shutil.copyfile(source, unfinished)


def archive_of(audio: str) -> str:
    """The file of ``archive.zip:offset:length``, or of a path alone."""
    parts = audio.rsplit(":", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else audio


def read_sentences(path: Path, count: int, taken: set[str]) -> list[str]:
    """The first ``count`` sentences that nobody said elsewhere.

    Raises:
        ValueError: there are fewer.
    """
    texts = [text for text in path.read_text(encoding="utf-8").splitlines() if sentence_key(text) not in taken]
    if len(texts) < count:
        raise ValueError(f"{path} has {len(texts)} sentences that are not said elsewhere, not {count}: ask for fewer")
    return texts[:count]


def make(
    sentences: Path, out: Path, cache: Path, counts: dict[str, int], speech: Path | None, names: Sequence[str],
    processes: int, most_ready: int = 0, lists: int = 0,
) -> None:  # fmt: skip
    """Everything in the module's text."""
    ready = {split: ready_rows(speech, split)[: most_ready or None] for split in READY_SPLITS}
    keys = {split: {sentence_key(row["src_text"]) for row in rows} for split, rows in ready.items()}
    clips = {}
    for split, count in counts.items():
        elsewhere = set().union(*(found for other, found in keys.items() if other != split))
        clips[split] = [clip_of(text, names) for text in read_sentences(sentences / f"{split}.txt", count, elsewhere)]
    listed = [clip_of(text, names) for text in read_sentences(sentences / "lists.txt", lists, set())] if lists else []
    everything = [clip for part in clips.values() for clip in part]
    make_speech.speak_missing([*everything, *listed], out / "audio", processes, speakers(cache, names))
    if speech is not None:
        copy_archives(speech, out, [row for rows in ready.values() for row in rows])
    for split in READY_SPLITS:
        spoken = [make_speech.clip_row(f"{split}-spoken-{i:06d}", c, out) for i, c in enumerate(clips.get(split, []))]
        if split == "train":
            spoken += [make_speech.clip_row(f"{LIST_ID}{i:06d}", clip, out) for i, clip in enumerate(listed)]
        rows = [*ready[split], *({name: row[name] for name in COLUMNS} for row in spoken)]
        if rows:
            write_manifest(out / f"{split}.tsv", rows, COLUMNS)
            hours = sum(int(row["n_frames"]) for row in rows) / make_speech.SAMPLE_RATE / 3600
            print(f"{out / split}.tsv: {len(rows)} utterances, {hours:.2f} hours")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True, help="folder of gather_sentences.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--speech", type=Path, help="folder of speech made before")
    parser.add_argument("--train", type=int, default=36_000, help="sentences to speak (36,000 are about 30 hours)")
    parser.add_argument("--lists", type=int, default=0, help="lists of words to speak, a third as many fit them")
    parser.add_argument("--valid", type=int, default=200)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--voices", nargs="+", choices=VOICES, default=list(VOICES))
    parser.add_argument("--most-ready", type=int, default=0, help="rows of each split of --speech (default: all)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(arguments)
    counts = {"train": args.train, "valid": args.valid, "test": args.test}
    make(
        args.sentences,
        args.out,
        args.cache,
        counts,
        args.speech,
        args.voices,
        args.processes,
        args.most_ready,
        args.lists,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"speak: {error}")
