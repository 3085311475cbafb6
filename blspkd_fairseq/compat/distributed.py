"""Training by several processes."""

from __future__ import annotations

import functools
import importlib
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
