"""The gate of a machine with one GPU: what the tests of a CPU cannot show, each step by itself and none for ever.

    bash scripts/gpu_check.sh --out DIR [--device cuda|cpu] [--quick] [--steps a,b,..] [--seconds N] [--quickstart DIR]

A step is a command with a limit: when that is over, all of its processes are killed, and the next one begins. What
steps print goes to DIR/log.txt when they end; DIR/summary.json has their seconds and results after each of them, and
benchmarks leave their tables as CSV. Everything else is written to DIR/work, which is deleted in the end.

steps: versions, device (tests that hold on any device), commands (tests of fairseq's commands), reads (one update of
each criterion, refusing reads of the device), launches (kernels and peak memory of an update), modules and training
(the two benchmarks, the second at three sizes), models, train, resume, generate, evaluate (fairseq's commands as typed,
with 8 workers, stopped in mid-epoch); with --quickstart a folder that holds its models, as in its cache, and its data,
as in its output: inference (the published model's first tokens beside the cascade's), quickstart (its training).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import split
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS, SCRIPTS = ROOT / "tests", ROOT / "scripts"
_EXIT_SECONDS = 60  # after "done training"
_KILL_SECONDS = 10  # a killed command may take to end
_OVERTIME = 15  # seconds behind --seconds at which whatever still runs is killed
_LOG_HEAD, _LOG_TAIL = 50_000, 700_000  # characters of a step's log that are kept
_SOCKET_NAME = 70  # longest folder for temporary files: loaders' sockets lie in it, whose names may have 107 bytes


# ---- the runner -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command of the gate.

    Attributes:
        name: in the table.
        command: its words; none if there is nothing to run.
        limit: seconds.
        told: its result in a few words, from what it printed.
        exits_after: once this was printed, :data:`_EXIT_SECONDS` are left.
        skipped: why it does not run.
        environment: variables beside those of the gate.
    """

    name: str
    command: Sequence[str]
    limit: float
    told: Callable[[str], str] = field(default=lambda printed: "")
    exits_after: str = ""
    skipped: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a step: ``status`` is ok, failed, timeout or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    result: str = ""


class Gate:
    """Runs steps one after another and writes what comes of them.

    Args:
        out: folder of the results.
        environment: variables of all steps.
        seconds: no step begins later.
        exit_seconds: how long a command may take to end after it said that it is done.
    """

    def __init__(
        self, out: Path, environment: Mapping[str, str], seconds: float = 460, exit_seconds: float = _EXIT_SECONDS
    ) -> None:
        self.out, self.environment = out, dict(environment)
        self.seconds, self.exit_seconds = seconds, exit_seconds
        self.begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        (out / "log.txt").write_text("", encoding="utf-8")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether none failed. An interruption ends the step that runs, and the rest is said to be skipped."""
        try:
            for step in steps:
                self._add(self._run(step))
        except KeyboardInterrupt:
            for step in steps[len(self.outcomes) :]:
                self._add(Outcome(step.name, "skipped", result="interrupted"))
        print("\n" + table(self.outcomes), flush=True)
        return all(one.status in ("ok", "skipped") for one in self.outcomes)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"   {outcome.status} after {outcome.seconds:.1f} s  {outcome.result}", flush=True)
        summary = {
            "passed": all(one.status in ("ok", "skipped") for one in self.outcomes),
            "seconds": round(self.elapsed, 1),
            "steps": [vars(one) for one in self.outcomes],
        }
        unfinished = self.out / "summary.part"
        unfinished.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.out / "summary.json")

    def _run(self, step: Step) -> Outcome:
        print(f"== {step.name} ({self.elapsed:.0f} s)", flush=True)
        if step.skipped:
            return Outcome(step.name, "skipped", result=step.skipped)
        left = self.seconds - self.elapsed
        if left <= 0:
            return Outcome(step.name, "skipped", result=f"the {self.seconds:.0f} seconds of --seconds are over")
        begin, printed = time.monotonic(), self.out / "step.txt"
        try:
            ended = self._watch(step, min(step.limit, left + _OVERTIME), printed)
        finally:
            text = printed.read_text(encoding="utf-8", errors="replace") if printed.exists() else ""
            printed.unlink(missing_ok=True)
            with open(self.out / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"\n===== {step.name}: {' '.join(step.command)[:2000]}\n{shorten(text)}\n")
        seconds = round(time.monotonic() - begin, 1)
        if ended:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            told = step.told(text) or last[-300:]
            return Outcome(step.name, "timeout" if "limit" in ended else "failed", seconds, f"{ended}: {told}")
        return Outcome(step.name, "ok", seconds, step.told(text))

    def _watch(self, step: Step, limit: float, printed: Path) -> str:
        """Runs a command; says what went wrong."""
        with open(printed, "wb") as file:
            try:
                process = subprocess.Popen(
                    list(step.command),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.environment | step.environment,
                    cwd=ROOT,
                    start_new_session=True,  # so that all of its processes can be killed
                )
            except OSError as error:
                return f"cannot be started ({error})"
        try:
            return self._wait(process, step, limit, printed)
        finally:
            kill_group(process)

    def _wait(self, process: "subprocess.Popen[bytes]", step: Step, limit: float, printed: Path) -> str:
        end, why = time.monotonic() + limit, f"limit of {limit:.0f} s"
        mark = step.exits_after.encode()
        while process.poll() is None:
            if mark and mark in printed.read_bytes():
                end, mark = min(end, time.monotonic() + self.exit_seconds), b""
                why = f"limit of {self.exit_seconds:.0f} s to exit after {step.exits_after!r}"
            if time.monotonic() > end:
                return why
            time.sleep(0.1)
        return f"exit code {process.returncode}" if process.returncode else ""


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and everything that it started, if it has not ended.

    What hangs inside the card's driver cannot be killed: it is left behind, so that the next step begins.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def shorten(text: str) -> str:
    """The beginning and the end of a long log, without what progress bars wrote over."""
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    if len(text) <= _LOG_HEAD + _LOG_TAIL:
        return text
    return f"{text[:_LOG_HEAD]}\n[... {len(text) - _LOG_HEAD - _LOG_TAIL} characters ...]\n{text[-_LOG_TAIL:]}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Steps, seconds and results."""
    rows = [f"{one.name:15} {one.status:8} {one.seconds:7.1f}  {one.result}" for one in outcomes]
    return "\n".join([f"{'step':15} {'status':8} {'seconds':>7}  result", *rows])


@contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """A killed gate still writes what it has: SIGTERM is an interruption."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- results of steps -----------------------------------------------------------------------------------------------


def last_of(pattern: str) -> Callable[[str], str]:
    """The last match of a pattern in what was printed: its group, if it has one."""

    def told(printed: str) -> str:
        found = re.findall(pattern, printed, re.M)
        return str(found[-1]) if found else ""

    return told


def all_of(pattern: str) -> Callable[[str], str]:
    """All matches."""
    return lambda printed: ", ".join(re.findall(pattern, printed, re.M))


told_results = all_of(r"^result: (.*)$")
told_updates = last_of(r"(num_updates \d+ .*)$")
told_pytest = last_of(r"^(?:=+ )?(\d+ (?:passed|failed|error|deselected)[^=\n]*? in [\d.]+s)")


def told_tests(printed: str) -> str:
    """pytest's count, the names of what failed, and over what two processes spoke."""
    failed = re.findall(r"^(?:FAILED|ERROR) \S*/(test_.+?)(?: - .*)?$", printed, re.M)
    spoken = re.findall(r"two processes spoke over \w+", printed)
    more = [f"and {len(failed) - 8} more"] if len(failed) > 8 else []
    return "; ".join([told_pytest(printed), *spoken[-1:], *failed[:8], *more])


def told_training(path: Path, preset: str, batch: int, variants: str) -> Callable[[str], str]:
    """Utterances per second of these variants in a table of bench_training.py."""

    def told(printed: str) -> str:
        import csv

        if not path.exists():
            return ""
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["models"], row["batch"]) == (preset, str(batch))]
        figures = {row["variant"]: row["utterances_per_second"] for row in rows}
        return ", ".join(f"{name}: {figures[name]}/s" for name in variants.split(",") if name in figures)

    return told


def told_first_tokens(printed: str) -> str:
    """How many times as late the cascade's first token comes, of each length of speech and size of batch."""
    found = re.findall(r"seconds (\S+)  batch (\d+)  system cascade .*first_token_ratio ([\d.]+)", printed)
    return ", ".join(f"{seconds} s, batch {batch}: {ratio}x" for seconds, batch, ratio in found)


# ---- the steps ------------------------------------------------------------------------------------------------------

NO_QUICKSTART = "give its models and data by --quickstart DIR"


