"""Finds the command that was asked for, and says what went wrong in one sentence.

Exit status: 0 done; 1 an error, said on stderr; 2 a wrong command line; 130 interrupted.

A command is a module in one of two forms: with ``main(arguments)``, which parses for itself, or with
``add_arguments(parser)``, ``main(args)`` and ``EXAMPLE``, for which the parser is made here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from blspkd_fairseq.cli import sentence


class Command(NamedTuple):
    """Attributes: the ``module`` and ``what`` it does in a line; or ``below``, the commands that begin with it."""

    module: str
    what: str
    below: Mapping[str, Command] | None = None


PREPARE = {
    "librispeech": Command("cli.prepare.librispeech", "LibriSpeech"),
    "common-voice": Command("cli.prepare.common_voice", "Common Voice, any release and language"),
    "gigaspeech": Command("cli.prepare.gigaspeech", "GigaSpeech"),
    "covost2": Command("cli.prepare.covost2", "CoVoST 2: speech with translations"),
    "list": Command("cli.prepare.listed", "a list of your own: TSV or JSON lines that name files and their text"),
    "folder": Command("cli.prepare.folder", "a folder of your own: audio files beside text files of the same name"),
}
COMMANDS = {
    "check": Command("check", "versions, problems, and a remedy for each"),
    "prepare": Command("", "a corpus to manifests that training reads", PREPARE),
    "validate": Command("data.validate", "check finished manifests and their audio"),
    "responses": Command("cli.responses", "let the LLM answer the transcripts: what distillation trains on"),
    "merge": Command("cli.merge", "one manifest of several"),
    "average": Command("cli.average", "one checkpoint of several"),
    "evaluate": Command("evaluate", "compare systems on test sets, with intervals and pictures"),
    "compare": Command("compare", "compare ways of training over seeds and speakers, as planned"),
    "power": Command("power", "how many seeds and rows an effect needs"),
    "transcribe": Command("cli.transcribe", "what is said in files of any length, as text, JSON or subtitles"),
    "chat": Command("cli.chat", "talk to a model in the terminal, by files, microphone or keyboard"),
    "align": Command("cli.align", "where CIF cuts the speech: times of tokens, and a picture"),
    "serve": Command("cli.serve", "an OpenAI-compatible server"),
    "demo": Command("cli.demo", "a page where one speaks and sees"),
    "publish": Command("cli.publish", "a trained model with its card, as a folder or on a hub"),
}
PREPARE_EXAMPLE = "example: blspkd prepare librispeech --root LibriSpeech --output data/librispeech"
EPILOG = """\
training and generation are fairseq's own commands:
  fairseq-train DATA --user-dir blspkd_fairseq --task blsp_kd --arch blsp_kd --criterion kl_distillation ...
  fairseq-generate DATA --user-dir blspkd_fairseq --task blsp_kd --path CHECKPOINT ...

example: blspkd transcribe talk.flac --format srt     (blspkd COMMAND --help has one for each command)
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdin is None:  # whoever has started this has closed it
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        return _run(words, "blspkd", COMMANDS)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(words: list[str], program: str, commands: Mapping[str, Command]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(usage(program, commands))
        return 0 if words else 2
    if name == "--version":
        from blspkd_fairseq.version import __version__

        print(f"blspkd {__version__}")
        return 0
    if name not in commands:
        print(f"{program}: there is no command {name!r}: choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    command, program = commands[name], f"{program} {name}"
    if command.below is not None:
        return _run(words[1:], program, command.below)
    sys.argv = [program, *words[1:]]  # argparse takes the program's name from there
    try:
        status = _call(_load(command.module), program, words[1:])
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("BLSPKD_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        print(f"{program}: {sentence(error)}", file=sys.stderr)
        return 1
    return int(status or 0)


def _load(module: str) -> ModuleType:
    name = f"blspkd_fairseq.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("blspkd_fairseq"):
            raise ValueError(f"this installation has no module {error.name}: install blspkd-fairseq anew") from error
        raise ValueError(f"{error.name} is not installed: `blspkd check` says what is missing") from error


def _call(module: Any, program: str, words: list[str]) -> Any:
    if not hasattr(module, "EXAMPLE"):
        return module.main(words)
    parser = argparse.ArgumentParser(
        prog=program,
        description=(module.__doc__ or "").strip(),
        epilog=f"example:\n{_indented(module.EXAMPLE)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.main(parser.parse_args(words))


def usage(program: str, commands: Mapping[str, Command]) -> str:
    """The list of commands."""
    width = max(map(len, commands))
    lines = [f"usage: {program} COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name.ljust(width)}  {command.what}" for name, command in commands.items()]
    return "\n".join([*lines, "", EPILOG if commands is COMMANDS else PREPARE_EXAMPLE]).rstrip()


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.strip().splitlines())
