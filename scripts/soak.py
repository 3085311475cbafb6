"""Kills, damages and signals in numbers, on tiny models: what is lost, repeated or hangs, as a table.

    bash scripts/soak.sh [--out FOLDER] [--share 0.1] [--only training damage ...]

Every program runs in a process of its own, forked from this one, which has imported everything, and dies by a real
SIGKILL. What it made is compared with what an undisturbed run makes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import generate_responses
import torch
from commands import train
from damage import DAMAGES
from interruptions import EVENTS_OF_A_COPY, EVENTS_OF_A_SAVE, OPTIONS, Kill, Step, World, gone_on, recorded
from tiny import SENTENCES, save_llm, write_speech, write_split

import blspkd_fairseq
from blspkd_fairseq.checkpoint_files import CheckpointError, read_checkpoint, updates_of

PATIENCE = 300.0  # seconds, after which a process hangs
LAST = "checkpoint_last.pt"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Count:
    """A row of the table. Attributes: what was done how often, and what went wrong."""

    what: str
    times: int = 0
    lost: int = 0
    repeated: int = 0
    differing: int = 0
    hangs: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.repeated or self.differing or self.hangs)


# ---- processes -----------------------------------------------------------------------------------------------------


class Child:
    """A program in a process of its own; what it prints goes to a file."""

    def __init__(self, program: Callable[[], Any], log: Path) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(program))

    def _run(self, program: Callable[[], Any]) -> int:
        os.setpgid(0, 0)
        with open(self.log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            program()
            return 0
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()

    def is_running(self) -> bool:
        """Whether it has not ended; then its end is still to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code, as of `subprocess`; None if it had to be killed."""
        end = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < end:
            time.sleep(0.005)
        hung = self.is_running()
        if hung:
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return None if hung else os.waitstatus_to_exitcode(status)


def done(program: Callable[[], Any], work: Path) -> None:
    """Does something in a process of its own: threads that libraries begin here would be missing where it is forked."""
    work.mkdir(parents=True, exist_ok=True)
    assert Child(program, work / "log").wait() == 0, (work / "log").read_text()


def world_in(work: Path) -> World:
    done(lambda: World(work / "world"), work)
    return World(work / "world")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_steps(path: Path) -> list[Step]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Step(update, tuple(utterances), loss) for update, utterances, loss in rows]


class Training:
    """Trainings into one folder, each of which goes on from the one before."""

    def __init__(self, world: World, folder: Path, *options: Any) -> None:
        self.world, self.folder, self.options = world, folder, (*OPTIONS, *options)
        self.runs = 0
        folder.mkdir(parents=True)

    @property
    def save_dir(self) -> Path:
        return self.folder / "save"

    def steps(self) -> Path:
        """Where the steps of the latest run are."""
        return self.folder / f"steps-{self.runs}.jsonl"

    def start(self, *more: Any, kill: Kill | None = None) -> Child:
        self.runs += 1
        noted = os.open(self.steps(), os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def note(step: Step) -> None:
            os.write(noted, (json.dumps(step) + "\n").encode())

        def program() -> None:
            with recorded(kill, kill_self, note):
                train(self.world.data, self.save_dir, self.world.llm, self.world.whisper, *self.options, *more)

        child = Child(program, self.folder / "log")
        os.close(noted)
        return child

    def wait_for_steps(self, child: Child, count: int) -> None:
        end = time.monotonic() + PATIENCE
        while len(read_steps(self.steps())) < count and child.is_running() and time.monotonic() < end:
            time.sleep(0.002)

    def weights(self) -> Any:
        return read_checkpoint(self.save_dir / LAST)["model"]


def compare(count: Count, what: str, steps: list[Step], through: list[Step]) -> None:
    """Adds the utterances that a training lost or saw twice, and says where it differs."""
    if steps == through:
        return
    seen, wanted = ([(s.update, one) for s in run for one in s.utterances] for run in (steps, through))
    lost, repeated = set(wanted) - set(seen), len(seen) - len(set(seen)) + len(set(seen) - set(wanted))
    count.lost, count.repeated, count.differing = count.lost + len(lost), count.repeated + repeated, count.differing + 1
    count.notes.append(f"{what}: {len(lost)} lost, {repeated} repeated, or another loss")


# ---- what is tried -------------------------------------------------------------------------------------------------

SCHEDULES: tuple[tuple[Any, ...], ...] = (
    ("--max-epoch", 3),
    ("--max-epoch", 3, "--num-workers", 2),
    ("--max-epoch", 5, "--update-freq", 2),
    ("--max-epoch", 3, "--batch-size", 3, "--data-buffer-size", 1, "--num-workers", 1),
    ("--max-epoch", 2, "--batch-size", 1),
)


def kill_trainings(work: Path, share: float) -> list[Count]:
    """Kills before updates and within saves, in five kinds of training."""
    anywhere, in_save = Count("training killed at an update"), Count("training killed inside a save")
    world, rng = world_in(work), random.Random(1)
    for number, options in enumerate(SCHEDULES):
        undisturbed = Training(world, work / f"through-{number}", *options)
        assert undisturbed.start().wait() == 0, undisturbed.folder
        through = read_steps(undisturbed.steps())
        updates = through[-1].update
        of_epoch = (updates + 1) // options[1]
        killed, lineage = Training(world, work / f"killed-{number}", *options), list[Step]()
        ends = sorted(rng.sample(range(1, updates), max(1, min(updates - 1, round(share * 10)))))
        ends += [rng.randrange(ends[-1], updates) for _ in range(round(share * 10) - len(ends))]
        for index, update in enumerate(ends):
            events = EVENTS_OF_A_SAVE if (update + 1) % of_epoch else EVENTS_OF_A_COPY
            event = rng.randrange(events) if index % 5 in (1, 3) else None
            count = anywhere if event is None else in_save
            code = killed.start(kill=Kill(update, event)).wait()
            count.times += code == -signal.SIGKILL
            count.hangs += code is None
            if code not in (None, 0, -signal.SIGKILL):
                count.differing += 1
                count.notes.append(f"{options}: exit {code}")
            lineage = gone_on(lineage, read_steps(killed.steps()))
        anywhere.hangs += killed.start().wait() is None
        lineage = gone_on(lineage, read_steps(killed.steps()))
        compare(anywhere, " ".join(map(str, options)), lineage, through)
        left = [path.name for path in killed.save_dir.glob(".*")]
        if left:
            anywhere.notes.append(f"left behind: {left}")
    return [anywhere, in_save]


def damage_checkpoints(work: Path, share: float) -> list[Count]:
    """Every kind of damage to the last checkpoint, and to all of them."""
    last, every = Count("checkpoint_last.pt damaged"), Count("all checkpoints damaged")
    world = world_in(work)
    training = Training(world, work / "whole", "--max-update", 7, "--keep-interval-updates", 9)
    assert training.start().wait() == 0
    through = training.weights()
    for path in training.save_dir.glob("checkpoint_2_7.pt"):
        path.unlink()
    names = list(DAMAGES)[: max(1, round(share * len(DAMAGES)))]
    for number, name in enumerate(names):
        damaged = Training(world, work / f"damaged-{number}", "--max-update", 7)
        shutil.copytree(training.save_dir, damaged.save_dir)
        DAMAGES[name](damaged.save_dir / LAST)
        code = damaged.start().wait()
        last.times, last.hangs = last.times + 1, last.hangs + (code is None)
        said = "going on from checkpoint" in (damaged.folder / "log").read_text()
        if code != 0 or not said or any(not torch.equal(damaged.weights()[n], w) for n, w in through.items()):
            last.differing += 1
            last.notes.append(f"{name}: exit {code}")
        if number % 5 == 0:
            ruined = Training(world, work / f"ruined-{number}", "--max-update", 7)
            shutil.copytree(training.save_dir, ruined.save_dir)
            for path in ruined.save_dir.iterdir():
                DAMAGES[name](path)
            code = ruined.start().wait()
            every.times, every.hangs = every.times + 1, every.hangs + (code is None)
            if code == 0 or CheckpointError.__name__ not in (ruined.folder / "log").read_text():
                every.differing += 1
                every.notes.append(f"{name}: exit {code}")
    return [last, every]


def send_signals(work: Path, share: float) -> list[Count]:
    """Every signal, to a training without workers, to the whole group of one with two, and to one of two processes."""
    world = world_in(work)
    through = {}
    for ranks in (1, 2):
        undisturbed = Training(world, work / f"through-{ranks}", "--max-epoch", 2, "--batch-size", 1)
        assert set(_codes(_start_ranks(undisturbed, ranks, 0))) == {0}
        through[ranks] = undisturbed.weights()
    counts = []
    for number in SIGNALS if share >= 0.5 else SIGNALS[:1]:
        for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
            where = "one of two processes" if ranks == 2 else "a process"
            count = Count(f"{number.name} to {where}, {workers} workers each")
            stopped = Training(world, work / f"{number.name}-{ranks}-{workers}", "--max-epoch", 2, "--batch-size", 1)
            children = _start_ranks(stopped, ranks, workers)
            stopped.wait_for_steps(children[0], 2)
            (os.killpg if ranks == 1 else os.kill)(children[-1].pid, number)
            codes = _codes(children)
            count.times, count.hangs = 1, codes.count(None)
            at = updates_of(stopped.save_dir / LAST)
            if (
                set(codes) != {128 + number}
                or f"stopped after update {at};" not in (stopped.folder / "log").read_text()
            ):
                count.differing += 1
                count.notes.append(f"exit {codes}, {at} updates")
            codes = _codes(_start_ranks(stopped, ranks, workers))
            count.hangs += codes.count(None)
            if set(codes) != {0} or any(not torch.equal(stopped.weights()[n], w) for n, w in through[ranks].items()):
                count.differing += 1
                count.notes.append(f"gone on: exit {codes}, or other weights")
            counts.append(count)
    return counts


def _start_ranks(training: Training, ranks: int, workers: int) -> list[Child]:
    options: tuple[Any, ...] = ("--num-workers", workers, "--data-buffer-size", 1)
    if ranks == 1:
        return [training.start(*options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options += (
        "--distributed-world-size", ranks, "--distributed-no-spawn", "--distributed-init-method",
        f"tcp://127.0.0.1:{port}", "--distributed-backend", "gloo", "--ddp-backend", "pytorch_ddp",
    )  # fmt: skip
    return [training.start(*options, "--distributed-rank", rank) for rank in range(ranks)]


def _codes(children: list[Child]) -> list[int | None]:
    return [child.wait() for child in children]


def kill_responses(work: Path, share: float) -> list[Count]:
    """Kills of the generation of responses at any time."""
    llm = work / "llm"
    done(lambda: save_llm(llm), work)
    write_split(work / "data", "train", 40)

    def program(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        options = ["--llm", str(llm), "--input", str(work / "data/train.tsv"), "--output", str(folder / "train.tsv")]
        generate_responses.main([*options, "--batch-size", "2", "--keep-refusals"])

    return [_kill_at_any_time("generation of responses killed", program, work, round(20 * share))]


def kill_preparation(work: Path, share: float) -> list[Count]:
    """Kills of the preparation of a corpus at any time."""
    (work / "raw").mkdir(parents=True)
    lines = ["path\ttext\tid"]
    for i in range(60):
        write_speech(work / f"raw/{i}.wav", 0.5 + i % 7 / 5, seed=i, rate=22_050)
        lines.append(f"{i}.wav\t{SENTENCES[i % len(SENTENCES)]}\tu{i}")
    (work / "raw/list.tsv").write_text("\n".join(lines) + "\n")

    def program(folder: Path) -> None:
        options = ["--list", f"train={work / 'raw/list.tsv'}", "--output", str(folder), "--src-lang", "en"]
        # Not forked: its workers are spawned, and would import all that this program has.
        script = str(Path(__file__).with_name("import_corpus.py"))
        os.execv(sys.executable, [sys.executable, script, *options, "--processes", "2"])

    return [_kill_at_any_time("preparation of a corpus killed", program, work, round(20 * share))]


def _kill_at_any_time(what: str, program: Callable[[Path], None], work: Path, kills: int) -> Count:
    """Each run goes on where the one before it was killed; when one ends, the next begins anew."""
    count, rng, begin = Count(what), random.Random(2), time.monotonic()
    done(lambda: program(work / "whole"), work)
    seconds, whole = time.monotonic() - begin, _content(work / "whole")
    killed = work / "killed"
    while count.times < kills or killed.exists():
        child = Child(lambda: program(killed), work / "log")
        if count.times < kills:
            time.sleep(rng.uniform(0, seconds / 2))
            if child.is_running():
                os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        if code == -signal.SIGKILL:
            count.times += 1
            continue
        count.hangs += code is None
        if code != 0:
            count.differing += 1
            count.notes.append(f"exit {code}")
        _compare_rows(count, whole, _content(killed))
        shutil.rmtree(killed, ignore_errors=True)
    return count


def _content(folder: Path) -> dict[str, bytes]:
    """What is trained on: each row of the manifests, and the audio."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.flac")}
    for path in folder.rglob("*.tsv"):
        for number, line in enumerate(path.read_bytes().splitlines()):
            content[f"{path.relative_to(folder)}:{number}"] = line
    return content


