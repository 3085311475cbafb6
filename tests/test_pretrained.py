"""The small model that the package carries."""

from pathlib import Path

import pytest

import blspkd_fairseq
from blspkd_fairseq.cache import default_cache
from blspkd_fairseq.evaluation.metrics import error_rate

CACHE = default_cache()
FOLDER = Path(blspkd_fairseq.__file__).parent / "pretrained" / "whisper-tiny.en-smollm2-135m"

pytestmark = pytest.mark.real


def test_it_hears() -> None:
    bases = {"llm": CACHE / "smollm2-135m-instruct", "speech_encoder": CACHE / "whisper-tiny.en"}
    model = blspkd_fairseq.BlspKd.from_pretrained(FOLDER, **{name: str(path) for name, path in bases.items()})
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    said = next(line.split("# ")[1] for line in card.splitlines() if 'example.flac", "repeat"' in line)
    heard = error_rate([model.generate(FOLDER / "example.flac", "repeat")], [said], "WER", "en")
    assert heard.score <= 30
    aligned = model.align(FOLDER / "example.flac", transcript=said)
    assert "".join(token.token for token in aligned).strip() == said
