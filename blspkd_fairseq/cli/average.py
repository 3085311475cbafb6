"""Averages the trained parameters of several models, in fp32.

    blspkd average --inputs checkpoints/checkpoint1.pt checkpoints/checkpoint2.pt --output avg.pt
    blspkd average --inputs checkpoints --num-epoch-checkpoints 5 --output avg.pt
    blspkd average --inputs my-model checkpoints/checkpoint_last.pt --output my-mean

Inputs are checkpoints of training and folders of save_pretrained, and what is written is of the first one's kind. They
are of one training, or of trainings that began with the same model; with what they began with among them, less is
forgotten (Wortsman et al., arXiv 2203.05482 and 2109.01903). One that stands there twice counts twice.

fairseq's own script fails on torch >= 2.6 and sums bf16 weights in bf16.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blspkd_fairseq.checkpoint_files import read_checkpoint, write_checkpoint
from blspkd_fairseq.modules.trained_state import check_same_start, is_pretrained, read_trained, write_weights


class Trained(NamedTuple):
    """A model, as one of the inputs holds it.

    Attributes:
        weights: by name, with what :func:`blspkd_fairseq.modules.trained_state.trained_state_dict` adds.
        write: writes others in their place to a path.
    """

    weights: Mapping[str, Tensor]
    write: Callable[[Path, dict[str, Tensor]], None]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    paths = find_checkpoints(args.inputs, args.num_epoch_checkpoints, args.num_update_checkpoints)
    if args.output.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"{args.output} is one of the inputs, which would be lost: give --output another name")
    if args.output.is_dir() != is_pretrained(paths[0]) and args.output.exists():
        raise ValueError(
            f"--output {args.output} is {'a folder' if args.output.is_dir() else 'a file'}, unlike {paths[0]}, whose "
            "kind is written: give it another name"
        )
    average(paths, args.output)
    print(f"averaged {len(paths)} models into {args.output}:", *(f"  {path}" for path in paths), sep="\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", nargs="+", type=Path, required=True,
        help="checkpoints and folders of save_pretrained, or one folder of checkpoints",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True)
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--num-epoch-checkpoints", type=int, help="the last N checkpointE.pt of the folder")
    last.add_argument("--num-update-checkpoints", type=int, help="the last N checkpoint_E_U.pt of the folder")
    return parser.parse_args(arguments)


def find_checkpoints(inputs: list[Path], epochs: int | None = None, updates: int | None = None) -> list[Path]:
    """What to average.

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
    missing = [str(path) for path in inputs if not (path.is_file() or is_pretrained(path))]
    if missing:
        raise ValueError(
            f"no checkpoint and no folder of save_pretrained at {', '.join(missing)} (for a folder of checkpoints, "
            "give --num-epoch-checkpoints N)"
        )
    return inputs


def average(paths: list[Path], output: Path) -> None:
    """Writes the first model with the mean of all weights in place of its own.

    Raises:
        ValueError: models of different parameters, settings or frozen models, or one that is damaged.
    """
    first = read(paths[0])
    total = {name: weight.to(torch.float32, copy=True) for name, weight in first.weights.items()}
    for path in paths[1:]:
        weights = read(path).weights
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in total.items()}:
            raise ValueError(f"{path} has other parameters than {paths[0]}: only models of one shape have a mean")
        check_same_start(weights, first.weights, f"{path} and {paths[0]}")
        for name, weight in weights.items():
            total[name] += weight.float()
    first.write(output, {name: weight / len(paths) for name, weight in total.items()})


def read(path: Path) -> Trained:
    """A checkpoint of training, or a folder of save_pretrained."""
    if is_pretrained(path):
        options, weights = read_trained(path)
        dtype = next(weight.dtype for name, weight in weights.items() if name.startswith("adapter."))
        return Trained(weights, lambda folder, mean: write_weights(folder, options, mean, dtype))
    checkpoint = read_checkpoint(path)

    def write(target: Path, mean: dict[str, Tensor]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The optimizer's state belongs to none of the averaged weights.
        kept: dict[str, Any] = {name: value for name, value in checkpoint.items() if name != "last_optimizer_state"}
        write_checkpoint({**kept, "model": mean}, target)

    return Trained(checkpoint["model"], write)
