"""Keeps a torchaudio that cannot be loaded from breaking transformers.

An installation by pip has a copy of this file beside the package, which every Python of that environment runs when it
starts (see setup.py): hence nothing is imported here that takes time, and nothing of this package.
"""

from __future__ import annotations

import sys


def block_broken_torchaudio() -> None:
    """Hides a torchaudio that cannot be imported; leaves a working or an absent one alone.

    Every build of fairseq requires torchaudio, whose wheel links CUDA and so fails beside a CPU torch.
    transformers imports it wherever it is *installed*, and then even its tokenizers fail with a misleading
    message. With `None` in `sys.modules`, Python and transformers take it for not installed. Nothing here
    needs torchaudio.
    """
    import importlib.util

    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        importlib.import_module("torchaudio")
    except Exception:  # OSError, RuntimeError, AttributeError, ...: depends on the pair of versions
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


class _BlockTorchaudioBeforeTransformers:
    """Finds nothing itself: the look-up of transformers is the latest moment to deal with torchaudio."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            block_broken_torchaudio()


def guard_transformers() -> None:
    """Calls `block_broken_torchaudio` when transformers is first imported, by whomever.

    Testing torchaudio costs an import of torch (1.5 s), which code that only reads manifests should not pay.
    """
    if "transformers" in sys.modules:
        block_broken_torchaudio()
    elif not any(isinstance(finder, _BlockTorchaudioBeforeTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BlockTorchaudioBeforeTransformers())
