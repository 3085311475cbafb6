"""``blspkd serve``: an OpenAI-compatible server of a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI


EXAMPLE = """\
blspkd serve --model checkpoints/checkpoint_best.pt --port 8000

from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
print(client.audio.transcriptions.create(model="checkpoint_best", file=open("question.wav", "rb")).text)
"""

NEEDED = "it needs FastAPI and uvicorn: pip install 'blspkd-fairseq[serve]'"
KEY_VARIABLE = "BLSPKD_API_KEY"

_LIMITS = {
    "rows": "answers that are decoded together in one batch",
    "waiting": "answers that may wait for a place in it; more are refused with status 503",
    "body_mib": "size of a request in MiB",
    "audio_seconds": "length of a piece of audio",
    "body_seconds": "time that a client has to send its request",
    "answer_seconds": "time from the whole request to the end of the answer",
    "new_tokens": "tokens of an answer, also of those that ask for more",
    "choices": "answers of one request (n)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_model_arguments(parser)
    parser.add_argument("--name", help="by which clients ask for the model; by default that of its file or folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        help=f"key that clients must send; better in the environment's {KEY_VARIABLE}, as others see options",
    )
    add_limit_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and options in place of its own."""
    parser.add_argument("--model", required=True, help="checkpoint, or folder of save_pretrained")
    parser.add_argument("--llm", help="in place of the model's own path or name")
    parser.add_argument("--speech-encoder", help="in place of the model's own path or name")
    parser.add_argument("--device", help="default: the GPU if there is one")


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """The limits, each an option."""
    from blspkd_fairseq.serving.limits import Limits

    group = parser.add_argument_group("limits")
    for field in fields(Limits):
        option = f"--{field.name.replace('_', '-')}"
        kind = type(field.default)
        group.add_argument(
            option, type=kind, default=field.default, help=f"{_LIMITS[field.name]} (default: %(default)s)"
        )


def main(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    try:
        from blspkd_fairseq.serving.app import create_app
        from blspkd_fairseq.serving.server import allowed_hosts
    except ModuleNotFoundError as error:
        print(f"blspkd serve: {NEEDED} ({error})", file=sys.stderr)
        return 1
    return run(args, "serve", lambda service, key: create_app(service, key, allowed_hosts(args.host)))


def run(args: argparse.Namespace, command: str, make_app: Any) -> int:
    """Loads the model and serves the application that ``make_app`` makes of its service and the key."""
    from blspkd_fairseq.hub import BlspKd
    from blspkd_fairseq.serving.limits import Limits
    from blspkd_fairseq.serving.server import is_loopback, listen
    from blspkd_fairseq.serving.server import run as serve
    from blspkd_fairseq.serving.service import Service

    try:
        limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
        server = listen(args.host, args.port)  # before the model is loaded, which takes a while
        overrides = {"llm": args.llm, "speech_encoder": args.speech_encoder}
        model = BlspKd.from_pretrained(args.model, args.device, **{k: v for k, v in overrides.items() if v})
    except ValueError as error:
        print(f"blspkd {command}: {error}", file=sys.stderr)
        return 1
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_loopback(args.host):
        print(
            f"blspkd {command}: everybody who reaches {args.host} can use it; --api-key asks for a key", file=sys.stderr
        )
    service = Service(model, args.name or Path(args.model).stem, limits)
    app: FastAPI = make_app(service, key)
    host, port = server.getsockname()[:2]
    print(f"{service.name} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    serve(app, server, limits.answer_seconds)
    return 0
