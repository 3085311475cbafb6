"""The configuration for AU-Harness: its requests, as that program makes them, are answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from serving_util import NAME, Served, as_file, input_audio, noise, served
from tiny import tiny_model

from blspkd_fairseq.base_models import PUBLISHED

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "au_harness.yaml"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_model(tmp_path_factory.mktemp("serving"))) as one:
        yield one


def test_every_kind_of_request_is_answered(server: Served, tmp_path: Path) -> None:
    for model in yaml.safe_load(CONFIG.read_text())["models"]:
        assert model["model"] == PUBLISHED.name and model["url"].endswith(":8000/v1")
        speech = as_file(noise(1.1))
        if model["inference_type"] == "transcription":
            (tmp_path / "said.wav").write_bytes(speech)
            with open(tmp_path / "said.wav", "rb") as file:
                assert isinstance(server.client.audio.transcriptions.create(model=NAME, file=file).text, str)
            continue
        assert model["inference_type"] == "vllm"
        for content in (
            [{"type": "text", "text": "Answer."}, input_audio(speech)],
            [{"type": "text", "text": "Answer."}],
        ):
            turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
            reply = server.client.chat.completions.create(
                model=NAME, messages=turns, tools=None, temperature=0.0001, max_completion_tokens=8
            )
            assert reply.choices[0].message.content is not None