def _compare_rows(count: Count, whole: dict[str, bytes], killed: dict[str, bytes]) -> None:
    count.lost += len(whole.keys() - killed.keys())
    count.repeated += len(killed.keys() - whole.keys())
    count.differing += sum(killed[name] != whole[name] for name in whole.keys() & killed.keys())


PARTS: dict[str, Callable[[Path, float], list[Count]]] = {
    "training": kill_trainings,
    "damage": damage_checkpoints,
    "signals": send_signals,
    "responses": kill_responses,
    "preparation": kill_preparation,
}


# ---- the table -----------------------------------------------------------------------------------------------------


def markdown(counts: list[Count], seconds: float) -> str:
    lines = ["| what | times | utterances lost | repeated | results that differ | hangs |", "|---|---|---|---|---|---|"]
    lines += [f"| {c.what} | {c.times} | {c.lost} | {c.repeated} | {c.differing} | {c.hangs} |" for c in counts]
    notes = [f"* {count.what}: {note}" for count in counts for note in count.notes]
    return "\n".join([*lines, "", f"{seconds / 60:.0f} minutes.", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for soak.md and soak.json")
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background jobs ignore
    blspkd_fairseq.register()
    import fairseq_cli.train  # noqa: F401  (once for all that is forked)

    begin, counts = time.monotonic(), list[Count]()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        for name in args.only:
            made = PARTS[name](Path(work) / name, args.share)
            for count in made:
                print(f"{count.what}: {count.times} times, {'clean' if count.is_clean else count.notes}", flush=True)
            counts += made
    seconds = time.monotonic() - begin
    print(markdown(counts, seconds))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "soak.md").write_text(markdown(counts, seconds))
        (args.out / "soak.json").write_text(json.dumps([asdict(count) for count in counts], indent=2) + "\n")
    sys.exit(not all(count.is_clean for count in counts))


if __name__ == "__main__":
    main()
