"""Real speech to test on, fetched when it is used: telephone prompts, the actors of a computer game, an audio book.

    python examples/open_vocabulary/recordings.py --out DIR --whisper WHISPER --rows 200

DIR/phone.tsv are prompts of the Asterisk project (one voice, CC-BY-SA-3.0), DIR/game.tsv lines of "Flight of the
Amazon Queen" (may be distributed and changed, not sold alone), of four words or more. The game has singing and
monsters, too: a line of which Whisper gets more than 30 % of the words wrong is left out, and DIR/game-filter.json
counts them. DIR/book.tsv are the five sentences of "Sense and Sensibility" (LibriVox, public domain) that PocketSphinx
is tested with. None is part of this repository. It needs apt-get and dpkg, but no root.
"""

import argparse
import io
import json
import random
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import soundfile

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import fetch_recordings  # noqa: E402

from blspkd_fairseq.cache import default_cache, locked  # noqa: E402
from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE, load_audio, prepare_waveform  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402
from blspkd_fairseq.evaluation.metrics import word_errors  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402
from blspkd_fairseq.systems.systems import WhisperTranscriber  # noqa: E402

BOOK = "pocketsphinx-testdata"
BOOK_FOLDER = "usr/share/pocketsphinx/test/data/librivox"
GAME = "flight-of-the-amazon-queen"
ARCHIVE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
MOST_ERRORS = 0.3  # of Whisper's words, of a line that is kept
COLUMNS = ("id", "audio", "n_frames", "src_text", "speaker", "src_lang")


class GameError(ValueError):
    """The game's archive is not the one that is read here."""


# ---- the game's archive --------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file in the archive."""

    name: str
    offset: int
    size: int


class Line(NamedTuple):
    """What somebody says. Attributes: ``audio`` (name of its file in the archive), ``text``, ``speaker``."""

    audio: str
    text: str
    speaker: str


def read_directory(data: bytes) -> dict[str, Entry]:
    """The archive's files by name.

    Raises:
        GameError: another archive.
    """
    if data[:4] != b"QTBL":
        raise GameError(f"{ARCHIVE} does not begin with QTBL: another version of {GAME}")
    (count,) = struct.unpack_from(">H", data, 13)
    entries = {}
    for i in range(count):
        name, _, offset, size = struct.unpack_from(">12sBII", data, 15 + 21 * i)
        text = name.rstrip(b"\0 ").decode("latin-1")
        entries[text] = Entry(text, offset, size)
    return entries


def lines_of(dialogue: bytes, name: str) -> Iterator[Line]:
    """The lines of a dialogue file ``NAME.DOG``: the hero's, and those of whom he talks with."""
    data = dialogue[20:]
    levels, _, talk, most_hero, most_other = struct.unpack_from(">5h", data)
    (other,) = struct.unpack_from(">h", data, 22)
    hero = 32 + 96 * abs(levels)
    for start, most, letter, person in ((hero, most_hero, "J", "hero"), (other, most_other, "P", name)):
        for number, text in _table(data, start, most):
            # Marks such as *03 say how somebody looks; a new piece of sound begins there.
            for segment, part in enumerate(re.split(r"\*\w\w", text), start=1):
                if words := " ".join(part.split()):
                    yield Line(f"{talk:02d}{number:04X}{letter}{segment}.SB", words, person)


def _table(data: bytes, start: int, most: int) -> Iterator[tuple[int, str]]:
    """The numbered texts of a table; one without a number stands before them."""
    _, place = _string(data, start + 4, start)
    for _ in range(most):
        if place + 4 >= len(data):
            return
        (number,) = struct.unpack_from(">H", data, place + 2)
        text, place = _string(data, place + 4, start)
        yield number, text


def _string(data: bytes, place: int, start: int) -> tuple[str, int]:
    """A text and the byte after it: its length, its letters, zeros up to a multiple of four from the table's start."""
    end = place + 1 + data[place]
    return data[place + 1 : end].decode("latin-1"), end + (start - end) % 4


def spoken_lines(archive: bytes) -> list[tuple[Line, bytes]]:
    """All lines of four words or more that have sound, with the MP3 of each; each text once.

    Raises:
        GameError: another archive, or none of its lines is found.
    """
    files = read_directory(archive)
    found: dict[str, tuple[Line, bytes]] = {}
    for entry in files.values():
        if not entry.name.endswith(".DOG"):
            continue
        for line in lines_of(_content(archive, entry), entry.name.removesuffix(".DOG").rstrip("0123456789").lower()):
            sound = files.get(line.audio)
            if sound is not None and fetch_recordings.is_sentence(line.text):
                found.setdefault(line.text, (line, _content(archive, sound)))
    if not found:
        raise GameError(f"{ARCHIVE} has no dialogue with sound: another version of {GAME}")
    return list(found.values())


def _content(archive: bytes, entry: Entry) -> bytes:
    return archive[entry.offset : entry.offset + entry.size]


# ---- sets ----------------------------------------------------------------------------------------------------------


