"""Training that begins with a trained model takes over the options without which its weights do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRAIN_OPTIONS, fairseq, load
from tiny import save_llm, save_whisper, write_split

from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.build import SpeechLlmConfig, adopt_options, build_speech_llm


def test_what_is_left_at_its_default_is_taken_over() -> None:
    trained = {"adapter_heads": 2, "adapter_pre_layers": 1, "lora_rank": 4, "llm": "L", "adapter_dropout": 0.5}
    config = SpeechLlmConfig(adapter_pre_layers=3, llm="mine")
    assert adopt_options(config, {**trained, "lora_scope": "speech"}) == {"adapter_heads": 2, "lora_rank": 4}
    assert (config.adapter_heads, config.adapter_pre_layers, config.llm) == (2, 3, "mine")
    config = SpeechLlmConfig()  # a warm-up without LoRA says nothing of the LoRA to come
    assert "lora_rank" not in adopt_options(config, {**trained, "lora_scope": "none"})
    assert config.lora_scope == "speech" and config.llm == "L"


def test_training_goes_on_from_a_folder_without_its_options(tmp_path: Path) -> None:
    config = SpeechLlmConfig(
        speech_encoder=str(save_whisper(tmp_path / "whisper")),
        llm=str(save_llm(tmp_path / "llm")),
        llm_dtype="float32",
        adapter_pre_layers=1,
        adapter_post_layers=2,
        adapter_heads=2,
        lora_rank=3,
        lora_alpha=5.0,
    )
    torch.manual_seed(0)
    BlspKd(*build_speech_llm(config), config).save_pretrained(tmp_path / "model")
    write_split(tmp_path / "data", "train", 4)
    pairs = dict(zip(TRAIN_OPTIONS[::2], TRAIN_OPTIONS[1::2], strict=False))
    assert "--adapter-heads" in pairs
    own: list[Any] = []
    words = iter(TRAIN_OPTIONS)
    for word in words:
        if word.startswith(("--adapter-p", "--adapter-h", "--lora-r")):
            next(words)
        else:
            own.append(word)
    options = [*own, "--save-dir", tmp_path / "save", "--max-update", 1, "--disable-validation"]
    log = fairseq("train", tmp_path / "data", *options, "--pretrained-model", tmp_path / "model")
    assert "--adapter-pre-layers 1" in log and "--lora-alpha 5.0" in log
    saved = load(tmp_path / "save" / "checkpoint_last.pt")["cfg"]["model"]
    assert (saved["adapter_post_layers"], saved["lora_rank"], saved["llm"]) == (2, 3, config.llm)
    # What is given stays, and is refused where it does not fit.
    with pytest.raises(ValueError, match="does not fit the model's options"):
        fairseq(
            "train", tmp_path / "data", *options, "--adapter-post-layers", 1, "--pretrained-model", tmp_path / "model"
        )
