"""fairseq's training loop: a training that is stopped or killed anywhere goes on as if nothing had happened."""

from __future__ import annotations

import copy
import functools
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from blspkd_fairseq.checkpoint_files import LAST
from blspkd_fairseq.compat.replacing import replace
from blspkd_fairseq.compat.signals import StopValidation, agree_on_signals, exit_code, stop_signal, watch_signals

logger = logging.getLogger(__name__)


class _Position(NamedTuple):
    """The iterator over an epoch as it was after an update, as much of it as validation and saving ask for."""

    epoch: int
    is_end: bool
    state: dict[str, Any]

    def end_of_epoch(self) -> bool:
        return self.is_end

    def state_dict(self) -> dict[str, Any]:
        return self.state


_open_update: _Position | None = None  # the last one, if a training stopped before it validated and saved
_code: int | None = None  # to exit with


def go_on_exactly() -> None:
    """Makes up for what fairseq's training loop forgets when it is resumed, and lets signals stop it.

    To be called when this package is loaded and when a task begins: the loop may be in ``__main__``.
    """
    from fairseq import checkpoint_utils
    from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule as Plateau
    from fairseq.trainer import Trainer

    agree_on_signals()
    replace(Plateau, "state_dict", _with_bad_epochs)
    replace(Plateau, "load_state_dict", _and_bad_epochs)
    replace(Trainer, "load_checkpoint", _with_what_came_after_saving)
    replace(checkpoint_utils, "load_checkpoint", _and_closes_the_update)
    for loop in _loops():
        replace(loop, "validate_and_save", _unless_stopped)
        replace(loop, "train", _unless_over)


def _loops() -> list[Any]:
    """The modules with fairseq's training loop: fairseq_cli.train, or the script itself."""
    names = ("fairseq_cli.train", "__main__", "__mp_main__")
    return [sys.modules[name] for name in names if hasattr(sys.modules.get(name), "validate_and_save")]


# ---- what is saved beside fairseq's own -----------------------------------------------------------------------------


def training_state() -> dict[str, Any]:
    """Returns the validations without improvement (--patience), and the update still to be validated and saved."""
    patience: dict[str, Any] = {}
    for loop in _loops():
        patience |= {name: getattr(loop.should_stop_early, name, None) for name in ("best", "num_runs")}
    return {"patience": patience, "open_update": None if _open_update is None else _open_update._asdict()}


def restore_training_state(state: dict[str, Any]) -> None:
    """Takes back what :func:`training_state` gave."""
    global _open_update
    for loop in _loops():
        vars(loop.should_stop_early).update({k: v for k, v in state["patience"].items() if v is not None})
    _open_update = _Position(**state["open_update"]) if state["open_update"] else None


def _with_what_came_after_saving(load: Callable[..., Any]) -> Callable[..., Any]:
    """Makes up for what happened after a checkpoint of an epoch's end was written.

    The schedule then got the loss of the validation, and the means of the epoch were reset. When it resumes, fairseq
    leaves out the former, and resets the means of the last --log-interval, too.
    """

    @functools.wraps(load)
    def load_checkpoint(
        self: Any,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: Any = None,
        reset_meters: bool = False,
    ) -> Any:
        state = load(self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)
        if state is not None and state["train_iterator"]["iterations_in_epoch"] == 0:
            if "metrics" in state and not reset_meters:
                _restore_means(state["metrics"])
            if state.get("val_loss") is not None and not reset_optimizer and not reset_lr_scheduler:
                self.lr_step(state["train_iterator"]["epoch"] - 1, state["val_loss"])
        return state

    return load_checkpoint


