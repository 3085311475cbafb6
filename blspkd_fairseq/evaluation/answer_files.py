"""Answers of any system: JSON lines with ``id`` and ``hypothesis``, or a text per line as sacreBLEU reads them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blspkd_fairseq.evaluation.row_scores import RowScoreError, read_jsonl


class AnswerFileError(ValueError):
    """A file of answers that cannot be used; the message names the file and the row."""


@dataclass(frozen=True)
class AnswerFile:
    """Answers to the rows of a test set.

    Attributes:
        path: of the file.
        rows: by id, in the order of the file: the JSON objects, or ``{"hypothesis": line}`` by the line's number.
    """

    path: Path
    rows: Mapping[str, Mapping[str, Any]]

    def texts(self, name: str, ids: Sequence[str], may_be_empty: bool = True) -> list[str]:
        """A field of the rows, in the order of ``ids``.

        Raises:
            AnswerFileError: other rows than ``ids``, or a row without text in that field.
        """
        if missing := [one for one in ids if one not in self.rows]:
            raise AnswerFileError(
                f"{self.path} has no row {missing[0]!r} ({len(missing)} are missing): answer all rows"
            )
        if len(self.rows) > len(ids):
            other = next(iter(set(self.rows).difference(ids)))
            raise AnswerFileError(
                f"{self.path} has the row {other!r}, which others lack: all systems see the same rows"
            )
        for one in ids:
            text = self.rows[one].get(name)
            if not isinstance(text, str) or not (may_be_empty or text.strip()):
                raise AnswerFileError(f"{self.path}, row {one!r} has no text in the field {name!r}")
        return [self.rows[one][name] for one in ids]


def read_answer_file(path: str | Path) -> AnswerFile:
    """Reads JSON lines (``.jsonl``), or the lines of any other file.

    Raises:
        AnswerFileError: no file, no rows, no JSON, an id twice or none.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        return AnswerFile(path, {str(n): {"hypothesis": line} for n, line in enumerate(read_lines(path), start=1)})
    try:
        return AnswerFile(path, read_jsonl(path))
    except RowScoreError as error:
        raise AnswerFileError(str(error)) from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file; one at the end that has no text is none.

    Raises:
        AnswerFileError: it cannot be read, or is empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AnswerFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    lines = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
    if not lines:
        raise AnswerFileError(f"{path} has no rows")
    return lines


def read_columns(path: str | Path, columns: Sequence[str], ids: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a tab-separated table with ``id``, such as a manifest, in the order of ``ids``.

    Raises:
        AnswerFileError: no file, no such column, or a row that is not there.
    """
    lines = read_lines(path)
    table = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    heading = lines[0].lstrip("\ufeff").split("\t")
    if lacking := [name for name in ("id", *columns) if name not in heading]:
        raise AnswerFileError(f"{path} has no column {lacking[0]!r}: it has {', '.join(heading)}")
    by_id = {str(row["id"]): row for row in table}
    if missing := [one for one in ids if one not in by_id]:
        raise AnswerFileError(f"{path} has no row {missing[0]!r} ({len(missing)} are missing)")
    return {name: [str(by_id[one][name] or "") for one in ids] for name in columns}
