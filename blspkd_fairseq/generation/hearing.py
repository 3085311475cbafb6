"""Speech as an LLM reads it, and what its nearest tokens say."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.batch import pad_waveforms
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.windows import cut_windows
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.whisper_encoder import frame_counts


class Heard(NamedTuple):
    """P pieces of speech, as the LLM reads them.

    Attributes:
        embeddings: ``[P, U, D]``.
        counts: how many each has.
        is_text: ``[P, U]`` bool, on the CPU: which are the LLM's own tokens, which its LoRA leaves alone.
    """

    embeddings: Tensor
    counts: list[int]
    is_text: Tensor

    def of(self, pieces: Sequence[int]) -> "Heard":
        """Some of the pieces."""
        counts = [self.counts[piece] for piece in pieces]
        width, chosen = max(counts, default=0), list(pieces)
        return Heard(self.embeddings[chosen, :width], counts, self.is_text[chosen, :width])


def speech_of(inputs: Mapping[str, Any], pieces: Sequence[int]) -> dict[str, Any]:
    """Arguments of :func:`hear` for some of the pieces of speech of a collated batch (its ``net_input``)."""
    samples = [inputs["samples"][piece] for piece in pieces]
    speech: dict[str, Any] = {"lengths": inputs["src_lengths"][pieces], "samples": samples}
    if inputs.get("features") is None:
        return speech | {"waveforms": inputs["src_tokens"][pieces]}
    frames = inputs["features"].split(frame_counts(inputs["samples"]))
    return speech | {"waveforms": None, "features": torch.cat([frames[piece] for piece in pieces])}


@torch.no_grad()
def hear(model: SpeechLLM, waveforms: Tensor | None, lengths: Tensor, **options: Any) -> Heard:
    """The speech embeddings of pieces of speech; longer ones are heard in windows."""
    if not len(lengths):
        nothing = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        return Heard(model.embed(nothing), [], torch.zeros(0, 0, dtype=torch.bool))
    if waveforms is not None and waveforms.shape[1] > model.window_seconds * SAMPLE_RATE:
        samples = options.get("samples") or lengths.tolist()
        cut = (one[:count] for one, count in zip(waveforms.cpu().numpy(), samples, strict=True))
        return hear_windows(model, [cut_windows(one, model.window_seconds) for one in cut])
    adapter = model.adapt(waveforms, lengths, **options)
    embeddings, is_text = adapter.embeddings.to(model.llm.dtype), adapter.is_text
    is_text = torch.zeros(embeddings.shape[:2], dtype=torch.bool) if is_text is None else is_text.cpu()
    return Heard(embeddings, adapter.lengths.tolist(), is_text)


@torch.no_grad()
def hear_windows(model: SpeechLLM, pieces: Sequence[Sequence[np.ndarray]], seconds: float = 120.0) -> Heard:
    """:func:`hear` of pieces of speech of any length, each the windows of which it consists.

    Args:
        pieces: ``[samples]`` float32 at 16 kHz, each no longer than the encoder's window.
        seconds: that are heard at a time, which bounds the memory and changes nothing else.
    """
    windows = [window for piece in pieces for window in piece]
    heard: list[Tensor] = []
    text: list[Tensor] = []
    while len(heard) < len(windows):
        batch: list[np.ndarray] = []
        for window in windows[len(heard) :]:
            if batch and sum(map(len, batch)) + len(window) > seconds * SAMPLE_RATE:
                break
            batch.append(window)
        samples = [len(window) for window in batch]
        waveforms = pad_waveforms([torch.from_numpy(window) for window in batch]).to(model.device)
        lengths = torch.tensor(samples, device=model.device)
        found = hear(model, waveforms, lengths, samples=samples)
        heard += [one[:count] for one, count in zip(found.embeddings, found.counts, strict=True)]
        text += [one[:count] for one, count in zip(found.is_text, found.counts, strict=True)]
    if not pieces:
        return hear(model, None, torch.zeros(0))
    empty = model.embed(torch.zeros(0, dtype=torch.long, device=model.device))
    counts = [len(piece) for piece in pieces]
    embeddings, is_text = _joined(heard, counts, empty), _joined(text, counts, torch.zeros(0, dtype=torch.bool))
    return Heard(pad_sequence(embeddings, True), [len(one) for one in embeddings], pad_sequence(is_text, True))


def _joined(windows: Sequence[Tensor], counts: Sequence[int], empty: Tensor) -> list[Tensor]:
    """Of each piece its windows, so many of them, end to end."""
    remaining = iter(windows)
    return [torch.cat([empty, *islice(remaining, count)]) for count in counts]


def most_written(heard: int) -> int:
    """Tokens of a text that says no more than what was heard, in tokens: an LLM that writes on invents it."""
    return 2 * heard + 16


def nearest_tokens(model: SpeechLLM, embeddings: Tensor) -> list[int]:
    """For embeddings ``[U, D]`` the ids of the LLM's nearest input embeddings (Euclidean distance)."""
    vectors, squares = model.vocabulary
    closeness = embeddings.float() @ vectors.float().t() - squares / 2
    ids: list[int] = closeness.argmax(1).tolist()
    return ids


_PART_OF_ONE = "\N{REPLACEMENT CHARACTER}"  # of whose bytes some are missing, as in misheard words of some scripts


def nearest_texts(model: SpeechLLM, chat: ChatFormat, heard: Sequence[Sequence[Tensor]]) -> list[str]:
    """The text of the nearest tokens of each piece of speech, all with one look at the LLM's table.

    It is "" where none of them has a letter or a digit: nobody speaks there, as in the "..." that silence is heard as.

    Args:
        model: whose adapter gives one embedding for each token.
        chat: the chat format of its LLM.
        heard: of each piece the embeddings ``[U, D]`` of its windows, one after another.
    """
    windows = [window for piece in heard for window in piece]
    ids = iter(nearest_tokens(model, torch.cat(windows)) if windows else [])
    texts = [chat.decode(list(islice(ids, sum(map(len, piece))))) for piece in heard]
    return [text if any(one.isalnum() or one == _PART_OF_ONE for one in text) else "" for text in texts]
