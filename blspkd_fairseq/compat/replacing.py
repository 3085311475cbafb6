"""Puts a function of this package in the place of one of another, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Puts ``wrap(original)`` in the place of an attribute, once for each ``wrap``."""
    original = getattr(owner, name)
    if not is_wrapped(original, wrap):
        ours = wrap(original)
        ours._is_ours = (*getattr(original, "_is_ours", ()), wrap.__qualname__)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(ours) if is_static else ours)


def is_wrapped(function: Any, wrap: Callable[[Any], Any]) -> bool:
    """Whether :func:`replace` has put ``wrap`` around what was there."""
    return wrap.__qualname__ in getattr(function, "_is_ours", ())
