"""Checkpoints of a model most of which is frozen: what was trained, by which frozen models and with which options."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from blspkd_fairseq.checkpoint_files import DamagedCheckpointError, read_checkpoint
from blspkd_fairseq.files import write_whole
from blspkd_fairseq.modules.cformer import ALIGNMENTS
from blspkd_fairseq.modules.fingerprint import fingerprint, same_fingerprint
from blspkd_fairseq.modules.speech_llm import SpeechLLM

_FINGERPRINT, _SETTING = "frozen.", "setting."
_NO_WEIGHT = (_FINGERPRINT, _SETTING)
_CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt")
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_SHA256 = "weights_sha256"
_SOFT_TOKENS = "adapter.soft_tokens."
_ADDS = re.compile(r"\.(self_attn\.out_proj|linear2)\.(weight|bias)$")  # the last of what a layer adds to its input

logger = logging.getLogger(__name__)


def trained_state_dict(model: SpeechLLM) -> dict[str, Tensor]:
    """The trained parameters by name, a fingerprint of each frozen model (a few hundred numbers), and the settings."""
    parameters = dict(model.named_parameters())
    state = {name: parameters[name].detach() for name in sorted(model.trained_names)}
    for name, values in model.fingerprints.items():
        state[_FINGERPRINT + name] = values.clone()
    for name, value in model.settings.items():
        state[_SETTING + name] = torch.tensor(value)
    return state


def load_trained_state_dict(model: SpeechLLM, state: Mapping[str, Tensor]) -> None:
    """Restores what :func:`trained_state_dict` returned.

    A part that is trained now and was frozen then (LoRA, the speech encoder) begins as it was then: LoRA adds nothing,
    and the encoder must be the same. So training can go on with more parts than it began with.

    Raises:
        ValueError: other frozen models than in training, parameters that are missing, unknown or of other shapes, or
            settings that give the same weights another meaning. Nothing has been loaded then.
    """
    weights = {name: value for name, value in state.items() if not name.startswith(_NO_WEIGHT)}
    parameters = {name: p for name, p in model.named_parameters() if name in model.trained_names}
    then_trained = {_part(name) for name in weights}
    begins = {
        name for name in parameters if _part(name) in ("lora", "speech_encoder") and _part(name) not in then_trained
    }
    fingerprints = dict(model.fingerprints)
    if any(_part(name) == "speech_encoder" for name in begins):
        fingerprints["speech_encoder"] = fingerprint(model.speech_encoder)
    for name, now in fingerprints.items():
        then = state.get(_FINGERPRINT + name)
        if then is not None and not same_fingerprint(then.cpu(), now):
            what, option = "LLM" if name == "llm" else "speech encoder", name.replace("_", "-")
            raise ValueError(
                f"this checkpoint was trained with another {what} than the one loaded now, whose weights differ: "
                f"give --{option} the model that the checkpoint was trained with"
            )
    problems = [
        *(f"{name} is missing from it" for name in parameters if name not in weights and name not in begins),
        *(f"{name} is unknown to the model" for name in weights if name not in parameters),
        *(
            f"{name} is {list(weights[name].shape)} and not {list(p.shape)}"
            for name, p in parameters.items()
            if name in weights and weights[name].shape != p.shape
        ),
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(
            "the checkpoint does not fit the model's options (adapter, LoRA, unfrozen speech encoder) or its base "
            f"models: {shown}"
        )
    _check_settings(model.settings, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in weights:
                parameter.copy_(weights[name])
            elif "lora_B" in name:
                parameter.zero_()


def deepen_adapter(model: SpeechLLM, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a CFormer with fewer layers, completed for this one: the output stays what it was.

    The layers that it lacks come after those that it has. They begin as they were initialised here, but for the
    projections of what each adds to its input, which are zero. Soft tokens begin as they were initialised, too, which
    changes what the LLM reads.

    Args:
        model: the deeper model, freshly built.
        state: of :func:`trained_state_dict`; of another adapter it is returned as it is.
    """
    known = {_layer(name) for name in state}
    if "adapter.pre.0" not in known:
        return dict(state)
    missing = {
        name: torch.zeros_like(parameter) if _ADDS.search(name) else parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith(("adapter.pre.", "adapter.post.", _SOFT_TOKENS)) and _layer(name) not in known
    }
    layers = sorted({_layer(name) for name in missing if not name.startswith(_SOFT_TOKENS)})
    if layers:
        logger.info(f"{', '.join(layers)}: not among the trained layers, begin by adding nothing")
    if any(name.startswith(_SOFT_TOKENS) for name in missing):
        logger.info("adapter.soft_tokens: not in the trained model, begins by distances alone")
    return {**state, **missing}