def _with_bad_epochs(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps how many epochs of --lr-patience have passed, which reduce_lr_on_plateau forgets."""

    @functools.wraps(state_dict)
    def with_bad_epochs(self: Any) -> Any:
        return {**state_dict(self), "num_bad_epochs": self.lr_scheduler.num_bad_epochs}

    return with_bad_epochs


def _and_bad_epochs(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_state_dict)
    def load_bad_epochs(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, state)
        self.lr_scheduler.num_bad_epochs = state.get("num_bad_epochs", 0)

    return load_bad_epochs


def _restore_means(state: dict[str, Any]) -> None:
    from fairseq.logging import meters, metrics

    metrics.load_state_dict(state)
    metrics.reset_meters("train")
    for meter in metrics.get_meters("default"):
        if isinstance(meter, meters.TimeMeter):
            meter.reset()


# ---- stopping and going on ------------------------------------------------------------------------------------------


def _unless_stopped(validate_and_save: Callable[..., Any]) -> Callable[..., Any]:
    """Saves an update at once after a signal, and leaves it open: validating may take longer than is granted."""

    @functools.wraps(validate_and_save)
    def judge(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, valid_subsets: list[str], end_of_epoch: bool) -> Any:
        if stop_signal() is None:
            try:
                return validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
            except StopValidation:
                pass
        _stop(cfg, trainer, epoch_itr, end_of_epoch)
        if not end_of_epoch:
            _exit_if_stopped()
        return [None], True  # so that the means of the epoch are printed

    return judge


def _stop(cfg: Any, trainer: Any, epoch_itr: Any, end_of_epoch: bool) -> None:
    global _open_update, _code
    from fairseq import checkpoint_utils

    number = stop_signal()
    assert number is not None
    stopped = f"{number.name}: stopped after update {trainer.get_num_updates()}"
    if cfg.checkpoint.no_save:
        logger.warning(f"{stopped}; nothing is saved, because of --no-save")
    else:
        _open_update = _Position(epoch_itr.epoch, end_of_epoch, epoch_itr.state_dict())
        checkpoint = copy.deepcopy(cfg.checkpoint)
        checkpoint.no_last_checkpoints = False
        checkpoint_utils.save_checkpoint(checkpoint, trainer, epoch_itr, None)
        without = "" if cfg.checkpoint.restore_file == LAST else " without --restore-file and --reset-*"
        path = Path(cfg.checkpoint.save_dir) / LAST
        logger.warning(f"{stopped}; it is saved in {path}, and the same command{without} goes on from there")
    _wait_for_all(trainer)
    _code = exit_code(number)


def _wait_for_all(trainer: Any) -> None:
    """Waits until the first process has saved: the end of one may be the end of all."""
    if trainer.data_parallel_world_size > 1:
        import torch
        from fairseq.distributed import utils

        done = torch.zeros(1, device=trainer.device)
        utils.all_reduce(done, group=trainer.data_parallel_process_group)
        done.item()


def _exit_if_stopped() -> None:
    global _code, _open_update
    if _code is not None:
        code, _code, _open_update = _code, None, None
        sys.stdout.flush()
        raise SystemExit(code)


def _and_closes_the_update(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        global _open_update
        _open_update = None
        for loop in _loops():
            vars(loop.should_stop_early).clear()  # of another training in this process
        loaded = load(cfg, trainer, **kwargs)
        position, _open_update = _open_update, None
        if position is not None:
            watch_signals()
            subsets = trainer.cfg.dataset.valid_subset.split(",")
            validate_and_save = _loops()[0].validate_and_save
            losses, _ = validate_and_save(trainer.cfg, trainer, trainer.task, position, subsets, position.is_end)
            _exit_if_stopped()
            if position.is_end:
                trainer.lr_step(position.epoch, losses[0])
        return loaded

    return load_checkpoint


def _unless_over(train: Callable[..., Any]) -> Callable[..., Any]:
    """Ends a training that has ended before, of which fairseq makes one update more at each call."""

    @functools.wraps(train)
    def train_epoch(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        watch_signals()
        if trainer.get_num_updates() >= (cfg.optimization.max_update or math.inf) or _is_out_of_patience(cfg):
            logger.info(f"this training has ended before, after {trainer.get_num_updates()} updates")
            return [None], True
        result = train(cfg, trainer, task, epoch_itr)
        _exit_if_stopped()
        return result

    return train_epoch


def _is_out_of_patience(cfg: Any) -> bool:
    runs = max((getattr(loop.should_stop_early, "num_runs", 0) for loop in _loops()), default=0)
    return bool(0 < cfg.checkpoint.patience <= runs)
