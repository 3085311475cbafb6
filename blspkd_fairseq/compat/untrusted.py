"""Lets fairseq's commands take checkpoints of others as data, which never switches on code.

fairseq builds whatever task, model and criterion a checkpoint names (some of them evaluate texts among their options as
Python, or load further files), and takes the options in it for the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OWN = {"task": ("blsp_kd",), "model": ("blsp_kd",), "criterion": ("kl_distillation", "on_policy_distillation")}


def distrust_checkpoints() -> None:
    """Lets fairseq-generate, -interactive and -validate of this plugin load this project's checkpoints alone, as data.

    What a checkpoint says of ``trust_remote_code`` is replaced by what ``--model-overrides`` says.
    """
    from fairseq import checkpoint_utils

    load = checkpoint_utils.load_model_ensemble_and_task
    if getattr(load, "_distrusts", False):
        return

    @functools.wraps(load)
    def load_ensemble(filenames: Any, arg_overrides: Any = None, task: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not _is_of_this_plugin(task, arg_overrides or {}):
            return load(filenames, arg_overrides, task, *args, **kwargs)
        with _checked_reading(builds_task=task is None):
            return load(filenames, arg_overrides, task, *args, **kwargs)

    load_ensemble._distrusts = True  # type: ignore[attr-defined]
    checkpoint_utils.load_model_ensemble_and_task = load_ensemble


def _is_of_this_plugin(task: Any, overrides: Mapping[str, Any]) -> bool:
    """fairseq-validate takes the task from the checkpoint; its overrides are the options of its command line."""
    if task is not None:
        return type(task).__module__.startswith("blspkd_fairseq.")
    folder = Path(overrides.get("user_dir") or "").name
    return overrides.get("task") == "blsp_kd" or folder == "blspkd_fairseq"


@contextmanager
def _checked_reading(builds_task: bool) -> Iterator[None]:
    from fairseq import checkpoint_utils

    read = checkpoint_utils.load_checkpoint_to_cpu

    def read_checked(path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = read(path, arg_overrides, *args, **kwargs)
        check_state(state, str(path), trusts=bool((arg_overrides or {}).get("trust_remote_code", False)))
        _show(state["cfg"], str(path), builds_task)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = read_checked
    try:
        yield
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = read


def _is_none(path: Any, why: str) -> str:
    return f"{path} is no checkpoint of this project, {why}"


def check_state(state: Mapping[str, Any], path: str, trusts: bool) -> None:
    """Refuses what is not of this project, and forgets whom the checkpoint's maker trusted.

    Raises:
        ValueError: the checkpoint names another task, model or criterion.
    """
    from omegaconf import open_dict

    cfg = state.get("cfg")
    if cfg is None or state.get("args") is not None:
        raise ValueError(_is_none(path, "or one of another version of fairseq"))
    for part, own in _OWN.items():
        name = (cfg.get(part) or {}).get("_name")
        if name not in own:
            raise ValueError(_is_none(path, f"whose {part} is {' or '.join(own)}: it names {name!r}"))
    with open_dict(cfg):
        cfg.model.trust_remote_code = trusts
        cfg.criterion.pop("trust_remote_code", None)  # of versions that kept it there


def _show(cfg: Any, path: str, builds_criterion: bool) -> None:
    from blspkd_fairseq.modules.pretrained import show_base_models

    teacher = cfg.criterion.get("teacher_llm") or "" if builds_criterion else ""
    show_base_models(path, LLM=cfg.model.llm, teacher_LLM=teacher, speech_encoder=cfg.model.speech_encoder)
