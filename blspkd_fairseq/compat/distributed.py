"""Training by several processes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

from blspkd_fairseq.compat.replacing import replace


def sum_gradients_as_they_are() -> None:
    """Lets both of fairseq's wrappers for several processes train what is here.

    legacy_ddp sums gradients in the precision of the model's first parameter, which is the frozen LLM's table: bfloat16
    loses .3 % of each, even in a single process. pytorch_ddp names a GPU for a model on a CPU.
    """
    import torch

    wrappers = importlib.import_module("fairseq.models.distributed_fairseq_model")

    def in_own_precision(all_reduce_grads: Any) -> Any:
        @functools.wraps(all_reduce_grads)
        def reduce(self: Any) -> None:
            trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            if self.buffer is None and trained:
                dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in trained])
                size = min(self.buffer_size, sum(parameter.numel() for parameter in trained))
                self.buffer = trained[0].new_empty(size, dtype=dtype)
            all_reduce_grads(self)

        return reduce

    def on_its_device(wrapper: Any) -> Any:
        def wrap(module: Any, **options: Any) -> Any:
            if not any(parameter.is_cuda for parameter in module.parameters()):
                options |= {"device_ids": None, "output_device": None}
            if "broadcast_buffers" in options and "forward_sync_buffers" in inspect.signature(wrapper).parameters:
                options["forward_sync_buffers"] = options.pop("broadcast_buffers")  # its name since torch 2.13
            return wrapper(module=module, **options)

        return wrap

    replace(wrappers.LegacyDistributedDataParallel, "all_reduce_grads", in_own_precision)
    replace(wrappers, "DistributedDataParallel", on_its_device)


def share_checkpoints() -> None:
    """Lets the first process tell the others what it has read from a checkpoint.

    fairseq sends a pickle of its own classes, which `torch.load` has refused since 2.6.
    """
    from fairseq.distributed import utils

    replace(utils, "_broadcast_object_slow", _broadcast_by_torch)


def _broadcast_by_torch(_: Any) -> Any:
    def broadcast(obj: Any, src_rank: int, group: Any, dist_device: Any) -> Any:
        from torch import distributed

        objects = [obj]
        distributed.broadcast_object_list(objects, src_rank, group, dist_device)
        return objects[0]

    return broadcast


_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def join_launcher(cfg: Any) -> None:
    """Lets fairseq's processes on CPUs, and on machines with one GPU each, train together under torchrun.

    fairseq takes the number of GPUs here for that of the processes; one or none of them, and each process trains by
    itself, all into the same folder.
    """
    import torch

    own = cfg.distributed_training
    world_size = _launched_processes()
    if world_size < 2 or own.distributed_init_method is not None or getattr(cfg.common, "tpu", False):
        return
    own.distributed_world_size = world_size
    if cfg.common.cpu or not torch.cuda.is_available():
        own.distributed_init_method = "env://"
        own.distributed_rank = int(os.environ["RANK"])
        own.distributed_no_spawn = True
        own.distributed_backend = "gloo"
        own.device_id = 0


def refuse_lonely_processes() -> None:
    """Refuses a training beside others that do not know of each other.

    Raises:
        ValueError: a launcher has started several processes, and this one is alone.
    """
    from torch import distributed

    if _launched_processes() > 1 and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, but this process would train alone, into the "
            "same --save-dir as the others: start fairseq-train with torchrun, or unset WORLD_SIZE"
        )


def is_launched() -> bool:
    """Whether torchrun, or a script in its manner, has started this process."""
    return all(name in os.environ for name in _LAUNCHED)


def _launched_processes() -> int:
    """Counts the processes that a launcher has started."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends a command on all processes, with the same words, when it ends on one of them.

    Raises:
        TrainingError: in place of the error of a loader or of a lost process.
    """
    from blspkd_fairseq.faults import ranks, workers
    from blspkd_fairseq.faults.errors import TrainingError

    with ranks.listening():
        try:
            yield
        except Exception as error:
            if other := ranks.message_of_another():
                raise TrainingError(f"another process has ended, and this one with it: {other}") from error
            explained = workers.explain(error)
            ranks.tell(str(explained or error))
            if explained is not None:
                raise explained from error
            raise
