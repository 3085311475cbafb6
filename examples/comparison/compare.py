"""Trains and measures every row of the comparison, in pieces that resume, and writes the report.

    python examples/comparison/compare.py --out out/comparison --minutes 4 --seeds 1 2 3

A piece is the training or the measuring of one row with one seed; what is there already is not made again, so that the
same command goes on where it was killed, and more seeds add to what there is. --only trains some rows, and those that
they begin with. Every row trains for the same time: so many updates as fit into --minutes by the seconds per update
that are measured first, one row after the other, on this machine (OUT/rates.json).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "scripts")]

import generate_responses  # noqa: E402
from systems import HIDDEN, ROWS, UNTRAINED, Row  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROBE_UPDATES = 8
FIRST_COUNTED = 2  # updates before it warm up memory and caches
LEARNING_RATES = {"scratch": 1e-3, "on": 3e-4, "on_policy": 1e-4}
VALIDATIONS = 5  # points of a learning curve


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    comparison.prepare()
    if not args.prepare_only:
        comparison.measure_rates()
        comparison.measure_untrained()
        for seed in args.seeds:
            for name in args.only or ROWS:
                comparison.run_row(name, seed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cache = Path(os.environ.get("BLSPKD_CACHE") or "~/.cache/blspkd_fairseq").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "comparison")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--results", type=Path, help="folder of the measurements (default: OUT/results)")
    parser.add_argument("--speech-encoder", default=str(cache / "whisper-tiny.en"))
    parser.add_argument("--llm", default=str(cache / "smollm2-135m-instruct"))
    parser.add_argument("--sentences", type=int, default=2400, help="of the training set")
    parser.add_argument("--test-sentences", type=int, default=100, help="of each test set")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of each row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows to train (default: all)")
    parser.add_argument("--updates", type=int, default=0, help="updates of a whole training, in place of --minutes")
    parser.add_argument("--prepare-only", action="store_true", help="make the data and stop")
    args = parser.parse_args(arguments)
    args.results = args.results or args.out / "results"
    if args.minutes <= 0 or args.updates < 0:
        parser.error("--minutes must be positive and --updates not negative")
    return args


class Comparison:
    """What the command line asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = args.out / "data"
        self.rates: dict[str, float] = {}
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

    # ---- training ----------------------------------------------------------------------------------------------------

    def measure_rates(self) -> None:
        """Seconds per update of every row, from a few updates."""
        path = self.args.out / "rates.json"
        self.rates = json.loads(path.read_text()) if path.exists() else {}
        if self.args.updates:
            return
        for name in with_starts(self.args.only or list(ROWS)):
            same = [other for other in self.rates if ROWS[other].options == ROWS[name].options]
            if same:
                self.rates[name] = self.rates[same[0]]
            elif name not in self.rates:
                folder = self.args.out / "probe"
                shutil.rmtree(folder, ignore_errors=True)
                log = self.train(ROWS[name], folder, PROBE_UPDATES, seed=1, start=None, validate=False)
                walls = [float(wall) for wall in re.findall(r"num_updates=\d+.*? wall=([\d.]+)", log)]
                counted = walls[FIRST_COUNTED:]
                self.rates[name] = max(1e-3, (counted[-1] - counted[0]) / (len(counted) - 1))
                write_json(path, self.rates)
                print(f"{name}: {self.rates[name]:.2f} s per update", flush=True)

    def run_row(self, name: str, seed: int) -> None:
        """Trains a row and what it begins with, and measures it."""
        row, folder = ROWS[name], self.folder(name, seed)
        result = self.args.results / f"{name}-seed{seed}.json"
        if result.exists():
            return
        if row.start:
            self.run_row(row.start, seed)
        if not (folder / "done.json").exists():
            if row.start and not (self.folder(row.start, seed) / "done.json").exists():
                self.train_row(row.start, seed)
            self.train_row(name, seed)
        if name not in HIDDEN:
            self.args.results.mkdir(parents=True, exist_ok=True)
            measured = self.args.out / f"{name}-seed{seed}.json"
            python(
                HERE / "measure.py", "--data", self.data, "--checkpoint", folder / "checkpoint_last.pt",
                "--whisper", self.args.speech_encoder, "--out", measured,
            )  # fmt: skip
            write_json(result, json.loads(measured.read_text()) | json.loads((folder / "done.json").read_text()))

    def train_row(self, name: str, seed: int) -> None:
        row, folder = ROWS[name], self.folder(name, seed)
        updates = self.updates_of(name)
        shutil.rmtree(folder, ignore_errors=True)
        start = self.folder(row.start, seed) / "checkpoint_last.pt" if row.start else None
        print(f"\n== {name}, seed {seed}: {updates} updates ({time.strftime('%H:%M:%S')})", flush=True)
        begin = time.monotonic()
        log = self.train(row, folder, updates, seed, start, validate=True)
        done = {
            "row": name,
            "seed": seed,
            "updates": updates,
            "batch": self.batch(row),
            "training_seconds": round(time.monotonic() - begin, 1),
            "train_wall": float(re.findall(r"train_wall[= ]([\d.]+)", log)[-1]),
            "rollout_wall": sum(float(wall) for wall in re.findall(r"\| train \|.*? rollout_wall ([\d.]+)", log)),
            "command": self.shown_command(row, updates, seed),
            "curve": curve(log),
            "machine": machine(),
        }
        write_json(folder / "done.json", done)

    def updates_of(self, name: str) -> int:
        """Of this row alone: what fits into its share of the minutes."""
        whole = self.args.updates or 60 * self.args.minutes / self.rates[name]
        return max(1, round(whole * ROWS[name].share))

    def folder(self, name: str, seed: int) -> Path:
        return self.args.out / "models" / f"{name}-seed{seed}"

    @staticmethod
    def batch(row: Row) -> int:
        return 48 if row.transcripts else 16

    def options(self, row: Row, updates: int, seed: int) -> list[str]:
        """Options of ``fairseq-train`` that make this row."""
        kind = "on_policy" if "on_policy" in row.options else "on" if row.start else "scratch"
        cached = [] if "unfreeze" in row.options else ["--cache-encoder-features"]
        criterion = [] if "--criterion" in row.options else ["--criterion", "kl_distillation"]
        shared = f"""
            --arch blsp_kd --speech-encoder-dtype bfloat16 --adapter-pre-layers 2 --adapter-post-layers 2
            --adapter-heads 6 --optimizer adam --clip-norm 1.0 --lr {LEARNING_RATES[kind]}
            --lr-scheduler polynomial_decay --warmup-updates {max(1, updates // 10)}
            --total-num-update {updates} --max-update {updates}
            --batch-size {self.batch(row)} --seed {seed}
        """
        return [*shared.split(), *cached, *criterion, *row.options.split()]

    def shown_command(self, row: Row, updates: int, seed: int) -> str:
        folder = "data" if row.transcripts else "data/responses"
        return f"fairseq-train {folder} --user-dir blspkd_fairseq --task blsp_kd " + " ".join(
            self.options(row, updates, seed)
        )

    def train(self, row: Row, folder: Path, updates: int, seed: int, start: Path | None, validate: bool) -> str:
        """Runs ``fairseq-train`` and returns its log, which it also leaves in the folder."""
        data = self.data if row.transcripts else self.data / "responses"
        command = [
            str(Path(sys.executable).with_name("fairseq-train")), str(data), "--user-dir", str(ROOT / "blspkd_fairseq"),
            "--task", "blsp_kd", "--audio-root", str(self.data), *self.device, "--save-dir", str(folder),
            "--speech-encoder", self.args.speech_encoder, "--llm", self.args.llm, "--num-workers", "0",
            "--no-epoch-checkpoints", "--log-format", "simple", "--log-interval", "1" if not validate else "10",
            *self.options(row, updates, seed),
        ]  # fmt: skip
        command += ["--finetune-from-model", str(start)] if start else []
        if validate:
            interval = str(max(1, updates // VALIDATIONS))
            command += ["--validate-interval-updates", interval, "--validate-interval", "1000000"]
            command += ["--max-valid-steps", "2", "--batch-size-valid", "16"]
            command += [] if "on_policy" in row.options or row.transcripts else ["--log-all-terms"]
        else:
            command += ["--disable-validation", "--no-save"]
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        (folder / "train.log").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"training failed; see {folder / 'train.log'}:\n{done.stdout[-2000:]}")
        return done.stdout

    # ---- systems without training ------------------------------------------------------------------------------------

    def measure_untrained(self) -> None:
        for name in UNTRAINED:
            result = self.args.results / f"{name}.json"
            if not result.exists():
                options = ["--cascade", self.args.speech_encoder] if name == "cascade" else []
                self.args.results.mkdir(parents=True, exist_ok=True)
                python(HERE / "measure.py", "--data", self.data, "--llm", self.args.llm, *options, "--out", result)


def with_starts(names: Sequence[str]) -> list[str]:
    """The rows, each after those that it begins with."""
    ordered: list[str] = []
    for name in names:
        start = ROWS[name].start
        ordered += [row for row in (with_starts([start]) if start else []) + [name] if row not in ordered]
    return ordered


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
    return f"{torch.get_num_threads()} threads of {models[0] if models else 'a CPU'}"


def python(script: Path, *arguments: Any) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
