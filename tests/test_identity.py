"""Stores of answers are bound to the content of what decides an answer, and not to where it lies."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import generate_responses
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers_util import CHATML

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.record_store import StoreError
from blspkd_fairseq.generation.identity import model_identity
from blspkd_fairseq.generation.responses import ResponseSettings
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.trained_state import write_trained
from blspkd_fairseq.systems.systems import CascadeSystem, CheckpointSystem, System, TextSystem


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an LLM, a Whisper, a template and a trained model."""
    root = tmp_path_factory.mktemp("made")
    tiny.save_llm(root / "llm")
    tiny.save_whisper(root / "whisper")
    (root / "llm" / "merges.txt").write_text("a b\n")  # of tokenizers that are not fast
    (root / "t.jinja").write_text(CHATML)
    return root


def config_of(root: Path) -> SpeechLlmConfig:
    return SpeechLlmConfig(
        speech_encoder=str(root / "whisper"), llm=str(root / "llm"), llm_dtype="float32",
        chat_template=str(root / "t.jinja"), adapter_heads=2, adapter_pre_layers=1, adapter_post_layers=1, lora_rank=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(made: Path) -> SpeechLLM:
    return build_speech_llm(config_of(made))[0]


@pytest.fixture
def root(made: Path, trained: SpeechLLM, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "root")
    write_trained(tmp_path / "root" / "trained", vars(config_of(tmp_path / "root")), trained, torch.float32)
    edit_json("trained/config.json", weights_sha256="")(
        tmp_path / "root"
    )  # as of earlier releases: weights are changed
    return tmp_path / "root"


def settings(root: Path, **options: Any) -> ResponseSettings:
    return replace(ResponseSettings(str(root / "llm"), chat_template=str(root / "t.jinja")), **options)


def system(root: Path, kind: str) -> System:
    config = settings(root).config()
    if kind == "checkpoint":
        return CheckpointSystem(root / "trained")
    return TextSystem(config) if kind == "text" else CascadeSystem(str(root / "whisper"), config)


def identities(root: Path) -> dict[str, Any]:
    found = {kind: system(root, kind).identity() for kind in ("checkpoint", "text", "cascade")}
    return {**found, "responses": settings(root).identity()}


def append(name: str, text: str = "\n") -> Callable[[Path], None]:
    return lambda root: (root / name).open("a").write(text) and None


def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        (root / name).write_text(json.dumps({**json.loads((root / name).read_text()), **values}))

    return edit


def change_weight(name: str, tensor: int) -> Callable[[Path], None]:
    """Another value everywhere in one tensor; size and header of the file stay as they are."""

    def edit(root: Path) -> None:
        weights = load_file(root / name)
        key = sorted(weights)[tensor]
        save_file({**weights, key: weights[key] * 1.01 + 1e-3}, root / name, {"format": "pt"})

    return edit


ALL = {"checkpoint", "text", "cascade", "responses"}
CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "template": (append("t.jinja", "{# other #}"), ALL),
    "first tensor": (change_weight("llm/model.safetensors", 0), ALL),
    "middle tensor": (change_weight("llm/model.safetensors", 9), ALL),
    "last tensor": (change_weight("llm/model.safetensors", -1), ALL),
    "configuration": (edit_json("llm/config.json", rope_theta=5.0), ALL),
    "tokenizer": (edit_json("llm/tokenizer.json", version="1.1"), ALL),
    "tokenizer's settings": (edit_json("llm/tokenizer_config.json", eos_token="<|endoftext|>"), ALL),
    "merges": (append("llm/merges.txt", "c d\n"), ALL),
    "template of the LLM": (append("llm/chat_template.jinja", "{# other #}"), ALL),
    "encoder": (change_weight("whisper/model.safetensors", 3), {"checkpoint", "cascade"}),
    "encoder's configuration": (edit_json("whisper/config.json", max_length=7), {"checkpoint", "cascade"}),
    "trained weights": (change_weight("trained/model.safetensors", 0), {"checkpoint"}),
    "trained options": (edit_json("trained/config.json", pad_to_30s=True), {"checkpoint"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_an_answer_is_bound(change: str, root: Path) -> None:
    before = identities(root)
    edit, expected = CHANGES[change]
    edit(root)
    after = identities(root)
    assert {kind for kind in before if before[kind] != after[kind]} == expected


def test_where_it_lies_is_not(root: Path, tmp_path: Path) -> None:
    before = identities(root)
    moved = root.rename(tmp_path / "elsewhere")
    named = {"llm": moved / "llm", "speech_encoder": moved / "whisper", "chat_template": moved / "t.jinja"}
    checkpoint = CheckpointSystem(moved / "trained", **{name: str(path) for name, path in named.items()})
    assert checkpoint.identity() == before["checkpoint"]
    assert system(moved, "text").identity() == before["text"]
    assert system(moved, "cascade").identity() == before["cascade"]
    assert settings(moved).identity() == before["responses"]
    (root.parent / "link").symlink_to(moved / "llm")
    assert model_identity(str(root.parent / "link")) == model_identity(str(moved / "llm"))


@pytest.mark.parametrize(
    "options",
    [{"llm_dtype": "float32"}, {"system_prompt": "Be brief."}, {"chat_template": ""}, {"max_new_tokens": 9},
     {"sampling": True}, {"temperature": 0.5}, {"top_p": 0.5}, {"seed": 2}, {"prompt": "Repeat: {speech}"}],
)  # fmt: skip
def test_options_are_bound(options: dict[str, Any], root: Path) -> None:
    assert settings(root, **options).identity() != settings(root).identity()
    assert settings(root).identity()["template_date"] == "2024-07-26"


def test_an_edited_template_is_refused_and_a_moved_one_is_not(root: Path, tmp_path: Path) -> None:
    rows = [{"id": f"u{i}", "audio": "x.wav", "n_frames": 9, "src_text": text} for i, text in enumerate(tiny.SENTENCES)]
    write_manifest(tmp_path / "in.tsv", rows)

    def run(template: Path, *options: str) -> list[dict[str, str]]:
        given = ["--input", tmp_path / "in.tsv", "--output", tmp_path / "out.tsv", "--llm", root / "llm"]
        given += ["--chat-template", template, "--max-new-tokens", 4, "--keep-refusals", *options]
        generate_responses.main([str(one) for one in given])
        return list(Manifest.load(tmp_path / "out.tsv"))

    run(root / "t.jinja", "--rows", "3")
    moved = (root / "t.jinja").rename(tmp_path / "moved.jinja")
    before = run(moved, "--rows", "3")
    moved.write_text("{{ 'Speak like a pirate.' }}" + moved.read_text())
    with pytest.raises(StoreError, match="other settings .chat_template was 'sha256:"):
        run(moved)
    assert list(Manifest.load(tmp_path / "out.tsv")) == before


# ---- adapters of peft ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_model", [False, True])
@pytest.mark.parametrize("option", ["llm", "speech-encoder"])
def test_a_folder_of_an_adapter_is_refused_everywhere(option: str, has_model: bool, root: Path) -> None:
    folder = root / {"llm": "llm", "speech-encoder": "whisper"}[option]
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    if not has_model:
        (folder / "model.safetensors").unlink()
    message = rf"--{option} .* is a PEFT adapter of some/base and no whole model: merge it"
    config = SpeechLlmConfig(str(root / "whisper"), str(root / "llm"))
    with pytest.raises(ValueError, match=message):
        build_speech_llm(config)
    with pytest.raises(ValueError, match=message):
        system(root, "checkpoint").identity()
    if option == "llm":
        with pytest.raises(ValueError, match=message):
            settings(root).identity()
        with pytest.raises(ValueError, match=message):
            system(root, "text").load()
