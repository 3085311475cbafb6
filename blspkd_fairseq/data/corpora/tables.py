"""Tables and lines of text, to the character: raw TSV, quoted TSV and CSV, JSON and JSON lines, in UTF-8 or UTF-16."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from blspkd_fairseq.data.corpora.items import MALFORMED, CorpusError, Dropped

QUOTES = ("auto", "raw", "csv")
"""How cells in quotes are taken: found out, or refused if that is not possible; as part of the text; as CSV's."""

_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_CELL = 1 << 24  # characters; csv's own limit, 131,072, is short of a long transcript

Row = dict[str, str]
Rows = Iterator[Row | Dropped]


# --- raw tables -----------------------------------------------------------------------------------


def read_table(path: Path, required: Sequence[str] = (), unescape: bool = False) -> Rows:
    r"""Rows of a raw TSV file with a line of column names.

    Args:
        path: UTF-8, with or without a byte order mark and CRLF, or UTF-16.
        required: columns it must have.
        unescape: a backslash stands before every tab, line break and backslash that belongs to a cell.

    Raises:
        CorpusError: missing, without these columns, or in another encoding.
    """
    with open_text(path) as file:
        lines = text_lines(file, path, unescape)
        header = next(lines, (1, ""))[1]
        is_crlf = header.endswith("\r")
        columns = header.removesuffix("\r").split("\t")
        _check_columns(path, columns, required, "with tabs between the columns")
        for number, line in lines:
            line = line.removesuffix("\r") if is_crlf else line
            yield _row(path, number, _split_escaped(line) if unescape else line.split("\t"), columns)


def _row(path: Path, number: int, cells: Sequence[str], columns: Sequence[str]) -> Row | Dropped:
    if len(cells) != len(columns):
        detail = f"{len(cells)} cells under {len(columns)} columns: a tab or a line break in a text?"
        return Dropped(f"{path.name} line {number}", MALFORMED, detail)
    return dict(zip(columns, cells, strict=True))


class MissingColumns(CorpusError):
    """A table without columns that it must have.

    Attributes:
        found: what is wrong. missing: these columns. columns: those that it has.
    """

    def __init__(self, found: str, remedy: str, missing: Sequence[str], columns: Sequence[str]) -> None:
        super().__init__(f"{found}: {remedy}")
        self.found, self.missing, self.columns = found, missing, columns


def _check_columns(path: Path, columns: Sequence[str], required: Sequence[str], how: str) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        found = f"{path} has no column {', '.join(missing)} (it has {', '.join(columns) or 'none'})"
        raise MissingColumns(found, f"is it the file of this corpus, {how}?", missing, columns)


# --- quoted tables --------------------------------------------------------------------------------


def read_csv(path: Path, required: Sequence[str] = (), delimiter: str = "") -> Rows:
    """Rows of a table as spreadsheets and pandas write it: a cell may be in quotes, and then hold anything.

    Args:
        path: as for :func:`read_table`.
        required: columns it must have.
        delimiter: default: the one by which the first line has these columns.

    Raises:
        CorpusError: missing, without these columns, in another encoding, or with quotes that do not close.
    """
    delimiter = delimiter or _find_delimiter(path, required)
    csv.field_size_limit(_LONGEST_CELL)
    with _open_csv(path, delimiter) as reader:
        columns: list[str] = next(reader, [])
        _check_columns(path, columns, required, "with commas, semicolons or tabs between the columns")
        for cells in reader:
            if cells:
                yield _row(path, reader.line_num, cells, columns)


def _find_delimiter(path: Path, required: Sequence[str]) -> str:
    for delimiter in _DELIMITERS:
        try:
            with _open_csv(path, delimiter) as reader:
                columns: list[str] = next(reader, [])
        except CorpusError:
            continue  # quotes that do not end where this one stands
        if len(columns) > 1 and set(required) <= set(columns):
            return delimiter
    return _DELIMITERS[0]


@contextmanager
def _open_csv(path: Path, delimiter: str) -> Iterator[Any]:
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            yield reader
        except csv.Error as error:
            raise CorpusError(
                f"{path} line {reader.line_num} is no CSV ({error}): a quote inside of a cell is doubled there"
            ) from error
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, reader.line_num) from error


def read_tsv(path: Path, required: Sequence[str] = (), quotes: str = "auto") -> Rows:
    """Rows of a tab-separated list, whose writer may have put cells into quotes.

    Args:
        path, required: as for :func:`read_table`.
        quotes: one of :data:`QUOTES`.

    Raises:
        CorpusError: as for the readers of both kinds; or cells in quotes may be of either, and it matters.
    """
    if quotes == "auto":
        quotes = _find_quotes(path, path.stat().st_mtime_ns if path.is_file() else 0)
    return read_csv(path, required, "\t") if quotes == "csv" else read_table(path, required)


