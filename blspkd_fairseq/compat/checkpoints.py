"""Makes fairseq write whole checkpoints, and read no others."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blspkd_fairseq.checkpoint_files import (
    LAST,
    CheckpointError,
    check_whole,
    checkpoint_to_resume,
    copy_checkpoint,
    prepare_folder,
    write_checkpoint,
)
from blspkd_fairseq.compat.replacing import replace

logger = logging.getLogger(__name__)


def allow_safe_checkpoint_globals() -> None:
    """Lets `torch.load(weights_only=True)` read what fairseq puts beside the weights of its checkpoints.

    fairseq stores an argparse Namespace, and meters that may hold numpy scalars. The types are inert data.
    """
    import argparse

    import numpy
    import torch

    scalar = importlib.import_module("numpy._core.multiarray").scalar

    float_dtype = type(numpy.dtype("float64"))
    torch.serialization.add_safe_globals([argparse.Namespace, scalar, numpy.dtype, float_dtype])


# ---- writing -------------------------------------------------------------------------------------------------------


def write_checkpoints_whole() -> None:
    """Lets a training that is killed, or whose disk is full, leave whole files, and name what is wrong with the disk.

    fairseq writes a checkpoint safely but for a loss of power, tries three times to append it to what it wrote before,
    and copies it to ``checkpoint_last.pt`` byte by byte over the one before. A folder that vanishes it makes anew.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    replace(checkpoint_utils, "torch_persistent_save", _written_whole)
    replace(checkpoint_utils, "verify_checkpoint_directory", lambda _: lambda save_dir: prepare_folder(Path(save_dir)))
    replace(checkpoint_utils, "save_checkpoint", _into_the_folder_that_was_there)
    replace(PathManager, "copy", _copied_whole)


def _is_remote(path: str) -> bool:
    from fairseq.file_io import PathManager

    return bool(PathManager.path_requires_pathmanager(path))


def _written_whole(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def torch_persistent_save(obj: Any, filename: Any, async_write: bool = False) -> Any:
        if async_write or not isinstance(filename, (str, os.PathLike)) or _is_remote(str(filename)):
            return save(obj, filename, async_write)
        return write_checkpoint(obj, Path(filename))

    return torch_persistent_save


def _copied_whole(copy: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(copy)
    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if _is_remote(src_path) or _is_remote(dst_path):
            return copy(src_path, dst_path, overwrite)
        copy_checkpoint(Path(src_path), Path(dst_path))
        return True

    return copy_whole


def _into_the_folder_that_was_there(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_checkpoint(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(cfg.save_dir)
        is_local = not cfg.no_save and not _is_remote(str(cfg.save_dir))
        if is_local and trainer.data_parallel_rank == 0 and not folder.is_dir():
            raise CheckpointError(
                f"{folder}, into which this training saves, is no longer there, nor are the checkpoints in it: bring "
                "it back, and the same command goes on from the last of them"
            )
        return save(cfg, trainer, *args, **kwargs)

    return save_checkpoint


# ---- reading -------------------------------------------------------------------------------------------------------


def read_whole_checkpoints() -> None:
    """Keeps commands from damaged checkpoints, and a training from beginning anew beside its own checkpoints.

    fairseq begins at the first update when the checkpoint that it was told to go on from is missing, and takes a folder
    for --finetune-from-model, finds no file in it, and trains from scratch without a word. What keeps a model from
    loading a checkpoint it replaces by "please ensure that the architectures match".
    """
    from fairseq import checkpoint_utils

    replace(checkpoint_utils, "load_checkpoint_to_cpu", _checked)
    replace(checkpoint_utils, "load_checkpoint", _from_a_whole_one)


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_remote(path):
            check_whole(Path(path))
        try:
            return load(path, *args, **kwargs)
        except Exception as error:
            raise CheckpointError(
                f"{path} is no checkpoint of fairseq-train, or is damaged ({type(error).__name__})"
            ) from error

    return load_checkpoint_to_cpu


def _from_a_whole_one(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        chosen = _on_first_rank(trainer, lambda: _choose(cfg))
        try:
            return load(_with_choice(cfg, chosen), trainer, **kwargs)
        except Exception as error:
            if "architectures match" in str(error) and isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    return load_checkpoint


def _choose(cfg: Any) -> str:
    """The checkpoint that a training begins with, if it is another one than fairseq would take; else "".

    Raises:
        CheckpointError: one that was given is damaged or missing, or all in the training's folder are.
    """
    if cfg.finetune_from_model and Path(cfg.finetune_from_model).is_dir():
        raise CheckpointError(
            f"--finetune-from-model {cfg.finetune_from_model} is a folder: give the checkpoint in it, or "
            "--pretrained-model for a folder of save_pretrained"
        )
    if _is_remote(cfg.save_dir) or _is_remote(cfg.restore_file):
        return ""
    if cfg.restore_file != LAST:
        _check_option("--restore-file", cfg.restore_file)
        _say_what_is_passed_over(cfg)
        return ""
    own = checkpoint_to_resume(Path(cfg.save_dir))
    if own is not None:
        return "" if own.name == LAST else str(own)
    for option in ("continue_once", "finetune_from_model"):
        if getattr(cfg, option, None):
            _check_option(f"--{option.replace('_', '-')}", getattr(cfg, option))
            break
    return ""


def _check_option(option: str, path: str) -> None:
    if _is_remote(path):
        return
    try:
        check_whole(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error


def _say_what_is_passed_over(cfg: Any) -> None:
    last = Path(cfg.save_dir) / LAST
    if last.exists() and last.resolve() != Path(cfg.restore_file).resolve():
        logger.warning(
            f"{last} is passed over, since --restore-file {cfg.restore_file} is given: leave that option out to go on "
            "from where this training was; --finetune-from-model counts at the first start only"
        )


def _with_choice(cfg: Any, chosen: str) -> Any:
    if not chosen:
        return cfg
    import copy

    from omegaconf import open_dict

    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.restore_file, cfg.finetune_from_model = chosen, None
    return cfg


def _on_first_rank(trainer: Any, choose: Callable[[], str]) -> str:
    """Returns or raises on all processes what ``choose`` does on the first."""
    outcome: tuple[bool, str] = (True, "")
    if trainer.data_parallel_rank == 0:
        try:
            outcome = True, choose()
        except CheckpointError as error:
            outcome = False, str(error)
    if trainer.data_parallel_world_size > 1:
        from fairseq.distributed import utils

        group = trainer.data_parallel_process_group
        outcome = utils.broadcast_object(outcome, src_rank=0, group=group, dist_device=trainer.device)
    is_chosen, answer = outcome
    if not is_chosen:
        raise CheckpointError(answer)
    return answer