def fetch_game(cache: Path) -> Path:
    """The game's lines as 16 kHz FLAC with a manifest, in a folder of the cache; made once."""
    packages = fetch_recordings.fetch_debian(cache / GAME, (GAME,))
    folder = cache / "game-speech"
    with locked(cache):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(prefix=".game-speech.", dir=cache) as temporary:
            output = Path(temporary) / "output"
            (output / "audio").mkdir(parents=True)
            rows = []
            for line, sound in spoken_lines((packages / ARCHIVE).read_bytes()):
                samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
                speech = prepare_waveform(samples, rate, line.audio, None)
                if len(speech) > MAX_SECONDS * SAMPLE_RATE:
                    continue
                name = f"audio/{Path(line.audio).stem}.flac"
                soundfile.write(output / name, speech, SAMPLE_RATE, subtype="PCM_16")
                cells = (Path(line.audio).stem, name, len(speech), line.text, line.speaker, "en")
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
            write_manifest(output / "recordings.tsv", rows, COLUMNS)
            output.rename(folder)
    print(f"{folder} made: {len(rows)} lines")
    return folder


def book_rows(folder: Path) -> list[dict[str, str]]:
    """The recordings of a folder with ``transcription``, each line of which is ``<s> TEXT </s> (NAME)``.

    Raises:
        ValueError: no line has a recording.
    """
    rows = []
    for line in (folder / "transcription").read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"<s> (.+) </s> \(([\w-]+)\)", line.strip())
        path = folder / f"{found[2]}.wav" if found else None
        if found and path is not None and path.is_file():
            cells = (found[2], path.resolve(), soundfile.info(path).frames, found[1], "librivox", "en")
            rows.append({name: str(cell) for name, cell in zip(COLUMNS, cells, strict=True)})
    if not rows:
        raise ValueError(f"{folder} has no recording with a text: another version of {BOOK}")
    return rows


def draw(folder: Path, count: int) -> list[dict[str, str]]:
    """``count`` random sentences (0: all) of a folder with recordings.tsv; their audio by its whole path."""
    rows = fetch_recordings.spoken(Manifest.load(folder / "recordings.tsv"))
    random.Random(3).shuffle(rows)
    found = []
    for row in rows[: count or None]:
        cells = {name: row.get(name, "") for name in COLUMNS}
        found.append({**cells, "audio": str((folder / row["audio"]).resolve()), "src_lang": "en"})
    return found


def heard_by_whisper(rows: Sequence[dict[str, str]], whisper: str, batch: int = 8) -> list[dict[str, str]]:
    """The rows of which Whisper gets at most :data:`MOST_ERRORS` of the words wrong."""
    transcriber = WhisperTranscriber(whisper)
    kept = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        heard = transcriber.transcribe([load_audio(row["audio"]) for row in part], ["en"] * len(part))
        for row, text in zip(part, heard, strict=True):
            count = word_errors(text, row["src_text"], "en")
            if count.errors <= MOST_ERRORS * count.words:
                kept.append(row)
    return kept


def copied(rows: Sequence[dict[str, str]], out: Path) -> list[dict[str, str]]:
    """The rows with their audio in OUT/audio, so that OUT may be moved."""
    (out / "audio").mkdir(parents=True, exist_ok=True)
    made = []
    for row in rows:
        name = f"audio/{row['id']}{Path(row['audio']).suffix}"
        shutil.copyfile(row["audio"], out / name)
        made.append({**row, "audio": name})
    return made


def make(out: Path, cache: Path, whisper: str, rows: int, copy: bool = False) -> None:
    """Everything in the module's text."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = draw(fetch_recordings.fetch(cache), rows)
    write_manifest(out / "phone.tsv", copied(prompts, out) if copy else prompts, COLUMNS)
    drawn = draw(fetch_game(cache), rows)
    kept = heard_by_whisper(drawn, whisper)
    write_manifest(out / "game.tsv", copied(kept, out) if copy else kept, COLUMNS)
    book = book_rows(fetch_recordings.fetch_debian(cache / BOOK, (BOOK,)) / BOOK_FOLDER)
    write_manifest(out / "book.tsv", copied(book, out) if copy else book, COLUMNS)
    counts = {
        "drawn": len(drawn),
        "kept": len(kept),
        "left out: more than 30 % of Whisper's words wrong": len(drawn) - len(kept),
    }
    write_whole(out / "game-filter.json", json.dumps(counts, indent=1) + "\n")
    print(f"{out}/game.tsv: {len(kept)} of {len(drawn)} lines")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--whisper", required=True, help="that decides which lines of the game are speech")
    parser.add_argument("--rows", type=int, default=200, help="of each set, before the filter (0: all)")
    parser.add_argument("--copy", action="store_true", help="copy the audio into OUT, which may then be moved")
    args = parser.parse_args(arguments)
    if args.rows < 0:
        parser.error(f"--rows must not be negative, got {args.rows}")
    make(args.out, args.cache, args.whisper, args.rows, args.copy)


if __name__ == "__main__":
    from blspkd_fairseq import compat

    compat.guard_transformers()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"recordings: {error}")
