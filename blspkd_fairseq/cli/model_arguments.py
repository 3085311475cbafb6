"""Options with which commands choose a model."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from blspkd_fairseq.data.prompts import resolve_prompt

if TYPE_CHECKING:
    from blspkd_fairseq.hub import BlspKd


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model, and those that replace its own."""
    parser.add_argument(
        "--model",
        help="checkpoint, or folder of save_pretrained (default: the small model that the package carries, which hears "
        "everyday English, with errors; its base models are fetched once)",
    )
    parser.add_argument("--llm", help="in place of the model's own path or name")
    parser.add_argument("--speech-encoder", help="in place of the model's own path or name")
    parser.add_argument(
        "--llm-quantization",
        choices=("none", "int8", "nf4"),
        help="hold the LLM's linear layers in fewer bits, by bitsandbytes (default: as in training)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the LLM's files, whatever --model says",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")


def add_vad_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option to leave out silence."""
    parser.add_argument(
        "--vad",
        choices=("energy", "silero", "none"),
        default="energy",
        help="hear only where somebody speaks, found by energy or by Silero's network, so that silence has no words; "
        "none: hear everything (default: %(default)s)",
    )


def add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of who writes down what is heard: the LLM, or nobody."""
    writer = parser.add_mutually_exclusive_group()
    writer.add_argument(
        "--prompt", default="repeat", help="asks the LLM for a transcript: a name or a text (default: %(default)s)"
    )
    writer.add_argument(
        "--heard", action="store_true", help="do not ask the LLM: write the tokens nearest to what CIF hears, faster"
    )


def chosen_prompt(args: argparse.Namespace) -> str | None:
    """The resolved prompt of :func:`add_writer_arguments`, or None with ``--heard``.

    Raises:
        ValueError: of that prompt.
    """
    return None if args.heard else resolve_prompt(args.prompt)


def chosen_vad(args: argparse.Namespace) -> str | None:
    """The detector of :func:`add_vad_argument`, or None."""
    return None if args.vad == "none" else str(args.vad)


def load_model(args: argparse.Namespace) -> BlspKd:
    """The model of :func:`add_model_arguments`.

    Raises:
        ValueError: it cannot be loaded or fetched.
    """
    from transformers.utils import logging as transformers_logging

    from blspkd_fairseq.base_models import load_published
    from blspkd_fairseq.hub import BlspKd

    logging.captureWarnings(True)  # a library's advice to its own authors is no part of a command's output
    transformers_logging.set_verbosity_error()
    names = ("llm", "speech_encoder", "llm_quantization")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.model is None:
        return load_published(args.device, **overrides)
    return BlspKd.from_pretrained(args.model, args.device, args.trust_remote_code, **overrides)
