"""Gradient checkpointing: an LLM's activations are computed again in backward, with what was in force in forward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from transformers import PreTrainedModel

from blspkd_fairseq import compat
from blspkd_fairseq.modules.packed_llm import active_rows, packed_rows
from blspkd_fairseq.modules.partial_lora import speech_positions


def enable_gradient_checkpointing(llm: PreTrainedModel) -> None:
    """Turns on gradient checkpointing so that mask and rows of a forward call are also those of its recomputation.

    The recomputation runs during backward, when the block of :func:`speech_positions` has long ended.
    """
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _as_now(llm))}
    compat.checkpoint_activations(llm, options)


def _as_now(llm: PreTrainedModel) -> AbstractContextManager[None]:
    """Brings back, later, what is in force now."""
    state, rows = getattr(llm, "partial_lora_state", None), active_rows()
    mask = None if state is None else state.mask

    @contextmanager
    def again() -> Iterator[None]:
        with packed_rows(llm.get_decoder().config, rows), speech_positions(llm, mask, whole=False):
            yield

    return again()
