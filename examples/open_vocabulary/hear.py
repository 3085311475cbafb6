"""Measures what a system hears and answers, row by row.

    python examples/open_vocabulary/hear.py --checkpoint MODEL --set test=DIR/test.tsv --audio-root DIR --out MODEL.json
    python examples/open_vocabulary/hear.py --cascade WHISPER --llm LLM --set test=DIR/test.tsv ... --out cascade.json
    python examples/open_vocabulary/hear.py --llm LLM --set test=DIR/test.tsv ... --out text.json          (it reads)

Of each set, for each row: its id and transcript, what was heard (of a checkpoint the tokens nearest to its embeddings,
as many as it counts by itself; of the cascade Whisper's transcript), the answers to "repeat", to the speech alone
("chat"; "long": longer ones) and to "continue", of a checkpoint the counted and the true tokens, and where the manifest
has responses the response KL.
--nothing is a set in which nobody speaks, whose answers to the sound alone are measured. --boundaries asks a Whisper
where each word of the clean sets ends: of each row the milliseconds by which CIF ends it later, with as many tokens as
the transcript has.

Answers that are to be compared with each other are best written with --llm-dtype float32: rounded to bfloat16, an LLM
that reads the same text in batches of another size answers otherwise (README).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE, load_audio
from blspkd_fairseq.data.batch import pad_waveforms
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation.alignment import boundary_differences
from blspkd_fairseq.evaluation.robustness import Voices, degrade, parse_condition
from blspkd_fairseq.files import write_whole
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_heard
from blspkd_fairseq.generation.hearing import hear
from blspkd_fairseq.generation.teacher_forced import collate, teacher_forced
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig
from blspkd_fairseq.systems.boundaries import token_ends
from blspkd_fairseq.systems.systems import CascadeSystem, TextSystem, Utterance, WhisperTranscriber

ANSWERS = {"repeat": ("repeat", 48), "chat": ("chat", 40), "continue": ("continue", 48), "long": ("chat", 160)}
"""What is asked for, and how many tokens an answer may have."""

Found = dict[str, list[Any]]


class Rows:
    """Rows of a manifest, whose audio may be relative to a folder.

    Attributes:
        name: of the set.
        manifest: all rows.
        count: how many are measured.
        condition: what is done to their sound.
    """

    def __init__(self, name: str, path: Path, audio_root: Path | None, most: int, condition: str = "clean") -> None:
        self.name = name
        self.manifest = Manifest.load(path, ("src_text",))
        self.count = min(len(self.manifest), most or len(self.manifest))
        self.condition = condition
        first = Path(self.manifest[0]["audio"] if self.count else "")
        lies_beside = audio_root is None or (path.parent / first).exists()
        self.root = None if first.is_absolute() else path.parent if lies_beside else audio_root

    @property
    def title(self) -> str:
        return self.name if self.condition == "clean" else f"{self.name} {self.condition}"

    def waveform(self, index: int) -> np.ndarray:
        """``[samples]`` float32 at 16 kHz, under the condition."""
        name = self.manifest[index]["id"]
        return degrade(self._voices.load(name), parse_condition(self.condition), name, voices=self._voices)

    @cached_property
    def _voices(self) -> Voices:
        """What babble is made of."""
        paths = {self.manifest[i]["id"]: self.manifest[i]["audio"] for i in range(self.count)}
        return Voices(list(paths), lambda name: load_audio(paths[name], self.root))

    def parts(self, size: int) -> Iterator[range]:
        for start in range(0, self.count, size):
            yield range(start, min(start + size, self.count))


# ---- a trained system ----------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_checkpoint(model: BlspKd, rows: Rows, batch: int, answers: Mapping[str, tuple[str, int]]) -> Found:
    """Everything of one set; of noisy speech and where nobody speaks, what was heard and the answers."""
    found: Found = {}
    taught = rows.condition == "clean" and "tgt_text" in rows.manifest.columns
    lengths = model.model.speech_lengths
    data = SpeechTextDataset(rows.manifest, model.chat_format, audio_root=rows.root, lengths=lengths)
    for part in tqdm(list(rows.parts(batch)), desc=rows.title, unit="batch"):
        cells = [rows.manifest[i] for i in part]
        if rows.condition == "clean":
            sample = collate(data, part, model.device)
            speech = sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"]
        else:
            waveforms = [torch.from_numpy(rows.waveform(i)) for i in part]
            samples = torch.tensor([len(one) for one in waveforms], device=model.device)
            speech = pad_waveforms(waveforms).to(model.device), samples
        _add(found, id=[row["id"] for row in cells], said=[row["src_text"] for row in cells])
        heard = hear(model.model, *speech)
        if model.model.adapter.one_to_one:
            pieces = zip(heard.embeddings, heard.counts, strict=True)
            tokens = [model.nearest_tokens(embeddings[:count]) for embeddings, count in pieces]
            _add(found, heard=[model.chat_format.decode(ids) for ids in tokens])
        for answer, (prompt, most) in answers.items():
            options = DecodingOptions(max_new_tokens=most)
            prompts = [resolve_prompt(prompt)] * len(cells)
            groups = answer_heard(model.model, model.chat_format, heard, prompts, options)
            _add(found, **{answer: [group[0].text for group in groups]})
        if taught:
            _add(found, **teacher_forced(model.model, sample))
    return found


def boundary_errors(model: BlspKd, whisper: WhisperTranscriber, rows: Rows, most: int) -> list[list[float]]:
    """Milliseconds by which tokens end later than Whisper's words, of the first rows; of speech over 30 s, none."""
    found: list[list[float]] = [[]] * rows.count
    for index in tqdm(range(min(rows.count, most or rows.count)), desc=f"{rows.title}, boundaries", unit="row"):
        waveform, text = rows.waveform(index), rows.manifest[index]["src_text"]
        late: Sequence[float] = ()
        if len(waveform) <= MAX_SECONDS * SAMPLE_RATE:
            ends = token_ends(model, waveform, text), whisper.word_ends(waveform, text)
            late = boundary_differences(*ends).differences_ms.tolist()
        found[index] = [round(ms, 1) for ms in late]
    return found


