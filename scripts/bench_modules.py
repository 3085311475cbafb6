"""Seconds and peak memory of CIF and of the distillation loss, forward and backward, against public implementations.

    bash scripts/venv.sh bench                                        # installs torch-cif and liger-kernel
    python scripts/bench_modules.py --out scripts/bench_modules.csv

Every implementation computes the same numbers from the same inputs: the table's loss and gradient norm tell. Each has
a process of its own, so that its peak memory is its own, and they take turns, so that a slow minute of the machine
hits all alike; medians are reported. On the CPU all is fp32; with an NVIDIA GPU all but the CIF weights is bf16.

What to know about the others: torch-cif loops over neither time nor batch, and adds every frame to its tokens by
scatter_add, in two passes and more. Plain KL keeps the logits of all positions. Liger's loss (beta 0: KL of student
from teacher) goes in chunks, too, eagerly here like all others; it computes a gradient for the output head even when
that is frozen, which is one more matrix product and a copy of the head, and stays in bf16 if that is what it gets.
"""

import argparse
import csv
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from blspkd_fairseq.files import whole_file
from blspkd_fairseq.modules.cif import continuous_integrate_and_fire
from blspkd_fairseq.modules.distillation_loss import DEFAULT_CHUNK_SIZE, linear_kl_div
from blspkd_fairseq.systems.peak_memory import PeakMemory
from blspkd_fairseq.version import __version__

OURS = "blspkd_fairseq"


class CifInputs(NamedTuple):
    """``features`` [B, T, D] and ``alpha`` [B, T] want gradients; ``upstream`` [B, n, D] is that of the embeddings."""

    features: Tensor
    alpha: Tensor
    target_lengths: Tensor
    upstream: Tensor


class KlInputs(NamedTuple):
    """Hidden states [N, D], of which ``student`` wants a gradient, and the frozen head ``weight`` [V, D]."""

    student: Tensor
    teacher: Tensor
    weight: Tensor


def cif_inputs(shape: dict[str, int], device: str, dtype: torch.dtype) -> CifInputs:
    batch, frames, width, tokens = (shape[name] for name in ("B", "T", "D", "n"))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, frames, width, generator=generator).to(device, dtype)
    alpha = torch.rand(batch, frames, generator=generator) * 2 * tokens / frames  # torch-cif takes up to 1
    upstream = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
    lengths = torch.full((batch,), tokens, device=device)
    return CifInputs(features.requires_grad_(), alpha.to(device).requires_grad_(), lengths, upstream)


def kl_inputs(shape: dict[str, int], device: str, dtype: torch.dtype) -> KlInputs:
    positions, words, width = (shape[name] for name in ("N", "V", "D"))
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(positions, width, generator=generator).to(device, dtype)
    teacher = torch.randn(positions, width, generator=generator).to(device, dtype)
    weight = torch.randn(words, width, generator=generator).mul_(width**-0.5).to(device, dtype)
    return KlInputs(student.requires_grad_(), teacher, weight)


def our_cif(x: CifInputs) -> Tensor:
    embeddings = continuous_integrate_and_fire(x.features, x.alpha, target_lengths=x.target_lengths).embeddings
    return (embeddings * x.upstream).sum()


def torch_cif(x: CifInputs) -> Tensor:
    from torch_cif import cif_function

    embeddings = cif_function(x.features, x.alpha, target_lengths=x.target_lengths)["cif_out"][0]
    return (embeddings * x.upstream).sum()


def our_kl(x: KlInputs) -> Tensor:
    return linear_kl_div(x.student, x.teacher, x.weight).mean()


def plain_kl(x: KlInputs) -> Tensor:
    with torch.no_grad():
        log_p = F.linear(x.teacher, x.weight).float().log_softmax(-1)
    log_q = F.linear(x.student, x.weight).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger_kl(x: KlInputs, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk_size
    )
    no_labels = torch.zeros(len(x.student), dtype=torch.long, device=x.student.device)  # any but ignore_index
    return loss(x.student, x.weight, x.teacher, x.weight, no_labels)


