"""Real recordings with human translations, in the published layouts, MP3 and FLAC."""

from pathlib import Path

import fetch_recordings
import numpy as np
import prepare_common_voice
import prepare_covost2
import prepare_librispeech
import pytest

from blspkd_fairseq.cache import default_cache
from blspkd_fairseq.data.audio import load_audio
from blspkd_fairseq.data.corpora import Dropped, read_table
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.validate import validate

CACHE = default_cache()
RECORDINGS = CACHE / "asterisk"

pytestmark = [pytest.mark.real, pytest.mark.recordings]


@pytest.fixture(scope="module")
def covost2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "covost2"
    fetch_recordings.build("covost2", RECORDINGS, folder)
    return folder


def table_rows(path: Path) -> list[dict[str, str]]:
    rows = list(read_table(path))
    assert not any(isinstance(row, Dropped) for row in rows)
    return rows  # type: ignore[return-value]


def test_recordings() -> None:
    assert len(Manifest.load(RECORDINGS / "recordings.tsv")) >= 500
    assert len(fetch_recordings.spoken(Manifest.load(RECORDINGS / "recordings.tsv"))) >= 200
    assert validate(RECORDINGS, sample=50).audio == {"recordings": 50}


def test_covost2_of_real_mp3(covost2: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(covost2), "--direction", "en_fr", "--any-direction", "--output"]
    prepare_covost2.main([*arguments, str(tmp_path / "zip"), "--zip", "--processes", "2"])
    joined = covost2.parent / "joined"  # only the published single file
    (joined / "en").mkdir(parents=True)
    for name in ("clips", "validated.tsv", "covost_v2.en_fr.tsv"):
        (joined / "en" / name).symlink_to(covost2 / "en" / name)
    prepare_covost2.main(["--root", str(joined), *arguments[2:], str(tmp_path / "files"), "--processes", "1"])
    # Clips are numbered from 1.
    originals = fetch_recordings.translated(Manifest.load(RECORDINGS / "recordings.tsv"))
    total = 0
    for split in ("train", "dev", "test"):
        published = table_rows(covost2 / "en" / f"covost_v2.en_fr.{split}.tsv")
        manifest = Manifest.load(tmp_path / "zip" / f"{split}.tsv", non_empty=("src_text", "tgt_text"))
        texts = [(row["src_text"], row["tgt_text"]) for row in manifest]
        assert texts == [(row["sentence"], row["translation"]) for row in published]
        for row, other in zip(manifest, Manifest.load(tmp_path / "files" / f"{split}.tsv"), strict=True):
            assert {**row, "audio": ""} == {**other, "audio": ""}
            samples = load_audio(row["audio"], tmp_path / "zip", int(row["n_frames"]))
            np.testing.assert_array_equal(samples, load_audio(other["audio"], tmp_path / "files"))
            original = load_audio(originals[int(row["id"].split("_")[-1]) - 1]["audio"], RECORDINGS)
            assert abs(len(samples) - len(original)) < 1600
            assert correlation(samples, original) > 0.95
        total += len(manifest)
    assert total >= 200
    findings = validate(tmp_path / "zip", audio="all")
    assert findings.problems == []
    assert any("speakers" in warning for warning in findings.warnings)  # there is one voice
    assert not any("sentences" in warning for warning in findings.warnings)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The largest there is at any shift: MP3 delays."""
    size = 1 << (len(one) + len(other)).bit_length()
    product = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size)), size)
    return float(product.max() / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_common_voice_of_real_mp3(covost2: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(covost2), "--lang", "en", "--splits", "validated", "--processes", "2"]
    prepare_common_voice.main([*arguments, "--output", str(tmp_path)])
    rows = list(Manifest.load(tmp_path / "validated.tsv"))
    assert [row["src_text"] for row in rows] == [row["sentence"] for row in table_rows(covost2 / "en/validated.tsv")]


def test_librispeech_of_real_flac(tmp_path: Path) -> None:
    fetch_recordings.build("librispeech", RECORDINGS, tmp_path / "corpus")
    arguments = ["--root", str(tmp_path / "corpus"), "--processes", "2", "--output", str(tmp_path / "out")]
    prepare_librispeech.main(arguments)
    assert validate(tmp_path / "out", audio="all").problems == []
    flacs = {path.stem: path for path in (tmp_path / "corpus").rglob("*.flac")}
    found = 0
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        for row in Manifest.load(tmp_path / "out" / f"{subset}.tsv"):
            samples = load_audio(row["audio"], tmp_path / "out")
            np.testing.assert_array_equal(samples, load_audio(flacs[row["id"]]))
            assert row["src_text"] == row["src_text"].upper()
            found += 1
    assert found == len(flacs) >= 150


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        fetch_recordings.build("covost2", RECORDINGS, tmp_path)
