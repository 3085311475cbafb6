"""A manifest as a fairseq data set: audio and the token ids of the sequences around it."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq import compat

compat.require_fairseq()  # one sentence instead of a missing module

from fairseq.data import FairseqDataset, data_utils  # noqa: E402

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, audio_identity, load_audio  # noqa: E402
from blspkd_fairseq.data.augment import Augmenter, Others  # noqa: E402
from blspkd_fairseq.data.batch import PlanRow, SpeechLengths, pad_ids, pad_waveforms, plan_batch  # noqa: E402
from blspkd_fairseq.data.chat import ChatError, ChatFormat  # noqa: E402
from blspkd_fairseq.data.conversation import (  # noqa: E402
    MOST_PIECES,
    TAUGHT_TWICE,
    AudioPart,
    Conversation,
    Segment,
    Speech,
    one_turn,
    read_conversation,
)
from blspkd_fairseq.data.feature_store import FeatureStore, Stored, entry_key, join  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, ManifestError, response_is_cut  # noqa: E402
from blspkd_fairseq.data.prompts import SPEECH_SLOT, resolve_prompt  # noqa: E402
from blspkd_fairseq.faults.left_out import LeftOut  # noqa: E402
from blspkd_fairseq.faults.shortened import Shortened  # noqa: E402
from blspkd_fairseq.faults.workers import ReadingRecord  # noqa: E402

logger = logging.getLogger(__name__)

# What fairseq-generate takes when neither --max-tokens nor --batch-size is given is meant for text: .75 s of samples.
_FAIRSEQ_MAX_TOKENS = 12_000
_MAX_TOKENS = 120 * SAMPLE_RATE
# More tokens than Whisper has frames; people speak two to six a second.
_ANY_TOKENS, _TOKENS_PER_SECOND = 64, 50
# What a batch is measured in are samples; a text of about as many bytes counts as two frames of the encoder.
_BYTES_PER_TOKEN, _SAMPLES_PER_TOKEN = 4, 640
# Rows that are tried for one that stands in for those that cannot be read: without any, the folder is not there.
_MOST_TRIED = 1000


class Utterance(NamedTuple):
    """One row, ready to be batched.

    Attributes:
        place: its index in the manifest.
        row: its cells.
        waveforms: ``[S]`` fp32 at 16 kHz, of each piece of speech; none if their frames are stored.
        segments: the conversation up to where the response begins.
        transcripts: ids of the transcript of each piece.
        response: ids of ``tgt_text``, with the end of turn unless the response was cut.
        prompt: the last instruction as text, with its ``{speech}`` slot.
        samples: of each piece.
        keys: of each piece in the store of frames, if there is one.
        stored: the frames of each piece, if all of them are stored.
        shortened: what to say of a response that was cut.
        taught: ids that the teacher reads in place of the transcripts, if it reads others.
        alike: of each piece the places of both up to which they say the same, where they are of the same text.
    """

    place: int
    row: dict[str, str]
    waveforms: list[Tensor]
    segments: list[Segment]
    transcripts: list[list[int]]
    response: list[int]
    prompt: str
    samples: list[int]
    keys: list[bytes]
    stored: list[Stored]
    shortened: Shortened | None = None
    taught: list[list[int]] | None = None
    alike: list[list[tuple[int, int]]] | None = None


class _UnusableRow(ManifestError):
    """A transcript that cannot be that of its audio, or more than the LLM reads."""


class SpeechTextDataset(FairseqDataset):
    """Speech, transcript and response of every row of a manifest.

    Args:
        manifest: its rows; columns ``prompt``, ``src_lang`` and ``tgt_lang`` are used where present; ``cut`` = 1 says
            that the length limit ended the response, so that no end of turn follows it; where ``teacher_text`` is not
            empty, the teacher reads it in place of ``src_text``.
        chat: chat format of the LLM.
        prompt: instruction of rows without one: a name or a text (see :mod:`blspkd_fairseq.data.prompts`).
        audio_root: folder that holds all audio; default: relative paths start at the manifest, absolute ones anywhere.
        max_seconds: rows that are longer are an error; of a conversation, each piece of speech.
        shuffle: train on other batches in another order every epoch, which follow from the seed and the number of the
            epoch alone; batches hold utterances of similar length.
        skip_bad_audio: leave out rows whose audio is too long, missing, unreadable or of another text.
        lengths: how many embeddings the adapter makes of a piece of speech.
        with_response: the LLM reads up to the end of the response; otherwise no further than the speech.
        share_prefix: what all rows of a batch begin with is read once.
        max_response_tokens: of a longer response the rest is cut off; 0: never.
        augmenter: changes the sound of every utterance in every epoch.
        context: tokens that the LLM reads; a row that has more of them is an error, or left out as bad audio is.

    Attributes:
        store: frames of speech that the encoder has heard; such speech is not decoded, and batches say what is missing.
        reading: what each loader process is reading.
    """

    def __init__(
        self,
        manifest: Manifest,
        chat: ChatFormat,
        prompt: str = "continue",
        audio_root: Path | None = None,
        max_seconds: float = 30.0,
        shuffle: bool = False,
        skip_bad_audio: bool = False,
        lengths: SpeechLengths | None = None,
        with_response: bool = True,
        share_prefix: bool = True,
        max_response_tokens: int = 0,
        augmenter: Augmenter | None = None,
        context: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.chat = chat
        self.prompt = prompt
        self.audio_root = audio_root
        self.max_seconds = max_seconds
        self.shuffle = shuffle
        self.skip_bad_audio = skip_bad_audio
        self.lengths = lengths or SpeechLengths()
        self.with_response = with_response
        self.share_prefix = share_prefix
        self.max_response_tokens = max_response_tokens
        self.augmenter = augmenter
        self.context = context
        self.epoch = 1
        self.store: FeatureStore | None = None
        self.reading = ReadingRecord(self._describe)
        self._stand_in: Utterance | None = None
        too_long = np.flatnonzero(manifest.n_frames > max_seconds * SAMPLE_RATE)
        if "conversation" in manifest.columns:  # whose pieces are looked at when they are read
            too_long = np.array([i for i in too_long.tolist() if not manifest[i]["conversation"]], dtype=np.int64)
        if len(too_long) and not skip_bad_audio:
            first = int(too_long[0])
            raise ManifestError(
                f"{manifest.location(first)}: {manifest.n_frames[first] / SAMPLE_RATE:.1f} s of audio are longer than "
                f"{max_seconds:g} s, as are {len(too_long) - 1} more rows: cut them into segments, or leave them out "
                "of training with --skip-bad-audio"
            )
        if len(too_long):
            logger.warning(f"{manifest.path}: {len(too_long)} rows longer than {max_seconds:g} s are left out")
        # Keys of utterances differ between manifests: an epoch may be a slice of the data.
        self._first_key = zlib.crc32(str(manifest.path.resolve()).encode()) << 40
        self._too_long = frozenset(too_long.tolist())
        if len(manifest):
            self._prompt(manifest[0])  # an unknown prompt is said now and not by a worker

    def _prompt(self, row: Mapping[str, str]) -> str:
        name = row.get("prompt") or self.prompt
        return resolve_prompt(name, row.get("src_lang", ""), row.get("tgt_lang", ""))

    def _root(self, audio: str) -> Path | None:
        """Absolute paths are taken as they are, unless an audio root confines them."""
        if self.audio_root is None and Path(audio).is_absolute():
            return None
        return self.audio_root or self.manifest.path.parent

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Utterance | LeftOut:
        index = int(index)  # fairseq's are numpy's, which overflow
        self.reading.begin(index)
        try:
            return self._read(index, self.manifest[index])
        except (AudioError, _UnusableRow) as error:
            if not self.skip_bad_audio:
                raise
            return LeftOut(str(self.manifest.path), index, self.manifest.n_frames[index] / SAMPLE_RATE, str(error))

    def _describe(self, index: int) -> str:
        row = self.manifest[index]
        audio = row["audio"] or ", ".join(piece.audio for piece in self._conversation(row)[1])
        return f"{self.manifest.location(index)}, {self._root(audio) or ''}/{audio}"

    def _read(self, index: int, row: dict[str, str]) -> Utterance:
        """A row's utterance.

        Raises:
            ManifestError, AudioError: it cannot be used; they name it.
        """
        try:
            return self._utterance(index, row)
        except ChatError as error:  # wherever the template or the tokenizer meets one of its texts
            raise ManifestError(f"{self.manifest.location(index)}: {error}") from error

    def _utterance(self, index: int, row: dict[str, str]) -> Utterance:
        where = self.manifest.location(index)
        try:
            conversation, pieces, prompt = self._conversation(row)
            is_cut = response_is_cut(row)
        except ValueError as error:
            raise ManifestError(f"{where}: {error}") from error
        n_frames = int(self.manifest.n_frames[index])
        try:
            keys, stored = self._find_stored(pieces, n_frames, row)
            waveforms = [] if stored else self._changed(self._load(pieces, n_frames), index, row)
        except AudioError as error:
            raise AudioError(f"{where}: {error}", error.reason) from error
        transcripts = [self.chat.encode_transcript(piece.transcript) for piece in pieces]
        samples = [one.samples for one in stored] or [len(waveform) for waveform in waveforms]
        for count, transcript in zip(samples, transcripts, strict=True):
            if len(transcript) > max(_ANY_TOKENS, _TOKENS_PER_SECOND * count / SAMPLE_RATE):
                raise _UnusableRow(
                    f"{where}: {len(transcript)} tokens of transcript for {count / SAMPLE_RATE:.1f} s of "
                    "audio: it is not the text of this audio, or lacks its end"
                )
        response, shortened = self._response(index, row.get("tgt_text", ""), is_cut)
        segments = self.chat.render(conversation)
        self._check_context(where, segments, transcripts, response)
        taught, alike = self._taught(row, where), None
        if taught is None and self.chat.transcript_merges:  # then the teacher goes on reading the LLM's own tokens
            taught = [self.chat.encode_text(piece.transcript) for piece in pieces]
            alike = [self.chat.common_ends(*both) for both in zip(transcripts, taught, strict=True)]
        return Utterance(
            index,
            row,
            waveforms,
            segments,
            transcripts,
            response,
            prompt,
            samples,
            keys,
            stored,
            shortened,
            taught,
            alike,
        )

    def _response(self, index: int, text: str, is_cut: bool) -> tuple[list[int], Shortened | None]:
        """Ids of a response, at most so many, and what to say of one that has more."""
        ids = self.chat.response_ids(text, finished=not is_cut) if text else []
        most = self.max_response_tokens
        if not most or len(ids) <= most:
            return ids, None
        where, given = self.manifest.location(index), f"tgt_text has {len(ids)} tokens"
        said = f"{where}: {given}, of which the first {most} are kept (--max-response-tokens)"
        return ids[:most], Shortened(str(self.manifest.path), index, said)

    def _check_context(
        self, where: str, segments: Sequence[Segment], transcripts: Sequence[Sequence[int]], response: Sequence[int]
    ) -> None:
        parts = [segment for segment in segments if not isinstance(segment, Speech)]
        tokens = sum(map(len, [*parts, *transcripts, response]))
        if self.context is not None and tokens > self.context:
            raise _UnusableRow(
                f"{where}: it has {tokens} tokens, response included, and the LLM reads {self.context}: shorten it, or "
                "leave it out (--skip-bad-audio does, of training)"
            )

    def _taught(self, row: Mapping[str, str], where: str) -> list[list[int]] | None:
        """What the teacher reads in place of the transcript."""
        text = row.get("teacher_text", "")
        if not text.strip():
            return None
        if row.get("conversation"):
            raise ManifestError(f"{where}: {TAUGHT_TWICE}")
        return [self.chat.encode_text(text)]

    def _find_stored(
        self, pieces: Sequence[AudioPart], n_frames: int, row: Mapping[str, str]
    ) -> tuple[list[bytes], list[Stored]]:
        """The key of each piece, and its frames if those of all pieces are stored and as long as is allowed."""
        if self.store is None:
            return [], []
        identities = [audio_identity(piece.audio, self._root(piece.audio)) for piece in pieces]
        if self.augmenter is not None:
            versions = (self.augmenter.key(f"{row['id']}\0{i}", self.epoch) for i in range(len(pieces)))
            identities = ["\0".join(both) for both in zip(identities, versions, strict=True)]
        keys = [entry_key(identity, n_frames) for identity in identities]
        found = (self.store.find(key) for key in keys)
        stored = [one for one in found if one is not None and one.samples <= self.max_seconds * SAMPLE_RATE]
        return keys, stored if len(stored) == len(pieces) else []

    def _conversation(self, row: Mapping[str, str]) -> tuple[Conversation, list[AudioPart], str]:
        """A row's turns, its pieces of speech, and its last instruction."""
        if not row.get("conversation"):
            if "conversation" in row and not row.get("src_text", "").strip():
                raise ManifestError("it has neither a conversation nor src_text: fill one of them in")
            prompt = self._prompt(row)
            return one_turn(prompt), [AudioPart(row["audio"], row.get("src_text", ""))], prompt
        turns, pieces = read_conversation(row["conversation"])
        last = "".join(part if isinstance(part, str) else SPEECH_SLOT for part in turns[-1].parts)
        return turns, pieces, last

    def _load(self, pieces: Sequence[AudioPart], n_frames: int) -> list[Tensor]:
        """The sound of each piece; ``n_frames`` counts all of them together."""
        expected = n_frames if len(pieces) == 1 else None
        samples = [load_audio(p.audio, self._root(p.audio), expected, self.max_seconds) for p in pieces]
        total = sum(map(len, samples))
        if expected is None and abs(total - n_frames) > max(0.1 * SAMPLE_RATE, 0.02 * total):
            raise AudioError(f"n_frames is {n_frames}, but its {len(pieces)} pieces of audio have {total} samples")
        return [torch.from_numpy(one) for one in samples]

    def set_epoch(self, epoch: int) -> None:
        """fairseq says which epoch begins."""
        super().set_epoch(epoch)
        self.epoch = epoch

    def _changed(self, waveforms: list[Tensor], index: int, row: Mapping[str, str]) -> list[Tensor]:
        """The sound of each piece as the augmenter leaves it; babble behind what is no speech would make it some."""
        if self.augmenter is None:
            return waveforms
        others = None if row.get("teacher_text", "").strip() else Others(len(self), self._voice, index)
        longest = self.max_seconds * SAMPLE_RATE
        return [
            torch.from_numpy(self.augmenter(one.numpy(), f"{row['id']}\0{i}", self.epoch, others, longest))
            for i, one in enumerate(waveforms)
        ]

    def _voice(self, index: int) -> np.ndarray:
        """The sound of a row's first piece, for babble."""
        try:
            _, pieces, _ = self._conversation(self.manifest[index])
            piece = pieces[0]
            return load_audio(piece.audio, self._root(piece.audio), max_seconds=self.max_seconds)
        except AudioError as error:
            if self.skip_bad_audio:
                return np.empty(0, np.float32)
            raise AudioError(f"{self.manifest.location(index)}: {error}") from error

    def collater(self, samples: Sequence[Utterance | LeftOut]) -> dict[str, Any]:
        """Plans a batch; all that a device needs of its texts is one tensor.

        Returns:
            ``id`` [B], ``net_input`` (the arguments of the model), ``target`` (ids of ``tgt_text`` [B, N] padded with
            -1, or None without that column), ``nsentences``, ``ntokens``; ``keys``, a number for each piece of speech,
            the same whenever it comes; and lists with an entry for each row: ``plan_rows``, ``prompts`` and ``rows``.
            If every row was left out, one that can be read stands in for them, and ``left_out`` is True; ``bad_rows``
            are the rows that were, and ``shortened`` those whose response was cut. With a store,
            ``src_tokens`` has the waveforms of what is not stored, and ``stored`` the frames of what is
            (:func:`~blspkd_fairseq.data.feature_store.with_features` brings them together).

        Raises:
            AudioError: no row of the manifest can be read.
        """
        utterances = [sample for sample in samples if isinstance(sample, Utterance)]
        bad_rows = [sample for sample in samples if isinstance(sample, LeftOut)]
        left_out = not utterances and len(self.manifest) > 0
        if left_out:
            utterances = [self._readable(bad_rows)]
        plan_rows = _plan_rows(utterances)
        batch = plan_batch(
            plan_rows, self.lengths, self.with_response, self.share_prefix, end_of_turn=self.chat.end_of_turn_id
        )
        plan, spec = batch.flatten()
        has_target = "tgt_text" in self.manifest.columns
        targets = [self.chat.encode_text(u.row["tgt_text"]) for u in utterances] if has_target else []
        keys = [self._first_key + u.place * MOST_PIECES + i for u in utterances for i in range(len(u.samples))]
        self.reading.end()
        return {
            "id": torch.tensor([u.place for u in utterances], dtype=torch.long),
            "net_input": _heard(utterances) | {"plan": plan, "spec": spec},
            "keys": keys,
            **({} if self.store is None else {"stored": _stored(utterances, self.store.width)}),
            "target": pad_ids(targets, -1) if has_target else None,
            "left_out": left_out,
            "bad_rows": bad_rows,
            "shortened": [u.shortened for u in utterances if u.shortened],
            "nsentences": len(utterances),
            "ntokens": batch.tokens + sum(len(u.response) for u in utterances),
            "plan_rows": plan_rows,
            "prompts": [u.prompt for u in utterances],
            "rows": [u.row for u in utterances],
        }

    def _readable(self, bad_rows: Sequence[LeftOut]) -> Utterance:
        """A row that stands in for those of a batch without any."""
        for index in range(min(len(self), _MOST_TRIED)):
            if self._stand_in is not None:
                break
            utterance = self[index]
            self._stand_in = utterance if isinstance(utterance, Utterance) else None
            bad_rows = bad_rows or [utterance] if isinstance(utterance, LeftOut) else bad_rows
        if self._stand_in is None:
            raise AudioError(
                f"{self.manifest.path}: none of the first {min(len(self), _MOST_TRIED)} rows can be read, as "
                f"{bad_rows[0].reason}: is --audio-root right, and its disk there?"
            )
        return self._stand_in

    def num_tokens(self, index: int) -> int:
        return int(self.num_tokens_vec(np.array([index]))[0])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Samples of audio, or what its texts count as, if that is more."""
        return np.maximum(self.manifest.n_frames[indices], self._text_size(indices))

    def _text_size(self, indices: np.ndarray) -> np.ndarray:
        return self.manifest.text_bytes[indices] // _BYTES_PER_TOKEN * _SAMPLES_PER_TOKEN

    def encoder_frames(self, per_frame: int) -> int:
        """The encoder's frames of all rows that are short enough."""
        kept = np.delete(self.manifest.n_frames, list(self._too_long))
        return int((-(-kept // per_frame)).sum())

    def size(self, index: int) -> int:
        return int(self.manifest.n_frames[index])

    @property
    def sizes(self) -> np.ndarray:
        return self.manifest.n_frames

    def ordered_indices(self) -> np.ndarray:
        """By length, longest first, so that batches are even and memory runs out at once or never."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        order = order[np.argsort(-self.manifest.n_frames[order], kind="stable")]
        return order[~np.isin(order, list(self._too_long))] if self._too_long else order

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False where batches differ: fairseq would keep those of the epoch in which the process began."""
        return not self.shuffle

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> Any:
        """Batches of at most so many samples, or tokens of text that count as so many; a longer text is a batch alone.

        fairseq drops what exceeds a multiple of ``required_batch_size_multiple`` (8 by default); every row counts here,
        in every split. One empty batch stands for a manifest without rows, so that generation of nothing ends well.
        """
        if len(indices) == 0 and not self.shuffle:
            return [[]]
        if max_tokens == _FAIRSEQ_MAX_TOKENS and max_sentences is None:
            max_tokens = _MAX_TOKENS
        self._refuse_rows_beyond(max_tokens or 0, indices)
        sizes = self.num_tokens_vec(indices)
        if max_tokens is not None:
            self._say_long_texts(indices[self._text_size(indices) > max_tokens])
            sizes = np.maximum(self.manifest.n_frames[indices], np.minimum(sizes, max_tokens))
        return data_utils.batch_by_size(
            indices, self.num_tokens, sizes, max_tokens, max_sentences, required_batch_size_multiple=1
        )

    def _say_long_texts(self, indices: np.ndarray) -> None:
        if len(indices):
            logger.warning(
                f"{self.manifest.location(int(indices[0]))}: its texts count as more than --max-tokens, as do those of "
                f"{len(indices) - 1} more rows: each is a batch of its own"
            )

    def _refuse_rows_beyond(self, max_tokens: int, indices: np.ndarray) -> None:
        sizes = self.manifest.n_frames[indices]
        if 0 < max_tokens < sizes.max(initial=0):
            longest = int(indices[sizes.argmax()])
            raise ManifestError(
                f"{self.manifest.location(longest)}: its audio has {sizes.max()} samples, and --max-tokens, which "
                f"counts samples ({SAMPLE_RATE} a second), is {max_tokens}: give at least {sizes.max()}"
            )


class SpeechDataset(FairseqDataset):
    """Waveforms alone, in the order given (fairseq-interactive)."""

    def __init__(self, waveforms: Sequence[Tensor], lengths: Sequence[int]) -> None:
        self.waveforms = waveforms
        self.sizes = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.waveforms)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.waveforms[index]

    def collater(self, samples: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        waveforms = [waveform for _, waveform in samples]
        lengths = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.long)
        return {
            "id": torch.tensor([index for index, _ in samples], dtype=torch.long),
            "net_input": {"src_tokens": pad_waveforms(waveforms), "src_lengths": lengths},
            "nsentences": len(samples),
        }

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])


