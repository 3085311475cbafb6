"""Puts a function of this package in the place of one of another, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Puts ``wrap(original)`` in the place of an attribute, once for each ``wrap``."""
    original = getattr(owner, name)
    by = getattr(original, "_is_ours", ())
    if wrap.__qualname__ not in by:
        ours = wrap(original)
        ours._is_ours = (*by, wrap.__qualname__)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(ours) if is_static else ours)
