"""GigaSpeech to manifests: one per subset, in the layout GigaSpeech.json and audio/**/*.opus.

    blspkd prepare gigaspeech --root GigaSpeech --subsets M DEV TEST --output data/gigaspeech --processes 8

Makes train-m.tsv, dev.tsv and test.tsv. Tags such as <COMMA> become punctuation unless --keep-tags is given; segments
without speech (<MUSIC> and the like) are dropped. Each long file is decoded once, and needs 4 bytes of memory for each
of its samples twice over: half a gigabyte an hour in every process. A killed run goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import read_gigaspeech
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare

TRAINING = ("XS", "S", "M", "L", "XL")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    splits = {
        f"train-{name.lower()}" if name in TRAINING else name.lower(): partial(
            read_gigaspeech, args.root, name, args.keep_tags, args.lowercase
        )
        for name in args.subsets
    }
    prepare(Corpus(args.root, splits), args.output, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with GigaSpeech.json and audio/")
    parser.add_argument(
        "--subsets",
        nargs="+",
        choices=(*TRAINING, "DEV", "TEST"),
        default=["XL", "DEV", "TEST"],
        help="each of XS to XL holds those before it: take one of them (default: XL DEV TEST)",
    )
    parser.add_argument("--keep-tags", action="store_true", help="leave <COMMA> and the like in the text")
    parser.add_argument("--lowercase", action="store_true")
    add_arguments(parser)
    return parser.parse_args(arguments)
