"""Common Voice, any release, to manifests: one per TSV file, in the layout LANG/clips/*.mp3 and LANG/train.tsv.

    blspkd prepare common-voice --root cv-corpus-17.0 --lang de --output data/cv-de --processes 8

A killed run goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import common_voice_folder, read_common_voice
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    folder = common_voice_folder(args.root, args.lang)
    splits = {name: partial(read_common_voice, folder, args.lang, name, args.unescape) for name in args.splits}
    prepare(Corpus(folder, splits), args.output, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the release, or of the language")
    parser.add_argument("--lang", required=True, help="language code as in Common Voice, such as zh-CN")
    parser.add_argument(
        "--splits", nargs="+", default=["train", "dev", "test"], help="TSV files to take (default: train dev test)"
    )
    parser.add_argument(
        "--unescape", action="store_true", help="a backslash in a cell stands before a backslash, tab or line break"
    )
    add_arguments(parser)
    return parser.parse_args(arguments)
