"""VoiceBench's files (Chen et al. 2024, github.com/MatthewCYM/VoiceBench): answers out, judgements in.

``write_answers`` makes what VoiceBench's ``main.py`` would: its ``api_judge.py --src_file FILE`` adds a ``score`` to
every line (three ratings of 1 to 5, or three times Yes or No where there is a reference) and writes ``result-FILE``,
which ``read_judgements`` turns into figures that can be resampled. They equal those of its ``evaluate.py`` with
``--evaluator open`` and the ``gpt`` figure of ``--evaluator qa``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blspkd_fairseq.evaluation.metrics import Measurement
from blspkd_fairseq.files import write_whole

_REQUIRED = ("prompt", "response")
_BRACKETED = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


class VoiceBenchError(ValueError):
    """A file that cannot be used; the message names the file and the line."""


def write_answers(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes answers for VoiceBench; the file appears when it is complete.

    Args:
        path: the file, replaced if it exists.
        rows: ``prompt`` (the transcript of the question) and ``response`` each; ``reference`` where there is a right
            answer (its presence alone chooses the judge, so None and "" are left out); any other field is kept, such
            as ``id``, or ``key``, ``instruction_id_list`` and ``kwargs`` for ``--evaluator ifeval``.

    Returns:
        Number of rows.

    Raises:
        VoiceBenchError: a row without prompt or response, or some rows with a reference and some without.
    """
    lines = [_checked(dict(row), f"row {number}") for number, row in enumerate(rows, start=1)]
    if len({"reference" in line for line in lines}) > 1:
        raise VoiceBenchError(f"some rows of {path} have a reference and some have none: write them to two files")
    write_whole(Path(path), "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of answers or judgements.

    Raises:
        VoiceBenchError: no JSON object on a line, or one without prompt or response.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_checked(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def read_judgements(path: str | Path, ids: Iterable[str] | None = None) -> Measurement:
    """The judge's scores of a run.

    Args:
        path: ``result-....jsonl`` of ``api_judge.py``.
        ids: the rows that were exported, in their order, by the field ``id``; the scores then have that order.
            None: the order of the file.

    Returns:
        "VoiceBench rating" (mean of all ratings, 1 to 5), or "VoiceBench correct" (percentage of rows with more Yes
        than other votes) where rows have references.

    Raises:
        VoiceBenchError: no rows, rows without scores, scores that cannot be read, or other rows than were exported.
    """
    rows = read_answers(path)
    if not rows:
        raise VoiceBenchError(f"{path} has no rows: run api_judge.py again")
    rows = rows if ids is None else _ordered(rows, list(ids), path)
    scores = [_votes(row, f"{path}, answer {number}") for number, row in enumerate(rows, start=1)]
    if "reference" in rows[0]:
        correct = [_is_correct(votes) for votes in scores]
        statistics = np.stack([100 * np.array(correct, dtype=np.float64), np.ones(len(rows))], axis=1)
        return Measurement("VoiceBench correct", "VoiceBench|judge:qa|majority of votes", statistics, _ratio)
    ratings = [[_rating(vote, path) for vote in votes] for votes in scores]
    statistics = np.array([[sum(row), len(row)] for row in ratings], dtype=np.float64)
    return Measurement("VoiceBench rating", "VoiceBench|judge:open|mean of ratings", statistics, _ratio)


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name in _REQUIRED:
        if not isinstance(row.get(name), str):
            raise VoiceBenchError(f"{where} has no text in the field {name!r}")
    if row.get("reference") in (None, ""):
        row.pop("reference", None)
    return row


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise VoiceBenchError(f"{where} is no JSON ({error}): was the file cut off?") from error
    if not isinstance(row, dict):
        raise VoiceBenchError(f"{where} is no JSON object")
    return row


def _ordered(rows: list[dict[str, Any]], ids: list[str], path: str | Path) -> list[dict[str, Any]]:
    by_id = {str(row.get("id")): row for row in rows}
    if len(by_id) != len(rows) or set(by_id) != set(ids) or len(ids) != len(rows):
        missing = len(set(ids) - set(by_id))
        raise VoiceBenchError(
            f"{path} has {len(rows)} rows for {len(ids)} answers, {missing} ids are missing: judge again"
        )
    return [by_id[name] for name in ids]


def _votes(row: dict[str, Any], where: str) -> list[str]:
    votes = row.get("score")
    if not isinstance(votes, list) or not votes:
        raise VoiceBenchError(f"{where} has no list of scores: is this the file that api_judge.py wrote?")
    return [str(vote).strip() for vote in votes]


def _is_correct(votes: list[str]) -> bool:
    return 2 * sum(vote.lower() == "yes" for vote in votes) > len(votes)


def _rating(vote: str, path: str | Path) -> float:
    match = _BRACKETED.search(vote)
    try:
        rating = float(match[1] if match else vote)
    except ValueError:
        raise VoiceBenchError(f"{path} has the rating {vote!r}: it should be a number") from None
    if not 1 <= rating <= 5:
        raise VoiceBenchError(f"{path} has the rating {vote!r}: it should be 1 to 5")
    return rating


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]
