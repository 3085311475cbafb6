"""The class that VoiceBench calls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, wake_lora

from blspkd_fairseq.generation.decoding import ContextError
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.systems.voicebench import VoiceBenchAssistant


@pytest.fixture(scope="module", params=["speech", "all"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voicebench")
    model = tiny_model(root, lora_scope=request.param)
    wake_lora(model.model.llm)
    model.save_pretrained(root / "model")
    return root / "model"


def test_it_answers_sound_and_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLSPKD_MODEL", str(folder))
    assistant = VoiceBenchAssistant()
    model = assistant.model
    samples = np.random.default_rng(0).normal(size=20_000) / 10  # float64, as datasets gives them
    answer = assistant.generate_audio({"array": samples, "sampling_rate": 22_050, "path": None}, max_new_tokens=12)
    assert answer == model.generate((samples, 22_050), max_new_tokens=12) and answer
    assert answer.startswith(assistant.generate_ttft({"array": samples, "sampling_rate": 22_050}))
    assert isinstance(
        assistant.generate_audio({"array": samples, "sampling_rate": 22_050}), str
    )  # to the context's end


def test_text_is_answered_by_the_llm_that_hears_nothing(folder: Path) -> None:
    model = BlspKd.from_pretrained(folder)
    answer = VoiceBenchAssistant(model).generate_text("Call my mother.", max_new_tokens=12)
    for name, parameter in model.model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert VoiceBenchAssistant(model).generate_text("Call my mother.", max_new_tokens=12) == answer
    assert answer == model.chat([{"role": "user", "content": "Call my mother."}], max_new_tokens=12)


def test_a_text_that_the_llm_has_no_room_for_is_refused(folder: Path) -> None:
    with pytest.raises(ContextError, match="the LLM reads 512 together with its answer: shorten the audio or the text"):
        VoiceBenchAssistant(BlspKd.from_pretrained(folder)).generate_text("light " * 600)
