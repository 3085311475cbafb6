"""How fairseq writes and reads checkpoints."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from blspkd_fairseq.files import whole_file


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


def copy_checkpoints_atomically() -> None:
    """A killed training leaves whole files: fairseq writes a checkpoint safely, but then copies it to
    ``checkpoint_last.pt`` byte by byte over the one before, and half of one cannot be resumed from."""
    import shutil

    from fairseq.file_io import PathManager

    remote_copy = PathManager.copy

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if PathManager.path_requires_pathmanager(dst_path) or PathManager.path_requires_pathmanager(src_path):
            return remote_copy(src_path, dst_path, overwrite)
        with whole_file(Path(dst_path)) as partial:
            shutil.copyfile(src_path, partial)
        return True

    copy._is_atomic = True  # type: ignore[attr-defined]
    if not getattr(remote_copy, "_is_atomic", False):
        PathManager.copy = staticmethod(copy)


def say_why_a_checkpoint_is_refused() -> None:
    """fairseq takes a folder for --finetune-from-model, finds no file in it, and trains from scratch without a word;
    what keeps a model from loading a checkpoint it replaces by "please ensure that the architectures match"."""
    from fairseq import checkpoint_utils

    load = checkpoint_utils.load_checkpoint

    def load_checkpoint(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.finetune_from_model and Path(cfg.finetune_from_model).is_dir():
            raise ValueError(
                f"--finetune-from-model {cfg.finetune_from_model} is a folder: give the checkpoint in it, or "
                "--pretrained-model for a folder of save_pretrained"
            )
        try:
            return load(cfg, *args, **kwargs)
        except Exception as error:
            if "architectures match" in str(error) and isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    load_checkpoint._says_why = True  # type: ignore[attr-defined]
    if not getattr(load, "_says_why", False):
        checkpoint_utils.load_checkpoint = load_checkpoint
