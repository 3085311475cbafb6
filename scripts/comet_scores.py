"""COMET's scores of a file of answers, as row scores for `evaluate` and `compare`.

    python -m venv comet && comet/bin/pip install unbabel-comet
    comet/bin/python scripts/comet_scores.py --answers results/answers/translation/ours.jsonl --out comet/ours.jsonl
    blspkd evaluate ... --row-scores translation/ours:COMET=comet/ours.jsonl

In an environment of its own: COMET needs numpy below 2 and transformers below 5. Needs nothing of this package.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIELDS = {"src": "transcript", "mt": "hypothesis", "ref": "reference"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines: id, transcript, hypothesis, reference")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="Unbabel/wmt22-comet-da", help="name, or path of a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=0)
    args = parser.parse_args(arguments)
    rows = read(args.answers)
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError as error:
        raise ValueError("COMET is not installed: pip install unbabel-comet, in an environment of its own") from error
    path = args.model if Path(args.model).exists() else download_model(args.model)
    inputs = [{ours: row[theirs] for ours, theirs in FIELDS.items()} for row in rows]
    scores = load_from_checkpoint(path).predict(inputs, batch_size=args.batch_size, gpus=args.gpus).scores
    if len(scores) != len(rows):
        raise ValueError(f"COMET gave {len(scores)} scores to {len(rows)} rows")
    signature = f"{args.model}|unbabel-comet:{version('unbabel-comet')}|scale:0-1"
    made = [
        {"id": row["id"], "value": float(one), "signature": signature} for row, one in zip(rows, scores, strict=True)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f".{args.out.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    os.replace(partial, args.out)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, all with the texts that COMET reads.

    Raises:
        ValueError: the first row that lacks one.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if lacking := [name for name in ("id", *FIELDS.values()) if not isinstance(row.get(name), str)]:
            raise ValueError(f"{path}, row {number} has no text in the field {lacking[0]!r}")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"comet_scores: {error}")
