"""Trains and measures every row of the comparison, in pieces that resume, and writes the report.

    python examples/comparison/compare.py --out out/comparison --minutes 12 --seeds 1 2 3

The first seed trains every row, the others the main ones. A piece is the training or the measuring of one row with one
seed; what is there already is not made again, so that the same command goes on where it was killed, and more seeds add
to what there is. --only trains some rows with all seeds, and those that they begin with. Every row trains for the same
time: so many updates as fit into --minutes by the seconds per update that are measured first on this machine
(OUT/rates.json). As many rows run at a time as there are cores, each on its own: their minutes are CPU minutes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "scripts")]

import generate_responses  # noqa: E402
from measure import write_json  # noqa: E402
from systems import DIVISORS, HIDDEN, LEARNING_RATES, LESS_DATA, MAIN, PUBLISHED, ROWS, UNTRAINED, Row, searched  # noqa: E402

from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROBE_UPDATES = 6  # in each of two epochs
FIRST_COUNTED = 2  # updates before it warm up memory
SEARCH_SHARE = 1 / 3  # of a row's minutes, for each learning rate that is tried
VALIDATIONS = 5  # points of a learning curve


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    comparison.prepare()
    if not args.prepare_only:
        comparison.measure_rates()
        comparison.run_all()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cache = default_cache()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "comparison")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--results", type=Path, help="folder of the measurements (default: OUT/results)")
    parser.add_argument("--speech-encoder", default=str(cache / "whisper-tiny.en"))
    parser.add_argument("--llm", default=str(cache / "smollm2-135m-instruct"))
    parser.add_argument("--sentences", type=int, default=2400, help="of the training set")
    parser.add_argument("--test-sentences", type=int, default=100, help="of each test set")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time of each row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows to train (default: all)")
    parser.add_argument(
        "--updates", type=int, default=0, help="of a whole training, in place of --minutes; no search of learning rates"
    )
    parser.add_argument("--jobs", type=int, default=0, help="rows at the same time; by default one for each CPU core")
    parser.add_argument("--prepare-only", action="store_true", help="make the data and stop")
    args = parser.parse_args(arguments)
    args.results = args.results or args.out / "results"
    cores = len(os.sched_getaffinity(0))
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else cores)
    # A small model keeps one thread busy and two by far not: a row for each core makes the most of them, and the time
    # of a training is CPU time then.
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // args.jobs))
    if args.minutes <= 0 or args.updates < 0:
        parser.error("--minutes must be positive and --updates not negative")
    return args


class Comparison:
    """What the command line asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = args.out / "data"
        self.names = with_starts(args.only or list(ROWS))
        self.planned = self.pieces()
        self.rates: dict[str, list[float]] = {}
        self.rates_lock = threading.Lock()
        self.search_locks = {name: threading.Lock() for name in LEARNING_RATES}
        self.training_locks: dict[Path, threading.Lock] = {}
        self.device = [] if torch.cuda.is_available() else ["--cpu"]

    # ---- data --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Speech, manifests, and the responses of the LLM."""
        args = self.args
        if not (self.data / "real.tsv").exists():
            options = ["--sentences", args.sentences, "--test-sentences", args.test_sentences, "--cache", args.cache]
            python(HERE / "data.py", "--out", self.data, *options)
        (self.data / "responses").mkdir(exist_ok=True)
        for split in ("train", "valid", "heard", "unheard", "real"):
            output = self.data / "responses" / f"{split}.tsv"
            if not output.exists():
                options = ["--max-new-tokens", 16, "--batch-size", 64, "--llm", args.llm]
                inputs = ["--input", self.data / f"{split}.tsv", "--output", output]
                generate_responses.main(list(map(str, [*inputs, *options])))
        for divisor in DIVISORS:
            self.write_part(f"train_{divisor}", args.sentences // divisor)

    def write_part(self, name: str, count: int) -> None:
        """The first rows of the training set, as a set of their own."""
        for folder in (self.data, self.data / "responses"):
            rows = list(Manifest.load(folder / "train.tsv"))[: max(1, count)]
            write_manifest(folder / f"{name}.tsv", rows, list(rows[0]))

    # ---- training ----------------------------------------------------------------------------------------------------

    def measure_rates(self) -> None:
        """Seconds per update of what is to be trained, in its first epoch and later, under the load of trainings."""
        path = self.args.out / "rates.json"
        self.rates = json.loads(path.read_text()) if path.exists() else {}
        if not self.args.updates:
            needed = [name for name, seed in self.planned if self.is_needed(name, seed)]
            searches = [name for name in map(searched, needed) if not self.found_rates(name).exists()]
            names = dict.fromkeys(twin(name) for name in (*needed, *with_starts(searches)))
            for batch in {self.batch(ROWS[name]) for name in names}:  # before the threads that read them
                self.write_part(f"train_probe_{batch}", PROBE_UPDATES * batch)
            with ThreadPoolExecutor(self.args.jobs) as pool:
                list(pool.map(self.measure_rate, names))

    def measure_rate(self, name: str) -> None:
        if name in self.rates:
            return
        row, folder = ROWS[name], self.args.out / f"probe-{name}"
        subset = f"train_probe_{self.batch(row)}"
        log = self.train(row, folder, 2 * PROBE_UPDATES, 1, None, rate=1e-4, validate=False, subset=subset)
        shutil.rmtree(folder)
        seconds = [1 / max(1e-3, float(speed)) for speed in re.findall(r" ups=([\d.]+)", log)]
        first, later = mean(seconds[FIRST_COUNTED:PROBE_UPDATES]), mean(seconds[PROBE_UPDATES:])
        with self.rates_lock:  # the file has all of them, whichever thread writes last
            self.rates[name] = [first, later]
            write_json(self.args.out / "rates.json", self.rates)
        print(f"{name}: {first:.2f} s per update in the first epoch, then {later:.2f} s", flush=True)

    def run_all(self) -> None:
        """All pieces, --jobs at a time, each after the one that it goes on from."""
        self.args.results.mkdir(parents=True, exist_ok=True)
        pending = [*((name, 0) for name in UNTRAINED), *self.planned]
        running: dict[Future[None], tuple[str, int]] = {}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            while pending or running:
                unfinished = {*pending, *running.values()}
                ready = [
                    (name, seed) for name, seed in pending if not seed or (ROWS[name].start, seed) not in unfinished
                ]
                for piece in ready[: self.args.jobs - len(running)]:
                    pending.remove(piece)
                    running[pool.submit(self.run_piece, *piece)] = piece
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                    done.result()

    def run_piece(self, name: str, seed: int) -> None:
        if name in UNTRAINED:
            self.measure_untrained(name)
        else:
            self.run_row(name, seed)

    def pieces(self) -> list[tuple[str, int]]:
        """Rows and seeds: all rows once, the main ones first, then these with the other seeds, then less data."""
        first, *others = self.args.seeds
        main = [name for name in self.names if name in with_starts(MAIN)]
        later = (*main, *PUBLISHED, *LESS_DATA)
        rest = sorted((name for name in self.names if name not in later), key=lambda name: ROWS[name].share)
        last = [name for name in self.names if name in (*PUBLISHED, *LESS_DATA)]
        again = self.names if self.args.only else main
        return [
            *((name, first) for name in main + rest),
            *((n, seed) for seed in others for n in again),
            *((name, first) for name in last),
        ]

    def run_row(self, name: str, seed: int) -> None:
        """Trains a row and measures it."""
        folder, result = self.folder(name, seed), self.args.results / f"{name}-seed{seed}.json"
        if not self.is_needed(name, seed):
            return
        self.train_row(name, seed)
        if name not in HIDDEN and not result.exists():
            measured = self.args.out / f"{name}-seed{seed}.json"
            python(
                HERE / "measure.py", "--data", self.data, "--checkpoint", folder / "checkpoint_last.pt",
                "--whisper", self.args.speech_encoder, "--out", measured, *self.robustness(name, seed),
            )  # fmt: skip
            write_json(result, json.loads(measured.read_text()) | json.loads((folder / "done.json").read_text()))

    def robustness(self, name: str, seed: int) -> list[str]:
        """Noise curves are those of the first seed."""
        return ["--robustness"] if name in UNTRAINED or (name in MAIN and seed == self.args.seeds[0]) else []

    def is_needed(self, name: str, seed: int) -> bool:
        """Whether it is still to be measured, or a row that goes on from it."""
        if (name, seed) not in self.planned:
            return False
        if name not in HIDDEN and not (self.args.results / f"{name}-seed{seed}.json").exists():
            return True
        return any(ROWS[other].start == name and self.is_needed(other, seed) for other in self.names)

    def train_row(self, name: str, seed: int) -> None:
        """Trains a row unless it is trained; the search of a learning rate may ask for the same one meanwhile."""
        folder = self.folder(name, seed)
        with self.training_locks.setdefault(folder, threading.Lock()):
            if not (folder / "done.json").exists():
                self.train_now(name, seed)

    def train_now(self, name: str, seed: int) -> None:
        row, folder = ROWS[name], self.folder(name, seed)
        updates, start = self.updates_of(name), self.start_of(row, seed)
        rate = self.learning_rate(searched(name))
        print(f"\n== {name}, seed {seed}: {updates} updates ({time.strftime('%H:%M:%S')})", flush=True)
        before = json.loads(start.with_name("done.json").read_text()) if start else {}
        begin = time.monotonic()
        log = self.train(row, folder, updates, seed, start, rate, validate=True)
        done = {
            "row": name,
            "seed": seed,
            "updates": updates,
            "batch": self.batch(row),
            "training_seconds": round(time.monotonic() - begin, 1),
            "train_wall": sum_over_epochs(log, "train_wall"),
            "utterances_before": before.get("utterances_before", 0) + before.get("updates", 0) * before.get("batch", 0),
            "wall_before": before.get("wall_before", 0.0) + before.get("train_wall", 0.0),
            "rollout_wall": sum_over_epochs(log, "rollout_wall"),
            "commands": [*before.get("commands", []), self.shown_command(row, updates, seed, rate, start)],
            "curve": curve(log),
            "machine": machine(),
        }
        write_json(folder / "done.json", done)

    def updates_of(self, name: str, part: float = 1.0) -> int:
        """Of this row alone: what fits into its share of the minutes; the speech encoder runs in the first epoch."""
        row = ROWS[name]
        if self.args.updates:
            return max(1, round(self.args.updates * part * row.share))
        seconds = 60 * self.args.minutes * part * row.share
        first, later = self.rates[twin(name)]
        epoch = len(Manifest.load(self.data / "train.tsv")) / row.data_divisor / self.batch(row)
        updates = seconds / first if seconds < epoch * first else epoch + (seconds - epoch * first) / later
        return max(1, round(updates))

    def learning_rate(self, name: str) -> float:
        """The best of those that are tried on a row, by its validation loss with the first seed."""
        if self.args.updates:
            return LEARNING_RATES[name][1]
        with self.search_locks[name]:
            path, row, seed = self.found_rates(name), ROWS[name], self.args.seeds[0]
            found = json.loads(path.read_text()) if path.exists() else {"minutes": self.args.minutes, "losses": {}}
            missing = [rate for rate in LEARNING_RATES[name] if str(rate) not in found["losses"]]
            if missing and row.start:
                self.train_row(row.start, seed)
            folder, start = self.args.out / f"search-{name}", self.start_of(row, seed)
            for rate in missing:
                updates = self.updates_of(name, SEARCH_SHARE)
                print(f"\n== {name} at learning rate {rate}: {updates} updates", flush=True)
                points = curve(self.train(row, folder, updates, seed, start, rate, validate=True))
                found["losses"][str(rate)] = points[-1].get("loss", float("nan")) if points else float("nan")
                write_json(path, found)
            return min(LEARNING_RATES[name], key=lambda rate: (isnan(loss := found["losses"][str(rate)]), loss))

    def found_rates(self, name: str) -> Path:
        return self.args.results / f"search-{name}.json"

    def folder(self, name: str, seed: int) -> Path:
        return self.args.out / "models" / f"{name}-seed{seed}"

    def start_of(self, row: Row, seed: int) -> Path | None:
        """The checkpoint that a row goes on from."""
        return self.folder(row.start, seed) / "checkpoint_last.pt" if row.start else None

    @staticmethod
    def batch(row: Row) -> int:
        return 48 if row.transcripts else 16

    def options(self, row: Row, updates: int, seed: int, rate: float, subset: str = "") -> list[str]:
        """Options of ``fairseq-train`` that make this row."""
        cached = [] if row.trains_encoder else ["--cache-encoder-features"]
        criterion = [] if row.on_policy else ["--criterion", "kl_distillation"]
        shared = f"""
            --arch blsp_kd --speech-encoder-dtype bfloat16 --adapter-pre-layers 1 --adapter-post-layers 1
            --adapter-heads 6 --optimizer adam --clip-norm 1.0 --lr {rate}
            --lr-scheduler polynomial_decay --warmup-updates {max(1, updates // 10)}
            --total-num-update {updates} --max-update {updates}
            --batch-size {self.batch(row)} --seed {seed}
        """
        subset = subset or (f"train_{row.data_divisor}" if row.data_divisor > 1 else "")
        part = ["--train-subset", subset] if subset else []
        return [*shared.split(), *part, *cached, *criterion, *row.options.split()]

    def shown_command(self, row: Row, updates: int, seed: int, rate: float, start: Path | None) -> str:
        """Without the names of the base models and folders."""
        folder = "data" if row.transcripts else "data/responses"
        words = ["fairseq-train", folder, "--user-dir blspkd_fairseq --task blsp_kd"]
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
        """Runs ``fairseq-train`` and returns its log, which it also leaves in the folder."""
        data = self.data if row.transcripts else self.data / "responses"
        command = [
            str(Path(sys.executable).with_name("fairseq-train")), str(data), "--user-dir", str(ROOT / "blspkd_fairseq"),
            "--task", "blsp_kd", "--audio-root", str(self.data), *self.device, "--save-dir", str(folder),
            "--speech-encoder", self.args.speech_encoder, "--llm", self.args.llm, "--num-workers", "0",
            "--no-epoch-checkpoints", "--log-format", "simple", "--log-interval", "1" if not validate else "10",
            *self.options(row, updates, seed, rate, subset),
        ]  # fmt: skip
        command += ["--finetune-from-model", str(start)] if start else []
        if validate:
            interval = str(max(1, updates // VALIDATIONS))
            command += ["--validate-interval-updates", interval, "--validate-interval", "1000000"]
            command += ["--max-valid-steps", "2", "--batch-size-valid", "16"]
            command += [] if row.on_policy or row.transcripts else ["--log-all-terms"]
        else:
            command += ["--disable-validation", "--no-save"]
        shutil.rmtree(folder, ignore_errors=True)  # from a checkpoint in it, training would go on
        folder.mkdir(parents=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        (folder / "train.log").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"training failed; see {folder / 'train.log'}:\n{done.stdout[-2000:]}")
        return done.stdout

    # ---- systems without training ------------------------------------------------------------------------------------

    def measure_untrained(self, name: str) -> None:
        result = self.args.results / f"{name}.json"
        if not result.exists():
            options = ["--cascade", self.args.speech_encoder] if name == "cascade" else []
            options += self.robustness(name, 0)
            python(HERE / "measure.py", "--data", self.data, "--llm", self.args.llm, *options, "--out", result)


def with_starts(names: Sequence[str]) -> list[str]:
    """The rows, each after those that it begins with."""
    ordered: list[str] = []
    for name in names:
        start = ROWS[name].start
        ordered += [row for row in (with_starts([start]) if start else []) + [name] if row not in ordered]
    return ordered


def twin(name: str) -> str:
    """The first row with the same options, whose speed it shares."""
    return next(other for other in ROWS if ROWS[other].options == ROWS[name].options)


def sum_over_epochs(log: str, name: str) -> float:
    """Of a figure that fairseq counts anew in each epoch; 0 if it is not logged."""
    return sum(float(value) for value in re.findall(rf"\| train \|.*? {name} ([\d.]+)", log))


def curve(log: str) -> list[dict[str, float]]:
    """Figures of each validation, by name."""
    points = []
    for line in log.splitlines():
        if "valid on 'valid' subset" in line:
            pairs = re.findall(r"\| ([a-z_]+) (-?[\d.]+(?:e-?\d+)?)(?= |$)", line)
            points.append({name: float(value) for name, value in pairs})
    return points


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    threads = int(os.environ["OMP_NUM_THREADS"])
    return f"{threads} thread{'s' * (threads > 1)} of {models[0] if models else 'a CPU'} for each row"


def python(script: Path, *arguments: Any) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