def _layer(name: str) -> str:
    """``adapter.pre.1`` of the name of a parameter in it."""
    return ".".join(name.split(".")[:3])


def _check_settings(settings: Mapping[str, float], state: Mapping[str, Tensor]) -> None:
    """Checkpoints of versions before the settings have none of them."""
    for name, now in settings.items():
        then = float(state.get(_SETTING + name, now))
        if not _same_setting(then, now):
            option = f"--{name.replace('_', '-')}"
            if name == "adapter_alignment":
                shown = [list(ALIGNMENTS)[round(value)] for value in (then, now)]
            else:
                shown = [f"{value:g}" for value in (then, now)]
            raise ValueError(
                f"this checkpoint was trained with {option} {shown[0]}, and its weights mean something else with "
                f"{option} {shown[1]}: give {option} {shown[0]}"
            )


def _same_setting(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)  # averaged weights are rounded


def read_trained(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Options and trained weights of a checkpoint of fairseq-train, a folder with one, or one of :func:`write_trained`.

    Whether the base models' own code may run is no option of a file: that is left out.

    Raises:
        ValueError: there is no model at this path, or it is damaged.
    """
    if path.is_dir():
        if is_pretrained(path):
            return _read_folder(path)
        found = [path / name for name in _CHECKPOINTS if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} holds neither {_CONFIG} and {_WEIGHTS} nor {' or '.join(_CHECKPOINTS)}")
        path = found[0]
    checkpoint = read_checkpoint(path)
    try:
        return without_trust(checkpoint["cfg"]["model"]), checkpoint["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint of this project: it lacks {error}") from error


def is_pretrained(path: Path) -> bool:
    """Whether this is a folder of :func:`write_trained`."""
    return (path / _WEIGHTS).exists() and (path / _CONFIG).exists()


def check_same_start(state: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str) -> None:
    """Weights of two models can be averaged where their frozen models are the same, and the settings.

    Raises:
        ValueError: they are not; ``which`` names both models.
    """
    for name in state:
        if name.startswith(_SETTING):
            is_same = _same_setting(float(state[name]), float(other[name]))
        elif name.startswith(_FINGERPRINT):
            is_same = same_fingerprint(state[name].cpu(), other[name].cpu())
        else:
            continue
        if not is_same:
            what = name.partition(".")[2].replace("_", " ")
            raise ValueError(f"{which} differ in their {what}: only models of the same base and options have a mean")


def without_trust(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model but the one that only its user may set."""
    return {name: value for name, value in options.items() if name != "trust_remote_code"}


def _read_folder(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    try:
        options = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        written = options.pop(_SHA256, "")  # earlier releases wrote none
        content = (folder / _WEIGHTS).read_bytes()
        weights = load(content)
    except (ValueError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{folder} is damaged, or holds no model of this project ({error})") from error
    if written and hashlib.sha256(content).hexdigest() != written:
        raise DamagedCheckpointError(
            f"{folder / _WEIGHTS} is damaged: it is not what was written with {_CONFIG} (if you have changed it "
            f"yourself, take {_SHA256} out of {_CONFIG})"
        )
    return without_trust(options), weights


def write_trained(folder: Path, options: Mapping[str, Any], model: SpeechLLM, dtype: torch.dtype) -> None:
    """Writes options and trained weights, these in ``dtype``, for :func:`read_trained`."""
    write_weights(folder, options, trained_state_dict(model), dtype)


def write_weights(folder: Path, options: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """As :func:`write_trained`, of what :func:`trained_state_dict` returned."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (tensor if name.startswith(_NO_WEIGHT) else tensor.to(dtype)).cpu().contiguous()
        for name, tensor in state.items()
    }
    content = save(stored)
    write_whole(folder / _WEIGHTS, content)  # save_file lets nobody else read it
    config = {**without_trust(options), _SHA256: hashlib.sha256(content).hexdigest()}
    write_whole(folder / _CONFIG, json.dumps(config, indent=2) + "\n")


def _part(name: str) -> str:
    return "lora" if "lora_" in name else name.split(".")[0]
