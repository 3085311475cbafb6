"""Tiny random models and data of the real kinds, for tests of everything around the numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers_util import bpe_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

from blspkd_fairseq.data.manifest import write_manifest
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

# Seconds: a guard against a deadlock, not a limit. A busy machine takes its time.
PATIENCE = 600

SENTENCES = (
    "Turn on the light in the kitchen.",
    "Play some music.",
    "What is the weather in Paris?",
    "Set a timer for ten minutes.",
    "Close the door, please.",
    "Add milk to my shopping list.",
    "Call my mother.",
    "It is cold in here.",
)


def save_llm(folder: Path, hidden: int = 32, layers: int = 2, seed: int = 0, **options: Any) -> Path:
    """A random Llama with a byte-level BPE tokenizer and a chat template."""
    tokenizer = bpe_tokenizer(texts=SENTENCES, vocab_size=400)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_whisper(folder: Path, width: int = 16, layers: int = 1, seed: int = 1) -> Path:
    """A random Whisper."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(config).save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {
    "llm_dtype": "float32", "adapter_pre_layers": 1, "adapter_post_layers": 1, "adapter_heads": 2, "lora_rank": 2,
}  # fmt: skip


def tiny_model(folder: Path, **options: Any) -> BlspKd:
    """A random model that hears, with one layer before and one after CIF."""
    config = SpeechLlmConfig(
        speech_encoder=str(save_whisper(folder / "whisper")),
        llm=str(save_llm(folder / "llm")),
        **{**SMALL, **options},
    )
    torch.manual_seed(0)
    model, chat = build_speech_llm(config)
    return BlspKd(model, chat, config)


def wake_lora(model: torch.nn.Module, std: float = 0.3) -> None:
    """Draws LoRA's second matrices, which begin at 0, so that it matters where LoRA acts."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def write_speech(path: Path, seconds: float, seed: int, rate: int = 16_000) -> int:
    """Noise under a slow envelope; returns its samples at 16 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    samples = rng.normal(size=len(time)) * (0.1 + 0.1 * np.sin(2 * np.pi * 3 * time))
    soundfile.write(path, samples.astype(np.float32), rate)
    return len(time) * 16_000 // rate


def write_split(
    folder: Path, split: str, count: int, texts: Sequence[str] = SENTENCES, drop: Sequence[str] = (), **cells: str
) -> Path:
    """``count`` utterances of different lengths, with responses; ``cells`` are further columns."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = f"audio/{split}-{i}.flac"
        # What is validated on is no recording of the training set, which validate would say.
        seed = i + 1000 * split.startswith(("v", "dev"))
        samples = write_speech(folder / name, 0.6 + 0.13 * (i % 7), seed=seed)
        row: dict[str, Any] = {"id": f"{split}-{i}", "audio": name, "n_frames": samples}
        row |= {"src_text": texts[i % len(texts)], "tgt_text": texts[(i + 1) % len(texts)], **cells}
        rows.append({key: value for key, value in row.items() if key not in drop})
    columns = ["id", "audio", "n_frames", "src_text", "tgt_text", *cells]
    write_manifest(folder / f"{split}.tsv", rows, [name for name in columns if name not in drop])
    return folder / f"{split}.tsv"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
