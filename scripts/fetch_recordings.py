"""Fetches real recordings with their texts, and makes corpora in published layouts out of them.

    python scripts/fetch_recordings.py [--cache DIR]
    python scripts/fetch_recordings.py --layout covost2 corpus/covost2

DIR/asterisk gets the telephone prompts of the Asterisk project (one voice, English, CC-BY-SA-3.0) as 16 kHz FLAC, and
recordings.tsv: a manifest of them with their text and, as tgt_text, the human French translation where there is one.
They come from three Debian packages, which needs apt-get and dpkg but no root, and PyAV to decode them.

covost2: OUT/en/clips/*.mp3, validated.tsv, covost_v2.en_fr.tsv and one TSV file per split. (CoVoST 2 itself has no
direction en_fr: prepare_covost2.py takes it with --any-direction.)
librispeech: OUT/LibriSpeech/train-clean-100/SPEAKER/CHAPTER/*.flac and *.trans.txt, dev-clean, test-clean.
"""

import argparse
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr

from blspkd_fairseq.cache import default_cache, locked
from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.validate import sentence_key

VERSION = "1.6.1-1"
PACKAGES = {
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
}
SPEAKER = "Allison"  # the only voice: all splits share it
_FRENCH_PLACEHOLDER = "Ce message n'a pas encore été écrit."
_COMMON_VOICE_RATE = 48_000


class FetchError(ValueError):
    """The recordings cannot be had; the message says why and what to do."""


# --- fetching -------------------------------------------------------------------------------------


def fetch(cache: Path) -> Path:
    """Makes sure that the recordings are in ``cache`` and returns their folder.

    Raises:
        FetchError: a package cannot be downloaded, is damaged, or cannot be decoded.
    """
    folder = cache / "asterisk"
    with locked(cache):
        if folder.is_dir():
            print(f"{folder} is there", flush=True)
            return folder
        # In the cache, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".asterisk.", dir=cache) as temporary:
            work = Path(temporary)
            print(f"asterisk: downloading {', '.join(PACKAGES)} (11 MB)", flush=True)
            packages = download(list(PACKAGES), work / "download")
            for name, sha256 in PACKAGES.items():
                _check(packages[name], sha256)
            unpack(packages.values(), work / "package")
            count = convert(work / "package", work / "output")
            (work / "output").rename(folder)
    print(f"{folder} made: {count} recordings", flush=True)
    return folder


