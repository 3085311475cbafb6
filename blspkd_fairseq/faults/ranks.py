"""Several processes that train together end together: one that fails tells the others why.

A process that waits in a collective for one that has ended waits until a time limit, with NCCL without a word.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import distributed

_KEY = "blspkd_fairseq/ended"
_LOOK_EVERY = 0.5  # seconds
_listener: threading.Thread | None = None


def _store() -> Any:
    """The meeting point of the processes; None if there is one process only."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return None
    return distributed.distributed_c10d._get_default_store()


def tell(message: str) -> None:
    """Lets the other processes end, with this message; only that of the first one counts."""
    store = _store()
    if store is None:
        return
    try:
        store.compare_set(_KEY, "", f"rank {distributed.get_rank()}: {message}")
    except RuntimeError:  # its holder has ended
        return
    time.sleep(4 * _LOOK_EVERY)  # as long as others need to hear it, in case this process holds the store


def message_of_another() -> str:
    """Returns the message with which another process has ended; "" if it is not known."""
    store = _store()
    try:
        if store is None or not store.check([_KEY]):
            return ""
        message = store.get(_KEY).decode()
    except RuntimeError:
        return ""
    return "" if message.startswith(f"rank {distributed.get_rank()}:") else message


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Ends this process, with exit status 1, when another one tells while the block runs."""
    global _listener
    store = _store()
    if store is None or _listener is not None:
        yield
        return
    store = store.clone() if hasattr(store, "clone") else store  # a connection of its own
    stop = threading.Event()
    _listener = threading.Thread(target=_listen, args=(store, stop), daemon=True, name="other-ranks")
    _listener.start()
    try:
        yield
    finally:
        stop.set()
        _listener.join(4 * _LOOK_EVERY)
        _listener = None


def _listen(store: Any, stop: threading.Event) -> None:
    own = f"rank {distributed.get_rank()}:"
    while not stop.wait(_LOOK_EVERY):
        try:
            message = store.get(_KEY).decode() if store.check([_KEY]) else own
        except RuntimeError:  # the process that held the store has ended
            return
        if not message.startswith(own):
            print(f"another process has ended, and this one with it: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
