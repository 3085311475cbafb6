"""Says what each row is asked for, and adds rows in which nobody says anything.

    python examples/open_vocabulary/mix_prompts.py --data DIR --rows 8000 --mix chat:0.5 continue:0.3 repeat:0.2

DIR/asked/train.tsv, valid.tsv, ... are sentences of DIR's manifests in a random order, with the columns ``prompt``
(drawn with these shares: the student answers well what it learns to answer) and ``teacher_text``; audio is relative to
DIR. Lists of words are asked nothing.
DIR/asked/nothing.tsv are clips without speech that training does not have.

    python examples/open_vocabulary/mix_prompts.py --data DIR --repeats 8000

Afterwards, when DIR/asked/responses has the LLM's responses: DIR/asked/distilled has them and up to so many other rows
to "repeat", whose response is their own transcript, so that no LLM need write one.
"""

import argparse
import hashlib
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from no_speech import COLUMNS as SPOKEN
from no_speech import TEACHER_TEXTS, write_clips
from speak import LIST_ID

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import PROMPTS, resolve_prompt

MIX = {"chat": 0.5, "continue": 0.3, "repeat": 0.2}
HELD_OUT = ("valid", "test", "test_unheard")
COLUMNS = (*SPOKEN, "prompt", "teacher_text")


def prompt_of(row_id: str, mix: Mapping[str, float]) -> str:
    """What a row is asked for: drawn by its id alone."""
    return random.Random(f"prompt {row_id}").choices(list(mix), list(mix.values()))[0]


def chosen(rows: Sequence[Mapping[str, object]], count: int) -> list[Mapping[str, object]]:
    """``count`` random rows (0: all), in a random order of which every prefix is a random choice."""
    order = sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())
    return order[: count or None]


def asked(row: Mapping[str, object], prompt: str, is_speech: bool) -> dict[str, object]:
    """A row with its prompt and, where nobody speaks, what makes the teacher say so."""
    cells = {name: row[name] for name in SPOKEN}
    return {**cells, "prompt": prompt, "teacher_text": "" if is_speech else TEACHER_TEXTS[prompt]}


def asked_again(folder: Path, target: Path, prompt: str, splits: Sequence[str]) -> None:
    """The rows of the manifests in a folder, all of them asked for one thing."""
    target.mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = [
            {**row, "prompt": prompt, "teacher_text": TEACHER_TEXTS[prompt] if row.get("teacher_text") else ""}
            for row in Manifest.load(folder / f"{split}.tsv")
        ]
        write_manifest(target / f"{split}.tsv", rows, COLUMNS)


def make(data: Path, rows: int, held_out: int, nothing: int, mix: Mapping[str, float]) -> None:
    """Everything in the module's text."""
    voices = Manifest.load(data / "train.tsv")
    (data / "asked").mkdir(exist_ok=True)
    silent = {name: share for name, share in mix.items() if name in TEACHER_TEXTS} or {"chat": 1.0}
    for split in ("train", *HELD_OUT):
        if split in HELD_OUT and not (data / f"{split}.tsv").exists():
            continue
        spoken = Manifest.load(data / f"{split}.tsv")
        found: list[Mapping[str, object]] = [row for row in spoken if not row["id"].startswith(LIST_ID)]
        made = [
            asked(row, prompt_of(str(row["id"]), mix), True)
            for row in chosen(found, held_out if split in HELD_OUT else rows)
        ]
        if split == "train" and nothing:
            clips = write_clips(data, "train", nothing, voices, data)
            made += [asked(row, prompt_of(str(row["id"]), silent), False) for row in clips]
            made = [dict(row) for row in chosen(made, 0)]
        write_manifest(data / "asked" / f"{split}.tsv", made, COLUMNS)
        counts = Counter(str(row["prompt"]) for row in made).most_common()
        print(f"{data / 'asked' / split}.tsv: {len(made)} rows: {', '.join(f'{n} {prompt}' for prompt, n in counts)}")
    clips = write_clips(data, "test", nothing and 100, voices, data)
    write_manifest(data / "asked" / "nothing.tsv", [asked(row, "chat", False) for row in clips], COLUMNS)


def add_repeats(data: Path, count: int) -> None:
    """The rows that the LLM answered, and up to ``count`` others to repeat, in ``asked/distilled``."""
    answered = list(Manifest.load(data / "asked" / "responses" / "train.tsv"))
    ids = {row["id"] for row in answered}
    rest = chosen([row for row in Manifest.load(data / "train.tsv") if row["id"] not in ids], count)
    repeats = [{**asked(row, "repeat", True), "tgt_text": row["src_text"], "cut": "0"} for row in rest]
    target = data / "asked" / "distilled"
    target.mkdir(exist_ok=True)
    shutil.copy(data / "asked" / "responses" / "valid.tsv", target)
    write_manifest(target / "train.tsv", [*answered, *repeats])
    print(f"{target / 'train.tsv'}: {len(answered)} answered rows and {len(repeats)} to repeat")


def read_mix(texts: Sequence[str]) -> dict[str, float]:
    """Shares of prompts from ``NAME:SHARE``.

    Raises:
        ValueError: an unknown prompt, or no share.
    """
    mix: dict[str, float] = {}
    for text in texts:
        name, _, share = text.rpartition(":")
        try:
            mix[name] = float(share)
        except ValueError:
            raise ValueError(f"--mix {text!r} has no share: write {name or text}:0.5") from None
        if name not in PROMPTS or mix[name] < 0:
            raise ValueError(f"--mix {text!r}: give one of {', '.join(PROMPTS)} with a share of 0 or more")
        resolve_prompt(name, "en", "en")
    if not sum(mix.values()):
        raise ValueError("--mix gives every prompt the share 0: nothing could be drawn")
    return mix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of speak.py")
    parser.add_argument("--rows", type=int, default=0, help="of training (default: all)")
    parser.add_argument("--held-out", type=int, default=0, help="rows of each other split (default: all)")
    parser.add_argument("--nothing", type=int, default=400, help="clips without speech in training")
    parser.add_argument("--mix", nargs="+", default=[f"{name}:{share}" for name, share in MIX.items()])
    parser.add_argument("--repeats", type=int, default=0, help="only add up to so many rows to the answered ones")
    args = parser.parse_args(arguments)
    if min(args.rows, args.held_out, args.nothing, args.repeats) < 0:
        parser.error("--rows, --held-out, --nothing and --repeats must not be negative")
    if args.repeats:
        return add_repeats(args.data, args.repeats)
    make(args.data, args.rows, args.held_out, args.nothing, read_mix(args.mix))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"mix_prompts: {error}")
