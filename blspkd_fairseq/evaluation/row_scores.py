"""Scores of rows that another program gave, such as COMET or a judge: read to be tested as any other metric.

A file has JSON lines: ``{"id": "...", "value": 0.83, "signature": "wmt22-comet-da"}``, the corpus score being the mean
of the values; or ``"sums": [2, 17]`` in place of the value, the corpus score being the ratio of both sums (the second
may be left out: 1). ``"less_is_better": true`` marks an error rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blspkd_fairseq.evaluation.metrics import Measurement


class RowScoreError(ValueError):
    """A file that cannot be used; the message names the file and the row."""


def read_row_scores(path: str | Path, metric: str, ids: Sequence[str]) -> Measurement:
    """One metric of one system.

    Args:
        path: JSON lines.
        metric: its name in tables.
        ids: the rows that were answered; the statistics have their order.

    Raises:
        RowScoreError: no file, other rows, a row twice, no number, or several signatures.
    """
    by_id = read_jsonl(path)
    if missing := [one for one in ids if one not in by_id]:
        raise RowScoreError(f"{path} has no score of row {missing[0]!r} ({len(missing)} are missing): score all rows")
    if len(by_id) > len(ids):
        other = next(one for one in by_id if one not in set(ids))
        raise RowScoreError(f"{path} has a score of row {other!r}, which is not among the answers: score them again")
    sums = np.array([_sums(by_id[one], f"{path}, row {one!r}") for one in ids], dtype=np.float64)
    if (sums[:, 1] < 0).any() or not sums[:, 1].any():
        raise RowScoreError(f"{path} has counts below 0, or only counts of 0, in the second of its sums")
    signature, less = (
        _common(by_id, key, path, default) for key, default in (("signature", ""), ("less_is_better", 0))
    )
    if not isinstance(signature, str) or not signature:
        raise RowScoreError(f"{path} has no signature: write what made the scores (model, version) into each row")
    return Measurement(metric, signature, sums, _ratio, bool(less))


def read_jsonl(path: str | Path) -> dict[str, dict[str, Any]]:
    """Rows of JSON lines by their ``id``, in the order of the file.

    Raises:
        RowScoreError: no file, no JSON object on a line, a row without id, or an id twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RowScoreError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowScoreError(f"{path}, line {number} is no JSON ({error}): was the file cut off?") from error
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise RowScoreError(f"{path}, line {number} has no id: write one JSON object with an id per line")
        if str(name) in rows:
            raise RowScoreError(f"{path}, line {number} has the id {str(name)!r} for the second time")
        rows[str(name)] = row
    if not rows:
        raise RowScoreError(f"{path} has no rows")
    return rows


def _sums(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    if ("value" in row) == ("sums" in row):
        raise RowScoreError(f"{where} needs either a value or sums")
    numbers = [row["value"], 1] if "value" in row else row["sums"]
    numbers = [*numbers, 1][:2] if isinstance(numbers, list) and len(numbers) in (1, 2) else numbers
    if not isinstance(numbers, list) or not all(_is_number(one) for one in numbers):
        raise RowScoreError(
            f"{where} has {row.get('value', row.get('sums'))!r}, which is no finite number (or two sums)"
        )
    return float(numbers[0]), float(numbers[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _common(rows: Mapping[str, Mapping[str, Any]], key: str, path: str | Path, default: Any) -> Any:
    """The value that all rows have, or that the first one has if no other has one."""
    found = list(dict.fromkeys(row[key] for row in rows.values() if key in row))
    if len(found) > 1:
        raise RowScoreError(f"{path} has rows of several kinds: {key} is {found[0]!r} and {found[1]!r}")
    return found[0] if found else default


def _ratio(sums: np.ndarray) -> np.ndarray:
    part, whole = sums[..., 0], sums[..., 1]
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
