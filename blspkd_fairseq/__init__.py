"""BLSP-KD for fairseq: makes a text chat LLM hear.

A Whisper encoder and a CIF adapter turn speech into one embedding per transcript token; a chat LLM with
Partial LoRA reads them and is distilled from itself reading the transcript. The package is a fairseq plugin,

    fairseq-train DATA --user-dir blspkd_fairseq --task blsp_kd --arch blsp_kd --criterion kl_distillation

and a library: `blspkd_fairseq.BlspKd` for trained models, `blspkd_fairseq.modules` without fairseq. Importing
it loads neither torch nor fairseq; when fairseq is loaded already, as with `--user-dir`, it registers there.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

if __name__ != "blspkd_fairseq":
    # fairseq names a plugin after the last part of its path; a second name would register everything twice.
    raise ImportError(
        f"imported as {__name__!r}: this package must be in a folder named blspkd_fairseq, for --user-dir too"
    )

from blspkd_fairseq import compat
from blspkd_fairseq.version import __version__

__all__ = ["BlspKd", "__version__", "register"]

FOLDER = Path(__file__).resolve().parent

compat.guard_transformers()
compat.silence_bitsandbytes()
compat.bound_product_cache()


def register() -> None:
    """Registers tasks, models and criterions with fairseq; `--user-dir` does it by itself.

    For programs that import this package first and fairseq later: fairseq skips a plugin already imported.

    Raises:
        FairseqError: fairseq is missing, cannot be imported, or was overwritten.
    """
    compat.require_fairseq()
    compat.allow_safe_checkpoint_globals()
    compat.silence_fairseq()
    compat.write_checkpoints_whole()
    compat.read_whole_checkpoints()
    compat.attend_commands()
    compat.go_on_exactly()
    compat.share_checkpoints()
    compat.sum_gradients_as_they_are()
    compat.guard_updates()
    compat.end_in_one_sentence()
    compat.attend_generation()
    compat.distrust_checkpoints()
    compat.show_all_options()
    from fairseq.models import import_models
    from fairseq.tasks import import_tasks

    importlib.import_module(f"{__name__}.criterions")
    importlib.import_module(f"{__name__}.optim")
    import_tasks(str(FOLDER / "tasks"), f"{__name__}.tasks")
    import_models(str(FOLDER / "models"), f"{__name__}.models")


def __getattr__(name: str) -> Any:
    """Loads the inference interface on first use: it imports torch and transformers."""
    if name == "BlspKd":
        return importlib.import_module("blspkd_fairseq.hub").BlspKd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "fairseq" in sys.modules:
    register()
