"""Checks the manifests of a data directory and the audio that they name.

    blspkd validate DATA [--audio all|sample|none]

DATA is a folder, whose sets are compared with each other, or one manifest.

Problems (a manifest or audio that training could not use, empty texts, audio of the training set in another set) make
it end with status 1; warnings (texts, audio or speakers that come twice, audio in which nothing can be heard, cells
in a spreadsheet's quotes, unknown languages) do not, unless --strict is given.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE, AudioError, find_flaw, load_audio
from blspkd_fairseq.data.conversation import TAUGHT_TWICE, AudioPart, ConversationError, read_conversation
from blspkd_fairseq.data.languages import find_language
from blspkd_fairseq.data.manifest import Manifest, ManifestError, response_is_cut
from blspkd_fairseq.data.prompts import PromptError, resolve_prompt
from blspkd_fairseq.data.same_recordings import Place, shared_recordings

_TEXTS = ("src_text", "tgt_text")
_SHOWN = 20  # of each kind of finding
_COMPARED = ("audio", "sentence", "speaker")


@dataclass
class Findings:
    """What was found; every line names a file and, where there is one, a line.

    Attributes:
        problems, warnings: what is wrong, and what may be.
        table: statistics of the splits, as text.
        audio: how much audio was decoded, by split.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table: str = ""
    audio: dict[str, int] = field(default_factory=dict)


def validate(
    data: Path,
    audio: str = "sample",
    sample: int = 200,
    seed: int = 1,
    audio_root: Path | None = None,
    threads: int = 4,
) -> Findings:
    """Checks all manifests (``*.tsv`` but ``*.dropped.tsv``) in a folder, or one of them by itself.

    Args:
        data: the folder, or the manifest.
        audio: decode ``all``, a ``sample`` of each split or ``none``.
        sample: rows in the sample.
        seed: of the sample.
        audio_root: folder of the audio; default: where each manifest is.
        threads: how many decode.

    Raises:
        ManifestError: there is no manifest.
    """
    if not data.exists():
        raise ManifestError(f"{data} does not exist")
    findings = Findings()
    splits = dict(_load(data, findings))
    if not splits and not findings.problems:
        raise ManifestError(f"{data} holds no manifest: expected files such as train.tsv and valid.tsv")
    facts = {name: _check_rows(manifest, findings) for name, manifest in splits.items()}
    _compare_splits(splits, facts, findings)
    if audio != "none":
        for name, manifest in splits.items():
            rows = _chosen(len(manifest), None if audio == "all" else sample, seed)
            findings.audio[name] = len(rows)
            _check_audio(manifest, rows, audio_root, threads, findings)
        _compare_recordings(splits, audio, sample, seed, audio_root, findings)
    findings.table = _table(splits)
    return findings


def _load(data: Path, findings: Findings) -> Iterator[tuple[str, Manifest]]:
    for path in [data] if data.is_file() else sorted(data.glob("*.tsv")):
        if path.name.endswith(".dropped.tsv"):
            continue
        try:
            manifest = Manifest.load(path)
        except ManifestError as error:
            findings.problems.append(str(error))
            continue
        if len(manifest) == 0:
            findings.problems.append(f"{path} has no rows: prepare the data again")
        if not set(_TEXTS) & set(manifest.columns):
            findings.problems.append(f"{path} has neither src_text nor tgt_text: add what was said")
        yield path.stem, manifest


# --- rows -----------------------------------------------------------------------------------------


def sentence_key(text: str) -> str:
    """What two texts that sound the same have in common: no case, no punctuation, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_WITHOUT_PUNCTUATION).split())


class _WithoutPunctuation(dict[int, int | None]):
    """For ``str.translate``; each character is looked up once: a corpus has millions of sentences, few characters."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] == "P" else code
        return self[code]


_WITHOUT_PUNCTUATION = _WithoutPunctuation()


class _Facts:
    """The first row of every id, audio, sentence and speaker of a split; hashes, to hold millions."""

    def __init__(self) -> None:
        self.first: dict[str, dict[int, int]] = {"id": {}, "audio": {}, "sentence": {}, "speaker": {}}

    def add(self, kind: str, value: str, row: int) -> int | None:
        """The row that had this value before, if one had."""
        first = self.first[kind].setdefault(hash(value), row)
        return None if first == row else first


def _check_rows(manifest: Manifest, findings: Findings) -> _Facts:
    facts = _Facts()
    repeated: dict[str, list[str]] = {"audio": [], "sentence": []}
    long = [f"line {index + 2}" for index in np.flatnonzero(manifest.n_frames > MAX_SECONDS * SAMPLE_RATE)]
    if long:
        findings.warnings.append(
            f"{manifest.path}: {len(long)} rows last over {MAX_SECONDS:g} s, more than training takes: {_some(long)}"
        )
    for index, row in enumerate(manifest):
        _check_cells(manifest, index, row, findings)
        for column in _TEXTS:
            is_inside = column == "src_text" and bool(row.get("conversation"))
            if column in row and not row[column].strip() and not is_inside:
                findings.problems.append(f"{manifest.location(index)}: {column} is empty: fill it in or remove the row")
        facts.add("id", row["id"], index)
        if row.get("speaker"):
            facts.add("speaker", row["speaker"], index)
        for piece in pieces_of(row):
            for kind, value in (("audio", str(piece.audio)), ("sentence", sentence_key(piece.transcript))):
                before = facts.add(kind, value, index) if value else None
                if before is not None:
                    repeated[kind].append(f"line {index + 2} has the {kind} of line {before + 2}")
    _check_table(manifest, findings)
    for kind, places in repeated.items():
        if places:
            findings.warnings.append(
                f"{manifest.path}: {len(places)} rows repeat the {kind} of another: {_some(places)}"
            )
    return facts


