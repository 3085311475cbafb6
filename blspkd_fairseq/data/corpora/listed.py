"""Lists of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blspkd_fairseq.data.corpora.items import MALFORMED, NO_CLIP, CorpusError, Dropped, Entry, Item
from blspkd_fairseq.data.corpora.tables import READERS, MissingColumns, read_tsv

IMPORT_COLUMNS = ("path", "text", "start", "end", "translation", "speaker", "id", "src_lang", "tgt_lang", "seconds")

# Of Hugging Face's folders of audio ("audiofolder").
_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json")
_FOLDER_PATHS = ("file_name", "path")
_FOLDER_TEXTS = ("text", "transcription", "transcript", "sentence", "normalized_text")


def read_listed(
    path: Path,
    audio_root: Path | None = None,
    src_lang: str = "",
    tgt_lang: str = "",
    names: Mapping[str, str] | None = None,
    quotes: str = "auto",
) -> Iterator[Item]:
    """Utterances of a list of one's own.

    Args:
        path: TSV or CSV with column names, JSON or JSON lines of objects (by its ending), or a folder with
            ``metadata.csv`` (or .tsv, .jsonl, .json) as Hugging Face has it. Columns or keys ``path`` and ``text``, in
            a folder also ``file_name`` and ``transcription``; optionally ``start``, ``end`` (seconds), ``translation``,
            ``speaker``, ``id`` (default: from path, start and end), ``src_lang``, ``tgt_lang``, ``seconds`` (length of
            the file).
        audio_root: folder of the audio; default: that of the list.
        src_lang, tgt_lang: of rows that do not say.
        names: what the list calls these columns, where it differs.
        quotes: of a TSV, one of :data:`~blspkd_fairseq.data.corpora.tables.QUOTES`.

    Raises:
        CorpusError: a column is missing, or the list cannot be read.
    """
    table = metadata_of(path) if path.is_dir() else path
    names = {column: column for column in IMPORT_COLUMNS} | dict(names or {})
    if path.is_dir():
        names |= _folder_names(table, names, quotes)
    for row in _read(table, names, (names["path"], names["text"]), quotes):
        if isinstance(row, Dropped):
            yield row
            continue
        cells = {column: row.get(name) for column, name in names.items()}
        yield _listed_entry(
            table,
            audio_root or table.parent,
            {k: "" if v is None else str(v) for k, v in cells.items()},
            src_lang,
            tgt_lang,
        )


def _read(table: Path, names: Mapping[str, str], required: Sequence[str], quotes: str) -> Iterator[Any]:
    """The rows of a list, whose columns may be named by the one who has it."""
    reader = READERS.get(table.suffix.lower())
    try:
        yield from reader(table, required) if reader else read_tsv(table, required, quotes)
    except MissingColumns as error:
        if len(error.columns) < 2:  # rather another separator
            raise
        options = " ".join(f"--column {ours}=COLUMN" for ours, name in names.items() if name in error.missing)
        raise CorpusError(f"{error.found}: say what they are called, with {options}") from error


def metadata_of(folder: Path) -> Path:
    """The list of a folder of audio.

    Raises:
        CorpusError: there is none, or there are several.
    """
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    below = sorted({str(path.parent) for name in _METADATA for path in folder.glob(f"*/{name}")})
    hint = f"; there is one in {', '.join(below)}: name a folder for each split" if below else ""
    have = " and ".join(path.name for path in found)
    raise CorpusError(f"{folder} has {have or 'no ' + ' or '.join(_METADATA)}: expected one of them{hint}")


def _folder_names(table: Path, names: Mapping[str, str], quotes: str) -> dict[str, str]:
    """What the metadata of a folder call path and text, unless ``names`` say it.

    Raises:
        CorpusError: none of the usual names.
    """
    first = next((row for row in _read(table, {}, (), quotes) if isinstance(row, dict)), {})
    chosen = {}
    for column, usual in (("path", _FOLDER_PATHS), ("text", _FOLDER_TEXTS)):
        candidates = usual if names[column] == column else (names[column],)
        name = next((name for name in candidates if name in first), None)
        if name is None:
            raise CorpusError(
                f"{table} has no column {' or '.join(candidates)} (it has {', '.join(first) or 'no rows'}): name it "
                f"with --column {column}=COLUMN"
            )
        chosen[column] = name
    return chosen


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
