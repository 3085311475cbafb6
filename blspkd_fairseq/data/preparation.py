"""Corpora to manifests: the part that all corpora share.

``prepare`` takes readers of splits (see :mod:`blspkd_fairseq.data.corpora`) and makes, in a folder, 16 kHz FLAC
audio, ``<split>.tsv`` and ``<split>.dropped.tsv``. Utterances that are done stand in ``prepared.jsonl``, so that a run
that was killed goes on where it was; its manifests are those of an undisturbed run, in the order of the corpus. Rows
that were dropped are looked at again by every run, since the corpus may have been repaired.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blspkd_fairseq.data.audio import MAX_SECONDS
from blspkd_fairseq.data.conversion import AUDIO_REASONS, Limits, Result, Task, do_job, file_name
from blspkd_fairseq.data.corpora import MALFORMED, NO_SPEECH, Dropped, Entry, Item
from blspkd_fairseq.data.manifest import write_manifest
from blspkd_fairseq.data.record_store import RecordStore
from blspkd_fairseq.data.zip_shards import MAX_SHARD_BYTES, ShardWriter, member_of

EMPTY_TEXT = "empty text"
CONTROL = "control characters"
REASONS = (*AUDIO_REASONS, EMPTY_TEXT, CONTROL, MALFORMED, NO_SPEECH)
_EXPECTED = frozenset({NO_SPEECH})  # parts of the corpus that are no utterances: no sign of damage

# C0 controls but tab and line feed, and halves of surrogate pairs, which are no characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]")
_JOB_ROWS = 16
_FOLDER_ROWS = 10_000  # files in one folder

Reader = Callable[[], Iterator[Item]]


class PreparationError(ValueError):
    """Data that was not prepared; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """How a corpus is prepared.

    Attributes:
        processes: how many decode audio.
        zip: write zip shards in place of files.
        shard_bytes: size at which a shard is closed.
        limits: which audio is taken.
        max_dropped: fraction of the rows of a split that may be dropped.
    """

    processes: int = 1
    zip: bool = False
    shard_bytes: int = 1_000_000_000
    limits: Limits = Limits()
    max_dropped: float = 0.05


