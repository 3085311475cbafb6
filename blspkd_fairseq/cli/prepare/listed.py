"""Any corpus to a manifest: from a list with columns (TSV, CSV) or keys (JSON, JSON lines) such as

    path    text    start    end    translation    speaker    id    src_lang    tgt_lang    seconds

of which path and text are needed. start and end are seconds, for several utterances in a file (keep those of a file
together: it is decoded once for a run of rows); seconds is the length of the file, to notice one that was cut off.

    blspkd prepare list --list train=my/train.tsv --list valid=my/valid.jsonl --output data/my --src-lang de
    blspkd prepare list --list train=x.tsv --column text=sentence --column path=file --output data/x

    blspkd prepare list --list train=data/train --list test=data/test --output data/x

In the last line, data/train is a folder with audio and a metadata.csv, .tsv, .jsonl or .json (file_name,
transcription), as Hugging Face has it. Lists are in UTF-8 or UTF-16; a CSV is separated by commas, semicolons or tabs.
Quotes around a cell of a TSV are left out if a spreadsheet has put them there; where that cannot be told, --quotes says
it. A killed run goes on where it was.
"""

import argparse
import os
import re
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import IMPORT_COLUMNS, QUOTES, CorpusError, read_listed
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    lists = {name: Path(path) for name, path in pairs(args.list, "--list").items()}
    wrong = [name for name in lists if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)]
    if wrong:
        raise CorpusError(f"--list {wrong[0]}=...: a split is named by letters, digits, '.', '-' and '_' only")
    names = pairs(args.column, "--column")
    unknown = [name for name in names if name not in IMPORT_COLUMNS]
    if unknown:
        raise CorpusError(f"--column {unknown[0]}=... is none of {', '.join(IMPORT_COLUMNS)}")
    root = args.audio_root or common_folder(lists)
    splits = {
        name: partial(
            read_listed,
            path,
            args.audio_root or (None if path.is_dir() else root),
            args.src_lang,
            args.tgt_lang,
            names,
            args.quotes,
        )
        for name, path in lists.items()
    }
    prepare(Corpus(root, splits, args.translations or bool(args.tgt_lang)), args.output, options)


def pairs(values: list[str], option: str) -> dict[str, str]:
    """``["a=b"]`` as ``{"a": "b"}``."""
    wrong = [value for value in values if not all(value.partition("="))]
    if wrong:
        raise CorpusError(f"{option} {wrong[0]} is not of the form NAME=VALUE")
    given = [value.partition("=")[::2] for value in values]
    twice = [name for place, (name, _) in enumerate(given) if name in dict(given[:place])]
    if twice:
        raise CorpusError(f"{option} {twice[0]}=... is given twice: one of them would be lost")
    return dict(given)


def common_folder(lists: dict[str, Path]) -> Path:
    """Paths are relative to the list that has them, or to the folder that is one."""
    if all(path.is_dir() for path in lists.values()):
        return Path(os.path.commonpath([path.resolve() for path in lists.values()]))
    folders = {path.resolve() if path.is_dir() else path.resolve().parent for path in lists.values()}
    if len(folders) > 1:
        raise CorpusError("the lists are in different folders: say where their audio is with --audio-root")
    return folders.pop()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="append", required=True, metavar="SPLIT=FILE", help="one for each split; a file or a folder"
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="what the lists call a column"
    )
    parser.add_argument(
        "--quotes", choices=QUOTES, default="auto", help="around cells of a TSV: text (raw), or not (csv)"
    )
    parser.add_argument("--audio-root", type=Path, help="folder that holds all audio (default: that of the lists)")
    parser.add_argument("--translations", action="store_true", help="make tgt_text; implied by --tgt-lang")
    parser.add_argument("--src-lang", default="", help="of rows that do not say")
    parser.add_argument("--tgt-lang", default="", help="of rows that do not say")
    add_arguments(parser)
    return parser.parse_args(arguments)
