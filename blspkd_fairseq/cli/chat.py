"""Talks to a model in the terminal, turn by turn: by audio files, the microphone, or the keyboard.

A line that names an audio file is speech, any other is text; an empty line with --mic records until Enter is pressed.
/new begins anew, /quit (or end of input) ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from blspkd_fairseq.cli.model_arguments import add_model_arguments, add_vad_argument, chosen_vad, load_model
from blspkd_fairseq.data.audio import check_audio

if TYPE_CHECKING:
    from blspkd_fairseq.session import ChatSession

AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".webm")

EXAMPLE = """\
blspkd chat                                   then type a text, or the name of an audio file
blspkd chat question.wav and-this.wav         each a turn; then goes on with what is typed
blspkd chat --mic --system "Answer in one sentence."
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio, each a turn of the user")
    parser.add_argument("--mic", action="store_true", help="speak: needs the package sounddevice and PortAudio")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--instruction", default="", help="a text before each piece of speech")
    add_vad_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of --temperature")
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Answers until the input ends; 1 if it was not a terminal and some turn could not be answered."""
    for file in args.files:
        check_audio(file)
    from blspkd_fairseq.generation.streaming import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    sampling = {name: getattr(args, name) for name in names}
    Sampling(**sampling)  # what is wrong with it is said before a model is loaded
    microphone = open_microphone() if args.mic else None
    model = load_model(args)
    from blspkd_fairseq.session import ChatSession

    def begin() -> ChatSession:
        return ChatSession(model, args.system, chosen_vad(args))

    session, failed = begin(), 0
    for line in lines(args.files, microphone is not None):
        if line == "/quit":
            break
        if line == "/new":
            session = begin()
            continue
        try:
            if not line and microphone is not None:
                introduce(session, args.instruction)
                record(session, microphone)
            elif is_file(line):
                introduce(session, args.instruction)
                session.say({"audio": os.path.expanduser(line)})
            elif names_audio(line):
                raise ValueError(f"there is no file {line}")
            elif line:
                session.say(line)
            else:
                continue
            if session.is_silent:  # whatever the instruction says
                session.discard()
                print(flush=True)
                continue
            for text in session.answer(**sampling):
                print(text, end="", flush=True)
            print(flush=True)
        except ValueError as error:
            failed += 1
            session.discard()  # such as the instruction to a file that cannot be read
            print(f"blspkd chat: {error}", file=sys.stderr)
    return 1 if failed and not sys.stdin.isatty() else 0


def lines(files: list[str], has_microphone: bool) -> Iterator[str]:
    """The files, then what is typed, with a prompt on a terminal; nothing is read behind files in a script."""
    for file in files:
        if sys.stdin.isatty():
            print(f"> {file}")
        yield file
    if files and not sys.stdin.isatty():
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files may be of any bytes
    while True:
        try:
            prompt = "Enter to speak, or type> " if has_microphone else "> "
            yield input(prompt if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def is_file(line: str) -> bool:
    return os.path.isfile(os.path.expanduser(line))


def names_audio(line: str) -> bool:
    """Whether a line looks like the name of a file of audio, and like nothing one would say."""
    return " " not in line and os.path.splitext(line)[1].lower() in AUDIO_ENDINGS


def introduce(session: ChatSession, instruction: str) -> None:
    if instruction:
        session.say(instruction.rstrip() + " ")


# --- microphone -----------------------------------------------------------------------------------


def open_microphone() -> Any:
    """The package that records.

    Raises:
        ValueError: it, PortAudio or a microphone is missing.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio itself
        raise ValueError(
            f"--mic needs the package sounddevice and the library PortAudio ({error}): pip install sounddevice, and "
            "apt install libportaudio2 on Linux"
        ) from error
    try:
        sounddevice.check_input_settings(channels=1)
    except Exception as error:  # sounddevice's own, and PortAudio's
        raise ValueError(f"--mic: no microphone can be opened ({error})") from error
    return sounddevice


def record(session: ChatSession, sounddevice: Any) -> None:
    """Feeds the session what is spoken until Enter is pressed."""
    import queue
    import threading

    portions: queue.Queue[Any] = queue.Queue()
    rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
    ended = threading.Event()

    def wait() -> None:
        with contextlib.suppress(EOFError):
            input("speak; Enter ends ")
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    with sounddevice.InputStream(
        samplerate=rate, channels=1, callback=lambda data, *_: portions.put(data[:, 0].copy())
    ):
        while not ended.is_set():
            try:
                session.feed(portions.get(timeout=0.1), rate)
            except queue.Empty:
                continue
    while not portions.empty():
        session.feed(portions.get(), rate)
