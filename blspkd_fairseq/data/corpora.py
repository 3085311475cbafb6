r"""Readers of published corpora: where their audio lies and what was said in it.

A reader goes through one split of a corpus in the order of its files and gives an :class:`Entry` for every utterance
and a :class:`Dropped` for every row that names none. Text is taken to the character: cells of TSV files are raw, as
Common Voice and CoVoST 2 publish them (quotes mean nothing; their writer puts a backslash before a backslash or a tab
inside a cell, which ``unescape`` undoes). A byte order mark and CRLF line ends are tolerated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

NO_CLIP = "no clip"
MALFORMED = "malformed row"
NO_SPEECH = "no speech"

# fmt: off
X_TO_EN = (
    "fr", "de", "es", "ca", "it", "ru", "zh-CN", "pt", "fa", "et", "mn", "nl", "tr", "ar", "sv-SE", "lv", "sl", "ta",
    "ja", "id", "cy",
)
EN_TO_X = (
    "de", "tr", "fa", "sv-SE", "mn", "zh-CN", "cy", "ca", "sl", "et", "id", "ar", "ta", "lv", "ja",
)
# fmt: on

_PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_NO_SPEECH_TAGS = frozenset({"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"})
_READ_CHARACTERS = 1 << 20


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the file and says what was expected there."""


class Entry(NamedTuple):
    """One utterance of a corpus.

    Attributes:
        id: unique in the corpus.
        audio: its file, which may hold others, too.
        text: transcript, as the corpus has it.
        translation: the text in ``tgt_lang``, or None.
        speaker: name of the speaker, empty if unknown.
        src_lang, tgt_lang: language codes of the corpus.
        start, end: seconds in the file; None: its beginning, its end.
        declared_seconds: length of the whole file according to the corpus.
    """

    id: str
    audio: Path
    text: str
    translation: str | None = None
    speaker: str = ""
    src_lang: str = ""
    tgt_lang: str = ""
    start: float | None = None
    end: float | None = None
    declared_seconds: float | None = None


class Dropped(NamedTuple):
    """A row that gives no utterance, and why."""

    id: str
    reason: str
    detail: str


Item = Entry | Dropped


# --- tables ---------------------------------------------------------------------------------------


def read_table(path: Path, required: Sequence[str] = (), unescape: bool = False) -> Iterator[dict[str, str] | Dropped]:
    r"""Rows of a raw TSV file with a line of column names.

    Args:
        path: UTF-8, with or without a byte order mark and CRLF.
        required: columns it must have.
        unescape: a backslash stands before every tab, line break and backslash that belongs to a cell.

    Raises:
        CorpusError: missing, without these columns, or not UTF-8.
    """
    with _open_text(path) as file:
        lines = _lines(file, path, unescape)
        header = next(lines, (1, ""))[1]
        is_crlf = header.endswith("\r")
        columns = header.removesuffix("\r").split("\t")
        missing = [name for name in required if name not in columns]
        if missing:
            raise CorpusError(
                f"{path} has no column {', '.join(missing)} (it has {', '.join(columns) or 'none'}): is it the TSV "
                "file of this corpus, with tabs between the columns?"
            )
        for number, line in lines:
            yield _row(path, number, line.removesuffix("\r") if is_crlf else line, columns, unescape)


def _row(path: Path, number: int, line: str, columns: list[str], unescape: bool) -> dict[str, str] | Dropped:
    cells = _split_escaped(line) if unescape else line.split("\t")
    if len(cells) != len(columns):
        detail = f"{len(cells)} cells under {len(columns)} columns: a tab or a line break in a text?"
        return Dropped(f"{path.name} line {number}", MALFORMED, detail)
    return dict(zip(columns, cells, strict=True))


