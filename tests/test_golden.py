"""What earlier releases have saved is loaded, answers as it did, and is trained on (golden/make_golden.py makes it)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import train
from tiny import write_split

from blspkd_fairseq import BlspKd
from blspkd_fairseq.checkpoint_files import check_whole, updates_of

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import make_golden  # noqa: E402

RELEASES = sorted(path.parent for path in GOLDEN.glob("*/expected.json"))


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def expected(release: Path) -> Any:
    return json.loads((release / "expected.json").read_text(encoding="utf-8"))


def test_there_is_one() -> None:
    assert RELEASES


@pytest.mark.parametrize("name", ["saved", "checkpoint.pt"])
def test_it_answers_as_it_did(release: Path, tmp_path: Path, name: str) -> None:
    base = {part: str(release / part) for part in ("llm", "speech_encoder")}
    model = BlspKd.from_pretrained(release / name, device="cpu", **base)
    assert make_golden.answers(model, tmp_path) == expected(release)["answers"]


def test_it_is_validated_as_it_was(release: Path, tmp_path: Path) -> None:
    figures = make_golden.figures(release / "checkpoint.pt", release, tmp_path)
    assert figures == pytest.approx(expected(release)["figures"], abs=2e-3, rel=2e-3)


def test_it_is_trained_on(release: Path, tmp_path: Path) -> None:
    check_whole(release / "checkpoint.pt")
    write_split(tmp_path / "data", "train", 8)
    log = train(
        tmp_path / "data", tmp_path / "save", release / "llm", release / "speech_encoder", "--max-update", 4,
        "--disable-validation", "--restore-file", release / "checkpoint.pt", "--optimizer", "adam",
    )  # fmt: skip
    assert "(epoch 2 @ 3 updates)" in log and updates_of(tmp_path / "save/checkpoint_last.pt") == 4
