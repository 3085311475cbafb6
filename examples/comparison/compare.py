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
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "scripts")]

import generate_responses  # noqa: E402
from systems import DIVISORS, MAIN, TABLE, Row  # noqa: E402
from trainings import (  # noqa: E402
    ROOT,
    Trainings,
    add_arguments,
    run_in_pieces,
    twin,
    use_cores,
    with_starts,
    write_json,
)

from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402

HERE = Path(__file__).resolve().parent
PROBE_UPDATES = 6  # in each of two epochs
FIRST_COUNTED = 2  # updates before it warm up memory
SEARCH_SHARE = 1 / 3  # of a row's minutes, for each learning rate that is tried


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    comparison.end_on_signals()
    comparison.prepare()
    if not args.prepare_only:
        comparison.measure_rates()
        comparison.run_all()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "comparison")
    add_arguments(parser, TABLE, default_cache())
    parser.add_argument("--sentences", type=int, default=2400, help="of the training set")
    parser.add_argument("--test-sentences", type=int, default=100, help="of each test set")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time of each row")
    parser.add_argument(
        "--updates", type=int, default=0, help="of a whole training, in place of --minutes; no search of learning rates"
    )
    parser.add_argument("--prepare-only", action="store_true", help="make the data and stop")
    args = parser.parse_args(arguments)
    use_cores(args)
    if args.minutes <= 0 or args.updates < 0:
        parser.error("--minutes must be positive and --updates not negative")
    return args


class Comparison(Trainings):
    """What the command line asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, TABLE)
        self.data = args.out / "data"
        self.rates: dict[str, list[float]] = {}
        self.rates_lock = threading.Lock()

    # ---- data --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Speech, manifests, and the responses of the LLM."""
        args = self.args
        if not (self.data / "real.tsv").exists():
            options = ["--sentences", args.sentences, "--test-sentences", args.test_sentences, "--cache", args.cache]
            self.python(HERE / "data.py", "--out", self.data, *options)
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

    # ---- time -----------------------------------------------------------------------------------------------------

    def measure_rates(self) -> None:
        """Seconds per update of what is to be trained, in its first epoch and later, under the load of trainings."""
        self.share_cores()
        path = self.args.out / "rates.json"
        self.rates = json.loads(path.read_text()) if path.exists() else {}
        if not self.args.updates:
            needed = [name for name, seed in self.planned if self.is_needed(name, seed)]
            searches = [name for name in map(TABLE.searched, needed) if not self.found_rates(name).exists()]
            names = dict.fromkeys(twin(TABLE, name) for name in (*needed, *with_starts(TABLE, searches)))
            for batch in {self.batch(TABLE.rows[name]) for name in names}:  # before the threads that read them
                self.write_part(f"train_probe_{batch}", PROBE_UPDATES * batch)
            with ThreadPoolExecutor(self.args.jobs) as pool:
                list(pool.map(self.measure_rate, names))

    def measure_rate(self, name: str) -> None:
        if name in self.rates:
            return
        row, folder = TABLE.rows[name], self.args.out / f"probe-{name}"
        subset = f"train_probe_{self.batch(row)}"
        log = self.train(row, folder, 2 * PROBE_UPDATES, 1, None, rate=1e-4, validate=False, subset=subset)
        shutil.rmtree(folder)
        seconds = [1 / max(1e-3, float(speed)) for speed in re.findall(r" ups=([\d.]+)", log)]
        first, later = mean(seconds[FIRST_COUNTED:PROBE_UPDATES]), mean(seconds[PROBE_UPDATES:])
        with self.rates_lock:  # the file has all of them, whichever thread writes last
            self.rates[name] = [first, later]
            write_json(self.args.out / "rates.json", self.rates)
        print(f"{name}: {first:.2f} s per update in the first epoch, then {later:.2f} s", flush=True)

    def updates_of(self, name: str, seed: int, part: float = 1.0) -> int:
        """Of this row alone: what fits into its share of the minutes; the speech encoder runs in the first epoch."""
        row = TABLE.rows[name]
        if self.args.updates:
            return max(1, round(self.args.updates * part * row.share))
        seconds = 60 * self.args.minutes * part * row.share
        first, later = self.rates[twin(TABLE, name)]
        epoch = len(Manifest.load(self.data / "train.tsv")) / row.data_divisor / self.batch(row)
        updates = seconds / first if seconds < epoch * first else epoch + (seconds - epoch * first) / later
        return max(1, round(updates))

    def searches(self) -> bool:
        return not self.args.updates

    def search_part(self, name: str) -> float:
        return SEARCH_SHARE

    # ---- rows --------------------------------------------------------------------------------------------------------

    def batch(self, row: Row) -> int:
        return 48 if row.transcripts else 16

    def data_of(self, row: Row) -> Path:
        return self.data if row.transcripts else self.data / "responses"

    def audio_root(self) -> Path:
        return self.data

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

    def measure(self, name: str, seed: int, checkpoint: Path, out: Path) -> None:
        robustness = ["--robustness"] if name in MAIN and seed == self.args.seeds[0] else []  # curves of the first seed
        self.python(
            HERE / "measure.py", "--data", self.data, "--checkpoint", checkpoint, "--whisper", self.args.speech_encoder,
            "--out", out, *robustness,
        )  # fmt: skip

    def measure_untrained(self, name: str) -> None:
        result = self.args.results / f"{name}.json"
        if not result.exists():
            options = ["--cascade", self.args.speech_encoder] if name == "cascade" else []
            options += ["--robustness", "--out", str(result)]
            self.python(HERE / "measure.py", "--data", self.data, "--llm", self.args.llm, *options)


if __name__ == "__main__":
    run_in_pieces(main)
