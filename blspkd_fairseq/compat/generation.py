"""Hooks that fairseq-generate and fairseq-interactive lack: the end of the input, and the results of a shard."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blspkd_fairseq.compat.replacing import replace

logger = logging.getLogger(__name__)

_after_input: list[Callable[[], None]] = []  # of the command that runs
_at_end: list[Callable[[], None]] = []


def attend_generation() -> None:
    """Gives these commands the hooks; to be called when this package is loaded, before their ``main`` runs."""
    for name, module in list(sys.modules.items()):
        if name in ("__main__", "fairseq_cli.generate", "fairseq_cli.interactive"):
            _wrap(module, "buffered_read", _then_call_back)
            _wrap(module, "main", _with_an_end)
    from fairseq.scoring import bleu

    replace(bleu.Scorer, "add", _of_any_length)
    replace(bleu.Scorer, "brevity", _of_no_words)


def _of_any_length(add: Callable[..., None]) -> Callable[..., None]:
    """Counts a text without tokens, for which fairseq's BLEU reads memory that is not its own, and mostly crashes."""

    @functools.wraps(add)
    def add_any(self: Any, ref: Any, pred: Any) -> None:
        if ref.numel() and pred.numel():
            add(self, ref, pred)
            return
        self.stat.reflen += ref.numel()
        self.stat.predlen += pred.numel()
        for order in range(1, 5):  # nothing matches
            count = f"count{order}"
            setattr(self.stat, count, getattr(self.stat, count) + max(0, pred.numel() - order + 1))

    return add_any


def _of_no_words(brevity: Callable[..., float]) -> Callable[..., float]:
    """Gives 0 where no hypothesis has a token; fairseq's BLEU divides by their length."""

    @functools.wraps(brevity)
    def penalty(self: Any) -> float:
        return brevity(self) if self.stat.predlen else 0.0

    return penalty


def _wrap(module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        return
    file = Path(inspect.unwrap(function).__code__.co_filename)
    is_generation = file.parent.name == "fairseq_cli" and file.stem in ("generate", "interactive")
    if is_generation:
        replace(module, name, wrapper)


def at_end(callback: Callable[[], None]) -> None:
    """Calls back when the command ends, however it does."""
    _at_end.append(callback)


def after_input(callback: Callable[[], None]) -> None:
    """Calls back when fairseq-interactive has answered its last line."""
    _after_input[:] = [callback]


def _then_call_back(buffered_read: Any) -> Any:
    @functools.wraps(buffered_read)
    def read(*args: Any) -> Iterator[Any]:
        yield from buffered_read(*args)
        while _after_input:
            _after_input.pop()()

    return read


def shard_folder(shard: int, shards: int) -> str:
    """Names the folder of a shard's results, beside those of the others; "" if there is one shard."""
    return f"shard-{shard}-of-{shards}" if shards > 1 else ""


def _with_an_end(main: Any) -> Any:
    """fairseq-generate ignores --num-shards, and would let each shard overwrite the results of the others."""

    @functools.wraps(main)
    def run(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(cfg, "task", None) == "blsp_kd" and getattr(cfg, "results_path", None):
            cfg.results_path = str(Path(cfg.results_path) / shard_folder(cfg.shard_id, cfg.num_shards))
        try:
            return main(cfg, *args, **kwargs)
        finally:
            _after_input.clear()
            while _at_end:
                _at_end.pop()()

    return run


def end_without_rows() -> None:
    """Ends fairseq-generate: its scorers fail on no text at all."""
    logger.info("the manifest has no rows: nothing to generate, nothing to score")
    raise SystemExit(0)
