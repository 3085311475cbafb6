"""Writes down what is said in audio files of any length, with the times of words."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from blspkd_fairseq.cli import sentence
from blspkd_fairseq.cli.model_arguments import (
    add_model_arguments,
    add_vad_argument,
    add_writer_arguments,
    chosen_prompt,
    chosen_vad,
    load_model,
)
from blspkd_fairseq.data.audio import AudioError, audio_seconds, check_audio
from blspkd_fairseq.data.transcript import FORMATS, Transcript, as_dict
from blspkd_fairseq.files import whole_file

if TYPE_CHECKING:
    from blspkd_fairseq.hub import BlspKd

EXAMPLE = """\
blspkd transcribe talk.flac
blspkd transcribe talk.flac --heard
blspkd transcribe lectures/*.mp3 --format srt --output subtitles --model checkpoints/checkpoint_best.pt
"""
ENDINGS = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio of any length, rate and number of channels")
    parser.add_argument("--format", choices=list(FORMATS), default="text", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a file there for each (default: to stdout)")
    add_vad_argument(parser)
    add_writer_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default: %(default)s)")
    parser.add_argument("--beam", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=160, help="of the text of one window (default: %(default)s)"
    )
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Transcribes all files that can be read; 1 if some could not."""
    check_options(args)
    if len(args.files) > 1 and args.output is None and args.format in ("srt", "vtt"):
        raise ValueError(f"several files give several {args.format} files: say where with --output FOLDER")
    if args.output is not None:
        names = [target(args.output, file, args.format) for file in args.files]
        if len(set(names)) < len(names):
            raise ValueError("two of the files have the same name: give them one by one, or other output folders")
        check_folder(args.output)
    problems = [problem(file) for file in args.files]
    if problems[0] is not None and all(problems):
        raise problems[0]  # before a model is loaded
    model = load_model(args)
    failed = 0
    for file in args.files:
        try:
            write(transcribe(model, file, args), file, args, alone=len(args.files) == 1)
        except BrokenPipeError:
            raise
        except (AudioError, OSError) as error:
            failed += 1
            print(f"blspkd transcribe: {sentence(error)}", file=sys.stderr)
    return 1 if failed else 0


def check_options(args: argparse.Namespace) -> None:
    """Refuses what no model need be loaded for."""
    from blspkd_fairseq.generation.decoding import DecodingOptions

    DecodingOptions(beam=args.beam, max_new_tokens=args.max_new_tokens)
    chosen_prompt(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")


def transcribe(model: BlspKd, file: str, args: argparse.Namespace) -> Transcript:
    """One file, under a progress bar over its seconds."""
    total = audio_seconds(file)
    with tqdm(
        total=None if total is None else round(total),
        desc=Path(file).name,
        unit="s",
        disable=True if total is not None and total <= 30 else None,
        leave=False,
        file=sys.stderr,
    ) as bar:
        return model.transcripts(
            [file],
            prompt=chosen_prompt(args),
            vad=chosen_vad(args),
            with_words=args.format != "text",
            batch_size=args.batch_size,
            progress=bar.update,
            beam=args.beam,
            max_new_tokens=args.max_new_tokens,
        )[0]


def write(transcript: Transcript, file: str, args: argparse.Namespace, alone: bool) -> None:
    """To its file, or to stdout, where of several each has its name."""
    if args.output is not None:
        with whole_file(target(args.output, file, args.format)) as partial:
            partial.write_text(FORMATS[args.format](transcript), encoding="utf-8")
    elif alone:
        print(FORMATS[args.format](transcript), end="", flush=True)
    elif args.format == "json":
        print(json.dumps({"file": shown(file), **as_dict(transcript)}, ensure_ascii=False), flush=True)
    else:
        print(f"{shown(file)}\t{transcript.text}", flush=True)


def shown(file: str) -> str:
    """A name as text; bytes of it that are none are written as \\xNN."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def check_folder(folder: Path) -> None:
    """Makes a folder for the transcripts, and writes there before anything is transcribed.

    Raises:
        OSError: it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def problem(file: str) -> AudioError | None:
    """What of a file can be said to be wrong without a model."""
    try:
        check_audio(file)
    except AudioError as error:
        return error
    return None


def target(folder: Path, file: str, form: str) -> Path:
    return folder / f"{Path(file).stem}{ENDINGS[form]}"
