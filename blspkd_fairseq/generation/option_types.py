"""Checks that options are numbers of their kind, wherever they come from."""

from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def check_numbers(options: Any) -> None:
    """Checks the fields of a dataclass whose defaults are numbers.

    Raises:
        ValueError: one holds something else, such as a text, or a fraction where its default is whole.
    """
    for field in fields(options):
        kind = type(field.default)
        if kind in (int, float):
            check_number(getattr(options, field.name), field.name, is_whole=kind is int)


def check_number(value: Any, name: str, is_whole: bool) -> None:
    """Raises ValueError unless a value is a number, and a whole one where it must be."""
    if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
        raise ValueError(f"{name} must be a {'whole ' if is_whole else ''}number, got {value!r}")