def liger_kl_default_chunks(x: KlInputs) -> Tensor:
    return liger_kl(x, chunk_size=1024)


@dataclass(frozen=True)
class Benchmark:
    """``implementations``: name -> (the distribution it comes from, scalar loss of the inputs); ours comes first."""

    inputs: Callable[..., Any]
    shape: dict[str, int]
    quick_shape: dict[str, int]
    implementations: dict[str, tuple[str, Callable[[Any], Tensor]]]


BENCHMARKS = {
    "cif": Benchmark(
        cif_inputs,
        {"B": 16, "T": 1500, "D": 1024, "n": 100},
        {"B": 3, "T": 50, "D": 8, "n": 7},
        {OURS: (OURS, our_cif), "torch-cif": ("torch-cif", torch_cif)},
    ),
    "kl": Benchmark(
        kl_inputs,
        {"N": 1024, "V": 151_936, "D": 896},
        {"N": 300, "V": 70, "D": 8},
        {
            OURS: (OURS, our_kl),
            "plain F.kl_div": ("torch", plain_kl),
            f"liger-kernel, chunks of {DEFAULT_CHUNK_SIZE}": ("liger-kernel", liger_kl),
            "liger-kernel, chunks of 1024": ("liger-kernel", liger_kl_default_chunks),
        },
    ),
}


