"""One manifest of several."""

import sys
from pathlib import Path

import pytest
import tiny

from blspkd_fairseq.data.audio import load_audio
from blspkd_fairseq.data.manifest import Manifest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import merge_manifests  # noqa: E402


def test_rows_audio_and_text_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tiny.write_split(tmp_path / "one", "train", 3, speaker="a")
    two = tiny.write_split(tmp_path / "two", "dev", 2)
    merge_manifests.main(["--inputs", str(one), str(two), "--output", str(tmp_path / "all" / "train.tsv")])
    assert "left out: speaker" in capsys.readouterr().out
    merged = Manifest.load(tmp_path / "all" / "train.tsv")
    parts = [row for path in (one, two) for row in Manifest.load(path)]
    assert [row["id"] for row in merged] == [row["id"] for row in parts]
    assert [row["tgt_text"] for row in merged] == [row["tgt_text"] for row in parts]
    for index, row in enumerate(merged):
        assert len(load_audio(row["audio"], None)) == merged.n_frames[index]


def test_ids_that_two_share_are_numbered(tmp_path: Path) -> None:
    paths = [tiny.write_split(tmp_path / name, "train", 2) for name in ("one", "two")]
    assert merge_manifests.merge(paths, tmp_path / "all.tsv") == 4
    assert [row["id"] for row in Manifest.load(tmp_path / "all.tsv")] == [
        "1/train-0", "1/train-1", "2/train-0", "2/train-1",
    ]  # fmt: skip


def test_archives_and_what_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "id\taudio\tn_frames\nx\tshards/a.zip:12:345\t16000\n"
    (tmp_path / "zip.tsv").write_text(text)
    merge_manifests.merge([tmp_path / "zip.tsv"], tmp_path / "out" / "all.tsv")
    (row,) = Manifest.load(tmp_path / "out" / "all.tsv")
    assert row["audio"] == f"{tmp_path}/shards/a.zip:12:345"
    for inputs in (["missing.tsv"], ["zip.tsv"]):
        with pytest.raises(SystemExit) as end:
            options = [str(tmp_path / name) for name in inputs]
            merge_manifests.main(["--inputs", *options, "--output", str(tmp_path / "zip.tsv")])
        assert end.value.code == 1
    said = capsys.readouterr().err
    assert "missing.tsv" in said and "is one of the inputs" in said
    assert (tmp_path / "zip.tsv").read_text() == text
