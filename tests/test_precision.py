"""Half precisions where a CPU only emulates them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny import save_llm, save_whisper, write_split

from blspkd_fairseq import BlspKd
from blspkd_fairseq.modules import precision
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.precision import has_bfloat16, usable_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALVES = {"llm_dtype": "bfloat16", "product_dtype": "bfloat16", "speech_encoder_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"llm": str(save_llm(folder / "llm")), "speech_encoder": str(save_whisper(folder / "whisper"))}


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)
    precision._say.cache_clear()


def config(models: dict[str, str], **options: str) -> SpeechLlmConfig:
    sizes = {"adapter_heads": 2, "adapter_pre_layers": 1, "adapter_post_layers": 1}
    return SpeechLlmConfig(**models, **sizes, **options)


def test_what_a_cpu_only_emulates_is_float32_and_said_once(old_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = [usable_dtype(dtype, CPU) for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)]
    assert found == [torch.float32, torch.float32, torch.float32, torch.float64]
    assert ["bfloat16" in record.message for record in caplog.records] == [True, False]
    assert usable_dtype(torch.bfloat16, GPU) == torch.bfloat16 and not has_bfloat16(CPU)


def test_elsewhere_it_is_what_was_asked_for(models: dict[str, str]) -> None:
    assert usable_dtype(torch.bfloat16, CPU) == torch.bfloat16
    model, _ = build_speech_llm(config(models, **HALVES))
    assert {p.dtype for name, p in model.llm.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert model.products == next(model.speech_encoder.parameters()).dtype == torch.bfloat16


def test_the_whole_model_is_in_float32_there_with_the_weights_it_has_elsewhere(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modern, _ = build_speech_llm(config(models, **HALVES))
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)
    model, _ = build_speech_llm(config(models, **HALVES))
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {model.products}
    for one, other in zip(modern.llm.parameters(), model.llm.parameters(), strict=True):
        assert one.shape == other.shape and (one.requires_grad or torch.equal(one.float(), other))
    for name, expected in modern.fingerprints.items():
        assert torch.equal(model.fingerprints[name], expected)


def test_where_there_is_a_gpu_the_llm_stays_in_half_precision(
    models: dict[str, str], old_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, _ = build_speech_llm(config(models, **HALVES))
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_model_saved_elsewhere_is_used_there(models: dict[str, str], tmp_path: Path, old_cpu: None) -> None:
    write_split(tmp_path / "data", "train", 1)
    chosen = config(models, **HALVES)
    BlspKd(*build_speech_llm(chosen), chosen).save_pretrained(tmp_path / "saved")
    again = BlspKd.from_pretrained(tmp_path / "saved")
    assert again.config.llm_dtype == again.config.product_dtype == "bfloat16"  # what is saved again is as it was
    assert again.model.llm.dtype == torch.float32
    assert isinstance(again.generate(tmp_path / "data/audio/train-0.flac", "repeat", max_new_tokens=2), str)
