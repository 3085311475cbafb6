"""Training that begins with a trained model takes over the options without which its weights do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRAIN_OPTIONS, fairseq, load
from tiny import save_llm, save_whisper, write_split

from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.build import SpeechLlmConfig, adopt_options, build_speech_llm
from blspkd_fairseq.modules.trained_state import deepen_adapter, load_trained_state_dict, trained_state_dict


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


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def small_config(folder: Path, **options: Any) -> SpeechLlmConfig:
    whisper, llm = folder / "whisper", folder / "llm"
    bases = whisper if whisper.exists() else save_whisper(whisper), llm if llm.exists() else save_llm(llm)
    return SpeechLlmConfig(
        speech_encoder=str(bases[0]), llm=str(bases[1]), llm_dtype="float32", adapter_heads=2, lora_rank=3, **options
    )


@pytest.mark.parametrize(("pre", "post"), [(3, 1), (2, 2)])
def test_a_deeper_adapter_begins_with_the_output_of_the_shallow_one(bases: Path, pre: int, post: int) -> None:
    shallow, _ = build_speech_llm(small_config(bases, adapter_pre_layers=1, adapter_post_layers=1))
    deep, _ = build_speech_llm(small_config(bases, adapter_pre_layers=pre, adapter_post_layers=post))
    state = trained_state_dict(shallow)
    load_trained_state_dict(deep, deepen_adapter(deep, state))
    samples, lengths = torch.randn(2, 16_000), torch.tensor([16_000, 9_000])
    outputs = [model.eval().adapt(samples, lengths) for model in (shallow, deep)]
    assert torch.equal(outputs[0].embeddings, outputs[1].embeddings)
    assert torch.equal(outputs[0].alpha, outputs[1].alpha)  # type: ignore[arg-type]
    # What is new learns from the first update on.
    outputs[1] = deep.train().adapt(samples, lengths)
    (outputs[1].embeddings * torch.randn_like(outputs[1].embeddings)).sum().backward()
    new = {name: p for name, p in deep.named_parameters() if name.startswith("adapter.") and name not in state}
    last = [p for name, p in new.items() if "out_proj." in name or "linear2." in name]
    assert len(new) == 12 * (pre + post - 2) == 3 * len(last)
    assert all(not p.any() and p.grad is not None and p.grad.any() for p in last)


@pytest.mark.parametrize("options", [{"adapter_pre_layers": 0}, {"adapter_post_layers": 0}, {"adapter": "cnn"}])
def test_an_adapter_that_is_no_beginning_of_the_other_is_refused(bases: Path, options: dict[str, Any]) -> None:
    shallow, _ = build_speech_llm(small_config(bases, **{"adapter_pre_layers": 2, "adapter_post_layers": 2}))
    other, _ = build_speech_llm(small_config(bases, **{"adapter_pre_layers": 2, "adapter_post_layers": 2} | options))
    with pytest.raises(ValueError, match="does not fit the model's options"):
        load_trained_state_dict(other, deepen_adapter(other, trained_state_dict(shallow)))


def test_training_goes_on_with_a_deeper_adapter(tmp_path: Path, bases: Path) -> None:
    config = small_config(bases, adapter_pre_layers=1, adapter_post_layers=1)
    BlspKd(*build_speech_llm(config), config).save_pretrained(tmp_path / "model")
    write_split(tmp_path / "data", "train", 4)
    log = fairseq(
        "train", tmp_path / "data", *TRAIN_OPTIONS, "--lora-rank", 3, "--save-dir", tmp_path / "save",
        "--max-update", 1, "--disable-validation", "--pretrained-model", tmp_path / "model", "--adapter-pre-layers", 2,
    )  # fmt: skip
    assert "adapter.pre.1: not among the trained layers, begin by adding nothing" in log
    assert "adapter.pre.1.linear2.weight" in load(tmp_path / "save" / "checkpoint_last.pt")["model"]