def make_steps(args: argparse.Namespace, work: Path) -> list[Step]:
    """All steps, in the order in which they are worth their time."""
    on_cpu = args.device == "cpu"

    def part(name: str) -> list[str]:
        options = ["--out", str(args.out), "--device", args.device, *(["--quick"] if args.quick else [])]
        return [sys.executable, "-u", str(SCRIPTS / "gpu_check.py"), *options, "--part", name]

    return [
        Step("versions", part("versions"), 90, told_results),
        Step("reads", part("reads"), 90, told_results),
        Step("device", pytest_command(work, ["test_on_device.py"], args), 120 if on_cpu else 150, told_tests),
        *fairseq_steps(args, work, part("models")),
        Step("launches", part("launches"), 90, told_results),
        Step("modules", bench_modules_command(args), 90, all_of(r"^((?:cif|kl) +blspkd_fairseq +[\d.]+) ")),
        *(bench_training_step(args, *run) for run in TRAINING_RUNS),
        bench_generation_step(args),
        bench_inference_step(args),
        Step("commands", pytest_command(work, ["test_fairseq_commands.py"], args), 240, told_tests),
        quickstart_step(args, work),
    ]


def pytest_command(work: Path, files: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Tests on the device, in several processes where that is installed and helps."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    spread = ["-n", str(processes)] if processes > 1 and find_spec("xdist") else []
    chosen = ["-k", "checkpoints_hold or results_are_text" if args.quick else ""]
    if "test_on_device.py" in files:
        chosen[1] = "not asks_the_device"  # which is a step of its own
    folder = ["-p", "no:cacheprovider", f"--basetemp={work / files[0].removesuffix('.py')}"]
    # P shows what tests that passed printed, such as over what two processes spoke.
    shown = "-rPfE" if "test_on_device.py" in files else "-rfE"
    options = ["-q", shown, "--durations=5", "--show-capture=stdout", *folder, *spread, *chosen]
    return [sys.executable, "-m", "pytest", *options, *(str(TESTS / one) for one in files)]


def bench_modules_command(args: argparse.Namespace) -> list[str]:
    options = ["--device", args.device, "--out", str(args.out / "bench_modules.csv")]
    options += ["--quick", "--repeats", "2"] if args.quick else ["--repeats", "5"]
    return [sys.executable, "-u", str(SCRIPTS / "bench_modules.py"), *options]


# Preset, batch, variants.
TRAINING_RUNS = (
    ("0.5b", 16, "default options,published,padded rows,float32 products"),
    ("7b", 48, "default options"),
    ("135m", 256, "default options"),
    ("0.5b", 192, "default options"),
    ("7b", 16, "default options,published"),
)


def bench_training_step(args: argparse.Namespace, preset: str, batch: int, variants: str) -> Step:
    path = args.out / "bench_training.csv"
    size, rounds = (2, 1) if args.quick else (batch, 3)
    options = ["--preset", preset, "--device", args.device, "--batch-size", size, "--rounds", rounds]
    options += ["--variants", variants, "--out", path, *(["--quick"] if args.quick else [])]
    command = [sys.executable, "-u", str(SCRIPTS / "bench_training.py"), *map(str, options)]
    return Step(f"training-{preset}-{batch}", command, 100, told_training(path, preset, size, variants))


def bench_generation_step(args: argparse.Namespace) -> Step:
    options = ["--preset", "0.5b", "--device", args.device, "--out", str(args.out / "bench_generation.csv")]
    options += ["--quick", "--batch-size", "2", "--tokens", "4", "--rounds", "1"] if args.quick else []
    command = [sys.executable, "-u", str(SCRIPTS / "bench_generation.py"), *options]
    return Step("generation", command, 90, all_of(r"^(beam \d+ \w+ +[\d.]+ tokens/s)"))


def bench_inference_step(args: argparse.Namespace) -> Step:
    """The published model's first tokens beside the cascade's."""
    if args.quickstart is None:
        return Step("inference", [], 0, skipped=NO_QUICKSTART)
    options = ["--out", str(args.out / "bench_inference.csv"), "--rounds", "1" if args.quick else "2"]
    options += ["--seconds", "3", "--batch", "1", "--tokens", "4"] if args.quick else []
    command = [sys.executable, "-u", str(SCRIPTS / "bench_inference.py"), *options]
    where = {"BLSPKD_CACHE": str(args.quickstart)} | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    return Step("inference", command, 150, told_first_tokens, environment=where)


_TRAINING = """
    --arch blsp_kd --criterion kl_distillation --adapter-pre-layers 1 --adapter-post-layers 1 --adapter-heads 2
    --lora-rank 4 --optimizer adam --lr 1e-3 --clip-norm 1.0 --batch-size 2 --log-format simple --log-interval 1
    --num-workers 8 --disable-validation --save-interval-updates 3 --seed 1
"""
_GENERATION = "--gen-subset test --beam 4 --max-len-b 8 --batch-size 3 --scoring sacrebleu"
_EVALUATION = "--text --llm-dtype float32 --max-new-tokens 6 --batch-size 4 --samples 100 --trials 200"


def fairseq_steps(args: argparse.Namespace, work: Path, make_models: Sequence[str]) -> list[Step]:
    """fairseq's commands as they are typed, on tiny models; a training with 8 workers stops in mid-epoch, twice."""
    tiny, checkpoint = work / "tiny", work / "tiny" / "save" / "checkpoint_last.pt"
    device = ["--cpu"] if args.device == "cpu" else []
    plugin = [tiny / "data", "--user-dir", ROOT / "blspkd_fairseq", "--task", "blsp_kd", *device]
    models = ["--llm", tiny / "llm", "--speech-encoder", tiny / "whisper", "--save-dir", checkpoint.parent]
    train = [*program("fairseq_cli.train"), *plugin, *models, *split(_TRAINING)]
    generate = [*program("fairseq_cli.generate"), *plugin, "--path", checkpoint, *split(_GENERATION)]
    evaluate = [sys.executable, "-m", "blspkd_fairseq.evaluate", "--out", work / "report", "--llm", tiny / "llm"]
    evaluate += ["--asr", tiny / "data" / "test.tsv", "--checkpoint", f"tiny={checkpoint}", *split(_EVALUATION)]

    def trained(name: str, updates: int) -> Step:
        command = [*map(str, train), "--max-update", str(updates)]
        return Step(name, command, 150, told_updates, exits_after="done training")

    return [
        Step("models", make_models, 60),
        trained("train", 3),
        trained("resume", 6),
        Step("generate", [*map(str, generate)], 90, last_of(r"(Translated [^\n]*)")),
        Step("evaluate", [*map(str, evaluate)], 90, last_of(r"^\| (tiny \| [\d.]+)")),
    ]


def program(module: str) -> list[str]:
    """What fairseq's script runs, wherever an installation put that script."""
    return [sys.executable, "-u", "-c", f"from {module} import cli_main; cli_main()"]


def quickstart_step(args: argparse.Namespace, work: Path) -> Step:
    """The training of examples/quickstart/run.sh itself, with this environment's Python and commands."""
    if args.quickstart is None:
        return Step("quickstart", [], 0, skipped=NO_QUICKSTART)
    script = ROOT / "examples" / "quickstart" / "run.sh"
    minutes = "1" if args.quick or args.device == "cpu" else "8"  # so many of two CPU cores
    options = ["--stage", "4", "--stop-stage", "4", "--minutes", minutes]
    folders = ["--out", str(work / "quickstart"), "--cache", str(args.quickstart)]
    path = f"{work / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return Step(
        "quickstart",
        ["bash", str(script), *options, *folders],
        120 if args.device != "cpu" else 300,
        told_updates,
        environment={"PATH": path, "BLSPKD_VENV": "none"},
    )