class Run(NamedTuple):
    """One forward and backward. ``cpu_seconds`` is the sum over threads; ``peak_mib`` None where it is not known."""

    seconds: float
    cpu_seconds: float
    peak_mib: float | None
    loss: float
    gradient_norm: float


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = []
    for name in args.only or BENCHMARKS:
        shape = BENCHMARKS[name].quick_shape if args.quick else BENCHMARKS[name].shape
        runs = measure_in_turns(name, installed(name), shape, args.device, dtype, args.repeats)
        rows += to_rows(name, runs, shape, args.device, dtype)
    report(rows)
    if args.out:
        write(args.out, rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV; rows of other devices, dtypes and shapes in it are kept")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed runs of each implementation, after one to warm up"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all works")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), help="default: all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no NVIDIA GPU here")
    return args


def installed(benchmark: str) -> list[str]:
    """The implementations whose distribution is here; says which are not."""
    found = []
    for name, (distribution, _) in BENCHMARKS[benchmark].implementations.items():
        if version(distribution):
            found.append(name)
        else:
            print(f"{benchmark}: {name} left out, since it is not installed; to have it: bash scripts/venv.sh bench")
    return found


def version(distribution: str) -> str:
    """Empty if it is not installed."""
    if distribution == OURS:
        return __version__  # of this checkout, whatever is installed
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def measure_in_turns(
    benchmark: str, names: list[str], shape: dict[str, int], device: str, dtype: torch.dtype, repeats: int
) -> dict[str, list[Run]]:
    """Runs of each implementation, the warm-up first."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, benchmark, name, shape, device, dtype), daemon=True)
        process.start()
        theirs.close()  # only the worker holds it now, so that its death is seen here
        workers[name] = process, ours
    runs: dict[str, list[Run]] = {name: [] for name in names}
    turns = [name for _ in range(repeats + 1) for name in names]
    for name in tqdm(turns, desc=f"{benchmark} on {device}", unit="run"):
        process, connection = workers[name]
        try:
            connection.send("run")
            runs[name].append(connection.recv())
        except (EOFError, BrokenPipeError):
            process.join()
            raise SystemExit(
                f"{benchmark}, {name}: its process ended with code {process.exitcode}; what it said stands above "
                "(nothing: it was killed, most likely for want of memory)"
            ) from None
    for process, connection in workers.values():
        connection.close()
        process.join()
    return runs


def serve(
    connection: Connection, benchmark: str, implementation: str, shape: dict[str, int], device: str, dtype: torch.dtype
) -> None:
    """A worker: one run each time it is told to, until the other end is closed."""
    chosen = BENCHMARKS[benchmark]
    _, loss_of = chosen.implementations[implementation]
    # What is imported and set up on first use is no part of the peak.
    run_once(loss_of, chosen.inputs(chosen.quick_shape, device, dtype), device)
    inputs = chosen.inputs(shape, device, dtype)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(run_once(loss_of, inputs, device))


def run_once(loss_of: Callable[[Any], Tensor], inputs: Any, device: str) -> Run:
    for tensor in inputs:
        tensor.grad = None
    peak = PeakMemory(device == "cuda")  # waits for the GPU
    begin, cpu_begin = time.perf_counter(), time.process_time()
    loss = loss_of(inputs)
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return Run(seconds, cpu_seconds, peak.added(), loss.item(), inputs[0].grad.float().norm().item())


def to_rows(
    benchmark: str, runs: dict[str, list[Run]], shape: dict[str, int], device: str, dtype: torch.dtype
) -> list[dict[str, str]]:
    timed = {name: all_[1:] for name, all_ in runs.items()}
    seconds = {name: statistics.median(run.seconds for run in some) for name, some in timed.items()}
    cpu = {name: statistics.median(run.cpu_seconds for run in some) for name, some in timed.items()}
    # The warm-up counts for the peak: it is the only run that found no memory left over from another.
    peaks = {
        name: max((run.peak_mib for run in all_ if run.peak_mib is not None), default=None)
        for name, all_ in runs.items()
    }
    rows = []
    for name, all_ in runs.items():
        peak, our_peak = peaks[name], peaks[OURS]
        rows.append(
            {
                "benchmark": benchmark,
                "implementation": name,
                "version": version(BENCHMARKS[benchmark].implementations[name][0]),
                "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
                "threads": str(torch.get_num_threads()),
                "dtype": str(dtype).removeprefix("torch."),
                "shape": " ".join(f"{key}{size}" for key, size in shape.items()),
                "seconds": f"{seconds[name]:.4f}",
                "cpu_seconds": f"{cpu[name]:.4f}" if device == "cpu" else "",
                "peak_mib": f"{peak:.1f}" if peak is not None else "",
                "seconds_over_ours": f"{seconds[name] / seconds[OURS]:.2f}",
                "cpu_seconds_over_ours": f"{cpu[name] / cpu[OURS]:.2f}" if device == "cpu" else "",
                "peak_over_ours": f"{peak / our_peak:.2f}" if peak and our_peak else "",
                "loss": f"{all_[-1].loss:.5g}",
                "gradient_norm": f"{all_[-1].gradient_norm:.5g}",
                "repeats": str(len(timed[name])),
                "torch": torch.__version__,
            }
        )
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def report(rows: list[dict[str, str]]) -> None:
    """Prints the table; "x ours" is how many times our seconds, CPU seconds or MiB the implementation takes."""
    print(f"{rows[0]['device']}, {rows[0]['threads']} threads, {rows[0]['dtype']}, torch {rows[0]['torch']}")
    print(
        f"{'':35}{'seconds':>9} {'x ours':>7} {'CPU s':>9} {'x ours':>7} {'MiB':>7} {'x ours':>7}  loss, gradient norm"
    )
    columns = ("seconds", "seconds_over_ours", "cpu_seconds", "cpu_seconds_over_ours", "peak_mib", "peak_over_ours")
    for row in rows:
        cells = " ".join(f"{row[name]:>{width}}" for name, width in zip(columns, (9, 7, 9, 7, 7, 7), strict=True))
        print(f"{row['benchmark']:4}{row['implementation']:31}{cells}  {row['loss']}, {row['gradient_norm']}")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Replaces what the file holds of the same benchmarks on this device, in this dtype and shape."""
    keys = ("benchmark", "device", "threads", "dtype", "shape")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = []
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row.get(key) for key in keys) not in new]
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


if __name__ == "__main__":
    main()
