"""The speech-to-LLM model: speech encoder -> adapter -> LLM, as a student beside its own teacher.

text:   [ prefix | before | transcript tokens | after | response ]
speech: [ prefix | before | speech embeddings | after | response ]

The teacher is the LLM reading the first sequence, the student the same weights reading the second. ``prefix`` is what
all rows of the batch begin with; its keys and values are computed once and reused by both.
"""

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blspkd_fairseq import compat
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.fingerprint import fingerprint
from blspkd_fairseq.modules.partial_lora import ALL_POSITIONS, PositionMask, lora_alpha, speech_positions
from blspkd_fairseq.modules.sequence import Segment, Sequence, concatenate, is_valid, predicts
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder

LORA_SCOPES = ("speech", "all", "none")
_SPEECH, _RESPONSE = 1, 3  # indices into [before, speech or transcript, after, response]
_CACHED_PREFIXES = 16


class Distillation(NamedTuple):
    """Hidden states of student and teacher at the positions that are compared, and whose they are.

    Attributes:
        student: ``[N, D]`` before the output head.
        teacher: ``[N, D]`` of the LLM reading the transcript, or None when not asked for.
        rows: ``[N]`` utterance of each position.
        targets: ``[N]`` the token that follows each position.
    """

    student: Tensor
    teacher: Tensor | None
    rows: Tensor
    targets: Tensor


class SpeechLlmOutput(NamedTuple):
    """Attributes: the adapter's output, and what was asked for at the input and at the response positions.

    ``text_response`` is that of the student reading the transcript, which only LoRA on all positions tells apart from
    the teacher.
    """

    adapter: AdapterOutput
    input: Distillation | None
    response: Distillation | None
    text_response: Distillation | None = None


