"""Properties of manifests and lists, over 200 odd cases each: what is written is read, or what is wrong is said."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blspkd_fairseq.data.corpora import CorpusError, Dropped
from blspkd_fairseq.data.corpora.tables import read_csv, read_json, read_table, read_tsv
from blspkd_fairseq.data.manifest import REQUIRED_COLUMNS, Manifest, ManifestError, write_manifest
from blspkd_fairseq.data.prompts import PROMPTS
from blspkd_fairseq.data.validate import validate

odd = settings(
    max_examples=200,
    derandomize=True,  # the same cases in every run
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Half of the characters are those that tables, JSON and templates are made of.
CHARACTERS = st.one_of(
    st.sampled_from("\t\n\r\"'\\,;|{}[]:json<>/ \0\ufeff\x0b\x1c\x85\u2028"), st.characters(codec="utf-8")
)
TEXT = st.text(CHARACTERS, max_size=12)
PLAIN = st.text(CHARACTERS.filter(lambda c: c not in "\t\n\r"), max_size=12)
NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=8).filter(
    lambda name: name not in REQUIRED_COLUMNS and not name.startswith('json:"') and name.strip()
)


@st.composite
def tables(draw: st.DrawFn, cells: st.SearchStrategy[str] = TEXT) -> list[dict[str, str]]:
    """Rows of a manifest with up to three more columns."""
    columns = draw(st.lists(NAMES, max_size=3, unique=True))
    count = draw(st.integers(0, 4))
    return [
        {"id": f"u{i}", "audio": draw(cells), "n_frames": str(draw(st.integers(1, 10**17)))}
        | {column: draw(cells) for column in columns}
        for i in range(count)
    ]


# ---- manifests -----------------------------------------------------------------------------------------------------


@odd
@given(rows=tables())
@example(rows=[{"id": 'json:"', "audio": "\r", "n_frames": "1", "x": 'json:"a"'}])
def test_every_table_comes_back(rows: list[dict[str, str]], tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.tsv", rows)
    manifest = Manifest.load(tmp_path / "a.tsv")
    assert list(manifest) == rows
    assert manifest.n_frames.tolist() == [int(row["n_frames"]) for row in rows]
    write_manifest(tmp_path / "b.tsv", manifest, manifest.columns)
    assert (tmp_path / "b.tsv").read_bytes() == (tmp_path / "a.tsv").read_bytes()


@odd
@given(parts=st.tuples(TEXT, st.characters(categories=["Cs"]), TEXT))
def test_half_a_surrogate_pair_leaves_the_file_as_it_was(parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("before")
    with pytest.raises(ManifestError, match="a.tsv row 1: holds half of a surrogate pair"):
        write_manifest(path, [{"id": "a", "audio": "".join(parts), "n_frames": 1}])
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@odd
@given(rows=tables(), place=st.floats(0, 1), replaced=st.integers(0, 3), put=st.binary(max_size=3))
def test_a_file_with_other_bytes_is_read_or_named(
    rows: list[dict[str, str]], place: float, replaced: int, put: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.tsv"
    write_manifest(path, rows)
    data = path.read_bytes()
    start = int(place * len(data))
    path.write_bytes(data[:start] + put + data[start + replaced :])
    _read_or_named(path)


@odd
@given(content=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: b"id\taudio\tn_frames\n" + b)))
@example(content=b"")
@example(content=b"id\taudio\tn_frames\na\tb\t" + b"9" * 19 + b"\n")
def test_any_bytes_are_read_or_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    _read_or_named(path)


def _read_or_named(path: Path) -> None:
    try:
        manifest = Manifest.load(path)
    except ManifestError as error:
        assert str(path) in str(error)
        return
    rows = list(manifest)
    assert all(list(row) == list(manifest.columns) for row in rows)
    assert [int(row["n_frames"]) for row in rows] == manifest.n_frames.tolist()
    assert len({row["id"] for row in rows}) == len(rows)
    write_manifest(path, rows, manifest.columns)
    assert list(Manifest.load(path)) == rows


CELLS = st.fixed_dictionaries(
    {
        "src_text": TEXT,
        "tgt_text": TEXT,
        "prompt": st.one_of(st.sampled_from(["", *PROMPTS, "{speech}", "a {tgt_lang}"]), TEXT),
        "src_lang": st.one_of(st.sampled_from(["", "en", "zho_Hans", "xx", "German"]), TEXT),
        "tgt_lang": st.one_of(st.sampled_from(["", "de", "zh-CN", "qq_X"]), TEXT),
        "cut": st.one_of(st.sampled_from(["", "0", "1"]), TEXT),
        "speaker": TEXT,
        "conversation": st.one_of(st.just(""), TEXT, st.sampled_from(["[]", "{}", "null", "3", '[{"role": "user"}]'])),
    }
)


@odd
@given(cells=st.lists(CELLS, min_size=1, max_size=3))
def test_validation_names_odd_cells_and_never_fails(cells: Sequence[dict[str, str]], tmp_path: Path) -> None:
    rows = [{"id": f"u{i}", "audio": f"{i}.wav", "n_frames": 16_000, **cell} for i, cell in enumerate(cells)]
    write_manifest(tmp_path / "train.tsv", rows)
    findings = validate(tmp_path, "none")
    for number, row in enumerate(rows, start=2):
        said = [problem for problem in findings.problems if f"train.tsv line {number} " in problem]
        is_spoken = row["src_text"].strip() or row["conversation"]
        is_fine = is_spoken and row["tgt_text"].strip() and row["cut"] in ("", "0", "1")
        assert said or is_fine


# ---- lists of others -----------------------------------------------------------------------------------------------


def _written(path: Path, rows: Sequence[Sequence[str]], delimiter: str, quoting: int) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([["path", "text"], *rows])
    return path


def _as_dicts(rows: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(("path", "text"), row, strict=True)) for row in rows]


PAIRS = st.lists(st.tuples(TEXT, TEXT).map(list), max_size=4)
PLAIN_PAIRS = st.lists(st.tuples(st.just("a.wav"), PLAIN).map(list), max_size=4)
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])


@odd
@given(rows=PAIRS, delimiter=st.sampled_from(",;\t"), quoting=QUOTING)
def test_every_csv_is_read(rows: list[list[str]], delimiter: str, quoting: int, tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", rows, delimiter, quoting)
    assert list(read_csv(path, ("path", "text"))) == _as_dicts(rows)


@odd
@given(rows=PAIRS, quoting=QUOTING)
@example(rows=[["a.wav", 'say "a"'], ["b.wav", "two\nlines"]], quoting=csv.QUOTE_MINIMAL)
def test_a_quoted_tsv_is_read_or_asked_about(rows: list[list[str]], quoting: int, tmp_path: Path) -> None:
    path = _written(tmp_path / "a.tsv", rows, "\t", quoting)
    try:
        found = list(read_tsv(path, ("path", "text")))
    except CorpusError as error:
        assert "--quotes raw" in str(error)
        found = list(read_tsv(path, ("path", "text"), "csv"))
    assert found == _as_dicts(rows)


@odd
@given(rows=PLAIN_PAIRS)
@example(rows=[["a.wav", '"He said ""yes""."'], ["b.wav", "plain"]])
@example(rows=[["a.wav", '"open'], ["b.wav", 'close"']])
def test_a_raw_tsv_is_read_or_asked_about(rows: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in [["path", "text"], *rows]), encoding="utf-8", newline="")
    assert list(read_table(path)) == _as_dicts(rows)
    try:
        found = list(read_tsv(path, ("path", "text")))
    except CorpusError as error:
        assert "--quotes raw" in str(error)
        found = list(read_tsv(path, ("path", "text"), "raw"))
    assert found == _as_dicts(rows)


@odd
@given(content=st.binary(max_size=60), name=st.sampled_from(["a.tsv", "a.csv", "a.json", "a.jsonl"]))
@example(content=b'path\ttext\n"a', name="a.tsv")
@example(content=b"\xff\xfe\xff", name="a.csv")
@example(content=b"[" * 60, name="a.json")
def test_any_bytes_of_a_list_are_read_or_named(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    reader = {".tsv": read_tsv, ".csv": read_csv}.get(path.suffix, read_json)
    try:
        rows = list(reader(path))
    except CorpusError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(row, (dict, Dropped)) for row in rows)
