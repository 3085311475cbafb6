"""Speech and texts of the comparison: sentences of the quickstart's grammar, countries, questions, real recordings.

    python examples/comparison/data.py --out DIR --sentences 2400

DIR/train.tsv and valid.tsv are in three voices (joe, slt, rms), heard.tsv, sentences never trained on, too;
unheard.tsv has the same sentences in the voice awb, which training never hears; real.tsv are recordings of a person
(Asterisk's telephone prompts), whose words are mostly new. questions_heard.tsv and questions_unheard.tsv ask for
capitals; all their words but the answers occur in training, the questions do not. slt, rms and awb are voices of flite,
and the capitals are those of a quiz of bsdgames: both come as Debian packages, which needs apt-get and dpkg, no root.
"""

import argparse
import hashlib
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples" / "quickstart"), str(ROOT / "scripts")]

import fetch_recordings  # noqa: E402
import make_speech  # noqa: E402
import sentences as grammar  # noqa: E402
import voices  # noqa: E402
from texts import COUNTRY_TEMPLATES, is_speech  # noqa: E402

from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402

TRAINING_VOICES = ("joe", "slt", "rms")
UNHEARD_VOICE = "awb"
QUESTION = "What is the capital of {country}?"
# Few enough for each to be heard some twenty times in training.
COUNTRIES = [
    "Afghanistan", "Australia", "Bulgaria", "Croatia", "Cyprus", "Egypt", "Estonia", "Finland", "France", "Germany",
    "Greece", "Hungary", "Iran", "Iraq", "Israel", "Japan", "Jordan", "Latvia", "Lebanon", "Nepal", "Norway",
    "Pakistan", "Philippines", "Romania", "Russia", "Serbia", "Spain", "Sweden", "Syria", "Thailand", "Turkey",
    "Vietnam",
]  # fmt: skip
PACKAGES = ("flite", "libflite1", "bsdgames")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--sentences", type=int, default=2400, help="of the training set")
    parser.add_argument("--test-sentences", type=int, default=100, help="of each test set; of questions, 32 at most")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    make(args.out, args.cache, args.sentences, args.test_sentences, args.processes)


def make(out: Path, cache: Path, train: int, test: int, processes: int) -> None:
    """Everything in the module's text; clips that are there are kept."""
    packages = fetch_recordings.fetch_debian(cache / "comparison", PACKAGES)
    capitals = read_capitals(packages)
    texts = {
        split: draw_sentences(count, split, sorted(capitals))
        for split, count in (("train", train), ("valid", 60), ("test", test))
    }
    heard = [make_speech.Clip(text, training_voice(text), 1.0) for text in texts["test"]]
    questions = [QUESTION.format(country=country) for country in sorted(capitals)][:test]
    manifests = {
        "train": [
            make_speech.Clip(text, training_voice(text), make_speech.training_tempo(text)) for text in texts["train"]
        ],
        "valid": [make_speech.Clip(text, training_voice(text), 1.0) for text in texts["valid"]],
        "heard": heard,
        "unheard": [clip._replace(voice=UNHEARD_VOICE) for clip in heard],
        "questions_heard": [make_speech.Clip(text, training_voice(text), 1.0) for text in questions],
        "questions_unheard": [make_speech.Clip(text, UNHEARD_VOICE, 1.0) for text in questions],
    }
    speakers: dict[str, Callable[[], voices.Speak]] = {"joe": voices.load_joe}
    speakers |= {name: partial(voices.load_flite, str(packages), name) for name in ("slt", "rms", "awb")}
    clips = [clip for each in manifests.values() for clip in each]
    make_speech.speak_missing(clips, out / "audio", processes, speakers)
    answers = {QUESTION.format(country=country): capital for country, capital in capitals.items()}
    for name, each in manifests.items():
        rows = [make_speech.clip_row(f"{name}-{i:05d}", clip, out) for i, clip in enumerate(each)]
        columns = list(make_speech.COLUMNS)
        if name.startswith("questions"):
            columns.append("tgt_text")
            rows = [{**row, "tgt_text": answers[str(row["src_text"])]} for row in rows]
        write_manifest(out / f"{name}.tsv", rows, columns)
    write_real(out, fetch_recordings.fetch(cache), test)


# ---- texts ---------------------------------------------------------------------------------------------------------


def draw_sentences(count: int, split: str, countries: Sequence[str]) -> list[str]:
    """Three quarters from the quickstart's grammar, a quarter about countries."""
    about = [text for text in country_sentences(countries) if grammar.split_of(text) == split]
    random.Random(1).shuffle(about)
    about = about[: count // 4]
    drawn = grammar.sentences(count - len(about), 1, split) + about
    random.Random(2).shuffle(drawn)
    return drawn


def country_sentences(countries: Sequence[str]) -> Iterator[str]:
    slots = {**grammar.SLOTS, "country": tuple(countries)}
    for template in COUNTRY_TEMPLATES:
        names = re.findall(r"\{(\w+)\}", template)
        pattern = re.sub(r"\{\w+\}", "{}", template)
        for words in grammar.itertools.product(*(slots[name] for name in names)):
            if len(set(words)) == len(words):
                yield pattern.format(*words)


def training_voice(text: str) -> str:
    """One of the three, by the text alone."""
    return TRAINING_VOICES[hashlib.sha256(f"voice {text}".encode()).digest()[0] % len(TRAINING_VOICES)]


def read_capitals(packages: Path) -> dict[str, str]:
    """The capitals of :data:`COUNTRIES`.

    Raises:
        ValueError: the quiz lacks one.
    """
    capitals = {}
    for name in ("europe", "asia", "africa"):
        path = packages / "usr/share/games/bsdgames/quiz" / name
        capitals |= dict(line.partition(":")[::2] for line in path.read_text(encoding="latin-1").splitlines())
    missing = [country for country in COUNTRIES if not capitals.get(country, "").isalpha()]
    if missing:
        raise ValueError(f"the quiz of bsdgames has no one-word capital of {', '.join(missing)}")
    return {country: capitals[country] for country in COUNTRIES}


# ---- speech --------------------------------------------------------------------------------------------------------


def write_real(out: Path, recordings: Path, count: int) -> None:
    """Recordings of 4 to 12 words, spread over the alphabet; none of silence, music or noise."""
    manifest = Manifest.load(recordings / "recordings.tsv")
    rows = [
        {**row, "audio": str((recordings / row["audio"]).resolve())}
        for row in (manifest[i] for i in range(len(manifest)))
        if 4 <= len(row["src_text"].split()) <= 12
    ]
    random.Random(3).shuffle(rows)
    columns = [name for name in ("id", "audio", "n_frames", "src_text", "speaker", "src_lang") if name in rows[0]]
    spoken = [row for row in rows if is_speech(row["src_text"])]
    chosen = [{name: row[name] for name in columns} for row in spoken[:count]]
    write_manifest(out / "real.tsv", chosen, columns)


if __name__ == "__main__":
    main()
