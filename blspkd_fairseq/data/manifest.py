r"""Manifests: tab-separated tables in the style of fairseq's speech_to_text, one utterance per row.

Columns ``id audio n_frames`` (samples at 16 kHz), optionally ``tgt_text src_text speaker src_lang tgt_lang prompt
teacher_text``, and any others. Rows end at ``\n`` and cells at ``\t``; everything else, quotes and backslashes
included, stands for itself, so that ``csv.DictReader(..., delimiter="\t", quoting=csv.QUOTE_NONE)`` reads the same. One
exception: a cell that cannot be written so (it holds a tab or a line break, or begins with ``json:"``) is ``json:`` and
a JSON string.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from blspkd_fairseq.files import whole_file

REQUIRED_COLUMNS = ("id", "audio", "n_frames")

_BOM = b"\xef\xbb\xbf"
_TAB, _LF, _CR = b"\t\n\r"
_JSON_CELL = 'json:"'
_BLOCK_BYTES = 1 << 24  # validated at a time: what the arrays of one block need stays small beside the file
_MAX_DIGITS = 18  # of n_frames: what an int64 holds
_TEXTS = ("src_text", "tgt_text", "conversation")


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the line and the remedy."""


# --- cells ----------------------------------------------------------------------------------------


def read_by_teacher(row: Mapping[str, str]) -> str:
    """The text in place of the speech for the teacher: ``teacher_text`` where there is one, else ``src_text``."""
    text = row.get("teacher_text", "")
    return text if text.strip() else row.get("src_text", "")


def response_is_cut(row: Mapping[str, str]) -> bool:
    """Whether the length limit ended the response of a row, so that it has no end of turn.

    Raises:
        ValueError: the cell ``cut`` is neither 1 nor 0 nor empty.
    """
    cut = row.get("cut", "")
    if cut not in ("", "0", "1"):
        raise ValueError(f"cut is {cut!r}: write 1 where the response was cut, or 0")
    return cut == "1"


def _encode_cell(text: str) -> str:
    is_plain = not (text.startswith(_JSON_CELL) or "\t" in text or "\n" in text or "\r" in text)
    return text if is_plain else "json:" + json.dumps(text, ensure_ascii=False)


def _decode_cell(cell: str) -> str:
    return json.loads(cell[len("json:") :]) if cell.startswith(_JSON_CELL) else cell


# --- writing --------------------------------------------------------------------------------------


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None) -> int:
    """Writes a manifest; the file appears when it is complete.

    Args:
        path: the file, replaced if it exists.
        rows: a value per column; None is an empty cell.
        columns: their order; default: the first row's, or the required ones if there is no row.

    Returns:
        Number of rows.

    Raises:
        ManifestError: a row has other columns, a cell is no valid Unicode, or the file cannot be written.
    """
    rows = iter(rows)
    if columns is None:
        first = next(rows, None)
        columns = list(REQUIRED_COLUMNS) if first is None else list(first)
        rows = rows if first is None else chain([first], rows)
    _check_columns(path, columns)
    count = 0
    with _replacing(Path(path)) as file:
        file.write("\t".join(columns) + "\n")
        for count, row in enumerate(rows, start=1):
            file.write(_format_row(row, columns, f"{path} row {count}"))
    return count