def _check_table(manifest: Manifest, findings: Findings) -> None:
    """What is wrong with columns as a whole: what a spreadsheet has put in, and languages that nobody knows."""
    for column in _TEXTS:
        quoted = [i for i, row in enumerate(manifest) if _QUOTED.fullmatch(row.get(column, ""))]
        if quoted:
            findings.warnings.append(
                f"{manifest.path}: {len(quoted)} cells of {column} are in quotes, with doubled ones inside, as a "
                f"spreadsheet writes them: {_some([f'line {i + 2}' for i in quoted])}; quotes of a manifest are text"
            )
    for column in ("src_lang", "tgt_lang"):
        named = {row.get(column, "").strip() for row in manifest} - {""}
        unknown = sorted(name for name in named if find_language(name) is None)
        if unknown:
            findings.warnings.append(
                f"{manifest.path}: {column} has languages that are not known here ({', '.join(unknown[:3])}): scores "
                "take a tokenizer for words between spaces"
            )


_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def pieces_of(row: dict[str, str]) -> list[AudioPart]:
    """The recordings of a row and what is said in them; none if its conversation cannot be read."""
    if not row.get("conversation"):
        return [AudioPart(row["audio"], row.get("src_text", ""))]
    try:
        return read_conversation(row["conversation"])[1]
    except ConversationError:
        return []


def _check_cells(manifest: Manifest, index: int, row: dict[str, str], findings: Findings) -> None:
    """What training would stop at."""
    where = manifest.location(index)
    try:
        response_is_cut(row)
    except ValueError as error:
        findings.problems.append(f"{where}: {error}")
    if row.get("prompt"):
        try:
            resolve_prompt(row["prompt"], row.get("src_lang", ""), row.get("tgt_lang", ""))
        except PromptError as error:
            findings.problems.append(f"{where}: {error}")
    if row.get("conversation"):
        try:
            read_conversation(row["conversation"])
        except ConversationError as error:
            findings.problems.append(f"{where}: {error}")
        if row.get("teacher_text", "").strip():
            findings.problems.append(f"{where}: {TAUGHT_TWICE}")
        if row.get("prompt"):
            findings.warnings.append(f"{where}: its conversation says what is asked, and its prompt is not used")
    seconds = manifest.n_frames[index] / SAMPLE_RATE
    length = sum(len(piece.transcript) for piece in pieces_of(row))
    if length > _CHARACTERS_PER_SECOND * max(1.0, seconds):
        findings.warnings.append(f"{where}: {length} characters in {seconds:.1f} s: is this the text of this audio?")


_CHARACTERS_PER_SECOND = 60  # people speak fewer than 30


def _compare_splits(splits: dict[str, Manifest], facts: dict[str, _Facts], findings: Findings) -> None:
    """Ids between all splits; audio, sentences and speakers between training and the others."""
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            places = _shared(facts, "id", one, other)
            if places:
                findings.warnings.append(
                    f"{splits[one].path} and {splits[other].path} share {len(places)} ids: {_some(places)}"
                )
            if one.startswith("train") != other.startswith("train"):
                train, rest = (one, other) if one.startswith("train") else (other, one)
                _compare_with_training(splits, facts, train, rest, findings)


def _compare_with_training(
    splits: dict[str, Manifest], facts: dict[str, _Facts], train: str, rest: str, findings: Findings
) -> None:
    for kind in _COMPARED:
        places = _shared(facts, kind, rest, train)
        if places:
            # Short sentences and, in many corpora, speakers come in both; a recording must not.
            kept = findings.problems if kind == "audio" else findings.warnings
            kept.append(
                f"{splits[rest].path} shares {len(places)} of its {len(facts[rest].first[kind])} {_plural(kind)} with "
                f"{splits[train].path}, which makes its scores better than they are: {_some(places)}"
            )


def _plural(kind: str) -> str:
    return "recordings" if kind == "audio" else f"{kind}s"


def _shared(facts: dict[str, _Facts], kind: str, one: str, other: str) -> list[str]:
    first, second = facts[one].first[kind], facts[other].first[kind]
    return [f"line {row + 2} and {other} line {second[key] + 2}" for key, row in first.items() if key in second]


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


# --- audio ----------------------------------------------------------------------------------------


def _chosen(rows: int, sample: int | None, seed: int) -> list[int]:
    if sample is None or rows <= sample:
        return list(range(rows))
    return sorted(random.Random(seed).sample(range(rows), sample))