def download(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Debian packages by name; the new ``folder`` takes them.

    Raises:
        FetchError: one cannot be downloaded.
    """
    folder.mkdir()
    command = ["apt-get", "-q", "-y"]
    wanted = ["download", *names]
    done = _try([*command, *wanted], folder)
    if done is not None:
        # There may be no package lists yet, and only root may write the system's.
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "archives" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
        _try([*command, *own, "update"], folder)
        done = _try([*command, *own, *wanted], folder)
    if done is not None:
        raise FetchError(f"the Debian packages {', '.join(names)} cannot be downloaded with apt-get: {done}")
    return {name: next(folder.glob(f"{name}_*.deb")) for name in names}


def fetch_debian(folder: Path, names: Sequence[str]) -> Path:
    """Downloads Debian packages and unpacks them into ``folder``, which appears when it is complete; once.

    Raises:
        FetchError: one cannot be downloaded or is damaged.
    """
    with locked(folder.parent):
        if not folder.is_dir():
            print(f"downloading {', '.join(names)}", flush=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
                work = Path(temporary)
                packages = download(names, work / "download")
                unpack(packages.values(), work / "packages")
                (work / "packages").rename(folder)
    return folder


def unpack(packages: Iterable[Path], folder: Path) -> None:
    """Unpacks Debian packages, all into one folder.

    Raises:
        FetchError: one is damaged.
    """
    for package in packages:
        problem = _try(["dpkg", "-x", str(package), str(folder)], Path.cwd())
        if problem is not None:
            raise FetchError(f"cannot unpack {package.name}: {problem}")


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if f"_{VERSION}_" not in path.name:
        print(f"{path.name} is not the version {VERSION} that this was tested with: figures may differ", flush=True)
    elif found != sha256:
        raise FetchError(f"{path.name} has the sha256 {found} instead of {sha256}: it is damaged, or was replaced")


def _try(command: Sequence[str], folder: Path) -> str | None:
    """None, or why it failed."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} cannot be started ({error.strerror}); this needs Debian or Ubuntu"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


# --- conversion -----------------------------------------------------------------------------------


def convert(package: Path, output: Path) -> int:
    """Decodes everything that has a text into ``output``; returns how many recordings that are."""
    documents = package / "usr/share/doc"
    english = read_texts(documents / "asterisk-core-sounds-en/core-sounds-en.txt.gz")
    french = read_texts(documents / "asterisk-core-sounds-fr/core-sounds-fr.txt.gz")
    sounds = package / "usr/share/asterisk/sounds/en_US_f_Allison"
    names = [name for name in english if (sounds / f"{name}.g722").is_file()]
    rows = []
    for name in names:
        samples = decode_g722(sounds / f"{name}.g722")
        audio = f"audio/{name}.flac"
        (output / audio).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(output / audio, samples, SAMPLE_RATE, subtype="PCM_16")
        row = {"id": name, "audio": audio, "n_frames": len(samples), "src_text": english[name]}
        rows.append(row | {"tgt_text": french.get(name, ""), "speaker": SPEAKER})
    write_manifest(output / "recordings.tsv", rows)
    shutil.copy(documents / "asterisk-core-sounds-en/copyright", output / "copyright")
    return len(rows)


def read_texts(path: Path) -> dict[str, str]:
    """Texts by name, from lines ``name: text``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = (line.partition(":") for line in file if not line.startswith(";"))
        return {name.strip(): text.strip() for name, colon, text in lines if colon}


def decode_g722(path: Path) -> np.ndarray:
    """Samples, int16 at 16 kHz; libsndfile does not know this format."""
    try:
        import av
    except ImportError as error:
        raise FetchError("PyAV decodes the recordings: pip install av") from error
    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


# --- layouts --------------------------------------------------------------------------------------


def spoken(manifest: Manifest) -> list[dict[str, str]]:
    """Recordings of a sentence, of at most 30 s: no tones, silences or notes for the reader."""
    return [
        row for row in manifest if is_sentence(row["src_text"]) and int(row["n_frames"]) <= MAX_SECONDS * SAMPLE_RATE
    ]


def translated(manifest: Manifest) -> list[dict[str, str]]:
    """Those of :func:`spoken` that have a translation."""
    return [row for row in spoken(manifest) if row["tgt_text"] and row["tgt_text"] != _FRENCH_PLACEHOLDER]


def is_sentence(text: str) -> bool:
    """Four words or more."""
    return len(text.split()) >= 4 and not re.search(r"[\[(]", text)


def split_rows(rows: Sequence[dict[str, str]]) -> list[str]:
    """A split for each row: a tenth of the sentences for dev, a tenth for test; a sentence is in one of them only."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(sentence_key(row["src_text"]), len(numbers)) for row in rows]
    return [{8: "dev", 9: "test"}.get(place % 10, "train") for place in places]


def build_covost2(recordings: Path, output: Path) -> int:
    """Writes a Common Voice 4 of English and CoVoST 2 translations into French."""
    folder = output / "en"
    (folder / "clips").mkdir(parents=True)
    rows = []
    chosen = translated(Manifest.load(recordings / "recordings.tsv"))
    for number, (row, split) in enumerate(zip(chosen, split_rows(chosen), strict=True), start=1):
        name = f"common_voice_en_{number}.mp3"
        samples = load_audio(row["audio"], recordings, max_seconds=None)
        clip = soxr.resample(samples, SAMPLE_RATE, _COMMON_VOICE_RATE, quality="HQ")
        soundfile.write(folder / "clips" / name, clip, _COMMON_VOICE_RATE, format="MP3")
        cells = {"path": name, "sentence": row["src_text"], "translation": row["tgt_text"], "client_id": SPEAKER}
        votes = {"up_votes": "2", "down_votes": "0", "age": "", "gender": "", "accent": ""}
        rows.append({**cells, **votes, "split": split})
    validated = ["client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent"]
    _write_table(folder / "validated.tsv", rows, validated)
    _write_table(folder / "covost_v2.en_fr.tsv", rows, ["path", "translation", "split"])
    for split in ("train", "dev", "test"):
        part = [row for row in rows if row["split"] == split]
        columns = ["path", "sentence", "translation", "client_id"]
        _write_table(folder / f"covost_v2.en_fr.{split}.tsv", part, columns)
    return len(rows)


def _write_table(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """Raw cells, as the corpora have them; none of these texts holds a tab."""
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def build_librispeech(recordings: Path, output: Path) -> int:
    """Writes subsets of one speaker, with a chapter per folder of the recordings."""
    subsets = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}
    chapters: dict[str, int] = {}
    texts: dict[Path, list[str]] = {}
    rows = [
        row for row in spoken(Manifest.load(recordings / "recordings.tsv")) if not re.search(r"\d", row["src_text"])
    ]
    for row, split in zip(rows, split_rows(rows), strict=True):
        chapter = chapters.setdefault(str(Path(row["id"]).parent), len(chapters) + 1)
        # A chapter lies in one subset: each subset numbers its own.
        chapter += 1000 * list(subsets).index(split)
        transcripts = output / "LibriSpeech" / subsets[split] / "1" / str(chapter) / f"1-{chapter}.trans.txt"
        lines = texts.setdefault(transcripts, [])
        utterance = f"1-{chapter}-{len(lines):04d}"
        transcripts.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(recordings / row["audio"], transcripts.with_name(f"{utterance}.flac"))
        lines.append(f"{utterance} {as_in_librispeech(row['src_text'])}\n")
    for transcripts, lines in texts.items():
        transcripts.write_text("".join(lines), encoding="utf-8")
    return len(rows)


def as_in_librispeech(text: str) -> str:
    """Capitals and apostrophes."""
    return " ".join(re.sub(r"[^A-Z']+", " ", text.upper()).split())


LAYOUTS: dict[str, Callable[[Path, Path], int]] = {"covost2": build_covost2, "librispeech": build_librispeech}


def build(layout: str, recordings: Path, output: Path) -> None:
    """Makes a corpus; the folder appears when it is complete.

    Raises:
        FetchError: the folder exists.
    """
    if output.exists():
        raise FetchError(f"{output} exists: delete it or choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        count = LAYOUTS[layout](recordings, Path(temporary) / "output")
        (Path(temporary) / "output").rename(output)
    print(f"{output} made: {count} utterances")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: $BLSPKD_CACHE or %(default)s")
    parser.add_argument("--layout", nargs=2, metavar=("LAYOUT", "OUT"), help="covost2 or librispeech, and a new folder")
    args = parser.parse_args(arguments)
    if args.layout and args.layout[0] not in LAYOUTS:
        parser.error(f"--layout {args.layout[0]} is none of {', '.join(LAYOUTS)}")
    recordings = fetch(args.cache)
    if args.layout:
        build(args.layout[0], recordings, Path(args.layout[1]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_recordings: {error}")