def _format_row(row: Mapping[str, object], columns: Sequence[str], where: str) -> str:
    if row.keys() != set(columns):
        raise ManifestError(
            f"{where}: has the columns {_listed(row)}, but the header has {_listed(columns)}: give every row the same"
        )
    values = (row[column] for column in columns)
    line = "\t".join("" if value is None else _encode_cell(str(value)) for value in values) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(f"{where}: holds half of a surrogate pair, which is no text: {error}") from error
    return line


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A text file beside ``path`` that takes its place at the end, or disappears on an error."""
    try:
        with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise ManifestError(f"{path} cannot be written: {error.strerror}") from error


# --- reading --------------------------------------------------------------------------------------


class Manifest:
    """The rows of a manifest, read from the file when they are asked for.

    The file is mapped into memory, so that any number of worker processes share one copy of it; a row costs 24
    bytes besides. Rows are dicts of decoded cells, in the order of the file.

    Attributes:
        path: the file.
        columns: their names in the order of the file.
        n_frames: ``[rows]`` int64, samples at 16 kHz.
        text_bytes: ``[rows]`` int64, of the texts that an LLM reads, as they stand in the file.
    """

    def __init__(
        self,
        path: Path,
        columns: tuple[str, ...],
        is_crlf: bool,
        offsets: np.ndarray,
        n_frames: np.ndarray,
        text_bytes: np.ndarray,
    ) -> None:
        """Use :meth:`load`. ``offsets`` [rows + 1]: the byte at which each row begins, and the end of the last."""
        self.path = path
        self.columns = columns
        self.n_frames = n_frames
        self.text_bytes = text_bytes
        self._is_crlf = is_crlf
        self._offsets = offsets
        self._data = _map(path)

    @classmethod
    def load(
        cls, path: str | Path, required: Sequence[str] = REQUIRED_COLUMNS, non_empty: Sequence[str] = ()
    ) -> Manifest:
        """Opens a manifest and checks all of it.

        Args:
            path: a UTF-8 file; a byte order mark and CRLF line ends are tolerated.
            required: columns it must have besides ``id``, ``audio`` and ``n_frames``.
            non_empty: columns in which no cell may be empty or blank; required too.

        Raises:
            ManifestError: the first thing that is wrong, with the file, the line and the remedy.
        """
        path = Path(path)
        scan = _Scan(path, required, non_empty)
        return cls(path, scan.columns, scan.is_crlf, *scan.run())

    def __len__(self) -> int:
        return len(self.n_frames)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows: there is no row {index}")
        index %= len(self)
        line = self._data[self._offsets[index] : self._offsets[index + 1]].decode()
        line = line.removesuffix("\n")
        cells = (line.removesuffix("\r") if self._is_crlf else line).split("\t")
        return {column: _decode_cell(cell) for column, cell in zip(self.columns, cells, strict=True)}

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[index] for index in range(len(self)))

    def location(self, index: int) -> str:
        """Where a row stands, for messages: ``train.tsv line 17 (id xyz)``."""
        return f"{self.path} line {index % len(self) + 2} (id {self[index]['id']})"

    def __getstate__(self) -> dict[str, Any]:
        """A spawned worker opens the file again."""
        return {**self.__dict__, "_data": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._data = _map(self.path)
        if len(self._data) < self._offsets[-1]:
            raise ManifestError(f"{self.path} has changed since it was loaded: start again")


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # of zero bytes
        raise ManifestError(f"{path} is empty: a manifest begins with a line of column names") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error


class _Block(NamedTuple):
    """Whole rows of the file, taken apart.

    Attributes:
        data: their bytes, with all line ends.
        starts, ends: ``[rows, columns]``, the bytes of ``data`` at which each cell begins and ends.
        first_line: number of its first line in the file.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray
    first_line: int

    def cell(self, row: int, column: int) -> str:
        return self.data[self.starts[row, column] : self.ends[row, column]].decode()

    def bytes_at(self, positions: np.ndarray) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8)[positions]


