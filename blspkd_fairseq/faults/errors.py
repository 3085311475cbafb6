"""Errors that end an update, and errors that end a training."""

from collections.abc import Sequence
from typing import Any

# Of CUDA's caching allocator, of cuBLAS and cuDNN, which allocate past it, and of torch on a CPU.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_SHOWN = 8  # names in a message


class TrainingError(Exception):
    """Ends a training; the message is one sentence with the remedy.

    No RuntimeError: of those fairseq's trainer takes one that speaks of memory for a batch to skip.
    """


class DoesNotFit(RuntimeError):
    """There is no memory for a batch. fairseq's trainer lets it pass, since its message does not speak of memory.

    Attributes:
        names: of the batch's utterances; none if it is not known which it was.
        why: the allocator's own words.
    """

    def __init__(self, names: Sequence[str], why: str) -> None:
        super().__init__("a batch does not fit")
        self.names = list(names)
        self.why = why


class NotFinite(Exception):
    """The gradient of an update holds NaN or Inf."""


class NothingToLearn(Exception):
    """No process has a batch with any weight in this update."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory for a tensor."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def names_of(sample: dict[str, Any]) -> list[str]:
    """The manifest's ids of a batch's utterances."""
    return [row["id"] for row in sample["rows"]]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