class ChatLLM(nn.Module):
    """An LLM that reads: as much of a :class:`SpeechLLM` as text needs.

    Args:
        llm: a causal LLM.
        lora_scope: where its LoRA acts: on "speech" positions, on "all", or "none" (it has none).
        share_prefix: compute the keys and values of the common prefix once. Off, the same numbers take longer.
    """

    def __init__(self, llm: PreTrainedModel, lora_scope: str = "none", share_prefix: bool = True) -> None:
        super().__init__()
        self.llm = llm
        self.lora_scope = lora_scope
        self.share_prefix = share_prefix
        self._prefixes: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, D]`` and bias ``[V]`` of the LLM's output head, which gets no gradient."""
        layer = self.llm.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return layer.weight.detach(), None if bias is None else bias.detach()

    def embed(self, ids: Tensor) -> Tensor:
        """The LLM's input embeddings of token ids, without gradient."""
        with torch.no_grad():
            return self.llm.get_input_embeddings()(ids)

    # ---- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teach(self, text: Mapping[str, Tensor], positions: Collection[str]) -> dict[str, Tensor]:
        """The LLM's own hidden states ``[N, D]`` at each of ``positions``; see :meth:`SpeechLLM.forward`."""
        return self._read(text, self._segment(text, "transcript"), positions, with_lora=False)

    def read(self, text: Mapping[str, Tensor], positions: Collection[str]) -> dict[str, Tensor]:
        """As :meth:`teach` for the student, which is the teacher itself unless LoRA acts on all positions."""
        transcript = self._segment(text, "transcript")
        return self._read(text, transcript, positions, with_lora=self.lora_scope == "all")

    def _read(
        self, text: Mapping[str, Tensor], heard: Segment, positions: Collection[str], with_lora: bool
    ) -> dict[str, Tensor]:
        """Hidden states at each of ``positions`` of the sequence around ``heard``."""
        sequence, hidden = self._hidden(text, heard, positions, with_lora)
        return {name: hidden[_select(sequence.segment, name)] for name in positions}

    def _hidden(
        self, text: Mapping[str, Tensor], heard: Segment, positions: Collection[str], with_lora: bool
    ) -> tuple[Sequence, Tensor]:
        """The sequence around ``heard``, and the LLM's hidden states ``[B, L, D]`` over it."""
        segments = [self._segment(text, "before"), heard]
        if "response" in positions:
            segments += [self._segment(text, "after"), self._segment(text, "response")]
        prefix = text["prefix"]
        cache = None
        if self._can_share_prefix(prefix):
            cache = self._prefix_cache(prefix, batch=len(heard.lengths))
        elif len(prefix):
            rows = self.embed(prefix).expand(len(heard.lengths), -1, -1)
            embeds, lengths = segments[0]
            segments[0] = Segment(torch.cat([rows, embeds], 1), lengths + len(prefix))
        sequence = concatenate(segments)
        with speech_positions(self.llm, self.lora_mask(sequence) if with_lora else None):
            output = self.llm.get_decoder()(
                inputs_embeds=sequence.embeds, use_cache=cache is not None, **compat.cache_argument(cache)
            )
        return sequence, output.last_hidden_state

    def lora_mask(self, sequence: Sequence) -> PositionMask:
        """Where the student's LoRA acts."""
        if self.lora_scope == "none":
            return None
        return ALL_POSITIONS if self.lora_scope == "all" else sequence.segment == _SPEECH

    def _segment(self, text: Mapping[str, Tensor], name: str) -> Segment:
        return Segment(self.embed(text[name]), text[f"{name}_lengths"])

    # ---- prefix ------------------------------------------------------------------------------------------------

    def _can_share_prefix(self, prefix: Tensor) -> bool:
        # LoRA on all positions changes the student's prefix; checkpointed layers refuse a cache.
        checkpointing = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.llm.modules())
        return self.share_prefix and len(prefix) > 0 and self.lora_scope != "all" and not checkpointing

    def _prefix_cache(self, prefix: Tensor, batch: int) -> DynamicCache:
        """A fresh cache that holds the prefix for every row."""
        key = tuple(prefix.tolist())
        if key not in self._prefixes:
            self._prefixes[key] = self._prefix_states(prefix)
            while len(self._prefixes) > _CACHED_PREFIXES:
                self._prefixes.popitem(last=False)
        cache = DynamicCache(config=self.llm.config)
        for index, (keys, values) in enumerate(self._prefixes[key]):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache

    @torch.no_grad()
    def _prefix_states(self, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[1, H, P, d]`` of each layer."""
        with speech_positions(self.llm, None):
            output = self.llm.get_decoder()(inputs_embeds=self.embed(prefix)[None], use_cache=True)
        return [(layer.keys, layer.values) for layer in compat.cache_of(output).layers]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module
        self._prefixes.clear()  # moved to another device or dtype
        return super()._apply(fn, recurse)


class SpeechLLM(ChatLLM):
    """Speech encoder, adapter and LLM in one module, of which only some parameters are trained.

    Args:
        speech_encoder: waveforms to frames.
        adapter: frames to LLM embeddings, such as :class:`~blspkd_fairseq.modules.cformer.CFormer`.
        llm: a causal LLM, frozen but for its (Partial) LoRA.
        lora_scope: where the LLM's LoRA acts: on "speech" positions, on "all", or "none" (the LLM has none).
        train_speech_encoder: unfreeze the speech encoder.
        share_prefix: compute the keys and values of the common prefix once. Off, the same numbers take longer.
        cache_features: keep the frozen encoder's frames of training utterances in memory, so that it hears each once.
    """

    def __init__(
        self,
        speech_encoder: SpeechEncoder,
        adapter: nn.Module,
        llm: PreTrainedModel,
        lora_scope: str = "none",
        train_speech_encoder: bool = False,
        share_prefix: bool = True,
        cache_features: bool = False,
    ) -> None:
        if lora_scope not in LORA_SCOPES:
            raise ValueError(f"unknown LoRA scope {lora_scope!r}: choose from {', '.join(LORA_SCOPES)}")
        super().__init__(llm, lora_scope, share_prefix)
        self.speech_encoder = speech_encoder
        self.adapter = adapter
        self.train_speech_encoder = train_speech_encoder
        self.cache_features = cache_features and not train_speech_encoder
        self._features: dict[int, Tensor] = {}
        self.speech_encoder.requires_grad_(train_speech_encoder)
        # Whisper's position table is a fixed sinusoid in its own training, too.
        self.speech_encoder.encoder.embed_positions.requires_grad_(False)
        for name, parameter in llm.named_parameters():
            parameter.requires_grad_("lora_" in name and lora_scope != "none")
        self.trained_names = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self.fingerprints = {"llm": fingerprint(llm)}
        if not train_speech_encoder:
            self.fingerprints["speech_encoder"] = fingerprint(speech_encoder)
        self.train(self.training)

    @property
    def settings(self) -> dict[str, float]:
        """Options that change what the trained weights mean, and not their shapes: checkpoints hold them."""
        alpha = lora_alpha(self.llm)
        return getattr(self.adapter, "settings", {}) | ({} if alpha is None else {"lora_alpha": alpha})

    # ---- modes -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Frozen parts stay in eval mode: the teacher must have no dropout, nor the student's frozen layers."""
        super().train(mode)
        if not self.train_speech_encoder:
            self.speech_encoder.eval()
        self.llm.eval()
        for name, module in self.llm.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
            elif getattr(module, "gradient_checkpointing", False):
                # transformers checkpoints layers in training mode only; the flag is set on the layer itself and not
                # on what it holds, so that its dropout stays off.
                module.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpeechLLM":
        """A copy that shares the frozen weights: an exponential moving average needs no second LLM."""
        for parameter in self.parameters():
            if not parameter.requires_grad:
                memo[id(parameter)] = parameter
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    # ---- speech ------------------------------------------------------------------------------------------------

    def adapt(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        target_lengths: Tensor | None = None,
        keys: Seq[int] | None = None,
        from_cache: bool = False,
    ) -> AdapterOutput:
        """Speech embeddings of waveforms ``[B, S]`` (fp32, 16 kHz) of ``lengths`` [B] samples.

        ``target_lengths`` [B] are the tokens of each utterance in training; ``keys`` name utterances for the cache,
        which evaluation passes by unless ``from_cache`` says that these are training utterances (roll-outs).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_speech_encoder):
            if keys is not None and (self.training or from_cache) and self.cache_features:
                features, padding_mask = self._cached_features(waveforms, lengths, keys)
            else:
                features, padding_mask = self.speech_encoder(waveforms, lengths)
        return self.adapter(features.to(self.adapter_dtype), padding_mask, target_lengths)

    def _cached_features(self, waveforms: Tensor, lengths: Tensor, keys: Seq[int]) -> tuple[Tensor, Tensor]:
        """The encoder's output; an utterance's frames do not depend on its batch, so they can be kept."""
        new = [row for row, key in enumerate(keys) if key not in self._features]
        if new:
            features, padding_mask = self.speech_encoder(waveforms[new], lengths[new])
            for row, frames, padding in zip(new, features, padding_mask, strict=True):
                self._features[keys[row]] = frames[~padding].clone()
        rows = [self._features[key] for key in keys]
        counts = torch.tensor([len(row) for row in rows], device=waveforms.device)
        features = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return features, torch.arange(features.shape[1], device=waveforms.device) >= counts.unsqueeze(1)

    @property
    def adapter_dtype(self) -> torch.dtype:
        return next(self.adapter.parameters()).dtype

    # ---- training ----------------------------------------------------------------------------------------------

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        text: Mapping[str, Tensor],
        positions: Collection[str] = ("input", "response"),
        teacher: bool = True,
        keys: Seq[int] | None = None,
        count_tokens: bool = False,
        text_replies: Mapping[str, Tensor] | None = None,
    ) -> SpeechLlmOutput:
        """Runs student and teacher.

        Args:
            src_tokens: ``[B, S]`` waveforms, fp32 at 16 kHz (fairseq's name for a model's source).
            src_lengths: ``[B]`` samples.
            text: ids of the sequences' text: ``prefix`` [P]; ``before``, ``transcript``, ``after``, ``response`` as
                right-padded ``[B, N]`` with ``<name>_lengths`` [B]. With several responses to each utterance,
                ``[B x m, N]``, those of an utterance one after another.
            positions: which to return: "input" (the speech positions; needs an adapter that gives one embedding per
                transcript token) and "response" (those that predict the response). Empty: the LLM does not run.
            teacher: run the teacher, too.
            keys: a number for each utterance, the same whenever it comes (for ``cache_features``).
            count_tokens: the adapter counts the tokens itself, as in generation, and is not told the transcript's.
            text_replies: as ``text``; the student reads its transcripts, too (``text_response`` of the output).
        """
        replies = len(text["response_lengths"]) // max(1, len(src_lengths))
        target_lengths = None if count_tokens else text["transcript_lengths"][:: max(1, replies)]
        adapter = self.adapt(src_tokens, src_lengths, target_lengths, keys)
        if not positions:
            return SpeechLlmOutput(adapter, None, None)
        speech = Segment(adapter.embeddings.to(self.llm.dtype), adapter.lengths)
        if replies > 1:
            speech = Segment(*(part.repeat_interleave(replies, 0) for part in speech))
        hearing = self._read(text, speech, positions, with_lora=True)
        taught = self.teach(text, positions) if teacher else {}
        compared = {name: _compare(text, name, hearing, taught) for name in positions}
        text_response = None
        if text_replies is not None:
            reading = self.read(text_replies, ("response",))
            taught = self.teach(text_replies, ("response",)) if teacher else {}
            text_response = _compare(text_replies, "response", reading, taught)
        return SpeechLlmOutput(adapter, compared.get("input"), compared.get("response"), text_response)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module
        self._features.clear()
        return super()._apply(fn, recurse)


def _compare(
    text: Mapping[str, Tensor], name: str, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> Distillation:
    segment = "transcript" if name == "input" else "response"
    valid = is_valid(text[segment], text[f"{segment}_lengths"])
    return Distillation(student[name], teacher.get(name), valid.nonzero()[:, 0], text[segment][valid])


def _select(segment: Tensor, name: str) -> Tensor:
    """Input positions are the speech positions themselves, response positions those that predict the response."""
    return segment == _SPEECH if name == "input" else predicts(segment, _RESPONSE)
