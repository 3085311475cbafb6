"""Puts a function of this package in the place of one of another, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Puts ``wrap(original)`` in the place of an attribute, once."""
    original = getattr(owner, name)
    if not getattr(original, "_is_ours", False):
        ours = wrap(original)
        ours._is_ours = True
        setattr(owner, name, ours)
