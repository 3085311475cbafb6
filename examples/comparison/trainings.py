"""Trains and measures the rows of a table in pieces that resume: what every comparison does, whatever its data are.

A piece is the training or the measuring of one row with one seed. What is there is not made again, a training that was
killed goes on from its last checkpoint, and what needs another row's checkpoint waits for it.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from systems import Row, Table

from blspkd_fairseq.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
VALIDATIONS = 5  # points of a learning curve
LADDER = tuple(float(f"{digit}e{exponent}") for exponent in range(-8, 2) for digit in (1, 3))  # of learning rates
POLL = 0.2  # seconds
INTERVAL = re.compile(r"\| train_inner \|.* ups=([\d.]+),.* num_updates=(\d+),.* train_wall=([\d.]+)")  # of a log
WHOLE_SECONDS = 10  # of an interval, which tell its pace
QUICKEST = 0.1  # of the intervals
PATIENCE = 120  # seconds in which a training that is told to end has written its checkpoint


class TimeOver(Exception):
    """The time that was given is over; the same command goes on."""


def run_in_pieces(main: Callable[[], None]) -> None:
    """Runs a command; exit code 124 says that its time is over."""
    try:
        main()
    except TimeOver:
        print("the time is over: the same command goes on")
        sys.exit(124)


def add_arguments(parser: argparse.ArgumentParser, table: Table, cache: Path) -> None:
    """What every comparison asks."""
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--results", type=Path, help="folder of the measurements (default: OUT/results)")
    parser.add_argument("--speech-encoder", default=str(cache / "whisper-tiny.en"))
    parser.add_argument("--llm", default=str(cache / "smollm2-135m-instruct"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=list(table.rows), help="rows to train (default: all)")
    parser.add_argument("--jobs", type=int, default=0, help="rows at the same time; by default one for each CPU core")
    parser.add_argument("--seconds", type=float, default=0, help="end after so long (exit code 124), to go on later")


def use_cores(args: argparse.Namespace) -> None:
    """Sets ``--jobs`` and the folder of the results.

    A small model keeps one thread busy and two by far not: a row for each core makes the most of them, and the time of
    a training is CPU time then.
    """
    cores = len(os.sched_getaffinity(0))
    args.results = args.results or args.out / "results"
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else cores)


class Trainings:
    """What the command line asked for.

    A comparison says how long a row trains, on what, with which options, and how it is measured.
    """

    def __init__(self, args: argparse.Namespace, table: Table) -> None:
        self.args, self.table = args, table
        self.names = with_starts(table, args.only or list(table.rows))
        self.planned = self.pieces()
        self.search_locks = {name: threading.Lock() for name in table.rates}
        self.training_locks: dict[Path, threading.Lock] = {}
        self.device = [] if torch.cuda.is_available() else ["--cpu"]
        self.end = time.monotonic() + args.seconds if args.seconds else math.inf

    def end_on_signals(self) -> None:
        """SIGTERM and Ctrl-C end the time: what runs saves, and ends."""

        def end_now(*_: object) -> None:
            self.end = 0.0

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end_now)

    # ---- what a comparison says --------------------------------------------------------------------------------------

    def updates_of(self, name: str, seed: int, part: float = 1.0) -> int:
        """How many updates a row makes, or a part of its training."""
        raise NotImplementedError

    def batch(self, row: Row) -> int:
        """Utterances of an update."""
        raise NotImplementedError

    def data_of(self, row: Row) -> Path:
        """Folder of the manifests."""
        raise NotImplementedError

    def audio_root(self) -> Path:
        """Folder of the audio that manifests name."""
        raise NotImplementedError

    def options(self, row: Row, updates: int, seed: int, rate: float, subset: str = "") -> list[str]:
        """Options of ``fairseq-train`` that make this row."""
        raise NotImplementedError

    def validation(self, row: Row) -> list[str]:
        """Options of ``fairseq-train`` that say what is validated on."""
        return ["--max-valid-steps", "2", "--batch-size-valid", "16"]

    def measure(self, name: str, seed: int, checkpoint: Path, out: Path) -> None:
        """Measures a trained row."""
        raise NotImplementedError

    def measure_untrained(self, name: str) -> None:
        """Measures a system without training, unless it was measured."""
        raise NotImplementedError

    def more_of(self, name: str, seed: int) -> dict[str, Any]:
        """What else is noted of a row that was trained."""
        return {}

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def pieces(self) -> list[tuple[str, int]]:
        """Rows and seeds: all rows once, the main ones first, then these with the other seeds, then the last ones."""
        first, *others = self.args.seeds
        rows = self.table.rows
        main = [name for name in self.names if name in with_starts(self.table, self.table.main)]
        later = (*main, *self.table.last)
        rest = sorted((name for name in self.names if name not in later), key=lambda name: rows[name].share)
        last = [name for name in self.names if name in self.table.last]
        again = self.names if self.args.only else main
        return [
            *((name, first) for name in main + rest),
            *((n, seed) for seed in others for n in again),
            *((name, first) for name in last),
        ]

    def share_cores(self) -> None:
        """Gives each row its threads; what ran before had all cores. An OMP_NUM_THREADS that is set holds."""
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.args.jobs)))

    def run_all(self) -> None:
        """All pieces, --jobs at a time, each after those that it needs.

        Raises:
            TimeOver: --seconds are over.
        """
        self.share_cores()
        self.args.results.mkdir(parents=True, exist_ok=True)
        pending = [*((name, 0) for name in self.table.untrained), *self.planned]
        running: dict[Future[None], tuple[str, int]] = {}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            while pending or running:
                unfinished = {*pending, *running.values()}
                ready = [
                    (name, seed)
                    for name, seed in pending
                    if not seed or not any((other, seed) in unfinished for other in needs(self.table, name))
                ]
                for piece in ready[: self.args.jobs - len(running)]:
                    pending.remove(piece)
                    running[pool.submit(self.run_piece, *piece)] = piece
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                    done.result()

    def run_piece(self, name: str, seed: int) -> None:
        if name in self.table.untrained:
            self.measure_untrained(name)
        else:
            self.run_row(name, seed)

    def run_row(self, name: str, seed: int) -> None:
        """Trains a row and measures it."""
        folder, result = self.folder(name, seed), self.result(name, seed)
        if not self.is_needed(name, seed):
            return
        self.train_row(name, seed)
        if name not in self.table.hidden and not result.exists():
            measured = self.args.out / f"{name}-seed{seed}.json"
            if not measured.exists() or measured.stat().st_mtime < (folder / "done.json").stat().st_mtime:
                self.measure(name, seed, folder / "checkpoint_last.pt", measured)
            write_json(result, json.loads(measured.read_text()) | self.done(name, seed))

    def is_needed(self, name: str, seed: int) -> bool:
        """Whether it is still to be measured, or a row that needs it."""
        if (name, seed) not in self.planned:
            return False
        if name not in self.table.hidden and not self.result(name, seed).exists():
            return True
        return any(name in needs(self.table, other) and self.is_needed(other, seed) for other in self.names)

    def result(self, name: str, seed: int) -> Path:
        return self.args.results / f"{name}-seed{seed}.json"

    def folder(self, name: str, seed: int) -> Path:
        return self.args.out / "models" / f"{name}-seed{seed}"

    def done(self, name: str, seed: int) -> dict[str, Any]:
        """What was noted of a training; nothing of none."""
        path = self.folder(name, seed) / "done.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if name else {}
        return found

    def heard_before(self, row: Row, seed: int) -> int:
        """Utterances that what it begins with has heard."""
        before = self.done(row.start, seed)
        return int(before.get("utterances_before", 0) + before.get("updates", 0) * before.get("batch", 0))

    def start_of(self, row: Row, seed: int) -> Path | None:
        """The checkpoint that a row goes on from."""
        return self.folder(row.start, seed) / "checkpoint_last.pt" if row.start else None

    # ---- training ----------------------------------------------------------------------------------------------------

    def train_row(self, name: str, seed: int) -> None:
        """Trains a row unless it is trained; the search of a learning rate may ask for the same one meanwhile."""
        folder = self.folder(name, seed)
        with self.training_locks.setdefault(folder, threading.Lock()):
            if not (folder / "done.json").exists():
                self.train_now(name, seed)

    def train_now(self, name: str, seed: int) -> None:
        row, folder = self.table.rows[name], self.folder(name, seed)
        updates, start = self.updates_of(name, seed), self.start_of(row, seed)
        rate = self.learning_rate(self.table.searched(name))
        print(f"\n== {name}, seed {seed}: {updates} updates ({time.strftime('%H:%M:%S')})", flush=True)
        before = self.done(row.start, seed)
        begin = time.monotonic()
        log = self.train(row, folder, updates, seed, start, rate, validate=True)
        done = {
            "row": name,
            "seed": seed,
            "updates": updates,
            "batch": self.batch(row),
            "training_seconds": round(time.monotonic() - begin, 1),
            "train_wall": undisturbed_seconds(log, updates),
            "utterances_before": self.heard_before(row, seed),
            "wall_before": before.get("wall_before", 0.0) + before.get("train_wall", 0.0),
            "rollout_wall": sum_over_epochs(log, "rollout_wall"),
            "commands": [*before.get("commands", []), self.shown_command(row, updates, seed, rate, start)],
            "curve": curve(log),
            "machine": machine(),
            **self.more_of(name, seed),
        }
        write_json(folder / "done.json", done)

    def shown_command(self, row: Row, updates: int, seed: int, rate: float, start: Path | None) -> str:
        """Without the names of the base models and folders."""
        folder = Path("data", *self.data_of(row).parts[len(self.audio_root().parts) :])
        words = ["fairseq-train", str(folder), "--user-dir blspkd_fairseq --task blsp_kd"]
        words += [f"--finetune-from-model models/{start.parent.name}/{start.name}"] if start else []
        return " ".join([*words, *self.options(row, updates, seed, rate)])

    def train(
        self,
        row: Row,
        folder: Path,
        updates: int,
        seed: int,
        start: Path | None,
        rate: float,
        validate: bool,
        subset: str = "",
    ) -> str:
        """Runs ``fairseq-train`` and returns its log, which it also leaves in the folder.

        From a checkpoint of the same command it goes on.
        """
        command = [
            str(Path(sys.executable).with_name("fairseq-train")), str(self.data_of(row)), "--task", "blsp_kd",
            "--user-dir", str(ROOT / "blspkd_fairseq"), "--audio-root", str(self.audio_root()), *self.device,
            "--save-dir", str(folder), "--speech-encoder", self.args.speech_encoder, "--llm", self.args.llm,
            "--num-workers", "0",
            "--no-epoch-checkpoints", "--log-format", "simple", "--log-interval", "1" if not validate else "10",
            *self.options(row, updates, seed, rate, subset),
        ]  # fmt: skip
        command += ["--finetune-from-model", str(start)] if start else []
        if validate:
            interval = str(max(1, updates // VALIDATIONS))
            command += ["--validate-interval-updates", interval, "--validate-interval", "1000000"]
            command += ["--save-interval-updates", interval, "--keep-interval-updates", "1"]
            command += [*self.validation(row), *([] if row.on_policy or row.transcripts else ["--log-all-terms"])]
        else:
            command += ["--disable-validation", "--no-save"]
        asked, log = folder / "command", folder / "train.log"
        if not validate or not asked.exists() or asked.read_text(encoding="utf-8") != "\n".join(command):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(asked, "\n".join(command))
        if code := self.call(command, log):
            said = log.read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"training ended with {code}; see {log}:\n{said[-2000:]}")
        return log.read_text(encoding="utf-8", errors="replace")

    def call(self, command: Sequence[str], log: Path | None = None) -> int:
        """The exit code of a command, whose output goes on in a file.

        Raises:
            TimeOver: --seconds are over; the command was told to end, and has ended.
        """
        if time.monotonic() >= self.end:
            raise TimeOver
        with (log or Path(os.devnull)).open("a", encoding="utf-8") as file:
            output: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
            process = subprocess.Popen(command, cwd=ROOT, **output)
            try:
                while process.poll() is None and time.monotonic() < self.end:
                    time.sleep(POLL)
                if process.returncode is None:
                    process.terminate()  # a training finishes its update and saves
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(PATIENCE)
            finally:
                process.kill()  # what has ended stays as it is
                process.wait()
        if process.returncode and time.monotonic() >= self.end:
            raise TimeOver
        return process.returncode

    def python(self, script: Path, *arguments: Any) -> None:
        """Runs a script, and ends with it if it fails."""
        if code := self.call([sys.executable, str(script), *map(str, arguments)]):
            raise SystemExit(f"{script.name} ended with {code}, as its message above says")

    # ---- learning rates ----------------------------------------------------------------------------------------------

    def search_part(self, name: str) -> float:
        """Share of the row's training that each learning rate is tried for."""
        raise NotImplementedError

    def searches(self) -> bool:
        """Whether learning rates are searched; else each kind takes the middle one."""
        return True

    def learning_rate(self, name: str) -> float:
        """The best of those that are tried on a row, by its validation loss with the first seed.

        Where it is the first or the last of them, more are tried beyond it, as many as the table allows.
        """
        rates = self.table.rates[name]
        if not self.searches():
            return rates[len(rates) // 2]
        with self.search_locks[name]:
            path = self.found_rates(name)
            found = json.loads(path.read_text()) if path.exists() else {}
            losses = found.setdefault("losses", {})
            for _ in range(1 + self.table.widest):
                for rate in rates:
                    if f"{rate:g}" not in losses:
                        self.try_rate(name, rate, found)
                best = best_rate(losses, rates)
                if rates[0] < best < rates[-1]:
                    break
                step = LADDER.index(best) + (1 if best == rates[-1] else -1)
                rates = tuple(sorted((*rates, LADDER[step])))
            return best

    def try_rate(self, name: str, rate: float, found: dict[str, Any]) -> None:
        """Trains a row for a part of its updates and notes its validation loss."""
        row, seed = self.table.rows[name], self.args.seeds[0]
        if row.start:
            self.train_row(row.start, seed)
        folder, start = self.args.out / f"search-{name}", self.start_of(row, seed)
        updates = self.updates_of(name, seed, self.search_part(name))
        print(f"\n== {name} at learning rate {rate:g}: {updates} updates", flush=True)
        points = curve(self.train(row, folder, updates, seed, start, rate, validate=True))
        found |= {"updates": updates, "batch": self.batch(row), "utterances_before": self.heard_before(row, seed)}
        found |= self.more_of(name, seed)
        found["losses"][f"{rate:g}"] = points[-1].get("loss", float("nan")) if points else float("nan")
        write_json(self.found_rates(name), found)
        shutil.rmtree(folder)

    def found_rates(self, name: str) -> Path:
        return self.args.results / f"search-{name}.json"


# ---- rows ------------------------------------------------------------------------------------------------------------


def needs(table: Table, name: str) -> tuple[str, ...]:
    """The rows that must be trained before this one: where it begins, and what says how long it trains."""
    row = table.rows[name]
    return tuple(other for other in (row.start, row.like, row.as_long_as) if other)


def with_starts(table: Table, names: Sequence[str]) -> list[str]:
    """The rows, each after those that it needs."""
    ordered: list[str] = []
    for name in names:
        for row in (*with_starts(table, needs(table, name)), name):
            ordered += [row] if row not in ordered else []
    return ordered


def twin(table: Table, name: str) -> str:
    """The first row with the same options, whose speed it shares."""
    return next(other for other in table.rows if table.rows[other].options == table.rows[name].options)


def best_rate(losses: dict[str, float], rates: Sequence[float]) -> float:
    """That of the smallest loss; a training that ended in NaN is the worst."""
    return min(rates, key=lambda rate: (math.isnan(loss := losses[f"{rate:g}"]), loss))


def at_the_edge(losses: dict[str, float]) -> bool:
    """Whether the best rate is the smallest or the largest that was tried, so that a better one may lie beyond."""
    rates = sorted(float(rate) for rate in losses)
    return best_rate(losses, rates) in (rates[0], rates[-1])


# ---- logs ------------------------------------------------------------------------------------------------------------


def sum_over_epochs(log: str, name: str) -> float:
    """Of a figure that fairseq counts anew in each epoch; 0 if it is not logged.

    A training that went on may say the same epoch twice: the last time it had all of it.
    """
    found = re.findall(rf"\| train \| epoch (\d+) \|.*? {name} ([\d.]+)", log)
    return sum(float(value) for value in dict(found).values())


def undisturbed_seconds(log: str, updates: int) -> float:
    """Seconds of training, had it gone at the pace of the quickest tenth of the log's intervals all the time.

    What else runs on the machine slows a training down to a third, and would count as if it were the row's. Fairseq
    writes whole seconds: of an interval of less than WHOLE_SECONDS its updates per second say more. A log without an
    interval has its sum over epochs.
    """
    paces: list[float] = []
    before: int | None = 0
    for line in log.splitlines():
        if "Loaded checkpoint" in line:  # the interval that was cut off is told with seconds of before
            before = None
        elif found := INTERVAL.search(line):
            speed, number, seconds = float(found[1]), int(found[2]), float(found[3])
            if before is not None and number > before and speed > 0:
                paces.append(seconds / (number - before) if seconds >= WHOLE_SECONDS else 1 / speed)
            before = number
    return updates * float(np.quantile(paces, QUICKEST)) if paces else sum_over_epochs(log, "train_wall")


def curve(log: str) -> list[dict[str, float]]:
    """Figures of each validation, by name; of those of one update, the last."""
    points = {}
    for line in log.splitlines():
        if "valid on 'valid' subset" in line:
            pairs = re.findall(r"\| ([a-z_]+) (-?[\d.]+(?:e-?\d+)?)(?= |$)", line)
            point = {name: float(value) for name, value in pairs}
            points[point.get("num_updates", float(len(points)))] = point
    return list(points.values())


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    threads = int(os.environ["OMP_NUM_THREADS"])
    return f"{threads} thread{'s' * (threads > 1)} of {models[0] if models else 'a CPU'} for each row"


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content) + "\n")
