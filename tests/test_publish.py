"""Publishing: a folder that others can load, its card, and what is sent to a hub."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from test_cli import call
from tiny import tiny_model, write_speech

from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.model_card import Card, CardError, write_card

OPTIONS = {"llm": "owner/llm", "speech_encoder": "owner/whisper", "adapter": "cformer", "lora_rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BlspKd]:
    root = tmp_path_factory.mktemp("publish")
    model = tiny_model(root)
    model.save_pretrained(root / "model")
    write_speech(root / "say.wav", 0.8, seed=0)
    return root, model


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_a_hub_reads() -> None:
    metrics = [("WER", "a test set", 3.1), ("BLEU", "another", 20.5)]
    card = Card("x", "mit", ["en", "de"], datasets=["me/corpus", "LibriSpeech"], hours=960, metrics=metrics)
    text = write_card(card, OPTIONS)
    found = header(text)
    assert found["base_model"] == ["owner/llm", "owner/whisper"] and found["pipeline_tag"] == "audio-text-to-text"
    assert found["datasets"] == ["me/corpus"] and found["metrics"] == ["bleu", "wer"]
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.1
    assert "LibriSpeech. 960 hours of speech." in text and "| BLEU | another | 20.5 |" in text
    assert "Partial LoRA of rank 4" in text and "## Limits" in text
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.eval_results[0].metric_value == 3.1
    with pytest.raises(CardError, match="--license"):
        write_card(Card("x", " "), OPTIONS)
    with pytest.raises(CardError, match="/home/me/llm is a path of this machine: name the base models"):
        write_card(Card("x", "mit"), {**OPTIONS, "llm": "/home/me/llm"})


def test_a_folder_is_written_that_others_load(model: tuple[Path, BlspKd], tmp_path: Path, capsys: Any) -> None:
    root, own = model
    words = ["publish", root / "model", "--output", tmp_path / "out", "--license", "mit", "--audio", root / "say.wav"]
    words += ["--base-model", "owner/llm", "owner/whisper", "--metric", "WER=mine=3", "--dtype", "float32"]
    assert call(*words, "--dry-run") == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["README.md", "config.json", "model.safetensors", "say.wav"] and not (tmp_path / "out").exists()
    assert call(*words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == listed
    bases = {"llm": str(root / "llm"), "speech_encoder": str(root / "whisper")}
    again = BlspKd.from_pretrained(tmp_path / "out", **bases)
    say = root / "say.wav"
    assert again.generate(say, max_new_tokens=6) == own.generate(say, max_new_tokens=6)
    assert str(root) not in (tmp_path / "out" / "config.json").read_text()  # nothing of this machine
    assert call(*words) == 1 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and nothing of how it was made


def test_a_dry_run_needs_no_place(model: tuple[Path, BlspKd], tmp_path: Path, capsys: Any) -> None:
    words = ["publish", model[0] / "model", "--license", "mit", "--base-model", "owner/llm", "owner/whisper"]
    assert call(*words, "--dry-run") == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["README.md", "config.json", "model.safetensors"]


def test_what_fails_on_the_way_leaves_nothing(
    model: tuple[Path, BlspKd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["publish", model[0] / "model", "--license", "mit", "--base-model", "owner/llm", "owner/whisper"]
    for end, status in ((OSError("no room"), 1), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr("blspkd_fairseq.hub.write_trained", mock.Mock(side_effect=end))
        assert call(*words, "--output", tmp_path / "new" / "out") == status
        assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say where to"),
        (["--output", "x"], "--license"),
        (["--output", "x", "--license", "mit"], "name the base models with --base-model"),
        (["--output", "x", "--license", "mit", "--metric", "WER 3"], "METRIC=DATA=VALUE"),
        (["--output", "x", "--license", "mit", "--metric", "WER=mine=nan"], "WER on mine is nan"),
        (["--output", "x", "--license", "mit", "--hours", "-3"], "hours of speech must be a number of at least 0"),
        (["--output", "x", "--license", "mit", "--hours", "inf"], "hours of speech must be a number of at least 0"),
        (["--output", "x", "--license", "mit", "--audio", "/none.wav"], "/none.wav does not exist"),
    ],
)
def test_what_is_missing_is_said(model: tuple[Path, BlspKd], words: list[str], message: str, capsys: Any) -> None:
    assert call("publish", model[0] / "model", *words) == 1
    assert message in capsys.readouterr().err


def test_pushing(model: tuple[Path, BlspKd], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import huggingface_hub

    sent: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            sent["repo"] = (repo, private, exist_ok)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            if repo_id == "me/refused":
                raise OSError("no network")
            sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    card = Card("x", "mit", base_models=("owner/llm", "owner/whisper"))
    assert model[1].push_to_hub("me/x", card, private=True) == "https://hub/me/x/commit/1"
    assert sent == {"repo": ("me/x", True, True), "files": ["README.md", "config.json", "model.safetensors"]}
    words = ["publish", model[0] / "model", "--license", "mit", "--base-model", "owner/llm", "owner/whisper"]
    assert call(*words, "--push-to", "me/y") == 0 and "https://hub/me/y/commit/1" in capsys.readouterr().out
    assert call(*words, "--push-to", "me/refused") == 1
    assert "me/refused cannot be written on the hub (no network): log in" in capsys.readouterr().err
