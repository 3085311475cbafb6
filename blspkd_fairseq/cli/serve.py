"""``blspkd serve``: an OpenAI-compatible server of a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from blspkd_fairseq.base_models import PUBLISHED
from blspkd_fairseq.cli.model_arguments import (
    add_model_arguments,
    add_vad_argument,
    add_writer_arguments,
    chosen_prompt,
    chosen_vad,
    load_model,
)
from blspkd_fairseq.serving.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from blspkd_fairseq.serving.service import Service

EXAMPLE = """\
blspkd serve --port 8000 --name hears

from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
print(client.audio.transcriptions.create(model="hears", file=open("question.wav", "rb")).text)
"""

NEEDED = "FastAPI and uvicorn are not installed: pip install 'blspkd-fairseq[serve]'"
KEY_VARIABLE = "BLSPKD_API_KEY"

_LIMITS = {
    "rows": "answers that are decoded together in one batch",
    "waiting": "answers that may wait for a place in it; more are refused with status 503",
    "body_mib": "MiB of a request",
    "audio_seconds": "seconds of audio of a request",
    "body_seconds": "seconds that a client has to send its request",
    "answer_seconds": "seconds from the whole request to the end of the answer",
    "new_tokens": "tokens of an answer, also of those that ask for more",
    "choices": "answers of one request (n)",
    "kept_mib": "MiB for keys and values of earlier conversations, which those that go on need not read again",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_server_arguments(parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all servers share."""
    add_model_arguments(parser)
    parser.add_argument("--name", help="by which clients ask for the model; by default that of its file or folder")
    add_vad_argument(parser)
    add_writer_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        help=f"key that clients must send; better in the environment's {KEY_VARIABLE}, since options are seen by all",
    )
    group = parser.add_argument_group("limits")
    for field in fields(Limits):
        option, text = f"--{field.name.replace('_', '-')}", f"{_LIMITS[field.name]} (default: %(default)s)"
        group.add_argument(option, type=type(field.default), default=field.default, help=text)


def main(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ValueError: a wrong option, no such model, or an address that is taken.
    """
    try:
        from blspkd_fairseq.serving.app import create_app
        from blspkd_fairseq.serving.server import allowed_hosts
    except ModuleNotFoundError as error:
        raise ValueError(f"{NEEDED} ({error})") from error
    return run(args, lambda service, key: create_app(service, key, allowed_hosts(args.host)))


def chosen_key(given: str | None) -> str | None:
    """The key that clients must send, if there is one, as they send it: without white space at its ends.

    Raises:
        ValueError: no client could send it.
    """
    key = given or os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    key = key.strip()
    if not (key and key.isascii() and key.isprintable()):
        source = "--api-key" if given else KEY_VARIABLE
        raise ValueError(f"the key of {source} must be printable ASCII characters, which clients can send in a header")
    return key


def run(args: argparse.Namespace, make_app: Callable[[Service, str | None], FastAPI]) -> int:
    """Loads the model and serves the application that is made of its service and the key."""
    from blspkd_fairseq.serving import server
    from blspkd_fairseq.serving.service import Service

    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    address = server.reserve(args.host, args.port)  # before the model is loaded, which takes a while
    prompt, key = chosen_prompt(args), chosen_key(args.api_key)
    model = load_model(args)
    if key is None and not server.is_loopback(args.host):
        print(f"anybody who reaches {args.host} can use this server: --api-key asks for a key", file=sys.stderr)
    name = args.name or Path(args.model or PUBLISHED).name.removesuffix(".pt")
    service = Service(model, name, limits, chosen_vad(args), prompt)
    app = make_app(service, key)
    server.listen(address)
    host, port = address.getsockname()[:2]
    print(f"{service.name} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server.run(app, address, limits.answer_seconds)
    return 0
