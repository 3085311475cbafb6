"""The page in a real Chromium, with a sound file as its microphone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser_util import Visit, chromium, expect, needs_chromium, record
from serving_util import Served, as_file, noise, served
from tiny import tiny_model

from blspkd_fairseq.demo.routes import add_demo

pytestmark = [pytest.mark.slow, needs_chromium]


class _Whisper:
    name = "whisper-of-the-test"

    def transcribe(self, samples: np.ndarray) -> str:
        return f"about {len(samples) / 16_000:.0f} seconds"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tiny_model(tmp_path_factory.mktemp("browser"))
    with served(model, change=lambda app: add_demo(app, _Whisper()), audio_seconds=8, new_tokens=12) as one:
        yield one


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    microphone = tmp_path_factory.mktemp("microphone") / "voice.wav"
    soundfile.write(microphone, np.tile(noise(4), 3), 48_000, subtype="PCM_16")
    with chromium(microphone) as one:
        yield one


@pytest.fixture(params=[(1100, 800), (360, 740)], ids=["desk", "phone"])
def visit(request: pytest.FixtureRequest, browser: object, server: Served) -> Iterator[Visit]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, permissions=["microphone"])
    context.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    yield Visit(context.new_page(), f"{server.url}/")
    context.close()


def test_one_speaks_reads_the_answers_hears_a_token_and_goes_on(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#about")).to_contain_text("whisper-of-the-test writes")
    record(page)
    expect(page.locator("#status")).to_have_text("Ready.")
    turn = page.locator(".turn")
    expect(turn.locator(".hears .text")).not_to_be_empty()
    expect(turn.locator(".hears .numbers")).to_contain_text("first word after")
    expect(turn.locator(".transcript")).to_have_text(re.compile(r"Whisper wrote: about \d seconds"))
    expect(turn.locator(".reads .text")).not_to_be_empty()
    tokens = turn.locator(".tokens button")
    assert tokens.count() >= 1
    assert turn.locator(".edges span").count() == tokens.count()
    tokens.first.click()
    expect(tokens.first).to_have_class("playing")
    expect(tokens.first).not_to_have_class("playing")  # it has been heard
    record(page)
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#status")).to_have_text("Ready.")
    roles = [[message["role"] for message in body["messages"]] for body in visit.bodies]
    assert roles == [["user"], ["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert "input_audio" in str(visit.bodies[2]) and "input_audio" not in str(visit.bodies[3])
    page.locator("#clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert not visit.problems
    assert all(url.startswith((visit.url, f"blob:{visit.url}", "data:")) for url in visit.asked)


def test_a_file_an_instruction_and_the_keyboard_alone(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    (tmp_path / "voice.flac").write_bytes(as_file(noise(3), "FLAC"))
    page.locator("#preset").select_option("own")
    page.locator("#instruction").fill("Say it again: {speech} Now.")
    page.locator("#file").set_input_files(tmp_path / "voice.flac")
    expect(page.locator("#status")).to_have_text("Ready.")
    expect(page.locator(".turn h2")).to_contain_text("voice.flac – Say it again:")
    parts = visit.bodies[0]["messages"][0]["content"]
    assert [part.get("text") for part in parts] == ["Say it again: ", None, " Now."]
    buttons = page.locator(".tokens button")
    assert buttons.count() > 1 and page.locator(".tokens button[tabindex='0']").count() == 1
    buttons.first.focus()
    page.keyboard.press("ArrowRight")
    expect(buttons.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(buttons.nth(1)).to_have_class("playing")
    page.locator("#record").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#record")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(800)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#status")).to_have_text("Ready.")
    assert not visit.problems


def test_everything_has_a_name_and_fits_the_screen(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    (tmp_path / "long.wav").write_bytes(as_file(noise(6)))
    page.locator("#file").set_input_files(tmp_path / "long.wav")
    expect(page.locator("#status")).to_have_text("Ready.")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0
    assert page.evaluate("document.querySelector('.scroll').scrollWidth") >= 6 * 170
    tree = page.locator("body").aria_snapshot()
    for said in (
        'heading "Talk to an LLM that hears"', 'button "Record"', 'combobox "Instruction"', "status: Ready.",
        'img "Spectrogram of 6.0 seconds', 'toolbar "Tokens heard', 'heading "It hears"', 'region "Conversation"',
    ):  # fmt: skip
        assert said in tree, tree
    small = page.evaluate(
        "[...document.querySelectorAll('form button, form select, .button')].filter((one) => one.offsetParent)"
        ".map((one) => one.getBoundingClientRect().height).filter((height) => height < 44)"
    )
    assert small == []


@pytest.mark.parametrize("content", [b"no sound", as_file(noise(9))], ids=["no sound", "too long"])
def test_what_cannot_be_heard_is_said(visit: Visit, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "thing.wav").write_bytes(content)
    page = visit.page
    page.locator("#file").set_input_files(tmp_path / "thing.wav")
    expect(page.locator("#problem")).not_to_be_empty()
    expect(page.locator("#record")).to_be_enabled()
    record(page)  # and it goes on
    expect(page.locator("#status")).to_have_text("Ready.")
    expect(page.locator("#problem")).to_be_empty()


def test_a_server_with_a_key_asks_for_it(browser: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model(tmp_path_factory.mktemp("key"))
    with served(model, key="secret", change=add_demo, new_tokens=4) as server:
        context = browser.new_context(permissions=["microphone"])
        page = context.new_page()
        page.goto(server.url)
        page.locator("#key").fill("secret")
        page.keyboard.press("Tab")
        expect(page.locator("#about")).to_have_text("tiny.")
        record(page)
        expect(page.locator("#status")).to_have_text("Ready.")
        context.close()
