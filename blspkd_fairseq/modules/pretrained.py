"""Pretrained models by name: shown before they are fetched, and loaded without the code among their files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blspkd_fairseq import compat

logger = logging.getLogger(__name__)

_ITS_CODE = "code that comes with its files"


def is_local(name: str) -> bool:
    """Whether a model is a folder of this machine, and not a name on the Hugging Face hub."""
    return os.path.isdir(os.path.expanduser(name))


def show_base_models(named_by: str, **models: str) -> None:
    """Says what a checkpoint is about to load, before anything is fetched from elsewhere than the local disk.

    Args:
        named_by: the checkpoint.
        models: names by what they are, such as ``LLM="Qwen/Qwen2.5-7B-Instruct"``.
    """
    given = {what.replace("_", " "): name for what, name in models.items() if name}
    shown = ", ".join(f"{what} {name} ({'local' if is_local(name) else 'not local'})" for what, name in given.items())
    all_local = all(map(is_local, given.values()))
    where = "" if all_local else "; what is not local comes from the Hugging Face hub or its cache"
    logger.log(logging.INFO if all_local else logging.WARNING, f"base models that {named_by} names: {shown}{where}")


def load_pretrained(
    cls: Any, name: str, option: str, what: str, trust_remote_code: bool = False, can_trust: bool = True, **options: Any
) -> Any:
    """What ``cls.from_pretrained`` loads; nothing among the model's files decides that code of theirs is run.

    Args:
        cls: a class of transformers, or one with the same method.
        name: Hugging Face name or local directory.
        option: the one that errors name, without dashes in front.
        what: is loaded, in errors.
        trust_remote_code: the user wants the code that comes with the files.
        can_trust: there is an option for that.
        options: for ``from_pretrained``.

    Raises:
        ValueError: it cannot be loaded, needs code of its own, or is an adapter for another model.
    """
    path = os.path.expanduser(name)
    refuse_peft_adapter(path, option)
    try:
        if not trust_remote_code:
            _refuse_code(path, name, what, can_trust)
        with compat.without_progress_bars():
            if can_trust:  # explicitly, in both cases: by default, transformers asks at the terminal
                options["trust_remote_code"] = trust_remote_code
            model = cls.from_pretrained(path, **options)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"cannot load the {what} {name!r}: give --{option} (or, for a checkpoint that names it, --model-overrides "
            f"\"{{'{option.replace('-', '_')}': 'DIRECTORY'}}\") a local directory or the name of a Hugging Face model "
            f"that this machine can reach. {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error) and not isinstance(error, CodeRefusedError):
            raise CodeRefusedError(_refusal(name, what, _ITS_CODE, can_trust)) from error
        raise
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _is_adapter(name, option)  # of the hub, whose files are seen when they are loaded
    return model


def load_unquantized(cls: Any, name: str, option: str, what: str, *args: Any, **options: Any) -> Any:
    """As :func:`load_pretrained`, with the weights that a quantised model's bits stand for.

    They are what identifies it, and what gradients go through. Experts in MXFP4 are left to transformers.

    Raises:
        ValueError: as there, or it is quantised by a method that cannot be undone here, or whose package is missing.
    """
    method = _quantization_of(os.path.expanduser(name))
    if method == "bitsandbytes":
        compat.import_bitsandbytes(f"--{option} {name}")
        return load_pretrained(cls, name, option, what, *args, **options).dequantize()
    if method not in ("", "mxfp4"):
        raise ValueError(
            f"--{option} {name} is quantised already ({method}), so the weights that identify it are not there: give "
            "the model that it was made from, and --llm-quantization to hold that in fewer bits"
        )
    return load_pretrained(cls, name, option, what, *args, **options)


def _quantization_of(path: str) -> str:
    """By which method a model is quantised; "" if it is not, or cannot be read, which loading says."""
    from transformers import PretrainedConfig

    try:
        config = PretrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError):
        return ""
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return str(given.get("quant_method", "unknown")) if given else ""


class CodeRefusedError(ValueError):
    """A model that runs code of its own, which the user has not asked for."""


def _refusal(name: str, what: str, code: str, can_trust: bool) -> str:
    remedy = "take another one"
    if can_trust:
        remedy = (
            "read it, and if you trust who made it, give --trust-remote-code (in Python: trust_remote_code=True; to "
            "fairseq-generate, -interactive and -validate: --model-overrides \"{'trust_remote_code': True}\")"
        )
    return f"the {what} {name!r} needs {code}, which is not run because a file says so: {remedy}"


def refuse_peft_adapter(name: str, option: str) -> None:
    """Refuses a folder that peft has written: transformers would load the base model and put the adapter on it.

    What is trained here is named by the LLM's own modules and its frozen weights, which are then others.

    Raises:
        ValueError: names the option and the remedy.
    """
    file = Path(os.path.expanduser(name)) / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise _is_adapter(name, option, base)


def _is_adapter(name: str, option: str, base: str | None = None) -> ValueError:
    of_base = f" of {base}" if base else ""
    return ValueError(
        f"--{option} {name} is a PEFT adapter{of_base} and no whole model: merge it into its base model (peft's "
        "merge_and_unload, then save_pretrained of model and tokenizer) and give the folder of that"
    )


def _refuse_code(path: str, name: str, what: str, can_trust: bool) -> None:
    """Refuses a configuration of a kind that only code in its files knows, or that names kernels on the hub, whose code
    transformers would fetch and run without being asked."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    config = PretrainedConfig.get_config_dict(path)[0]  # reads, and makes nothing of it
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise CodeRefusedError(_refusal(name, what, _ITS_CODE, can_trust))
    for key, value in _entries(config):
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise CodeRefusedError(_refusal(name, what, f"the kernels {value} of the Hugging Face hub", can_trust))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)
