"""One speaks to the published model on its page, in a real Chromium."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser_util import Visit, chromium, expect, needs_chromium, record

from blspkd_fairseq.base_models import PUBLISHED
from blspkd_fairseq.evaluation.metrics import error_rate

pytestmark = [pytest.mark.slow, pytest.mark.real, needs_chromium]

RATE = 16_000


@pytest.fixture
def demo() -> Iterator[str]:
    """The address of ``blspkd demo``, as a user starts it."""
    command = [sys.executable, "-m", "blspkd_fairseq", "demo", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_spoken_question_is_heard_and_answered(demo: str, tmp_path: Path) -> None:
    card = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    said = re.search(r'example\.flac", "repeat"\).*said was: (.*)', card)[1]
    samples, _ = soundfile.read(PUBLISHED / "example.flac", dtype="float32")
    soundfile.write(tmp_path / "voice.wav", np.concatenate([samples, np.zeros(2 * RATE)]), RATE, subtype="PCM_16")
    with chromium(tmp_path / "voice.wav") as browser:
        context = browser.new_context(permissions=["microphone"])
        context.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        visit = Visit(context.new_page(), f"{demo}/")
        page = visit.page
        page.locator("#preset").select_option("repeat")
        record(page, round(1000 * len(samples) / RATE) + 500)
        expect(page.locator("#status")).to_have_text("Ready.")
        turn = page.locator(".turn")
        heard = "".join(turn.locator(".tokens button").all_text_contents())
        answer = turn.locator(".hears .text").inner_text()
        written = turn.locator(".transcript").inner_text()
        record(page)
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.locator("#status")).to_have_text("Ready.")
        context.close()
    assert error_rate([heard], [said.replace(" ", "")], "CER", "en").score <= 30
    assert error_rate([answer], [said], "WER", "en").score <= 40
    assert error_rate([written.removeprefix("Whisper wrote: ")], [said], "WER", "en").score <= 20
    assert not visit.problems
