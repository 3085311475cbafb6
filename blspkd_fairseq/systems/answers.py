"""A system's answers to every row of a manifest, in a file that a killed run goes on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from blspkd_fairseq.data.audio import AudioError, load_audio, warn_of_flaw
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.data.record_store import Record, RecordStore, StoreError
from blspkd_fairseq.evaluation.robustness import Condition, Voices, degrade
from blspkd_fairseq.generation.decoding import ContextError, DecodingOptions
from blspkd_fairseq.systems.systems import Answer, System, Utterance

_WINDOW_BATCHES = 64
CLEAN = Condition("clean")


@dataclass(frozen=True)
class Questions:
    """What is asked of every system: a manifest under a prompt.

    Attributes:
        kind: "asr", "translation" or "qa".
        manifest: with ``src_text``, and ``tgt_text`` where there is a reference.
        prompt: name or text, for rows without a prompt of their own.
        audio_root: as for :class:`~blspkd_fairseq.data.dataset.SpeechTextDataset`.
        options: how the LLM decodes.
        condition: what is done to the audio first, with ``seed``.
        babble: a manifest of the voices behind it, with its own audio folder; None: the other speakers of the test set.
    """

    kind: str
    manifest: Manifest
    prompt: str
    audio_root: Path | None = None
    options: DecodingOptions = field(default_factory=DecodingOptions)
    condition: Condition = CLEAN
    seed: int = 1
    babble: Manifest | None = None

    def row_prompt(self, row: dict[str, str]) -> str:
        """The row's prompt as text with its ``{speech}`` slot.

        Raises:
            ValueError: the row is a conversation of its own.
        """
        if row.get("conversation"):
            raise ValueError(
                f"row {row['id']} has a conversation, and systems are compared on single turns: leave such rows out of "
                "the evaluation, and answer them with fairseq-generate"
            )
        return resolve_prompt(row.get("prompt") or self.prompt, row.get("src_lang", ""), row.get("tgt_lang", ""))

    def settings(self, system: System) -> dict[str, Any]:
        """What the answers depend on besides the rows."""
        condition = str(self.condition) if system.hears else "clean"
        seed = self.seed if system.hears and self.condition != CLEAN or self.options.sampling else 0
        voices = {"babble": str(self.babble.path) if self.babble else "other speakers"} if "babble" in condition else {}
        return {
            "system": system.identity(),
            "kind": self.kind,
            "decoding": asdict(self.options),
            "condition": condition,
            "seed": seed,
            **voices,
        }


class _Row(NamedTuple):
    place: int
    cells: dict[str, str]


def answer_all(system: System, questions: Questions, path: Path, name: str, batch_size: int = 16) -> list[Record]:
    """Lets a system answer what it has not answered yet.

    Args:
        system: loaded only if an answer is missing.
        questions: what to answer.
        path: of the JSON lines: ``id speaker prompt transcript hypothesis reference`` and, of a cascade, ``heard``.
        name: of the system, for the progress bar.
        batch_size: utterances at a time.

    Returns:
        One record for each row of the manifest, in its order.

    Raises:
        StoreError: the answers there are of other settings or rows, or another process is writing them.
        AudioError: audio that cannot be used; it names the row.
        ContextError: the LLM cannot read a prompt with so long a recording or transcript; it names the row.
    """
    manifest = questions.manifest
    with RecordStore(path, questions.settings(system)) as store:
        planned = [batch for batch in _plan(manifest, batch_size) if any(r.cells["id"] not in store for r in batch)]
        if planned:
            system.load()
            label = name if questions.condition == CLEAN else f"{name}, {questions.condition}"
            with tqdm(total=len(manifest), initial=len(store), desc=f"{questions.kind}: {label}", unit="row") as bar:
                for batch in planned:
                    bar.update(_answer_batch(system, questions, batch, store))
        return collect(store, questions)


def collect(store: RecordStore, questions: Questions) -> list[Record]:
    """The records in the order of the manifest.

    Raises:
        StoreError: a row has no answer, an answer has no row, or a row is not what was answered.
    """
    manifest, records = questions.manifest, []
    if len(store) > len(manifest):
        raise StoreError(
            f"{store.path} has {len(store)} answers for the {len(manifest)} rows of {manifest.path}: choose another "
            "output"
        )
    for index, row in enumerate(manifest):
        if row["id"] not in store:
            raise StoreError(f"{store.path} has no answer to {manifest.location(index)}: no score without all rows")
        record = store[row["id"]]
        if [record[k] for k in ("prompt", "transcript", "reference")] != [
            questions.row_prompt(row), row["src_text"], row.get("tgt_text", ""),
        ]:  # fmt: skip
            raise StoreError(
                f"{manifest.location(index)} is not what was answered in {store.path} (text or prompt have changed): "
                "choose another output"
            )
        records.append(record)
    return records


def _plan(manifest: Manifest, batch_size: int) -> Iterator[list[_Row]]:
    """Batches of similar length, the same ones whatever is answered already (see generation/responses.py)."""
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(manifest), window):
        rows = range(start, min(start + window, len(manifest)))
        ordered = sorted(rows, key=lambda index: -int(manifest.n_frames[index]))
        for first in range(0, len(ordered), batch_size):
            yield [_Row(index, manifest[index]) for index in ordered[first : first + batch_size]]


def _answer_batch(system: System, questions: Questions, batch: Sequence[_Row], store: RecordStore) -> int:
    utterances = [utterance_of(system, questions, row.place) for row in batch]
    try:
        answers = system.answer(utterances, questions.options, questions.kind == "asr")
    except ContextError as error:
        raise ContextError(f"{questions.manifest.location(batch[error.row].place)}: {error}", error.row) from error
    records = [_record(*group) for group in zip(batch, utterances, answers, strict=True)]
    new = [record for record in records if record["id"] not in store]
    store.add(new)
    return len(new)


def _record(row: _Row, utterance: Utterance, answer: Answer) -> Record:
    record = {
        "id": row.cells["id"],
        "speaker": row.cells.get("speaker", ""),
        "prompt": utterance.prompt,
        "transcript": utterance.transcript,
        "hypothesis": answer.text,
        "reference": row.cells.get("tgt_text", ""),
    }
    return record if answer.heard is None else {**record, "heard": answer.heard}


def utterance_of(system: System, questions: Questions, index: int) -> Utterance:
    """What a system is given of a row."""
    cells = questions.manifest[index]
    waveform = read_waveform(questions, index) if system.hears else None
    return Utterance(waveform, cells["src_text"], questions.row_prompt(cells), cells.get("src_lang", ""))


def read_waveform(questions: Questions, index: int) -> np.ndarray:
    """``[S]`` float32 of a row, under the condition."""
    samples = _load(questions, index)
    if questions.condition == CLEAN:
        return samples
    manifest = questions.manifest
    voices = _voices(questions) if questions.condition.kind == "babble" else None
    return degrade(samples, questions.condition, manifest[index]["id"], questions.seed, voices)


def _voices(questions: Questions) -> Voices:
    """Those of the babble."""
    source = questions if questions.babble is None else replace(questions, manifest=questions.babble, audio_root=None)
    places, speakers = _places(source.manifest)
    return Voices(tuple(places), lambda row_id: _load(source, places[row_id]), speakers)


@lru_cache(maxsize=2)
def _places(manifest: Manifest) -> tuple[dict[str, int], dict[str, str]]:
    """Index and speaker by id."""
    rows = list(enumerate(manifest))
    return {row["id"]: index for index, row in rows}, {row["id"]: row.get("speaker", "") for _, row in rows}


def _load(questions: Questions, index: int) -> np.ndarray:
    manifest, root = questions.manifest, questions.audio_root
    audio = manifest[index]["audio"]
    if root is None and not Path(audio).is_absolute():
        root = manifest.path.parent
    try:
        waveform = load_audio(audio, root, int(manifest.n_frames[index]), max_seconds=None)
    except AudioError as error:
        raise AudioError(f"{manifest.location(index)}: {error}", error.reason) from error
    warn_of_flaw(waveform, manifest.location(index))
    return waveform