@lru_cache(maxsize=64)
def _find_quotes(path: Path, _: int) -> str:
    """How the cells of a TSV in quotes are to be taken, by which its rows make sense; as it was at a time.

    Raises:
        CorpusError: they make sense both ways, and differ.
    """
    with open_text(path) as file:
        lines = text_lines(file, path)
        header = next(lines, (1, ""))[1]
        if '"' not in header and not any('"' in line for _, line in lines):
            return "raw"
    if not _fits(read_csv(path, delimiter="\t")):
        return "raw"  # quotes that do not close are part of the text
    if '"' in header or not _fits(read_table(path)):
        return "csv"  # they are no part of a column's name
    for raw, quoted in zip(read_table(path), read_csv(path, delimiter="\t"), strict=True):
        assert isinstance(raw, dict) and isinstance(quoted, dict)
        example = next((cell for name, cell in raw.items() if cell != quoted.get(name)), None)
        if example is not None:
            raise CorpusError(
                f"{path} has cells in quotes, such as {example[:60]}: say whether the quotes are part of the text "
                "(--quotes raw) or were put around it by a spreadsheet (--quotes csv)"
            )
    return "raw"


def _fits(rows: Rows) -> bool:
    """Whether every row has as many cells as there are columns."""
    try:
        return not any(isinstance(row, Dropped) for row in rows)
    except CorpusError:
        return False


# --- JSON -----------------------------------------------------------------------------------------


def read_json(path: Path, required: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Objects of a JSON file: one a line, or a list of them, which may be the only list in an object.

    Raises:
        CorpusError: missing, in another encoding, no JSON, or an object without what is required.
    """
    with open_text(path) as file:
        lines = text_lines(file, path)
        first = next(lines, (1, ""))[1].strip()
    is_lines = first.startswith("{") and _is_json(first)
    for number, row in _json_lines(path) if is_lines else _json_list(path):
        missing = [name for name in required if name not in row] if isinstance(row, dict) else required
        if missing or not isinstance(row, dict):
            where = f"line {number}" if is_lines else f"object {number}"
            raise CorpusError(f"{path} {where} has no {', '.join(missing)}: every object must have it")
        yield row


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        for number, line in text_lines(file, path):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path} line {number} is no JSON ({error}): write one object a line") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        try:
            content = json.load(file)
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, 0) from error
        except ValueError as error:
            raise CorpusError(f"{path} is no JSON ({error}): write one object a line, or a list of objects") from error
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise CorpusError(f"{path} holds no list of objects: write one object a line, or a list of objects")
    yield from enumerate(lists[0], start=1)


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Any]]] = {
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
}
"""By the ending of a list; any other is tab-separated."""


# --- text -----------------------------------------------------------------------------------------


def open_text(path: Path, newline: str = "\n") -> TextIO:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        return open(path, encoding=_encoding(begin), newline=newline)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def _encoding(begin: bytes) -> str:
    """By the byte order mark or, in UTF-16 without one, the zeros of the first two characters."""
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if len(begin) == 4 and begin[1::2] == b"\0\0":
        return "utf-16-le"
    return "utf-16-be" if len(begin) == 4 and begin[::2] == b"\0\0" else "utf-8-sig"


def _wrong_encoding(path: Path, line: int) -> CorpusError:
    return CorpusError(f"{path} after line {line} is not UTF-8: convert the file to UTF-8")


def text_lines(file: TextIO, path: Path, unescape: bool = False) -> Iterator[tuple[int, str]]:
    """Lines without their ends, and the number of each; blank ones are left out."""
    number, pending = 0, ""
    try:
        for number, line in enumerate(file, start=1):
            line = pending + line.removesuffix("\n")
            pending = ""
            if unescape and _ends_escaped(line):
                pending = line + "\n"
            elif line.strip("\r"):
                yield number, line
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, number) from error
    if pending:
        yield number, pending.removesuffix("\n")


def _ends_escaped(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _split_escaped(line: str) -> list[str]:
    cells, start = [], 0
    for match in re.finditer(r"\\.|\t", line, re.DOTALL):
        if match[0] == "\t":
            cells.append(line[start : match.start()])
            start = match.end()
    return [re.sub(r"\\(.)", r"\1", cell, flags=re.DOTALL) for cell in (*cells, line[start:])]
