"""``--help`` of fairseq's commands: the options of this package, too, in groups with names and with their defaults.

fairseq prints its help when it has read ``--task`` and before it knows what options that has.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

from blspkd_fairseq.compat.replacing import replace

_ASKS = ("-h", "--help")
_OURS = ["--task", "blsp_kd", "--arch", "blsp_kd", "--criterion", "kl_distillation"]  # shown where none are named


def show_all_options() -> None:
    """Lets the help of fairseq's commands wait until they know all of their options."""
    from fairseq import options

    replace(options, "parse_args_and_arch", _helpful)


def _helpful(parse: Any) -> Any:
    @functools.wraps(parse)
    def run(parser: Any, input_args: Any = None, *args: Any, modify_parser: Any = None, **kwargs: Any) -> Any:
        given = list(sys.argv[1:] if input_args is None else input_args)
        if not set(_ASKS) & set(given):
            return parse(parser, input_args, *args, modify_parser=modify_parser, **kwargs)
        times = iter((False, True))  # before and after fairseq has added what belongs to task, model and criterion

        def show(parser: argparse.ArgumentParser) -> None:
            if modify_parser is not None:
                modify_parser(parser)
            if next(times):
                group_options(parser)
                parser.usage = "%(prog)s [options] data"  # else hundreds of lines
                parser.print_help()
                parser.exit()

        named = [*_OURS, *(word for word in given if word not in _ASKS)]
        return parse(parser, named, *args, modify_parser=show, **kwargs)

    return run


def group_options(parser: argparse.ArgumentParser) -> None:
    """Gives the options of this package a group for each dataclass that declares some, by its docstring."""
    groups: dict[type, Any] = {}
    declared = dict(_declared())
    for action in parser._actions:
        if action.dest not in declared:
            continue
        owner, option = declared[action.dest]
        if owner not in groups:
            title, _, description = str(owner.__doc__).partition(".")
            groups[owner] = parser.add_argument_group(title.replace("``", ""), " ".join(description.split()) or None)
        for group in parser._action_groups:  # argparse has no way to move one
            if action in group._group_actions:
                group._group_actions.remove(action)
        groups[owner]._group_actions.append(action)
        action.help = _with_default(option)


def _declared() -> Iterator[tuple[str, tuple[type, Any]]]:
    """Names of this package's options, with the dataclass that declares each."""
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    criterions = REGISTRIES["criterion"]["dataclass_registry"]
    for registry in (TASK_DATACLASS_REGISTRY, MODEL_DATACLASS_REGISTRY, criterions):
        for config in registry.values():
            if config.__module__.startswith("blspkd_fairseq."):
                yield from _options_of(config)


def _options_of(config: type) -> Iterator[tuple[str, tuple[type, Any]]]:
    for option in dataclasses.fields(config):
        if "help" in option.metadata:  # else it is one of fairseq's own
            owners = [one for one in config.__mro__ if _explains(one, option.name)]
            yield option.name, (owners[-1], option)


def _explains(config: type, name: str) -> bool:
    """Whether a dataclass declares an option itself, with its help."""
    return name in vars(config).get("__annotations__", ()) and "help" in config.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]


def _with_default(option: Any) -> str:
    text, default = option.metadata["help"], option.default
    says = default is not False and default not in ("", "???")
    return f"{text} (default: {default})" if says else str(text)
