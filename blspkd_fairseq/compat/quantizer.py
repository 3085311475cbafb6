"""bitsandbytes, which quantises weights, without the code that it would fetch from a model hub."""

from __future__ import annotations

import logging
import sys
from types import ModuleType


def silence_bitsandbytes() -> None:
    """Hides what it says of itself, in all commands: peft imports it wherever it is installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.WARNING)  # fairseq lets libraries print all they have to say
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # on code that it has not found


def import_bitsandbytes(option: str) -> ModuleType:
    """The package.

    On some processors its import asks the package ``kernels`` for a function, which comes from the Hugging Face hub and
    which nothing here needs.

    Args:
        option: needs it, in the error.

    Raises:
        ValueError: it is not installed, or cannot be loaded.
    """
    missing = object()
    kernels = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        import bitsandbytes
    except (ImportError, OSError) as error:
        raise ValueError(
            f"{option} needs bitsandbytes, which cannot be imported ({error}): pip install "
            "'blspkd-fairseq[quantized]', or leave the option out, which changes no checkpoint"
        ) from error
    finally:
        if kernels is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]
    return bitsandbytes
