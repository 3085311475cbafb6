"""LibriSpeech: SUBSET/SPEAKER/CHAPTER/*.flac and *.trans.txt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from blspkd_fairseq.data.corpora.items import CorpusError, Entry, Item
from blspkd_fairseq.data.corpora.tables import open_text, text_lines


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
        with open_text(transcripts) as file:
            for _, line in text_lines(file, transcripts):
                utterance, _, text = line.removesuffix("\r").partition(" ")
                audio = transcripts.with_name(f"{utterance}.flac")
                text = text.lower() if lowercase else text
                yield Entry(utterance, audio, text, speaker=speaker, src_lang=lang)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
