"""LibriSpeech to manifests: one per subset, in the layout SUBSET/SPEAKER/CHAPTER/*.flac and *.trans.txt.

    blspkd prepare librispeech --root LibriSpeech --output data/librispeech --processes 8

The text is LibriSpeech's own, in capitals, unless --lowercase is given. A killed run goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import librispeech_subsets, read_librispeech
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    subsets = args.subsets or librispeech_subsets(args.root)
    splits = {name: partial(read_librispeech, args.root, name, args.lang, args.lowercase) for name in subsets}
    prepare(Corpus(args.root, splits), args.output, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with train-clean-100 and the like")
    parser.add_argument("--subsets", nargs="+", help="default: all there are")
    parser.add_argument("--lang", default="en", help="src_lang of the manifest (default: %(default)s)")
    parser.add_argument("--lowercase", action="store_true")
    add_arguments(parser)
    return parser.parse_args(arguments)