def _open_text(path: Path) -> TextIO:
    try:
        return open(path, encoding="utf-8-sig", newline="\n")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def _lines(file: TextIO, path: Path, unescape: bool = False) -> Iterator[tuple[int, str]]:
    """Lines without their ends, and the number of each; blank ones are left out."""
    number, pending = 0, ""
    try:
        for number, line in enumerate(file, start=1):
            line = pending + line.removesuffix("\n")
            pending = ""
            if unescape and _ends_escaped(line):
                pending = line + "\n"
            elif line.strip("\r"):
                yield number, line
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} after line {number} is not UTF-8: convert the file to UTF-8") from error
    if pending:
        yield number, pending.removesuffix("\n")


def _ends_escaped(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _split_escaped(line: str) -> list[str]:
    cells, start = [], 0
    for match in re.finditer(r"\\.|\t", line, re.DOTALL):
        if match[0] == "\t":
            cells.append(line[start : match.start()])
            start = match.end()
    return [re.sub(r"\\(.)", r"\1", cell, flags=re.DOTALL) for cell in (*cells, line[start:])]


# --- LibriSpeech ----------------------------------------------------------------------------------


def librispeech_subsets(root: Path) -> list[str]:
    """Names of the subsets (``train-clean-100``, ``dev-clean``, ...) under a root.

    Raises:
        CorpusError: there is none.
    """
    folder = _librispeech_folder(root)
    return sorted(path.name for path in folder.iterdir() if _is_librispeech_subset(path))


def _is_librispeech_subset(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*/*/*.trans.txt"), None) is not None


def _librispeech_folder(root: Path) -> Path:
    for folder in (root, root / "LibriSpeech"):
        if folder.is_dir() and any(_is_librispeech_subset(path) for path in folder.iterdir()):
            return folder
    raise CorpusError(
        f"{root} is no LibriSpeech: expected SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt in it, for instance "
        "train-clean-100/103/1240/103-1240.trans.txt"
    )


def read_librispeech(root: Path, subset: str, lang: str = "en", lowercase: bool = False) -> Iterator[Item]:
    """Utterances of a subset, by speaker, chapter and number.

    Raises:
        CorpusError: no such subset, or a transcript that is not UTF-8.
    """
    folder = _librispeech_folder(root) / subset
    if not _is_librispeech_subset(folder):
        raise CorpusError(f"{root} has no subset {subset}: there are {', '.join(librispeech_subsets(root))}")
    for transcripts in sorted(folder.glob("*/*/*.trans.txt"), key=lambda path: _natural(path.name)):
        speaker = transcripts.parent.parent.name
        with _open_text(transcripts) as file:
            for _, line in _lines(file, transcripts):
                utterance, _, text = line.removesuffix("\r").partition(" ")
                audio = transcripts.with_name(f"{utterance}.flac")
                text = text.lower() if lowercase else text
                yield Entry(utterance, audio, text, speaker=speaker, src_lang=lang)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- Common Voice ---------------------------------------------------------------------------------


def common_voice_folder(root: Path, lang: str) -> Path:
    """The folder of a language: ``root`` or ``root/lang``.

    Raises:
        CorpusError: neither holds clips.
    """
    for folder in (root / lang, root):
        if (folder / "clips").is_dir() and next(folder.glob("*.tsv"), None) is not None:
            return folder
    raise CorpusError(
        f"{root} is no Common Voice of {lang}: expected clips/ and TSV files such as train.tsv and validated.tsv in "
        f"it or in {root / lang}"
    )


def read_common_voice(root: Path, lang: str, split: str, unescape: bool = False) -> Iterator[Item]:
    """Utterances of ``<split>.tsv`` (train, dev, test, validated, other), in its order.

    Raises:
        CorpusError: another layout.
    """
    folder = common_voice_folder(root, lang)
    table = folder / f"{split}.tsv"
    if not table.is_file():
        found = ", ".join(sorted(path.stem for path in folder.glob("*.tsv")))
        raise CorpusError(f"{folder} has no {split}.tsv: there are {found}")
    seconds = _clip_seconds(folder)
    for row in read_table(table, ("client_id", "path", "sentence"), unescape):
        if isinstance(row, Dropped):
            yield row
        else:
            yield _clip(folder, row, row["sentence"], None, (lang, ""), seconds)


def _clip(
    folder: Path,
    row: Mapping[str, str],
    text: str,
    translation: str | None,
    langs: tuple[str, str],
    seconds: Mapping[str, float],
) -> Item:
    name = row["path"] if Path(row["path"]).suffix else f"{row['path']}.mp3"
    if not row["path"].strip():
        return Dropped(f"{folder.name}: {text[:40]}", NO_CLIP, "the row names no clip")
    speaker = row.get("client_id", "")
    declared = seconds.get(Path(name).name)
    return Entry(
        name.removesuffix(".mp3"),
        folder / "clips" / name,
        text,
        translation,
        speaker,
        *langs,
        declared_seconds=declared,
    )


def _clip_seconds(folder: Path) -> dict[str, float]:
    """Lengths of the clips by name, which newer releases publish."""
    path = folder / "clip_durations.tsv"
    if not path.is_file():
        return {}
    seconds = {}
    for row in read_table(path, ("clip",)):
        if isinstance(row, dict):
            value = next((cell for column, cell in row.items() if column.startswith("duration")), "")
            if value.replace(".", "", 1).isdecimal():
                seconds[row["clip"]] = float(value) / 1000
    return seconds


# --- CoVoST 2 -------------------------------------------------------------------------------------


def check_direction(src_lang: str, tgt_lang: str) -> None:
    """Raises a CorpusError, with the list, unless CoVoST 2 has this direction."""
    if (tgt_lang == "en" and src_lang in X_TO_EN) or (src_lang == "en" and tgt_lang in EN_TO_X):
        return
    raise CorpusError(
        f"CoVoST 2 has no direction {src_lang}_{tgt_lang}: from {', '.join(X_TO_EN)} into en, and from en into "
        f"{', '.join(EN_TO_X)}"
    )


def read_covost2(
    root: Path,
    src_lang: str,
    tgt_lang: str,
    split: str,
    translations: Path | None = None,
    unescape: bool = False,
) -> Iterator[Item]:
    """Utterances of a split (train, dev, test) of a direction.

    Takes ``covost_v2.<src>_<tgt>.<split>.tsv`` (path, sentence, translation, client_id) in its order where it exists.
    Otherwise joins the published ``covost_v2.<src>_<tgt>.tsv`` (path, translation, split) with Common Voice's
    ``validated.tsv`` on the path, in the order of the latter; translations that it lacks come last, as dropped.

    Args:
        root: Common Voice 4, or the folder of its source language.
        translations: folder of the translations; default: the Common Voice folder.

    Raises:
        CorpusError: another layout.
    """
    folder = common_voice_folder(root, src_lang)
    places = [translations] if translations else [folder, root]
    name = f"covost_v2.{src_lang}_{tgt_lang}"
    files = [place / f"{name}{ending}" for ending in (f".{split}.tsv", ".tsv") for place in places]
    table = next((path for path in files if path.is_file()), None)
    if table is None:
        raise CorpusError(
            f"no translations in {' or '.join(map(str, places))}: expected {name}.tsv (with the columns path, "
            f"translation, split) or {name}.{split}.tsv there"
        )
    langs, seconds = (src_lang, tgt_lang), _clip_seconds(folder)
    if table.name == f"{name}.tsv":
        yield from _join_covost2(folder, table, split, langs, unescape, seconds)
        return
    for row in read_table(table, ("path", "sentence", "translation"), unescape):
        if isinstance(row, Dropped):
            yield row
        else:
            yield _clip(folder, row, row["sentence"], row["translation"], langs, seconds)


def _join_covost2(
    folder: Path, table: Path, split: str, langs: tuple[str, str], unescape: bool, seconds: Mapping[str, float]
) -> Iterator[Item]:
    wanted: dict[str, str] = {}
    for row in read_table(table, ("path", "translation", "split"), unescape):
        if isinstance(row, Dropped):
            yield row
        # "train_covost" marks what Common Voice itself does not use for training.
        elif row["split"] == split or (split == "train" and row["split"] == "train_covost"):
            wanted[row["path"]] = row["translation"]
    for row in read_table(folder / "validated.tsv", ("client_id", "path", "sentence"), unescape):
        if isinstance(row, Dropped):
            continue  # of another split, for all that is known; if not, its translation is left over below
        translation = wanted.pop(row["path"], None)
        if translation is not None:
            yield _clip(folder, row, row["sentence"], translation, langs, seconds)
    for path in wanted:
        yield Dropped(path.removesuffix(".mp3"), NO_CLIP, f"{table.name} has it, but validated.tsv does not")


# --- GigaSpeech -----------------------------------------------------------------------------------


def read_gigaspeech(
    root: Path, subset: str, keep_tags: bool = False, lowercase: bool = False, lang: str = "en"
) -> Iterator[Item]:
    """Segments of a subset (XS, S, M, L, XL, DEV, TEST), by audio file.

    ``GigaSpeech.json`` has several gigabytes; one audio file's part of it is held in memory at a time. Tags of
    punctuation become punctuation (unless ``keep_tags``); segments tagged as silence, music or noise are dropped.

    Raises:
        CorpusError: another layout.
    """
    path = root / "GigaSpeech.json"
    if not path.is_file():
        raise CorpusError(f"{root} is no GigaSpeech: expected GigaSpeech.json and audio/ in it")
    for audio in _json_array(path, "audios"):
        try:
            yield from _segments(root, audio, subset, keep_tags, lowercase, lang)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorpusError):
                raise
            raise CorpusError(
                f"{path}: the audio {_name_of(audio)} is not as published ({type(error).__name__}: {error}); expected "
                "path and segments with sid, begin_time, end_time, text_tn, subsets"
            ) from error


def _name_of(audio: Any) -> str:
    return str(audio.get("aid", "without aid")) if isinstance(audio, dict) else repr(audio)[:40]


def _segments(
    root: Path, audio: dict[str, Any], subset: str, keep_tags: bool, lowercase: bool, lang: str
) -> Iterator[Item]:
    declared = float(audio["duration"]) if "duration" in audio else None
    for segment in audio["segments"]:
        if subset not in {name.strip("{}") for name in segment["subsets"]}:
            continue
        text = segment["text_tn"] if "text_tn" in segment else segment["text_tts"]
        tags = _NO_SPEECH_TAGS.intersection(text.split())
        if tags:
            yield Dropped(segment["sid"], NO_SPEECH, " ".join(sorted(tags)))
            continue
        text = text if keep_tags else punctuate(text)
        speaker = segment.get("speaker", "")
        yield Entry(
            segment["sid"],
            root / audio["path"],
            text.lower() if lowercase else text,
            speaker="" if speaker == "N/A" else speaker,
            src_lang=lang,
            start=float(segment["begin_time"]),
            end=float(segment["end_time"]),
            declared_seconds=declared,
        )


def punctuate(text: str) -> str:
    """``HELLO <COMMA> WORLD <PERIOD>`` as ``HELLO, WORLD.``"""
    return re.sub(r"\s*<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT)>", lambda m: _PUNCTUATION[m[0].strip()], text)


def _json_array(path: Path, key: str) -> Iterator[Any]:
    """Elements of the array ``key`` of a JSON object, one at a time."""
    decoder = json.JSONDecoder()
    with _open_text(path) as file:
        buffer = _JsonBuffer(file, path)
        position = buffer.find(re.compile(rf'"{key}"\s*:\s*\['), key)
        while True:
            position = buffer.skip(position)
            if buffer.text[position] == "]":
                return
            value, position = buffer.decode(decoder, position)
            yield value


class _JsonBuffer:
    """The part of a file that is being read."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.text = file, path, ""

    def _grow(self) -> None:
        # As much again, so that an element that comes in many pieces is not parsed as many times.
        try:
            more = self.file.read(max(_READ_CHARACTERS, len(self.text)))
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.path} is not UTF-8: fetch it again") from error
        if not more:
            raise CorpusError(f"{self.path} ends in the middle, so it is truncated or no JSON: fetch it again")
        self.text += more

    def find(self, pattern: re.Pattern[str], key: str) -> int:
        while (match := pattern.search(self.text)) is None:
            try:
                self._grow()
            except CorpusError as error:
                raise CorpusError(f'{self.path} has no "{key}": is it the file of this corpus?') from error
        return match.end()

    def skip(self, position: int) -> int:
        """The next character that is neither blank nor a comma."""
        pattern = re.compile(r"[^\s,]")
        while (match := pattern.search(self.text, position)) is None:
            self._grow()
        return match.start()

    def decode(self, decoder: json.JSONDecoder, position: int) -> tuple[Any, int]:
        self.text = self.text[position:]
        while True:
            try:
                return decoder.raw_decode(self.text)
            except json.JSONDecodeError:
                self._grow()


# --- any corpus -----------------------------------------------------------------------------------

IMPORT_COLUMNS = ("path", "text", "start", "end", "translation", "speaker", "id", "src_lang", "tgt_lang", "seconds")


def read_listed(
    path: Path, audio_root: Path, src_lang: str = "", tgt_lang: str = "", names: Mapping[str, str] | None = None
) -> Iterator[Item]:
    """Utterances of a list of one's own: ``.jsonl`` (objects), or a raw TSV with column names.

    Args:
        path: columns or keys ``path`` and ``text``, optionally ``start``, ``end`` (seconds), ``translation``,
            ``speaker``, ``id`` (default: from path, start and end), ``src_lang``, ``tgt_lang``, ``seconds`` (length of
            the file).
        audio_root: folder of the audio.
        src_lang, tgt_lang: of rows that do not say.
        names: what the list calls these columns, where it differs.

    Raises:
        CorpusError: a column is missing, or a line is no JSON object.
    """
    names = {column: column for column in IMPORT_COLUMNS} | dict(names or {})
    needed = (names["path"], names["text"])
    rows = _read_jsonl(path, needed) if path.suffix in (".jsonl", ".json") else read_table(path, needed)
    for row in rows:
        if isinstance(row, Dropped):
            yield row
            continue
        cells = {column: row.get(name) for column, name in names.items()}
        yield _listed_entry(
            path, audio_root, {k: "" if v is None else str(v) for k, v in cells.items()}, src_lang, tgt_lang
        )


def _listed_entry(path: Path, root: Path, cells: dict[str, str], src_lang: str, tgt_lang: str) -> Item:
    audio, span = cells["path"], "-".join(filter(None, (cells["start"], cells["end"])))
    name = cells["id"] or "-".join(filter(None, (os.path.splitext(audio)[0], span)))
    if not audio.strip():
        return Dropped(name or f"{path.name}: {cells['text'][:40]}", NO_CLIP, "the row names no audio")
    try:
        start, end, seconds = (float(cells[key]) if cells[key] else None for key in ("start", "end", "seconds"))
    except ValueError:
        return Dropped(name, MALFORMED, f"start, end and seconds must be numbers: {span or cells['seconds']}")
    return Entry(
        name,
        root / audio,
        cells["text"],
        cells["translation"],
        cells["speaker"],
        cells["src_lang"] or src_lang,
        cells["tgt_lang"] or tgt_lang,
        start,
        end,
        seconds,
    )


def _read_jsonl(path: Path, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in _lines(file, path):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path} line {number} is no JSON ({error}): write one object a line") from error
            missing = [name for name in required if name not in row] if isinstance(row, dict) else required
            if missing:
                raise CorpusError(
                    f"{path} line {number} has no {', '.join(missing)}: write one object a line, with them"
                )
            yield row