def prepare_quickstart(folder: Path, work: Path) -> None:
    """A folder in which its training finds the data, and the commands that it calls, of this environment."""
    (work / "quickstart").mkdir()
    (work / "quickstart" / "data").symlink_to((folder / "data").resolve())
    (work / "bin").mkdir()
    commands = {"python": "", "fairseq-train": "-c 'from fairseq_cli.train import cli_main; cli_main()'"}
    for name, arguments in commands.items():
        path = work / "bin" / name
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' {arguments} \"$@\"\n", encoding="utf-8")
        path.chmod(0o755)


# ---- parts that run in a process of their own -----------------------------------------------------------------------


def say(result: str) -> None:
    """One figure of a step."""
    print(f"result: {result}", flush=True)


def show_versions(args: argparse.Namespace) -> None:
    """Versions, the card, and how fast it multiplies."""
    import platform
    from importlib import metadata

    import torch

    names = ("torch", "transformers", "peft", "sacrebleu", "sentencepiece", "pytest")
    found = [f"{name} {metadata.version(name)}" for name in names if find_spec(name)]
    say(f"Python {platform.python_version()} {' '.join(found)}")
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        say(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        say(f"{os.cpu_count()} CPU cores")
    size = 8192 if args.device == "cuda" else 512
    say(f"{size}^3 bf16: {matrix_rate(args.device, size):.3g} TFLOP/s")

    import blspkd_fairseq

    blspkd_fairseq.register()
    say("fairseq has the plugin")


def matrix_rate(device: str, size: int) -> float:
    """TFLOP/s of a product of square matrices in bfloat16; the best of three rounds."""
    import torch

    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = 20 if device == "cuda" else 2
    rates = []
    for _ in range(4):  # the first one warms up
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            one @ other
        synchronize(device)
        rates.append(2 * size**3 * times / (time.perf_counter() - begin) / 1e12)
    return max(rates[1:])


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def refuse_reads(args: argparse.Namespace) -> None:
    """One update of each criterion, in which nothing but what is logged may wait for the device."""
    import tempfile

    import torch
    import updates

    device, failed = torch.device(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        world = updates.TinyWorld(Path(folder))
        for name, case in updates.CASES.items():
            model = world.build(case, device)
            criterion, optimizer = updates.criterion_of(case, model), updates.optimizer_of(model)
            updates.update(model, criterion, world.sample(model, device), optimizer)  # what is looked up once
            sample = world.sample(model, device)
            try:
                with updates.no_host_reads(device):
                    updates.update(model, criterion, sample, optimizer)
            except Exception:
                import traceback

                traceback.print_exc()
                failed.append(name)
    say(f"{len(updates.CASES) - len(failed)} of {len(updates.CASES)} criterions wait for nothing")
    if failed:
        raise SystemExit(f"waits for the device: {', '.join(failed)}")


def count_launches(args: argparse.Namespace) -> None:
    """Kernels and peak memory of one update at the shape of Whisper small and Qwen2.5-0.5B."""
    import launches
    import torch
    import updates

    def count(shape: launches.Shape) -> str:
        model, sample = shape.build(args.device), shape.sample(args.device)
        if model.speech_llm.known_decoder is None:
            raise SystemExit("the LLM's layers are not known here: the warning above says why")
        criterion = updates.criterion_of(updates.Case({}), model)
        # As --optimizer adamw of the recipes has it.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        return launches.count(partial(updates.update, model, criterion, sample, optimizer), args.device)

    shape = launches.Shape.small() if args.quick else launches.Shape()
    for layers in (2, shape.layers) if args.device == "cuda" else (2,):
        say(f"{layers} layers, batch {shape.batch}: {count(shape.with_layers(layers))}")


def make_models(args: argparse.Namespace) -> None:
    """Tiny models and data for fairseq's commands."""
    import tiny

    folder = args.out / "work" / "tiny"
    tiny.save_llm(folder / "llm")
    tiny.save_whisper(folder / "whisper")
    for name, count in (("train", 16), ("valid", 4), ("test", 7)):
        tiny.write_split(folder / "data", name, count, src_lang="en", speaker="s")


PARTS = {"versions": show_versions, "reads": refuse_reads, "launches": count_launches, "models": make_models}


# ---- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.part:
        sys.path[:0] = [str(ROOT), str(TESTS), str(SCRIPTS)]
        import blspkd_fairseq  # noqa: F401  (before transformers, from which it hides a broken torchaudio)

        PARTS[args.part](args)
        return 0
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    (work / "t").mkdir(parents=True)
    try:
        if args.quickstart is not None:
            prepare_quickstart(args.quickstart, work)
        steps = make_steps(args, work)
        chosen = [step for step in steps if not args.steps or step.name in args.steps]
        with interrupted_by_termination():
            passed = Gate(args.out, environment_of(args, work), args.seconds).run(chosen)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every step works")
    parser.add_argument("--steps", type=lambda names: names.split(","), default=[], help="only these (default: all)")
    parser.add_argument("--seconds", type=float, default=460, help="no step begins later (default: 460)")
    parser.add_argument("--quickstart", type=Path, help="folder with its models and data")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    unknown = set(args.steps) - {step.name for step in make_steps(args, args.out / "work")}
    if unknown:
        parser.error(f"unknown --steps {', '.join(sorted(unknown))}")
    if args.quickstart is not None:
        args.quickstart = args.quickstart.resolve()
        if not (args.quickstart / "data" / "responses" / "train.tsv").exists():
            parser.error(f"--quickstart {args.quickstart} holds no data/responses/train.tsv")
    return args


def environment_of(args: argparse.Namespace, work: Path) -> dict[str, str]:
    """Variables of every step: this checkout, no network, one card, and nothing written elsewhere."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if args.device == "cuda" else ""
    caches = ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
    environment = {name: str(work / "cache" / name) for name in caches}
    if len(str(work / "t")) < _SOCKET_NAME:
        environment["TMPDIR"] = str(work / "t")
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if args.device == "cpu" else "4"),
        "CUDA_VISIBLE_DEVICES": card,
        "BLSPKD_TEST_DEVICE": args.device,
    }


if __name__ == "__main__":
    raise SystemExit(main())