@dataclass(frozen=True)
class Corpus:
    """What to prepare.

    Attributes:
        root: folder that all audio must be in.
        splits: a reader by the name of each split; it is called several times.
        has_translation: whether the manifests get the columns ``tgt_text`` and ``tgt_lang``.
    """

    root: Path
    splits: Mapping[str, Reader]
    has_translation: bool = False


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all commands of preparation share, ``--output`` among them."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the manifests and the audio")
    parser.add_argument("--zip", action="store_true", help="audio in uncompressed zip shards, not in files")
    parser.add_argument("--shard-mb", type=int, default=1000, help="size of a shard (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: all cores (%(default)s)")
    parser.add_argument("--min-seconds", type=float, default=0.1, help="drop what is shorter (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS, help="drop what is longer (%(default)s)")
    parser.add_argument(
        "--keep-flawed",
        action="store_true",
        help="keep audio that is digital silence, clipped throughout or far from zero, too (default: drop it)",
    )
    parser.add_argument(
        "--max-dropped", type=float, default=0.05, help="fraction of rows to drop at most (default: %(default)s)"
    )


def options_from(args: argparse.Namespace) -> Options:
    """Options of :func:`add_arguments`.

    Raises:
        PreparationError: one that makes no sense.
    """
    problems = {
        "--processes must be at least 1": args.processes < 1,
        f"--shard-mb must be from 1 to {MAX_SHARD_BYTES // 10**6}": not 1 <= args.shard_mb <= MAX_SHARD_BYTES // 10**6,
        "--min-seconds must be less than --max-seconds": not 0 <= args.min_seconds < args.max_seconds,
        "--max-dropped is a fraction, from 0 to 1": not 0 <= args.max_dropped <= 1,
    }
    wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise PreparationError(wrong[0])
    limits = Limits(args.min_seconds, args.max_seconds, args.keep_flawed)
    return Options(args.processes, args.zip, args.shard_mb * 10**6, limits, args.max_dropped)


# --- the whole ------------------------------------------------------------------------------------


def prepare(corpus: Corpus, output: Path, options: Options) -> None:
    """Prepares all splits and prints what was dropped.

    Raises:
        PreparationError: two rows of one id, too many rows dropped, nothing left, or the disk is full.
        StoreError: the output was made with other options, or another process is at it.
        CorpusError: of a reader.
    """
    settings = {
        "root": str(corpus.root.resolve()),
        "container": f"zip of {options.shard_bytes} bytes" if options.zip else "files",
        "min_seconds": options.limits.min_seconds,
        "max_seconds": options.limits.max_seconds,
        **({"keep_flawed": True} if options.limits.keep_flawed else {}),
    }
    with RecordStore(output / "prepared.jsonl", settings) as store:
        _remove_partial_files(output)
        counts = _check_ids(corpus)
        with _workers(options.processes) as workers:
            bad = {
                split: _SplitPreparation(corpus, split, output, options, store).run(workers, counts[split])
                for split in corpus.splits
            }
        outcomes = {split: _Outcomes(corpus, split, store, bad[split]) for split in corpus.splits}
        dropped = {split: _write_dropped(outcomes[split], output / f"{split}.dropped.tsv") for split in outcomes}
        print(table_of_dropped(dropped, counts), flush=True)
        for split in corpus.splits:
            _check_dropped(split, dropped[split], counts[split], output, options)
        for split in corpus.splits:
            written = write_manifest(output / f"{split}.tsv", _rows(outcomes[split], output), _columns(corpus))
            print(f"{output / f'{split}.tsv'}: {written} rows", flush=True)


def _columns(corpus: Corpus) -> list[str]:
    target = (["tgt_text"], ["tgt_lang"]) if corpus.has_translation else ([], [])
    return ["id", "audio", "n_frames", "src_text", *target[0], "speaker", "src_lang", *target[1]]


def _check_ids(corpus: Corpus) -> dict[str, int]:
    """Counts the rows of each split; an id may occur once in all of them."""
    places: dict[str, tuple[str, int]] = {}
    counts = dict.fromkeys(corpus.splits, 0)
    for split, read in corpus.splits.items():
        for row, item in enumerate(read(), start=1):
            counts[split] = row
            if isinstance(item, Dropped):
                continue
            if not item.id.strip():
                raise PreparationError(f"{split} row {row} ({item.audio}) has an empty id: give it one")
            if item.id in places:
                other, number = places[item.id]
                raise PreparationError(
                    f"{other} row {number} and {split} row {row} have the same id {item.id!r}: remove one of them, or "
                    "give every row its own"
                )
            places[item.id] = (split, row)
    return counts


def _key(split: str, item: Entry) -> str:
    return f"{split}/{item.id}"


def _source(corpus: Corpus, entry: Entry) -> str:
    """What a record was made of, so that records of an earlier state of the corpus are noticed."""
    span = "" if entry.start is None and entry.end is None else f" {entry.start}-{entry.end}"
    try:
        size = f" of {os.stat(entry.audio).st_size} bytes"
    except OSError:
        size = ""  # its audio may be gone once it is prepared
    return os.path.relpath(entry.audio, corpus.root) + span + size


def _remove_partial_files(output: Path) -> None:
    """Removes what killed workers have left."""
    for path in (output / "audio").glob("*/*/.*.partial"):
        path.unlink(missing_ok=True)


class _Outcomes:
    """Every row of a split, with its record, or with the reason why it was dropped."""

    def __init__(self, corpus: Corpus, split: str, store: RecordStore, bad: Mapping[str, Dropped]) -> None:
        self.corpus, self.split, self.store, self.bad = corpus, split, store, bad

    def __iter__(self) -> Iterator[Dropped | tuple[Entry, dict[str, Any]]]:
        for item in self.corpus.splits[self.split]():
            if isinstance(item, Dropped):
                yield item
            else:
                key = _key(self.split, item)
                yield _drop_by_text(item, self.corpus) or self.bad.get(key) or (item, self._record(key, item))

    def _record(self, key: str, entry: Entry) -> dict[str, Any]:
        record = self.store[key]
        source = _source(self.corpus, entry)
        if record["source"] != source and record["source"].rpartition(" of ")[0] != source:
            raise PreparationError(
                f"{self.store.path} has {entry.id!r} from {record['source']}, but the corpus now has it in {source}: "
                "delete the whole output and start again"
            )
        return record


def _drop_by_text(entry: Entry, corpus: Corpus) -> Dropped | None:
    texts = {"transcript": entry.text}
    if corpus.has_translation:
        texts["translation"] = entry.translation or ""
    for name, text in texts.items():
        if not text.strip():
            return Dropped(entry.id, EMPTY_TEXT, f"the {name} is empty")
        found = _CONTROL.search(text)
        if found:
            return Dropped(entry.id, CONTROL, f"the {name} holds U+{ord(found[0]):04X} at character {found.start()}")
    return None


def _write_dropped(outcomes: _Outcomes, path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, str]]:
        for outcome in outcomes:
            if isinstance(outcome, Dropped):
                counts[outcome.reason] += 1
                yield outcome._asdict()

    write_manifest(path, rows(), Dropped._fields)
    return counts


