"""What an answer depends on besides its row, by content: what binds a store of answers to what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blspkd_fairseq.data.chat import TEMPLATE_DATE
from blspkd_fairseq.modules.build import SpeechLlmConfig, read_chat_template
from blspkd_fairseq.modules.pretrained import refuse_peft_adapter

# Of a folder: configuration, tokenizer, template, weights. Not among them: pictures, a README, code.
_MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".pt", ".gguf", ".model", ".tiktoken", ".jinja", ".txt"})
_SAMPLE = 1 << 12  # bytes
_LENGTH_BYTES = 8  # of the header of a safetensors file, before it


def llm_identity(config: SpeechLlmConfig) -> dict[str, Any]:
    """The LLM, its tokenizer and its chat format; the same wherever their files are.

    Raises:
        ValueError: there is no such LLM or template.
    """
    template = read_chat_template(config)
    # Left out where nothing is quantised: stores of earlier releases stay valid.
    bits = {} if config.llm_quantization == "none" else {"llm_quantization": config.llm_quantization}
    return {
        "llm": model_identity(config.llm),
        "llm_dtype": config.llm_dtype,
        **bits,
        "system_prompt": config.system_prompt,
        "chat_template": "" if template is None else f"sha256:{hashlib.sha256(template.encode()).hexdigest()[:16]}",
        "template_date": TEMPLATE_DATE.isoformat(),
    }


def model_identity(name: str, option: str = "llm") -> str:
    """Recognises a model by its files: the last part of its name and a hash (or, from the hub, the revision).

    Args:
        name: local directory, or Hugging Face name.
        option: the one that an error names.

    Raises:
        ValueError: there is no such model, or it is an adapter and no model.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return _hub_identity(name)
    refuse_peft_adapter(name, option)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for piece in _samples(path) if path.suffix == ".safetensors" else _pieces(path):
            digest.update(piece)
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def _hub_identity(name: str) -> str:
    from transformers.utils import hub

    try:
        file = hub.cached_file(name, "config.json")  # and not the configuration, which may bring code
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no model {name!r}: give a local directory or the name of a Hugging Face model that this "
            f"machine can reach. {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return f"{name}@{hub.extract_commit_hash(file, None) or 'unknown'}"


def _pieces(path: Path) -> Iterator[bytes]:
    """All bytes of a file."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _samples(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and the begin, middle and end of each of its tensors.

    Reading tens of gigabytes would take minutes in every process of a job array. Training and merging change a tensor
    everywhere; that only other elements of it were changed is not seen.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length)
        yield header
        try:
            tensors = [entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError):  # no safetensors: loading says so
            yield from _pieces(path)
            return
        first = _LENGTH_BYTES + length
        for begin, end in sorted(map(tuple, tensors)):
            for place in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                file.seek(first + place)
                yield file.read(min(_SAMPLE, end - place))
