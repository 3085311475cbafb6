"""Answers token by token, of requests that come and go: the same as each by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_llm, save_whisper

from blspkd_fairseq.generation.streaming import Delta, StreamingDecoder
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

NOISE = np.random.default_rng(0).normal(size=40_000).astype(np.float32) / 10


def speech(begin: int, seconds: float) -> tuple[np.ndarray, int]:
    return NOISE[begin : begin + int(seconds * 16_000)], 16_000


@pytest.fixture(scope="module", params=["speech", "all"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    root = tmp_path_factory.mktemp("streaming")
    config = SpeechLlmConfig(
        speech_encoder=str(save_whisper(root / "whisper")),
        llm=str(save_llm(root / "llm")),
        llm_dtype="float32",
        lora_scope=request.param,
        adapter_heads=2,
    )
    torch.manual_seed(0)
    model, chat = build_speech_llm(config)
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # so that it matters where LoRA acts
    return BlspKd(model, chat, config)


def said(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part}
            for part in parts
        ],
    }


CONVERSATIONS = [
    [said(speech(0, 0.7))],
    [said("Repeat: ", speech(3000, 1.3), " Now.")],
    [said("Call my mother.")],
    [said(speech(0, 0.4), speech(9000, 0.9)), {"role": "assistant", "content": "Of what?"}, said(speech(5, 0.5))],
]


def run(decoder: StreamingDecoder, rows: Sequence[int] = ()) -> dict[int, list[Delta]]:
    """Steps until nothing is active."""
    deltas: dict[int, list[Delta]] = {row: [] for row in rows}
    while decoder.active:
        for delta in decoder.step():
            deltas.setdefault(delta.row, []).append(delta)
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_it_says_what_generate_says(model: BlspKd) -> None:
    for messages in CONVERSATIONS[:2] + CONVERSATIONS[3:]:
        expected = model.generate(messages=messages, max_new_tokens=12)
        assert model.chat(messages, max_new_tokens=12) == expected
        pieces = list(model.chat(messages, stream=True, max_new_tokens=12))
        assert "".join(pieces) == expected and all(pieces)
