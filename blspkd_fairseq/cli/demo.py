"""``blspkd demo``: a page where one speaks, sees what is heard, and reads the answers beside the cascade's."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from blspkd_fairseq.cli.serve import NEEDED, add_server_arguments, run

if TYPE_CHECKING:
    from fastapi import FastAPI

    from blspkd_fairseq.demo.routes import Cascade
    from blspkd_fairseq.modules.build import SpeechLlmConfig
    from blspkd_fairseq.serving.service import Service

EXAMPLE = """\
blspkd demo                                  then open http://127.0.0.1:8000 in a browser
blspkd demo --model checkpoints --cascade openai/whisper-small
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_server_arguments(parser)
    parser.add_argument(
        "--cascade",
        metavar="WHISPER",
        help="compare with this Whisper and the same LLM; by default with the model's own Whisper where all of it is "
        "there; none: do not compare",
    )


def main(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    try:
        from blspkd_fairseq.demo.routes import add_demo
        from blspkd_fairseq.serving.app import create_app
        from blspkd_fairseq.serving.server import allowed_hosts
    except ModuleNotFoundError as error:
        raise ValueError(f"{NEEDED} ({error})") from error

    def make_app(service: Service, key: str | None) -> FastAPI:
        app = create_app(service, key, allowed_hosts(args.host))
        return add_demo(app, _find_cascade(args.cascade, service.model.config))

    return run(args, make_app)


def _find_cascade(whisper: str | None, config: SpeechLlmConfig) -> Cascade | None:
    """The cascade to compare with, if there is one.

    Raises:
        ValueError: it was asked for, and cannot be had.
    """
    from blspkd_fairseq.demo.routes import Cascade

    if whisper == "none":
        return None
    try:
        if config.lora_scope == "all":  # the LLM would not read the transcript as the one that hears nothing does
            raise ValueError("this model's LoRA acts on text, too, so that there is no LLM to compare with")
        return Cascade(os.path.expanduser(whisper or config.speech_encoder))
    except (ValueError, OSError) as error:
        if whisper is not None:
            raise ValueError(f"--cascade {whisper}: {error}") from error
        print(f"there is no cascade to compare with: {error}", file=sys.stderr)
        return None