def table_of_dropped(dropped: Mapping[str, Counter[str]], counts: Mapping[str, int]) -> str:
    """Reasons by splits, as text."""
    splits = list(dropped)
    reasons = [reason for reason in REASONS if any(dropped[split][reason] for split in splits)]
    lines = [["", *splits], ["rows", *(str(counts[split]) for split in splits)]]
    lines += [[f"dropped: {reason}", *(str(dropped[split][reason]) for split in splits)] for reason in reasons]
    lines.append(["kept", *(str(counts[split] - dropped[split].total()) for split in splits)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(splits) + 1)]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _check_dropped(split: str, dropped: Counter[str], count: int, output: Path, options: Options) -> None:
    bad = sum(number for reason, number in dropped.items() if reason not in _EXPECTED)
    rows = count - sum(dropped[reason] for reason in _EXPECTED)
    if rows == 0 or bad == rows:
        raise PreparationError(
            f"{split} has no row that can be used, of {count}: see {output / f'{split}.dropped.tsv'}"
        )
    if bad > options.max_dropped * rows:
        raise PreparationError(
            f"{bad} of the {rows} rows of {split} were dropped, which is more than --max-dropped "
            f"{options.max_dropped:g}: look at {output / f'{split}.dropped.tsv'}, then repair the corpus or raise the "
            "limit, and start again"
        )


def _rows(outcomes: _Outcomes, output: Path) -> Iterator[dict[str, object]]:
    archives: set[str] = set()
    for outcome in outcomes:
        if isinstance(outcome, Dropped):
            continue
        entry, record = outcome
        file = record["audio"].rsplit(":", 2)[0] if "shard" in record else record["audio"]
        if file not in archives and not (output / file).is_file():
            raise PreparationError(f"{output / file} was written and is gone: delete the whole output and start again")
        if "shard" in record:
            archives.add(file)
        row: dict[str, object] = {
            "id": entry.id,
            "audio": record["audio"],
            "n_frames": record["n_frames"],
            "src_text": entry.text,
            "speaker": entry.speaker,
            "src_lang": entry.src_lang,
        }
        if outcomes.corpus.has_translation:
            row |= {"tgt_text": entry.translation, "tgt_lang": entry.tgt_lang}
        yield row


# --- one split ------------------------------------------------------------------------------------


class _ThisProcess:
    """Runs jobs at once, when asked."""

    def submit(self, function: Callable[..., list[Result]], *args: object) -> Future[list[Result]]:
        future: Future[list[Result]] = Future()
        future.set_result(function(*args))
        return future