def _add(found: Found, **columns: Sequence[Any]) -> None:
    for name, values in columns.items():
        found.setdefault(name, []).extend(values)


# ---- systems without training --------------------------------------------------------------------------------------


def measure_untrained(system: TextSystem, rows: Rows, batch: int, answers: Mapping[str, tuple[str, int]]) -> Found:
    """What was heard, once for all answers."""
    found: Found = {}
    for part in tqdm(list(rows.parts(batch)), desc=rows.title, unit="batch"):
        cells = [rows.manifest[i] for i in part]
        spoken = [
            Utterance(rows.waveform(i) if system.hears else None, row["src_text"], "", "en")
            for i, row in zip(part, cells, strict=True)
        ]
        heard = system.hear(spoken)
        _add(found, id=[row["id"] for row in cells], said=[row["src_text"] for row in cells], heard=heard)
        for answer, (prompt, tokens) in answers.items():
            prompts = [resolve_prompt(prompt)] * len(cells)
            _add(found, **{answer: system.read(heard, prompts, DecodingOptions(max_new_tokens=tokens))})
    return found


# ---- command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    begin = time.monotonic()
    sets = [Rows(name, path, args.audio_root, args.rows) for name, path in args.set]
    sets += [Rows(*args.set[0], args.audio_root, args.rows, condition) for condition in args.conditions]
    silent = [Rows("nothing", args.nothing, args.audio_root, args.rows)] if args.nothing else []
    answers = {name: (ANSWERS[name][0], min(ANSWERS[name][1], args.most_tokens)) for name in args.answers}

    def asked_of(rows: Rows) -> Mapping[str, tuple[str, int]]:
        if rows in silent:  # what is answered by itself
            return {name: one for name, one in answers.items() if name == "chat"}
        if rows.condition != "clean":
            return {}
        return {name: one for name, one in answers.items() if name == "repeat" or rows.name not in args.repeat_only}

    results: dict[str, Any] = {"sets": {}, "llm_dtype": args.llm_dtype}
    precision = {"llm_dtype": args.llm_dtype} if args.llm_dtype else {}
    if args.checkpoint:
        options: dict[str, Any] = precision | ({"window_seconds": args.window_seconds} if args.window_seconds else {})
        if args.by_sound:
            options |= {"adapter_prior_weight": 0.0, "adapter_prior_beam": 0, "adapter_prior_training": False}
        model = BlspKd.from_pretrained(args.checkpoint, **options)
        for rows in (*sets, *silent):
            results["sets"][rows.title] = measure_checkpoint(model, rows, args.batch_size, asked_of(rows))
        if args.boundaries and model.model.adapter.one_to_one:
            whisper = WhisperTranscriber(args.boundaries)
            for rows in (rows for rows in sets if rows.condition == "clean"):
                results["sets"][rows.title]["boundary_ms"] = boundary_errors(model, whisper, rows, args.boundary_rows)
    else:
        config = SpeechLlmConfig(llm=args.llm, **precision)
        system = CascadeSystem(args.cascade, config) if args.cascade else TextSystem(config)
        system.load()
        for rows in (*sets, *silent) if system.hears else [rows for rows in sets if rows.condition == "clean"]:
            results["sets"][rows.title] = measure_untrained(system, rows, args.batch_size, asked_of(rows))
    results["measuring_seconds"] = round(time.monotonic() - begin, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(results, ensure_ascii=False) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of training or a folder of save_pretrained")
    parser.add_argument("--by-sound", action="store_true", help="hear without what the LLM expects, hearing itself")
    parser.add_argument("--window-seconds", type=float, help="of the checkpoint; longer speech is cut in pauses")
    parser.add_argument(
        "--boundaries", default="", metavar="WHISPER", help="of a checkpoint: that says where words end"
    )
    parser.add_argument("--boundary-rows", type=int, default=0, help="first rows of each set for that (default: all)")
    parser.add_argument("--cascade", default="", help="Whisper before the LLM")
    parser.add_argument("--llm", default="", help="of the cascade, or that reads the transcripts")
    parser.add_argument(
        "--llm-dtype", default="", choices=["", *DTYPES], help="(default: the checkpoint's, else bfloat16)"
    )
    parser.add_argument("--set", action="append", required=True, metavar="NAME=MANIFEST", type=_named)
    parser.add_argument("--nothing", type=Path, help="manifest of clips in which nobody speaks")
    parser.add_argument("--conditions", nargs="*", default=[], help="the first set again under noise, such as white:10")
    parser.add_argument("--answers", nargs="*", choices=list(ANSWERS), default=["repeat", "chat"])
    parser.add_argument("--repeat-only", nargs="*", default=[], metavar="NAME", help="sets that are asked for no other")
    parser.add_argument("--most-tokens", type=int, default=1000, help="that an answer may have, whatever is asked")
    parser.add_argument("--audio-root", type=Path, help="of audio that does not lie beside its manifest")
    parser.add_argument("--rows", type=int, default=0, help="first rows of each set (default: all)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if bool(args.checkpoint) == bool(args.llm):
        parser.error("give --checkpoint, or --llm with or without --cascade")
    if args.boundaries and not args.checkpoint:
        parser.error("--boundaries are those of a --checkpoint")
    if unknown := sorted(set(args.repeat_only) - {name for name, _ in args.set}):
        parser.error(f"--repeat-only {unknown[0]}: --set names {', '.join(name for name, _ in args.set)}")
    if min(args.rows, args.boundary_rows) < 0 or min(args.batch_size, args.most_tokens) < 1:
        parser.error("--rows and --boundary-rows must not be negative, --batch-size and --most-tokens at least 1")
    return args


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and os.path.exists(path)):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=MANIFEST with a manifest that exists")
    return name, Path(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"hear: {error}")
