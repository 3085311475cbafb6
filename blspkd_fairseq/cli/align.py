"""Shows where CIF cuts the speech of a file: a line with begin, end (seconds) and text for each token."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blspkd_fairseq.cli.model_arguments import add_model_arguments, add_vad_argument, chosen_vad, load_model
from blspkd_fairseq.data.audio import check_audio

EXAMPLE = """\
blspkd align question.wav
blspkd align question.wav --transcript "How tall is it?" --plot question.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("file", metavar="FILE", help="audio of any length")
    parser.add_argument("--transcript", help="what is said; without it, CIF counts and the nearest tokens are shown")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PICTURE",
        help="spectrogram, weights and tokens of up to five minutes, as .png, .svg or .pdf",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list in place of lines")
    add_vad_argument(parser)
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the tokens, and draws them if asked."""
    check_audio(args.file)
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {args.plot} is no name of a picture: end it in .png, .svg or .pdf")
        if not args.plot.parent.is_dir():
            raise ValueError(f"--plot {args.plot}: there is no folder {args.plot.parent}: make it first")
        try:
            import matplotlib.figure  # noqa: F401

            from blspkd_fairseq.evaluation.plots import plot_alignment
        except ImportError as error:
            raise ValueError(f"--plot needs matplotlib ({error}): pip install 'blspkd-fairseq[quickstart]'") from error
    model = load_model(args)
    vad = chosen_vad(args)
    tokens = model.align(args.file, args.transcript, vad)
    if args.plot is not None:
        text = args.transcript or "".join(one.token for one in tokens).strip()
        plot_alignment(model, args.file, text, args.plot, tokens, vad)
    if args.json:
        print(json.dumps([token._asdict() for token in tokens], ensure_ascii=False))
    else:
        for one in tokens:
            print(f"{one.start:.2f}\t{one.end:.2f}\t{one.token}")
    return 0