Workers = _ThisProcess | ProcessPoolExecutor


class _SplitPreparation:
    """Makes the records of a split that are missing, and its audio."""

    def __init__(self, corpus: Corpus, split: str, output: Path, options: Options, store: RecordStore) -> None:
        self.corpus, self.split, self.output = corpus, split, output
        self.options, self.store = options, store
        self.bad: dict[str, Dropped] = {}
        self.shards = self._open_shards() if options.zip else None

    def _open_shards(self) -> ShardWriter:
        ids = (i for i in self.store.ids() if i.startswith(f"{self.split}/"))
        records = (self.store[i] for i in ids)
        known = (member_of(record) for record in records if "shard" in record)
        return ShardWriter(self.output / "audio", self.split, self.options.shard_bytes, known)

    def run(self, workers: Workers, rows: int) -> dict[str, Dropped]:
        """Returns the rows that were dropped for their audio."""
        pending: deque[tuple[int, Future[list[Result]]]] = deque()
        try:
            with tqdm(total=rows, desc=self.split, unit="row") as bar:
                for job in self._jobs(bar):
                    future = workers.submit(do_job, job, self.corpus.root, self.output, self.options.limits)
                    pending.append((len(job), future))
                    # In order, so that shards are the same in every run, and few at a time, to hold little in memory.
                    while pending and (pending[0][1].done() or len(pending) > 3 * self.options.processes):
                        self._keep(pending, bar)
                while pending:
                    self._keep(pending, bar)
            if self.shards is not None:
                self.shards.finish()
        except OSError as error:
            raise PreparationError(
                f"{self.output} cannot be written: {error.strerror or error}; what was finished is kept, so make room "
                "and start again"
            ) from error
        except BrokenProcessPool as error:
            raise PreparationError(
                "a worker process was killed, perhaps for want of memory: start again with fewer --processes"
            ) from error
        finally:
            if self.shards is not None:
                self.shards.close()
        return self.bad

    def _jobs(self, bar: tqdm) -> Iterator[list[Task]]:
        """Rows without a record, so many at a time as pay for sending them; never an audio file in two parts."""
        job: list[Task] = []
        for row, item in enumerate(self.corpus.splits[self.split]()):
            if isinstance(item, Dropped) or _drop_by_text(item, self.corpus) or _key(self.split, item) in self.store:
                bar.update()
                continue
            if len(job) >= _JOB_ROWS and job[-1].entry.audio != item.audio:
                yield job
                job = []
            job.append(self._task(row, item))
        if job:
            yield job

    def _task(self, row: int, entry: Entry) -> Task:
        name = f"{file_name(entry.id)}.flac"
        target = None if self.shards else f"audio/{self.split}/{row // _FOLDER_ROWS:04d}/{name}"
        return Task(_key(self.split, entry), entry, _source(self.corpus, entry), name, target)

    def _keep(self, pending: deque[tuple[int, Future[list[Result]]]], bar: tqdm) -> None:
        count, future = pending.popleft()
        results = future.result()
        self.bad |= {result.record["id"]: result.dropped for result in results if result.dropped}
        self.store.add([self._record(result) for result in results if not result.dropped])
        bar.update(count)

    def _record(self, result: Result) -> dict[str, Any]:
        if not result.flac:
            return result.record
        assert self.shards is not None
        member = self.shards.append(result.name, result.flac)
        archive = self.shards.path(member.shard).relative_to(self.output).as_posix()
        return {**result.record, "audio": f"{archive}:{member.offset}:{member.length}", **member._asdict()}


# --- workers --------------------------------------------------------------------------------------


@contextmanager
def _workers(processes: int) -> Iterator[Workers]:
    if processes == 1:
        yield _ThisProcess()
        return
    # Spawned, since a forked worker would hold the lock of the store after this process was killed.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, initializer=end_with_parent)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Ends this worker when the process that started it was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
