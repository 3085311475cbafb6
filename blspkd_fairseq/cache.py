"""Where models and recordings are kept that are fetched once."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache() -> Path:
    """$BLSPKD_CACHE, or a folder in the home directory.

    Raises:
        ValueError: there is no home directory.
    """
    folder = os.path.expanduser(os.environ.get("BLSPKD_CACHE") or "~/.cache/blspkd_fairseq")
    if folder.startswith("~"):
        raise ValueError(f"{folder} cannot be found, since there is no such home folder: set BLSPKD_CACHE to a folder")
    return Path(folder)


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Waits for another process that fetches into the same cache, and clears what a killed one left.

    Unfinished folders are named ``.NAME.SOMETHING``. The system unlocks when a process is killed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for folder in cache.glob(".*.*"):
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
        yield