def load_manifest(path: Path, texts: Sequence[str]) -> Manifest:
    """A manifest with these texts in every row; where rows may be conversations, ``src_text`` is within them.

    Raises:
        ManifestError: it is missing or wrong; it names the row and the remedy.
    """
    manifest = Manifest.load(path, (), [name for name in texts if name != "src_text"])
    if "src_text" in texts and "conversation" not in manifest.columns:
        manifest = Manifest.load(path, texts, texts)
    return manifest


def transcripts_of(row: Mapping[str, str]) -> list[str]:
    """What is said in a row."""
    if not row.get("conversation"):
        return [row["src_text"]]
    return [piece.transcript for piece in read_conversation(row["conversation"])[1]]


def _plan_rows(utterances: Sequence[Utterance]) -> list[PlanRow]:
    rows, first = [], 0
    for u in utterances:
        pieces = range(first, first + len(u.samples))
        rows.append(PlanRow(u.segments, u.transcripts, u.samples, u.response, pieces, u.taught, u.alike))
        first += len(u.samples)
    return rows


def _heard(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """The speech of a batch as the model takes it."""
    samples = [count for u in utterances for count in u.samples]
    return {
        "src_tokens": pad_waveforms([waveform for u in utterances for waveform in u.waveforms]),
        "src_lengths": torch.tensor(samples, dtype=torch.long),
        "samples": samples,
    }


def _stored(utterances: Sequence[Utterance], width: int) -> dict[str, Any]:
    """Frames ``[N, D]`` of the stored pieces, end to end; of the others, the numbers in the batch and the keys."""
    pieces = [(key, bool(u.stored)) for u in utterances for key in u.keys]
    return {
        "frames": join([one for u in utterances for one in u.stored], width),
        "missing": [number for number, (_, is_stored) in enumerate(pieces) if not is_stored],
        "keys": [key for key, is_stored in pieces if not is_stored],
    }
