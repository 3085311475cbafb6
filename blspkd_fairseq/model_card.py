"""Model cards, as model hubs read them: what a model is made of, what it was trained on, and what was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class CardError(ValueError):
    """A card that cannot be written; the message says what is missing."""


@dataclass(frozen=True)
class Card:
    """What nobody can read out of the weights.

    Attributes:
        name: of the model.
        licence: an identifier such as mit or apache-2.0.
        languages: codes of what it hears.
        base_models: hub names, where the model's options have paths of one machine.
        datasets: hub names or titles. hours: of speech heard in training, with repetitions; 0: not said.
        metrics: (metric, data set, value), such as ("WER", "LibriSpeech test-clean", 3.1).
        limits: what it cannot do, in sentences.
        example: name of an audio file in the folder.
    """

    name: str
    licence: str
    languages: Sequence[str] = ("en",)
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    hours: float = 0.0
    metrics: Sequence[tuple[str, str, float]] = ()
    limits: str = ""
    example: str = ""

    def __post_init__(self) -> None:
        """Raises CardError where a number cannot have been measured."""
        if not 0 <= self.hours < math.inf:
            raise CardError(f"hours of speech must be a number of at least 0, got {self.hours:g}")
        for metric, dataset, value in self.metrics:
            if not math.isfinite(value):
                raise CardError(f"{metric} on {dataset} is {value:g}, which is no measurement: leave it out")


def write_card(card: Card, options: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        card: see there.
        options: of the model, as in its config.json.

    Raises:
        CardError: no licence, or base models that are paths and have no other name.
    """
    if not card.licence.strip():
        raise CardError("a model without a licence may not be used: give --license, such as mit or apache-2.0")
    bases = list(card.base_models) or [options["llm"], options["speech_encoder"]]
    paths = [base for base in bases if not _HUB_NAME.fullmatch(base)]
    if paths:
        raise CardError(f"{paths[0]} is a path of this machine: name the base models with --base-model OWNER/NAME")
    header = yaml.safe_dump(_metadata(card, bases), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{_body(card, bases, options)}"


def _metadata(card: Card, bases: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "license": card.licence,
        "language": list(card.languages),
        "library_name": "blspkd_fairseq",
        "pipeline_tag": "audio-text-to-text",
        "base_model": list(bases),
        "tags": ["speech", "speech-llm", "cif", "blsp-kd"],
    }
    datasets = [name for name in card.datasets if _HUB_NAME.fullmatch(name)]
    if datasets:
        found["datasets"] = datasets
    if card.metrics:
        found["metrics"] = sorted({metric.lower() for metric, _, _ in card.metrics})
        found["model-index"] = [{"name": card.name, "results": [_result(*one) for one in card.metrics]}]
    return found


def _result(metric: str, dataset: str, value: float) -> dict[str, Any]:
    return {
        "task": {"type": "audio-text-to-text"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [{"type": metric.lower(), "name": metric, "value": value}],
    }


def _body(card: Card, bases: Sequence[str], options: Mapping[str, Any]) -> str:
    adapter = options.get("adapter", "cformer")
    lora = options.get("lora_scope", "speech")
    parts = [f"the speech encoder of {bases[-1]}", f"a {adapter} adapter"]
    if lora != "none":
        what = "Partial LoRA" if lora == "speech" else "LoRA"
        parts.append(f"{what} of rank {options.get('lora_rank', 16)}")
    hours = f" {card.hours:g} hours of speech." if card.hours else ""
    bits = options.get("llm_quantization", "none")
    held = "" if bits == "none" else f" The LLM's linear layers were held in {bits} in training."
    lines = [
        f"# {card.name}",
        "",
        f"{bases[0]} hears through {', '.join(parts[:-1])} and {parts[-1]}. The file holds what was trained; the base "
        f"models are fetched by their names.{held}",
        "",
        "```python",
        "from blspkd_fairseq import BlspKd",
        "",
        'model = BlspKd.from_pretrained("FOLDER")',
        f'model.generate("{card.example or "question.wav"}")',
        "```",
        "",
        "## Training",
        "",
        f"Data: {', '.join(card.datasets) or 'not said'}.{hours}",
    ]
    if card.metrics:
        lines += ["", "## What was measured", "", "| metric | data | value |", "|---|---|---|"]
        lines += [f"| {metric} | {dataset} | {value:g} |" for metric, dataset, value in card.metrics]
    lines += ["", "## Limits", "", card.limits or "Nobody has said what it cannot do: try it on speech of yours first."]
    return "\n".join(lines) + "\n"
