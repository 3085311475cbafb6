"""A folder of your own to a manifest: audio files, each beside a text file of the same name (a.flac and a.txt).

    blspkd prepare folder --root recordings --output data/mine --src-lang en
    blspkd prepare folder --root recordings --output data/mine --valid 0.02

Files in folders below are taken, too; --speakers says that the first of these is the speaker. With --valid, so many of
the rows (by a hash of their names, so that it stays the same) are valid.tsv, and the rest train.tsv. A killed run goes
on where it was.
"""

import argparse
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import CorpusError, Dropped, Entry
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare

NO_TEXT = "no_text"


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    if not 0 <= args.valid < 1:
        raise CorpusError(f"--valid {args.valid} must be a fraction, from 0 to 1")
    if not args.root.is_dir():
        raise CorpusError(f"--root {args.root} is no folder: check the path")
    if not any(find_texts(args.root)):
        raise CorpusError(f"{args.root} holds no text file (*.txt) beside an audio file of the same name")
    names = ["train", "valid"] if args.valid else ["train"]
    splits = {name: partial(read_folder, args.root, name, args.valid, args.src_lang, args.speakers) for name in names}
    prepare(Corpus(args.root, splits), args.output, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the audio and the texts")
    parser.add_argument("--valid", type=float, default=0.0, help="share of the rows for valid.tsv (default: none)")
    parser.add_argument("--speakers", action="store_true", help="the first folder below the root names the speaker")
    parser.add_argument("--src-lang", default="", help="language of all of it")
    add_arguments(parser)
    return parser.parse_args(arguments)


def read_folder(
    root: Path, split: str, valid: float = 0.0, lang: str = "", has_speakers: bool = False
) -> Iterator[Entry | Dropped]:
    """The utterances of a split in the order of their names."""
    for text_file, audio in find_texts(root):
        name = str(text_file.relative_to(root).with_suffix(""))
        if split_of(name, valid) != split:
            continue
        text = " ".join(text_file.read_text(encoding="utf-8-sig", errors="replace").split())
        if not text:
            yield Dropped(name, NO_TEXT, f"{text_file} is empty")
            continue
        parts = Path(name).parts
        yield Entry(name, audio, text, speaker=parts[0] if has_speakers and len(parts) > 1 else "", src_lang=lang)


def find_texts(root: Path) -> Iterator[tuple[Path, Path]]:
    """Text files, each with the audio beside it; one without any is left to itself."""
    for text in sorted(root.rglob("*.txt")):
        others = [one for one in sorted(text.parent.glob(f"{_escaped(text.stem)}.*")) if one != text and one.is_file()]
        if len(others) > 1:
            raise CorpusError(f"{text} lies beside {others[0].name} and {others[1].name}: leave one of them")
        if others:
            yield text, others[0]


def split_of(name: str, valid: float) -> str:
    """Returns the split of a row, the same for ever."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "valid" if place < valid else "train"


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
