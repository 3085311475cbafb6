"""A model as VoiceBench (github.com/MatthewCYM/VoiceBench) takes one: a class with three methods.

In VoiceBench's ``src/models/__init__.py``::

    from blspkd_fairseq.systems.voicebench import VoiceBenchAssistant
    model_cls_mapping["blspkd"] = VoiceBenchAssistant

Then ``BLSPKD_MODEL=checkpoints python main.py --model blspkd --data alpacaeval --split test --modality audio``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from blspkd_fairseq.base_models import load_published
from blspkd_fairseq.data.prompts import SPEECH_SLOT
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_text
from blspkd_fairseq.hub import BlspKd

MODEL_VARIABLE = "BLSPKD_MODEL"


class VoiceBenchAssistant:
    """Answers spoken questions, and the same questions as text: greedily, without an instruction.

    Args:
        model: default: what the environment's BLSPKD_MODEL names, or the model that the package carries.
    """

    def __init__(self, model: BlspKd | None = None) -> None:
        path = os.environ.get(MODEL_VARIABLE)
        self.model = model or (BlspKd.from_pretrained(path) if path else load_published())

    def generate_audio(self, audio: Mapping[str, Any], max_new_tokens: int = 2048) -> str:
        """The answer to what is said.

        Args:
            audio: ``array`` of samples, and their ``sampling_rate``.
            max_new_tokens: limit; the LLM's context is another.
        """
        speech = (audio["array"], int(audio["sampling_rate"]))
        turn = {"role": "user", "content": [{"type": "audio", "audio": speech}]}
        return self.model.chat([turn], max_new_tokens=max_new_tokens)

    def generate_text(self, text: str, max_new_tokens: int = 2048) -> str:
        """The answer of the LLM, which hears nothing, to the question as text."""
        options = DecodingOptions(max_new_tokens=max_new_tokens)
        return answer_text(self.model.model, self.model.chat_format, [text], [SPEECH_SLOT], options)[0][0].text

    def generate_ttft(self, audio: Mapping[str, Any]) -> str:
        """The first token of the answer, for those who measure how long it takes."""
        return self.generate_audio(audio, max_new_tokens=1)
