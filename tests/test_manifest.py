"""Manifests: what is written is read again, exactly, and what is wrong is named."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

from blspkd_fairseq.data import manifest as module
from blspkd_fairseq.data.manifest import Manifest, ManifestError, write_manifest

TEXTS = [
    'she said "no", and \'yes\' \\n "',
    "tab\there",
    "line\nbreak",
    "carriage\rreturn\r\n",
    'json:"not ours"',
    'json:"',
    "json: plain",
    "emoji 🎙️ 你好 עברית e\u0301 \u2028 \x85 \x0b \x00",
    "\ufeffbom",
    " spaces ",
    "",
    "x" * 200_000,
]


def rows_of(texts: list[str]) -> list[dict[str, object]]:
    return [
        {"id": f"u{i}", "audio": f"{i}.wav", "n_frames": 16_000 + i, "tgt_text": text} for i, text in enumerate(texts)
    ]


def written(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "train.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_text_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    assert write_manifest(path, rows_of(TEXTS)) == len(TEXTS)
    manifest = Manifest.load(path)
    assert [row["tgt_text"] for row in manifest] == TEXTS
    assert manifest.columns == ("id", "audio", "n_frames", "tgt_text")
    assert manifest.n_frames.dtype == np.int64
    assert manifest.n_frames.tolist() == [16_000 + i for i in range(len(TEXTS))]
    assert manifest[-1] == manifest[len(TEXTS) - 1]
    with pytest.raises(IndexError):
        manifest[len(TEXTS)]


def test_csv_reads_the_same(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if module._encode_cell(text) == text and len(text) < csv.field_size_limit()]
    write_manifest(tmp_path / "train.tsv", rows_of(texts))
    with open(tmp_path / "train.tsv", encoding="utf-8", newline="") as file:
        by_csv = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert by_csv == list(Manifest.load(tmp_path / "train.tsv"))


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    write_manifest(tmp_path / "train.tsv", rows_of(TEXTS))
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    assert [row["tgt_text"] for row in Manifest.load(tmp_path / "train.tsv")] == TEXTS


def test_files_of_other_programs(tmp_path: Path) -> None:
    """A byte order mark, CRLF in all lines but one, no last line end, columns in another order, unknown ones."""
    lines = (b"\xef\xbb\xbfid\taudio\tmood\tn_frames\r", b"a\tx.wav\t\t7\r", b"b\t\tgood\t8", b"c\ty.wav\t\t90\r")
    manifest = Manifest.load(written(tmp_path, b"\n".join(lines)))
    assert manifest[0] == {"id": "a", "audio": "x.wav", "mood": "", "n_frames": "7"}
    assert [row["n_frames"] for row in manifest] == ["7", "8", "90"]
    assert manifest.n_frames.tolist() == [7, 8, 90]


def test_only_a_crlf_file_loses_its_carriage_returns(tmp_path: Path) -> None:
    manifest = Manifest.load(written(tmp_path, "id\taudio\tn_frames\tx\na\tb\t1\tend\r\n"))
    assert list(manifest) == [{"id": "a", "audio": "b", "n_frames": "1", "x": "end\r"}]


def test_a_header_alone_is_a_manifest(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "a.tsv", []) == 0
    manifest = Manifest.load(tmp_path / "a.tsv")
    assert len(manifest) == 0 and manifest.n_frames.shape == (0,) and list(manifest) == []
    assert len(Manifest.load(written(tmp_path, "id\taudio\tn_frames"))) == 0


def test_pickling_opens_the_file_again(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.tsv", rows_of(TEXTS))
    pickled = pickle.dumps(Manifest.load(tmp_path / "train.tsv"))
    assert len(pickled) < 2_000
    assert list(pickle.loads(pickled)) == list(Manifest.load(tmp_path / "train.tsv"))
    written(tmp_path, "id\taudio\tn_frames\n")
    with pytest.raises(ManifestError, match="has changed"):
        pickle.loads(pickled)


def test_location(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.tsv", rows_of(["a", "b"]))
    manifest = Manifest.load(tmp_path / "train.tsv")
    assert manifest.location(1) == f"{tmp_path}/train.tsv line 3 (id u1)" == manifest.location(-1)


HEADER = "id\taudio\tn_frames\tsrc_text\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.tsv is empty"),
        ("id\taudio\n", "no column 'n_frames', 'src_text'; its first line has 'id', 'audio'"),
        ("id,audio,n_frames\n", "no column 'id', 'audio', 'n_frames', 'src_text'"),
        ("id\taudio\tn_frames\tid\n", "more than one column 'id'"),
        ("id\taudio\tn_frames\t\n", "'' is no name for a column"),
        (HEADER + "a\tx\t1\thi\nb\tx\t1\thi\tho\n", "line 3 has 5 cells, but the header has 4.*tab"),
        (HEADER + "a\tx\t1\thi\n\n", "line 3 has 1 cells"),
        (HEADER + "a\tx\t1\n", "line 2 has 3 cells"),
        (HEADER + "a\tx\t1\thi\n \tx\t1\thi\n", "line 3 .*id is empty"),
        (HEADER + "a\tx\t1\thi\nb\tx\t1\thi\na\tx\t1\thi\n", "lines 2 and 4 have the same id 'a'"),
        (HEADER + "a\tx\t1\thi\nb\tx\t1\t\n", r"line 3 \(id b\): src_text is empty"),
        (HEADER + "a\tx\t1\t \u3000\u00a0\n", "line 2 .*src_text is empty"),
        (HEADER + "a\tx\t1\té\nb\tx\t1\t\u3000\n", "line 3 .*src_text is empty"),
        (HEADER + 'a\tx\t1\tjson:"\\n\\t"\n', "line 2 .*src_text is empty"),
        (HEADER + 'a\tx\t1\tjson:"open\n', "line 2 .*src_text begins with json:"),
        (HEADER + 'a\tx\t1\tjson:"\\ud800"\n', "line 2 .*src_text begins with json:"),
        (HEADER.encode() + b"a\tx\t1\thi\nb\tx\t1\t\xff\n", "line 3 is not UTF-8"),
        (b"\xff\xfei\x00d\x00", "line 1 is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.load(written(tmp_path, content), non_empty=["src_text"])


@pytest.mark.parametrize("n_frames", ["", "0", "-1", "1.0", " 1", "1e3", "１", "x", "9" * 19])
def test_n_frames_must_be_a_positive_integer(tmp_path: Path, n_frames: str) -> None:
    with pytest.raises(ManifestError, match=rf"train.tsv line 3 \(id b\): n_frames is {n_frames!r}"):
        Manifest.load(written(tmp_path, f"id\taudio\tn_frames\na\tx\t12\nb\tx\t{n_frames}\nc\tx\t34567\n"))


def test_line_numbers_go_on_from_block_to_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 10)
    lines = [f"{i}\tx\t{1 if i != 70 else 'many'}\n" for i in range(100)]
    with pytest.raises(ManifestError, match=r"line 72 \(id 70\)"):
        Manifest.load(written(tmp_path, "id\taudio\tn_frames\n" + "".join(lines)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="dev.tsv cannot be read: No such file"):
        Manifest.load(tmp_path / "dev.tsv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}, {"id": "b", "x": "c"}], "row 2: has the columns 'id', 'x', but the header has 'id'"),
        ([{"id": "a", "x": "b"}, {"id": "c"}], "row 2"),
        ([{"id": "\ud800"}], "row 1: .*surrogate"),
        ([{"a\tb": "c"}], "no name for a column"),
    ],
)
def test_a_failed_write_changes_nothing(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    path = written(tmp_path, "before")
    with pytest.raises(ManifestError, match=message):
        write_manifest(path, rows)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_columns_fix_the_order(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.tsv", [{"n_frames": 1, "id": "a", "audio": None}], ("id", "audio", "n_frames"))
    assert (tmp_path / "a.tsv").read_bytes() == b"id\taudio\tn_frames\na\t\t1\n"
    with pytest.raises(ManifestError, match="cannot be written: No such file"):
        write_manifest(tmp_path / "nowhere" / "a.tsv", [])