def _check_audio(
    manifest: Manifest, rows: Sequence[int], audio_root: Path | None, threads: int, findings: Findings
) -> None:
    def check(index: int) -> tuple[str, str]:
        """A problem and a warning, or "" in their place."""
        recordings = [str(piece.audio) for piece in pieces_of(manifest[index])]
        declared = int(manifest.n_frames[index])
        expected = declared if len(recordings) == 1 else None
        where = manifest.location(index)
        try:
            heard = [load_audio(one, _root(one, manifest, audio_root), expected, None) for one in recordings]
        except AudioError as error:
            return f"{where}: {error}", ""
        flaws = [(one, find_flaw(waveform)) for one, waveform in zip(recordings, heard, strict=True)]
        warning = " and ".join(f"{one} is audio with a flaw ({flaw})" for one, flaw in flaws if flaw)
        found = sum(map(len, heard))
        difference = found - declared if len(recordings) == 1 else abs(found - declared)
        problem = ""
        if recordings and difference > max(0.1 * SAMPLE_RATE, 0.02 * declared):
            audio = " and ".join(recordings)
            problem = f"{where}: n_frames is {declared}, but {audio} has {found} samples: correct it"
        return problem, f"{where}: {warning}: is anything said in it?" if warning else ""

    with ThreadPoolExecutor(threads) as pool:
        checked = list(tqdm(pool.map(check, rows), total=len(rows), desc=f"audio of {manifest.path.name}", unit="row"))
    findings.problems += [problem for problem, _ in checked if problem]
    findings.warnings += [warning for _, warning in checked if warning]


def _compare_recordings(
    splits: dict[str, Manifest], audio: str, sample: int, seed: int, audio_root: Path | None, findings: Findings
) -> None:
    """Recordings of the training set in another one, under other names: scores of these are no measure."""

    def locate(manifest: Manifest, row: int) -> Place:
        name = str(pieces_of(manifest[row])[0].audio)
        return name, _root(name, manifest, audio_root)

    def text_of(manifest: Manifest, row: int) -> str:
        return sentence_key(manifest[row].get("src_text", ""))

    def single(manifest: Manifest, rows: Sequence[int]) -> list[int]:
        return [row for row in rows if len(pieces_of(manifest[row])) == 1]

    training = [name for name in splits if name.startswith("train")]
    for name in [name for name in splits if name not in training]:
        rest = splits[name]
        rows = single(rest, _chosen(len(rest), None if audio == "all" else sample, seed))
        for train in training:
            pairs = shared_recordings(rest, rows, splits[train], locate, text_of)
            places = [
                f"line {one + 2} and {train} line {other + 2}"
                for one, other in pairs
                if locate(rest, one)[0] != locate(splits[train], other)[0]
            ]
            if places:
                findings.problems.append(
                    f"{rest.path} has {len(places)} recordings of {splits[train].path} under other names, which makes "
                    f"its scores better than they are: {_some(places)} are the same recording"
                )


def _root(audio: str, manifest: Manifest, audio_root: Path | None) -> Path | None:
    return None if audio_root is None and Path(audio).is_absolute() else audio_root or manifest.path.parent


# --- statistics -----------------------------------------------------------------------------------


def _table(splits: dict[str, Manifest]) -> str:
    header = ["split", "rows", "hours", "min s", "median s", "95% s", "max s", "characters/s"]
    lines = [header, *(_statistics(name, manifest) for name, manifest in splits.items() if len(manifest))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _statistics(name: str, manifest: Manifest) -> list[str]:
    seconds = manifest.n_frames / SAMPLE_RATE
    numbers = [seconds.min(), np.median(seconds), np.percentile(seconds, 95), seconds.max()]
    has_text = {"src_text", "conversation"} & set(manifest.columns)
    characters = sum(len(piece.transcript) for row in manifest for piece in pieces_of(row)) if has_text else 0
    rate = f"{characters / seconds.sum():.1f}"
    return [name, str(len(manifest)), f"{seconds.sum() / 3600:.2f}", *(f"{n:.2f}" for n in numbers), rate]


# --- command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="blspkd validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of manifests, or one of them")
    parser.add_argument("--audio", choices=("all", "sample", "none"), default="sample", help="what to decode")
    parser.add_argument("--sample", type=int, default=200, help="rows of each split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: %(default)s)")
    parser.add_argument("--audio-root", type=Path, help="folder of the audio (default: that of the manifests)")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    args = parser.parse_args(arguments)
    findings = validate(args.data, args.audio, args.sample, args.seed, args.audio_root, args.threads)
    print(findings.table)
    for name, count in findings.audio.items():
        print(f"{name}: audio of {count} rows decoded")
    for kind, found in (("warning", findings.warnings), ("problem", findings.problems)):
        for line in found[:_SHOWN]:
            print(f"{kind}: {line}")
        if len(found) > _SHOWN:
            print(f"{kind}: and {len(found) - _SHOWN} more")
    print(f"{len(findings.problems)} problems, {len(findings.warnings)} warnings")
    return 1 if findings.problems or (args.strict and findings.warnings) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"validate: {error}")