class _Scan:
    """Goes through a file once, block by block, finds where its rows begin, and checks them."""

    def __init__(self, path: Path, required: Sequence[str], non_empty: Sequence[str]) -> None:
        self.path = path
        self.data = _map(path)
        self.header_end = self._line_end(0)
        self.columns, self.is_crlf = self._read_header((*REQUIRED_COLUMNS, *required, *non_empty))
        self.not_blank = [self.columns.index(name) for name in dict.fromkeys(("id", *non_empty))]
        self.text_columns = [self.columns.index(name) for name in _TEXTS if name in self.columns]
        self.id_column, self.frames_column = self.columns.index("id"), self.columns.index("n_frames")

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the offsets [rows + 1], n_frames [rows] and text_bytes [rows]."""
        begins, frames, hashes, texts = [], [], [], []
        for start, block in self._blocks():
            begins.append(start + block.starts[:, 0])
            frames.append(self._frames(block))
            hashes.append(self._id_hashes(block))
            texts.append((block.ends - block.starts)[:, self.text_columns].sum(1))
            self._check_json(block)
            self._check_not_blank(block)
        offsets = _joined([*begins, np.array([len(self.data)])])
        self._check_unique(_joined(hashes), offsets)
        return offsets, _joined(frames), _joined(texts)

    def _line_end(self, position: int) -> int:
        """The byte after the line end at or after ``position``."""
        return self.data.find(b"\n", position) + 1 or len(self.data)

    def _read_header(self, required: Sequence[str]) -> tuple[tuple[str, ...], bool]:
        line = self.data[: self.header_end].removesuffix(b"\n")
        is_crlf = line.endswith(b"\r")
        columns = self._decode(line.removeprefix(_BOM).removesuffix(b"\r"), 1).split("\t")
        _check_columns(self.path, columns)
        missing = [name for name in dict.fromkeys(required) if name not in columns]
        if missing:
            raise ManifestError(
                f"{self.path} has no column {_listed(missing)}; its first line has {_listed(columns)}: "
                "add what is missing, with tabs between the columns"
            )
        return tuple(columns), is_crlf

    def _blocks(self) -> Iterator[tuple[int, _Block]]:
        """The rows, and the byte of the file at which each block of them begins."""
        start, line = self.header_end, 2
        while start < len(self.data):
            end = self._line_end(min(start + _BLOCK_BYTES, len(self.data)) - 1)
            data = self.data[start:end]
            block = self._take_apart(data if data.endswith(b"\n") else data + b"\n", line)
            yield start, block
            start, line = end, line + len(block.starts)

    def _take_apart(self, data: bytes, first_line: int) -> _Block:
        self._decode(data, first_line)
        array = np.frombuffer(data, np.uint8)
        separators = np.flatnonzero((array == _TAB) | (array == _LF))
        widths = np.diff(np.flatnonzero(array[separators] == _LF), prepend=-1)
        wrong = np.flatnonzero(widths != len(self.columns))
        if len(wrong):
            raise ManifestError(
                f"{self.path} line {first_line + wrong[0]} has {widths[wrong[0]]} cells, but the header has "
                f"{len(self.columns)}: if a text holds a tab or a line break, write the manifest with "
                "write_manifest, which escapes them"
            )
        starts = np.concatenate([[0], separators[:-1] + 1]).reshape(-1, len(self.columns))
        ends = separators.reshape(-1, len(self.columns))
        if self.is_crlf:
            last = ends[:, -1]
            last -= (last > starts[:, -1]) & (array[last - 1] == _CR)
        return _Block(data, starts, ends, first_line)

    def _decode(self, data: bytes, first_line: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            line = first_line + data.count(b"\n", 0, error.start)
            raise ManifestError(f"{self.path} line {line} is not UTF-8: convert the file to UTF-8") from error

    def _frames(self, block: _Block) -> np.ndarray:
        """n_frames [rows], read digit by digit for all rows at once."""
        starts = block.starts[:, self.frames_column]
        lengths = block.ends[:, self.frames_column] - starts
        values = np.zeros(len(starts), np.int64)
        is_number = (lengths > 0) & (lengths <= _MAX_DIGITS)
        for place in range(int(lengths[is_number].max(initial=0))):
            inside = is_number & (place < lengths)
            digits = block.bytes_at(np.where(inside, starts + place, 0)).astype(np.int64) - ord("0")
            is_number &= ~inside | ((digits >= 0) & (digits <= 9))
            values = np.where(inside, values * 10 + digits, values)
        wrong = np.flatnonzero(~is_number | (values <= 0))
        if len(wrong):
            raise ManifestError(
                f"{self._where(block, wrong[0])}: n_frames is {block.cell(wrong[0], self.frames_column)!r}, "
                "but must be a positive integer: the number of samples at 16 kHz"
            )
        return values

    def _id_hashes(self, block: _Block) -> np.ndarray:
        """A number [rows] per id: two million strings would need ten times the memory."""
        starts, ends = block.starts[:, self.id_column].tolist(), block.ends[:, self.id_column].tolist()
        hashes = (hash(block.data[start:end]) for start, end in zip(starts, ends, strict=True))
        return np.fromiter(hashes, np.int64, len(starts))

    def _check_unique(self, hashes: np.ndarray, offsets: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        for rows in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            lines = (self.data[offsets[row] : offsets[row + 1]].strip(b"\r\n") for row in rows)
            first, second = (line.split(b"\t")[self.id_column] for line in lines)
            if first == second:
                raise ManifestError(
                    f"{self.path} lines {rows[0] + 2} and {rows[1] + 2} have the same id {first.decode()!r}: "
                    "give every row its own"
                )

    def _check_json(self, block: _Block) -> None:
        for row, column in np.argwhere(block.bytes_at(block.starts) == ord(_JSON_CELL[0])).tolist():
            try:
                _decode_cell(block.cell(row, column)).encode()
            except ValueError as error:
                raise ManifestError(
                    f"{self._where(block, row)}: {self.columns[column]} begins with {_JSON_CELL} but is no JSON "
                    f"string ({error}): write the manifest with write_manifest, which escapes it"
                ) from error

    def _check_not_blank(self, block: _Block) -> None:
        for column in self.not_blank:
            first = block.bytes_at(block.starts[:, column])
            # A cell that begins with an ASCII character after the space is not blank, unless it is JSON.
            doubtful = (first <= ord(" ")) | (first >= 0x80) | (first == ord(_JSON_CELL[0]))
            for row in np.flatnonzero(doubtful).tolist():
                if not _decode_cell(block.cell(row, column)).strip():
                    raise ManifestError(
                        f"{self._where(block, row)}: {self.columns[column]} is empty: fill it in or remove the row"
                    )

    def _where(self, block: _Block, row: int) -> str:
        return f"{self.path} line {block.first_line + row} (id {block.cell(row, self.id_column)})"


def _joined(blocks: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *blocks])


def _check_columns(path: str | Path, columns: Sequence[str]) -> None:
    for name in columns:
        if not name.strip() or _encode_cell(name) != name:
            raise ManifestError(f"{path}: {name!r} is no name for a column")
    twice = [name for name in dict.fromkeys(columns) if list(columns).count(name) > 1]
    if twice:
        raise ManifestError(f"{path} has more than one column {_listed(twice)}: remove or rename one")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
