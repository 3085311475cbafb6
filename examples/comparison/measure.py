"""Measures one system on every test set, row by row, so that any two can be compared in pairs.

    python examples/comparison/measure.py --data DIR --checkpoint FILE --out FILE.json
    python examples/comparison/measure.py --data DIR --llm LLM --out text.json                        # the LLM reads
    python examples/comparison/measure.py --data DIR --llm LLM --cascade WHISPER --out cascade.json

Each figure is one number per row of the manifest, or a sum and a count; the report draws from the rows.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from systems import QUESTIONS, SETS
from tqdm import tqdm
from trainings import write_json

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation.alignment import boundary_differences
from blspkd_fairseq.evaluation.robustness import Voices, degrade, parse_condition
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech
from blspkd_fairseq.generation.teacher_forced import collate, sums_of_rows, teacher_forced
from blspkd_fairseq.generation.teacher_forced import text_kl as teacher_forced_text_kl
from blspkd_fairseq.modules.build import SpeechLlmConfig
from blspkd_fairseq.systems.boundaries import token_ends
from blspkd_fairseq.systems.systems import CascadeSystem, TextSystem, Utterance, WhisperTranscriber

# What is asked, and how long the answer may be. Training sees "continue" alone.
ASKED = {"repeat": 28, "continue": 16}
QUESTION_TOKENS = 20
CONDITIONS = ("white:20", "white:10", "white:0", "babble:20", "babble:10", "babble:0")  # of the heard set, repeated
BATCH = 50


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    begin = time.monotonic()
    results = measure_checkpoint(args) if args.checkpoint else measure_untrained(args)
    results["measuring_seconds"] = round(time.monotonic() - begin, 1)
    write_json(args.out, results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of data.py, with responses/")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--llm", default="", help="for systems that are not trained")
    parser.add_argument("--cascade", default="", help="Whisper before the LLM")
    parser.add_argument("--whisper", default="", help="whose word ends CIF's boundaries are compared with")
    parser.add_argument("--robustness", action="store_true", help="measure the heard set under noise, too")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


# ---- systems without training ----------------------------------------------------------------------------------------


def measure_untrained(args: argparse.Namespace) -> dict[str, Any]:
    config = SpeechLlmConfig(llm=args.llm)
    system = CascadeSystem(args.cascade, config) if args.cascade else TextSystem(config)
    system.load()
    results: dict[str, Any] = {"sets": {}}
    for name in tqdm((*SETS, *QUESTIONS), desc=args.out.stem, unit="set"):
        data = Manifest.load(manifest_of(args.data, name))
        results["sets"][name] = {"id": [row["id"] for row in data], **ask(system, data, args.data, asked_of(name))}
    if args.robustness and system.hears:
        data = Manifest.load(manifest_of(args.data, "heard"))
        repeat = {"repeat": ASKED["repeat"]}
        results["conditions"] = {
            condition: ask(system, data, args.data, repeat, condition)["repeat"]
            for condition in tqdm(CONDITIONS, desc="under noise", unit="condition")
        }
    return results


def manifest_of(folder: Path, name: str) -> Path:
    """Every system is measured on the same rows: those to which the LLM has a response."""
    return (folder if name in QUESTIONS else folder / "responses") / f"{name}.tsv"


def asked_of(name: str) -> dict[str, int]:
    return {"chat": QUESTION_TOKENS} if name in QUESTIONS else ASKED


def ask(
    system: TextSystem, data: Manifest, root: Path, asked: Mapping[str, int], condition: str = "clean"
) -> dict[str, list[str]]:
    """The answers to each prompt, of as many tokens; an utterance is heard once for all of them."""
    answers: dict[str, list[str]] = {prompt: [] for prompt in asked}
    voices = voices_of(data, root)
    for start in range(0, len(data), BATCH):
        rows = [data[i] for i in range(start, min(start + BATCH, len(data)))]
        waveforms = [under(condition, row["id"], voices) if system.hears else None for row in rows]
        batch = [Utterance(wave, row["src_text"], "", "en") for wave, row in zip(waveforms, rows, strict=True)]
        heard = system.hear(batch)
        for prompt, tokens in asked.items():
            prompts = [resolve_prompt(prompt)] * len(batch)
            answers[prompt] += system.read(heard, prompts, DecodingOptions(max_new_tokens=tokens))
    return answers


def voices_of(data: Manifest, root: Path) -> Voices:
    """Waveforms of a manifest by id, and who speaks: nobody babbles behind himself."""
    paths = {row["id"]: row["audio"] for row in data}
    speakers = {row["id"]: row.get("speaker", "") for row in data}
    return Voices(
        list(paths), lambda name: load_audio(paths[name], None if Path(paths[name]).is_absolute() else root), speakers
    )


def under(condition: str, name: str, voices: Voices) -> np.ndarray:
    """The waveform of an utterance, degraded."""
    return degrade(voices.load(name), parse_condition(condition), name, voices=voices)


# ---- trained systems -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    model = BlspKd.from_pretrained(args.checkpoint)
    word_ends = WordEnds(args.whisper, args.data) if args.whisper and model.model.adapter.one_to_one else None
    results: dict[str, Any] = {"sets": {}}
    for name in tqdm((*SETS, *QUESTIONS), desc=args.out.stem, unit="set"):
        data = SpeechTextDataset(
            Manifest.load(manifest_of(args.data, name)), model.chat_format, lengths=model.model.speech_lengths
        )
        data.audio_root = None if name == "real" else args.data
        results["sets"][name] = measure_set(model, data, name, word_ends)
    results["text_kl"] = text_kl(model, args.data)
    if args.robustness:
        voices = voices_of(Manifest.load(manifest_of(args.data, "heard")), args.data)
        results["conditions"] = {}
        for condition in tqdm(CONDITIONS, desc="under noise", unit="condition"):
            speech = [(under(condition, name, voices), SAMPLE_RATE) for name in voices.ids]
            results["conditions"][condition] = model.generate(
                speech, "repeat", batch_size=BATCH, max_new_tokens=ASKED["repeat"]
            )
    return results


_COUNTS = ("counted", "tokens", "input_tokens", "response_tokens")


def measure_set(
    model: BlspKd, data: SpeechTextDataset, name: str, word_ends: "WordEnds | None"
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"id": []}

    def add(key: str, values: Sequence[Any]) -> None:
        found.setdefault(key, []).extend(values)

    for start in range(0, len(data), BATCH):
        batch = collate(data, range(start, min(start + BATCH, len(data))), model.device)
        inputs = batch["net_input"]
        speech = inputs["src_tokens"], inputs["src_lengths"]
        add("id", [row["id"] for row in batch["rows"]])
        for asked, tokens in asked_of(name).items():
            prompts = [resolve_prompt(asked)] * batch["nsentences"]
            options = DecodingOptions(max_new_tokens=tokens)
            groups = answer_speech(model.model, model.chat_format, *speech, prompts, options)
            add(asked, [group[0].text for group in groups])
        if name in QUESTIONS:
            continue
        for key, values in teacher_forced(model.model, batch).items():
            add(key, [round(value) for value in values] if key in _COUNTS else values)
    if word_ends is not None and name not in QUESTIONS:
        add("boundary_ms", word_ends.differences(model, data, name))
    return found


def text_kl(model: BlspKd, folder: Path) -> dict[str, list[float]]:
    """KL of the trained LLM reading text against the base LLM, at the responses to the heard set."""
    data = SpeechTextDataset(
        Manifest.load(manifest_of(folder, "heard")), model.chat_format, audio_root=folder,
        lengths=model.model.speech_lengths,
    )  # fmt: skip
    inputs = collate(data, range(len(data)), model.device)["net_input"]
    plan = inputs["spec"].build(inputs["plan"])
    kl, tokens = teacher_forced_text_kl(model.model, plan.teacher), torch.ones(len(plan.response.rows))
    sums = (sums_of_rows(values, plan.response.rows, len(data)) for values in (kl, tokens))
    return dict(zip(("kl", "tokens"), sums, strict=True))


class WordEnds:
    """Word ends by Whisper's attention, computed once for all systems and kept beside the data."""

    def __init__(self, whisper: str, folder: Path) -> None:
        self.whisper, self.folder = whisper, folder
        self.transcriber: WhisperTranscriber | None = None

    def differences(self, model: BlspKd, data: SpeechTextDataset, name: str) -> list[list[float]]:
        """Milliseconds between the ends of matched words, of each row."""
        path = self.folder / f"word-ends-{name}.json"
        if not path.exists():
            self.transcriber = self.transcriber or WhisperTranscriber(self.whisper)
            ends = [self._word_ends(data, i) for i in range(len(data))]
            write_json(path, ends)
        ends = json.loads(path.read_text(encoding="utf-8"))
        return [self._differences(model, data, i, ends[i]) for i in range(len(data))]

    def _word_ends(self, data: SpeechTextDataset, index: int) -> list[tuple[str, float]]:
        assert self.transcriber is not None
        utterance = data[index]
        assert utterance is not None
        return self.transcriber.word_ends(utterance.waveforms[0].numpy())

    @staticmethod
    def _differences(
        model: BlspKd, data: SpeechTextDataset, index: int, ends: Sequence[tuple[str, float]]
    ) -> list[float]:
        utterance = data[index]
        assert utterance is not None
        tokens = token_ends(model, utterance.waveforms[0].numpy(), utterance.row["src_text"])
        differences = boundary_differences(tokens, [(word, end) for word, end in ends]).differences_ms
        return [round(float(ms), 1) for ms in differences]


if __name__ == "__main__":
    main()
