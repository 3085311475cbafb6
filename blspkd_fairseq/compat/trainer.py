"""Shows fairseq's trainer faults that it passes over: no memory, NaN, batches without weight."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from typing import Any

from blspkd_fairseq.compat.replacing import replace
from blspkd_fairseq.faults.errors import DoesNotFit, NotFinite, NothingToLearn, TrainingError, is_out_of_memory, listed


def guard_updates() -> None:
    """Lets the guard of a task (:class:`~blspkd_fairseq.faults.update.UpdateGuard`) see all updates.

    fairseq skips a batch that does not fit, for ever and on one process alone (fairseq#708); on a CPU it does not know
    the allocator's words. Of NaN it prints the norms of all parameters. A batch without weight is an update like
    others, whose loss it logs as -1.
    """
    from fairseq.trainer import Trainer

    replace(Trainer, "train_step", _guarded)
    replace(Trainer, "valid_step", _explained)
    replace(Trainer, "clip_grad_norm", _refusing_non_finite)
    replace(Trainer, "_aggregate_logging_outputs", _refusing_nothing)
    replace(Trainer, "save_checkpoint", _refusing_bad_parameters)


def _guarded(train_step: Any) -> Any:
    import torch

    @functools.wraps(train_step)
    def step(self: Any, samples: Any, raise_oom: bool = False) -> Any:
        guard = getattr(self.task, "guard", None)
        if guard is None:
            return train_step(self, samples, raise_oom)
        is_first = True

        def step_with(some: Any) -> Any:
            nonlocal is_first
            if self.cuda and not is_first:  # what the try before has held
                torch.cuda.empty_cache()
            is_first = self.has_gradient = False
            try:
                return train_step(self, some, True)
            except RuntimeError as error:
                if isinstance(error, DoesNotFit) or not is_out_of_memory(error):
                    raise
                why = str(error)
            if not self.has_gradient:  # on a batch's way to the device
                raise DoesNotFit([], why)
            raise TrainingError(
                "there is no memory for the optimizer's step: give a smaller --batch-size or --max-tokens, or train "
                f"less, such as a smaller --lora-rank ({why})"
            )

        return guard.update(samples, step_with, self.data_parallel_world_size == 1, functools.partial(_is_finite, self))

    return step


def _is_finite(trainer: Any, sample: Any) -> bool:
    """Whether the gradient of a batch is finite, in this process alone."""
    trainer.zero_grad()
    sample, is_dummy = trainer._prepare_sample(sample)
    model, number = trainer.model, trainer.get_num_updates()
    with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
        trainer.task.train_step(sample, model, trainer.criterion, trainer.optimizer, number, is_dummy)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def _explained(valid_step: Any) -> Any:
    @functools.wraps(valid_step)
    def step(self: Any, sample: Any, raise_oom: bool = False) -> Any:
        try:
            return valid_step(self, sample, raise_oom)
        except RuntimeError as error:
            if raise_oom or not is_out_of_memory(error):  # fairseq tries once more
                raise
            raise TrainingError(
                "there is no memory for a batch of validation: give a smaller --batch-size-valid or --max-tokens-valid "
                f"({error})"
            ) from error

    return step


def _refusing_non_finite(clip_grad_norm: Any) -> Any:
    """Reads the norm of the gradient of all processes, which so agree on it.

    It is the one time that an update waits for the device: what fairseq asks of the norm after that is free.
    """

    @functools.wraps(clip_grad_norm)
    def clip(self: Any, clip_norm: float) -> Any:
        self.has_gradient = True
        norm = clip_grad_norm(self, clip_norm)
        if getattr(self.task, "guard", None) is None:
            return norm
        norm = norm.cpu()
        if not math.isfinite(norm):
            raise NotFinite
        return norm

    return clip


def _refusing_nothing(aggregate: Any) -> Any:
    """Refuses an update without weight; fairseq sums the weight over processes and then reads it."""

    @functools.wraps(aggregate)
    def summed(self: Any, logging_outputs: Any, *sums: Any, ignore: bool = False) -> Any:
        outputs, totals = aggregate(self, logging_outputs, *sums, ignore=ignore)
        if getattr(self.task, "guard", None) is None or not self.model.training:
            return outputs, totals
        sample_size = float(totals[0])
        if not sample_size:
            raise NothingToLearn
        return outputs, [sample_size, *totals[1:]]

    return summed


def _refusing_bad_parameters(save_checkpoint: Any) -> Any:
    @functools.wraps(save_checkpoint)
    def save(self: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        named = self.model.named_parameters() if getattr(self.task, "guard", None) is not None else ()
        bad = [name for name, p in named if p.requires_grad and not p.isfinite().all()]
        if bad and Path(filename).name != "crash.pt":
            raise TrainingError(
                f"{listed(bad)}: NaN or Inf in what is trained, so that no checkpoint is written over the ones before: "
                "go on from one of them (--restore-file) with a smaller --lr"
            )
        return save_checkpoint(self, filename, *args, **kwargs)

    return save
