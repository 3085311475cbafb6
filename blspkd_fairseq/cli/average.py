"""Averages the trained parameters of several checkpoints, in fp32.

    blspkd average --inputs checkpoints/checkpoint1.pt checkpoints/checkpoint2.pt --output avg.pt
    blspkd average --inputs checkpoints --num-epoch-checkpoints 5 --output avg.pt

fairseq's own script fails on torch >= 2.6 and sums bf16 weights in bf16.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from blspkd_fairseq.checkpoint_files import read_checkpoint, write_checkpoint


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    paths = find_checkpoints(args.inputs, args.num_epoch_checkpoints, args.num_update_checkpoints)
    if args.output.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"{args.output} is one of the inputs, which would be lost: give --output another name")
    save(average(paths), args.output)
    print(f"averaged {len(paths)} checkpoints into {args.output}:", *(f"  {path}" for path in paths), sep="\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, help="checkpoints, or one folder of them")
    parser.add_argument("--output", type=Path, required=True)
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--num-epoch-checkpoints", type=int, help="the last N checkpointE.pt of the folder")
    last.add_argument("--num-update-checkpoints", type=int, help="the last N checkpoint_E_U.pt of the folder")
    return parser.parse_args(arguments)


def find_checkpoints(inputs: list[Path], epochs: int | None = None, updates: int | None = None) -> list[Path]:
    """The files to average.

    Raises:
        ValueError: none, or fewer than asked for; a file that is missing.
    """
    count = updates if epochs is None else epochs
    if count is not None:
        if count < 1:
            raise ValueError(f"--num-*-checkpoints must be at least 1, got {count}")
        if len(inputs) != 1 or not inputs[0].is_dir():
            raise ValueError("--num-*-checkpoints takes one folder as --inputs")
        pattern = re.compile(r"checkpoint(\d+)\.pt" if epochs is not None else r"checkpoint_\d+_(\d+)\.pt")
        numbered = [(int(m[1]), path) for path in inputs[0].iterdir() if (m := pattern.fullmatch(path.name))]
        if len(numbered) < count:
            raise ValueError(f"{inputs[0]} holds {len(numbered)} checkpoints like {pattern.pattern}, not {count}")
        return [path for _, path in sorted(numbered)[-count:]]
    missing = [str(path) for path in inputs if not path.is_file()]
    if missing:
        raise ValueError(f"no checkpoint at {', '.join(missing)} (for a folder, give --num-epoch-checkpoints N)")
    return inputs


def average(paths: list[Path]) -> dict[str, Any]:
    """The first checkpoint with the mean of all weights in place of its own.

    Raises:
        ValueError: checkpoints of different parameters, or one that is damaged.
    """
    first: dict[str, Any] = {}
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        weights = checkpoint["model"]
        if not first:
            first, total = checkpoint, {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in total.items()}:
            raise ValueError(
                f"{path} has other parameters than {paths[0]}: only checkpoints of one run can be averaged"
            )
        for name, weight in weights.items():
            total[name] += weight.float()
    first["model"] = {name: weight / len(paths) for name, weight in total.items()}
    first.pop("last_optimizer_state", None)  # belongs to none of the averaged weights
    return first


def save(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(checkpoint, path)
