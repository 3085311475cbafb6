"""CoVoST 2 to manifests: train.tsv, dev.tsv and test.tsv of a direction, with translations.

    blspkd prepare covost2 --root cv-corpus-4/fr --translations covost --direction fr_en --output data/fr_en

Takes the clips and validated.tsv of Common Voice 4 and covost_v2.fr_en.tsv, or the covost_v2.fr_en.train.tsv and so on
that CoVoST's own script makes of them. A killed run goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path

from blspkd_fairseq.data.corpora import CorpusError, check_direction, common_voice_folder, read_covost2
from blspkd_fairseq.data.preparation import Corpus, add_arguments, options_from, prepare


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options = options_from(args)
    src_lang, _, tgt_lang = args.direction.partition("_")
    if not (src_lang and tgt_lang):
        raise CorpusError(f"--direction {args.direction} is not of the form fr_en")
    if not args.any_direction:
        check_direction(src_lang, tgt_lang)
    translations = args.translations
    if translations is None and next(args.root.glob(f"covost_v2.{args.direction}.*"), None):
        translations = args.root
    folder = common_voice_folder(args.root, src_lang)
    splits = {
        name: partial(read_covost2, folder, src_lang, tgt_lang, name, translations, args.unescape)
        for name in args.splits
    }
    prepare(Corpus(folder, splits, has_translation=True), args.output, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="Common Voice 4, or its folder of the source language")
    parser.add_argument("--translations", type=Path, help="folder of covost_v2.*.tsv (default: in the root)")
    parser.add_argument("--direction", required=True, help="such as fr_en or en_zh-CN")
    parser.add_argument("--any-direction", action="store_true", help="also one that CoVoST 2 does not have")
    parser.add_argument("--splits", nargs="+", choices=("train", "dev", "test"), default=["train", "dev", "test"])
    parser.add_argument(
        "--unescape", action="store_true", help="a backslash in a cell stands before a backslash, tab or line break"
    )
    add_arguments(parser)
    return parser.parse_args(arguments)
