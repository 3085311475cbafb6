"""Trains and measures every row of the comparison on everyday English, in pieces that resume.

    python examples/open_vocabulary/compare_rows.py --work OUT --utterances 120000 [--search] [--only mix blsp]
    python examples/open_vocabulary/rows_report.py --rows OUT/rows --out OUT/rows/report

OUT is the folder of run.sh, after its stage 4 (and 7, for the recordings); the rows stand in rows.py. All of them learn
from the same utterances, a warm-up without their responses. The frames of a frozen encoder are stored before, in a time
that no row pays. A row hears --utterances, a warm-up's included, and again as many as fit into the minutes of the
reference row, by the time that the trainer's log counts. --search tries learning rates for each kind of row, each
until twice --threshold-hours of speech were heard, and tries more where the best is at the edge; else the middle one is
taken.

The first seed trains every row, the others those of the primary contrasts. The same command goes on where it was
killed. --quick takes a few utterances, to see that everything runs.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "comparison")]

import mix_prompts  # noqa: E402
from rows import LONG, TABLE  # noqa: E402
from systems import Row  # noqa: E402
from trainings import ROOT, Trainings, add_arguments, run_in_pieces, use_cores  # noqa: E402

from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.audio import SAMPLE_RATE  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

QUICK = {"utterances": 24, "batch": 4, "test_rows": 6, "max_new_tokens": 8, "threshold_hours": 0.01}
QUICK_TOKENS = 6  # of an answer
SHORTEST_SEARCH = 1 / 3  # of a row's utterances
RECORDED = ("phone", "game")  # of real people, with no contrast
SETS = ("test", "test_unheard", *RECORDED)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    rows = OpenRows(args)
    rows.end_on_signals()
    rows.prepare()
    rows.run_all()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of run.sh")
    parser.add_argument("--out", type=Path, help="of the trainings (default: WORK/rows)")
    add_arguments(parser, TABLE, default_cache())
    parser.add_argument("--utterances", type=int, default=120_000, help="that a row hears, a warm-up's included")
    parser.add_argument("--batch", type=int, default=16, help="utterances of an update; of a warm-up thrice")
    parser.add_argument("--layers", type=int, default=1, help="of the CFormer, before and after CIF each")
    parser.add_argument("--augment", default="", help="as of fairseq-train; then no frames are stored")
    parser.add_argument("--num-workers", type=int, default=0, help="that load audio, with --augment")
    parser.add_argument("--search", action="store_true", help="search the learning rate of each kind of row")
    parser.add_argument("--threshold-hours", type=float, default=30, help="heard before rows say anything (README)")
    parser.add_argument("--test-rows", type=int, default=200, help="of each test set")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of a response that is learnt")
    parser.add_argument("--quick", action="store_true", help="a few utterances, to see that everything runs")
    args = parser.parse_args(arguments)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(arguments)
    for name in ("utterances", "batch", "layers", "test_rows", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.work = args.work.resolve()
    args.out = (args.out or args.work / "rows").resolve()
    use_cores(args)
    return args


class OpenRows(Trainings):
    """What the command line asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, TABLE)
        self.data = args.work / "data"

    # ---- data --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Responses to every prompt that a row learns, parts of the data, and the frames of the encoder.

        Raises:
            ValueError: the folders lack something, or belong to other options.
        """
        if not (self.asked("") / "train.tsv").exists():
            raise ValueError(f"{self.asked('')} holds no train.tsv: run.sh --out {self.args.work} --stop-stage 4 first")
        self.keep_options()
        needed = [self.table.rows[name] for name, seed in self.planned if self.is_needed(name, seed)]
        for prompt in sorted({row.responses for row in needed} - {""}):
            self.respond(prompt)
        for divisor in sorted({row.data_divisor for row in needed} - {1}):
            write_part(self.asked(""), divisor)
        stored = self.args.out / "frames.done"
        if needed and not self.args.augment and not stored.exists():
            row = self.table.rows["warm_up"]
            updates = math.ceil(self.size(row)[0] / self.batch(row))
            self.train(row, self.args.out / "frames", updates, 1, None, 1e-4, validate=False)
            stored.touch()

    def asked(self, responses: str) -> Path:
        """Folder of the manifests with responses to one prompt, or to the mix."""
        return self.data / f"asked{responses and '-'}{responses}" / "responses"

    def respond(self, prompt: str) -> None:
        folder = self.asked(prompt).parent
        if all((folder / "responses" / f"{split}.tsv").exists() for split in ("train", "valid")):
            return
        mix_prompts.asked_again(self.asked("").parent, folder, prompt, ("train", "valid"))
        for split in ("train", "valid"):
            self.python(
                ROOT / "scripts" / "generate_responses.py", "--llm", self.args.llm, "--input", folder / f"{split}.tsv",
                "--output", folder / "responses" / f"{split}.tsv", "--max-new-tokens", self.args.max_new_tokens,
                "--batch-size", 128 if self.device else 512,
            )  # fmt: skip

    def keep_options(self) -> None:
        """Other options would train other rows into the same folder.

        Raises:
            ValueError: the folder holds rows of other options.
        """
        names = ("utterances", "batch", "layers", "augment", "search", "threshold_hours", "speech_encoder", "llm")
        given = {name: getattr(self.args, name) for name in names}
        path = self.args.out / "options.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else given
        if changed := [name for name in names if before[name] != given[name]]:
            raise ValueError(
                f"{self.args.out} holds rows of --{changed[0].replace('_', '-')} {before[changed[0]]}, not "
                f"{given[changed[0]]}: give another --out, or remove that folder"
            )
        self.args.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(given) + "\n")

    # ---- how long ----------------------------------------------------------------------------------------------------

    def updates_of(self, name: str, seed: int, part: float = 1.0) -> int:
        row = self.table.rows[name]
        if not row.like:
            return max(1, round(self.args.utterances * row.share * part / self.batch(row)))
        like = self.done(row.like, seed)
        seconds = seconds_of(self.done(row.as_long_as, seed)) - seconds_of(self.done(row.start, seed))
        return max(1, round(seconds * part * like["updates"] / max(1e-3, like["train_wall"])))

    def searches(self) -> bool:
        return bool(self.args.search)

    def search_part(self, name: str) -> float:
        """Until twice the hours of the threshold were heard; at least a third, at most all of the row's utterances."""
        row = self.table.rows[name]
        count, hours = self.size(row)
        wanted = 2 * self.args.threshold_hours * count / hours
        wanted -= self.heard_before(row, self.args.seeds[0])
        return min(1.0, max(SHORTEST_SEARCH, wanted / (self.args.utterances * row.share)))

    # ---- rows --------------------------------------------------------------------------------------------------------

    def batch(self, row: Row) -> int:
        return self.args.batch * (3 if row.transcripts else 1)

    def data_of(self, row: Row) -> Path:
        return self.asked(row.responses)

    def audio_root(self) -> Path:
        return self.data

    def subset(self, row: Row) -> str:
        return f"train_{row.data_divisor}" if row.data_divisor > 1 else "train"

    def size(self, row: Row) -> tuple[int, float]:
        """Utterances and hours of what it trains on."""
        return count_and_hours(self.data_of(row) / f"{self.subset(row)}.tsv")

    def options(self, row: Row, updates: int, seed: int, rate: float, subset: str = "") -> list[str]:
        shared = f"""
            --arch blsp_kd --speech-encoder-dtype bfloat16 --product-dtype bfloat16
            --adapter-pre-layers {self.args.layers} --adapter-post-layers {self.args.layers} --adapter-heads 6
            --optimizer adamw --adam-betas (0.9,0.98) --clip-norm 1.0 --lr {rate:g}
            --lr-scheduler polynomial_decay --warmup-updates {max(1, updates // 10)}
            --total-num-update {updates} --max-update {updates}
            --batch-size {self.batch(row)} --seed {seed} --train-subset {subset or self.subset(row)}
        """
        frames = ["--augment", self.args.augment, "--num-workers", str(self.args.num_workers)]
        if not self.args.augment:
            frames = [] if row.trains_encoder else ["--cache-encoder-features"]
        criterion = [] if row.on_policy else ["--criterion", "kl_distillation"]
        return [*shared.split(), *frames, *criterion, *row.options.split()]

    def validation(self, row: Row) -> list[str]:
        return ["--max-valid-steps", "8", "--batch-size-valid", "16"]

    def more_of(self, name: str, seed: int) -> dict[str, Any]:
        count, hours = self.size(self.table.rows[name])
        return {"hours": round(hours, 4), "utterance_hours": hours / count}

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, name: str, seed: int, checkpoint: Path, out: Path) -> None:
        answers = ["repeat", "chat", "continue", *(["long"] if name in LONG else [])]
        self.hear(out, answers, "--checkpoint", checkpoint)

    def measure_untrained(self, name: str) -> None:
        result = self.args.results / f"{name}.json"
        if not result.exists():
            cascade = ["--cascade", self.args.speech_encoder] if name == "cascade" else []
            self.hear(result, ["repeat", "chat", "continue", "long"], "--llm", self.args.llm, *cascade)

    def hear(self, out: Path, answers: Sequence[str], *system: Any) -> None:
        found = {name: path for name, path in self.sets().items() if path.exists() and len(Manifest.load(path))}
        sets = [word for name, path in found.items() for word in ("--set", f"{name}={path}")]
        self.python(
            HERE / "hear.py", *system, *sets, "--audio-root", self.data, "--rows", self.args.test_rows,
            "--llm-dtype", "float32", "--batch-size", 48, "--repeat-only", *[n for n in found if n in RECORDED],
            "--answers", *answers, "--out", out, *(["--most-tokens", QUICK_TOKENS] if self.args.quick else []),
        )  # fmt: skip

    def sets(self) -> dict[str, Path]:
        recordings = self.args.work / "sets"
        return {n: (self.asked("") if n.startswith("test") else recordings) / f"{n}.tsv" for n in SETS}


def seconds_of(done: dict[str, Any]) -> float:
    """Seconds of training, with those of what it began with."""
    return float(done.get("wall_before", 0.0)) + float(done.get("train_wall", 0.0))


@cache
def count_and_hours(manifest: Path) -> tuple[int, float]:
    """Rows, and hours of speech."""
    frames = [int(row["n_frames"]) for row in Manifest.load(manifest)]
    return len(frames), sum(frames) / SAMPLE_RATE / 3600


def write_part(folder: Path, divisor: int) -> None:
    """FOLDER/train_DIVISOR.tsv, a part of train.tsv; every part holds the smaller ones."""
    rows = list(Manifest.load(folder / "train.tsv"))
    chosen = mix_prompts.chosen(rows, max(1, len(rows) // divisor))
    write_manifest(folder / f"train_{divisor}.tsv", [dict(row) for row in chosen], list(rows[0]))


if __name__ == "__main__":
    try:
        run_in_pieces(main)
    except (ValueError, OSError) as error:
        sys.exit(f"compare_rows: {error}")
