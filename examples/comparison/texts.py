"""What was said in the rows that were measured, so that the report is made again without speech.

    python examples/comparison/texts.py --data out/comparison/data --results examples/comparison/results

Writes RESULTS/texts.json: transcript, reference answer, speaker and template of every row of the test sets.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from systems import QUESTIONS, SETS
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples" / "quickstart")]

import sentences as grammar  # noqa: E402

# Kinds of sentences beside those of the quickstart's grammar.
COUNTRY_TEMPLATES = (
    "My {person} moved from {country} to {country}.",
    "What is the weather in {country} on {day}?",
    "My {person} asked me about the capital of {country}.",
    "The capital of {country} is cold {when}.",
)
_COLUMNS = ("src_text", "tgt_text", "speaker")


class Texts(NamedTuple):
    """Attributes: ``rows[set][id]`` of columns; mean hours of an utterance of the training set, where it is known."""

    rows: dict[str, dict[str, dict[str, str]]]
    utterance_hours: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args(arguments)
    texts = from_manifests(args.data)
    write_whole(args.results / "texts.json", json.dumps(texts._asdict(), indent=0, ensure_ascii=False) + "\n")


def load(results: Path, data: Path | None) -> Texts:
    """From ``texts.json`` of the results if it is there, else from the manifests.

    Raises:
        ValueError: neither is there.
    """
    path = results / "texts.json"
    if path.exists():
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Texts(**given)
    if data is None:
        raise ValueError(f"{results} has no texts.json: give --data, the folder of data.py")
    return from_manifests(data)


def from_manifests(data: Path) -> Texts:
    """The rows of all test sets."""
    rows = {
        name: {
            row["id"]: {column: row.get(column, "") for column in _COLUMNS} | {"template": template_of(row["src_text"])}
            for row in Manifest.load(data / f"{name}.tsv")
        }
        for name in (*SETS, *QUESTIONS)
    }
    hours = float(np.mean([int(row["n_frames"]) for row in Manifest.load(data / "train.tsv")])) / 16_000 / 3600
    return Texts(rows, hours)


def template_of(sentence: str) -> str:
    """The kind of sentence of the grammar; "" for any other. Those of one kind fail together."""
    return next((one for one, pattern in _patterns().items() if pattern.fullmatch(sentence)), "")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """What the sentences of each template look like; a country is any word."""
    words = {slot: "|".join(map(re.escape, values)) for slot, values in grammar.SLOTS.items()} | {"country": r"\w+"}
    return {
        one: re.compile("".join(
            f"(?:{words[part[1:-1]]})" if part.startswith("{") else re.escape(part)
            for part in re.split(r"(\{\w+\})", one)
        ))
        for one in (*grammar.TEMPLATES, *COUNTRY_TEMPLATES)
    }  # fmt: skip


def is_speech(text: str) -> bool:
    """Words are left when remarks in brackets are not: "(3 seconds of silence)" is no utterance."""
    return bool(BasicTextNormalizer()(text).strip())


if __name__ == "__main__":
    main()
