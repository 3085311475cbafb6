"""The speech-to-LLM model: speech encoder -> adapter -> LLM, as a student beside its own teacher.

text:   [ ... text | transcript tokens | text ... | response ]
speech: [ ... text | speech embeddings | text ... | response ]

The teacher is the LLM reading the first sequence, the student the same weights reading the second. Where everything
goes is planned before (:mod:`blspkd_fairseq.data.batch`); here the device only computes, and is asked for nothing.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blspkd_fairseq.data.batch import Batch, Layout, Rows, SpeechLengths, plan_from_text
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.decoder_block import KnownDecoder
from blspkd_fairseq.modules.decoder_trial import known_decoder
from blspkd_fairseq.modules.distillation_loss import LogitTransform
from blspkd_fairseq.modules.fingerprint import fingerprint
from blspkd_fairseq.modules.fused_norm import fuse_norms
from blspkd_fairseq.modules.language_prior import LanguagePrior, expect, other_counts
from blspkd_fairseq.modules.packed_llm import can_read_packed, padded_places, read_packed, read_padded
from blspkd_fairseq.modules.partial_lora import (
    ALL_POSITIONS,
    PositionMask,
    SpeechPlaces,
    lora_alpha,
    speech_positions,
    values_at,
)
from blspkd_fairseq.modules.precision import has_bfloat16, usable_dtype
from blspkd_fairseq.modules.ragged import Ragged, pad, rows_of
from blspkd_fairseq.modules.soft_tokens import soft_tokens_of
from blspkd_fairseq.modules.whisper_encoder import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    SpeechEncoder,
    frame_counts,
    frame_lengths,
)

LORA_SCOPES = ("speech", "all", "none")


class Distillation(NamedTuple):
    """Hidden states of student and teacher at the positions that are compared, and whose they are.

    Attributes:
        student: ``[N, D]`` before the output head.
        teacher: ``[N, D]`` of the LLM reading the transcript, or None when not asked for.
        rows: ``[N]`` utterance of each position.
        targets: ``[N]`` the token at each input position; at a response position, the one that follows.
        counts: ``[N]`` positions of the same utterance.
    """

    student: Tensor
    teacher: Tensor | None
    rows: Tensor
    targets: Tensor
    counts: Tensor


class SpeechLlmOutput(NamedTuple):
    """What was asked for.

    Attributes:
        adapter: the adapter's output.
        input, response: what is compared at the speech positions, and at those that predict the response.
        text_response: of the student reading the transcript; differs from the teacher only with ``lora_scope="all"``.
        batch: the plan, on the model's device.
    """

    adapter: AdapterOutput
    input: Distillation | None
    response: Distillation | None
    text_response: Distillation | None
    batch: Batch


class ChatLLM(nn.Module):
    """An LLM that reads: as much of a :class:`SpeechLLM` as text needs.

    Args:
        llm: a causal LLM.
        lora_scope: where its LoRA acts: on "speech" positions, on "all", or "none" (it has none).
        share_prefix: what all rows begin with is read once. Off, the same numbers take longer.
    """

    def __init__(self, llm: PreTrainedModel, lora_scope: str = "none", share_prefix: bool = True) -> None:
        super().__init__()
        self.llm = llm
        self.lora_scope = lora_scope
        self.share_prefix = share_prefix
        self.reads_packed = can_read_packed(llm)
        self.known_decoder: KnownDecoder | None = None
        self._tried: tuple[Any, ...] = ()
        self._squares: tuple[tuple[Any, ...], Tensor] | None = None
        self._settle_decoder()

    def settle_precision(self) -> None:
        """To be called when the model has come to another device or precision."""
        self._settle_decoder()

    def _settle_decoder(self) -> None:
        """Tries whether the LLM's layers are known, once in each place and precision."""
        state = getattr(self.llm, "partial_lora_state", None)
        setting = (self.device, self.llm.dtype, None if state is None else state.products)
        if self.reads_packed and setting != self._tried:
            self.known_decoder, self._tried = known_decoder(self.llm), setting

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module
        super()._apply(fn, recurse)
        self.settle_precision()
        return self

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, D]`` and bias ``[V]`` of the LLM's output head, which gets no gradient."""
        layer = self.llm.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return layer.weight.detach(), None if bias is None else bias.detach()

    @property
    def logit_transform(self) -> LogitTransform | None:
        """What the LLM does to the logits of its head."""
        return getattr(self.llm, "logit_transform", None)

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The LLM's input embeddings of token ids, without gradient."""
        table = self.llm.get_input_embeddings()
        # Called on its class: gradient checkpointing hangs a hook on the layer that asks for a gradient.
        return type(table).forward(table, ids)

    @property
    def vocabulary(self) -> tuple[Tensor, Tensor]:
        """``[V, D]`` the input embeddings of all tokens, and ``[V]`` the squares of their norms in fp32, kept."""
        table = self.llm.get_input_embeddings()
        weight: Tensor = table.weight.detach()
        plain = type(table) is nn.Embedding
        vectors = weight if plain else self.embed(torch.arange(len(weight), device=weight.device))
        key = (weight.device, weight.dtype, weight.data_ptr(), weight._version)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32).square()
        return vectors, self._squares[1]

    # ---- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teach(self, layout: Layout) -> Tensor:
        """The LLM's own hidden states ``[N, D]`` of the sequences with the transcripts."""
        return self.hidden(self.embed(layout.ids), layout)

    def read(self, layout: Layout) -> Tensor:
        """As :meth:`teach` for the student, which is the teacher itself unless LoRA acts on all positions."""
        return self.hidden(self.embed(layout.ids), layout, ALL_POSITIONS if self.lora_scope == "all" else None)

    def hidden(self, embeds: Tensor, layout: Layout, lora: PositionMask = None) -> Tensor:
        """The LLM's hidden states ``[N, D]`` of packed embeddings ``[N, D]``."""
        with speech_positions(self.llm, lora):
            if self.reads_packed:
                return read_packed(self.llm, embeds, layout.positions, layout.rows, self.known_decoder)
            return read_padded(self.llm, embeds, layout.rows)

    def speech_places(self, layout: Layout, is_text: Tensor | None = None) -> PositionMask:
        """Where the student's LoRA acts; not where the speech embeddings, ``[N]`` of them, are its own tokens."""
        if self.lora_scope != "speech":
            return ALL_POSITIONS if self.lora_scope == "all" else None
        rows = layout.rows
        soft = layout.speech if is_text is None else (~is_text).nonzero()[:, 0]
        if isinstance(soft, Tensor) and not len(soft):
            return None
        if self.reads_packed:
            return SpeechPlaces(soft, (1, rows.total))
        places = values_at(padded_places(rows)[1], soft)
        return SpeechPlaces(places, (len(rows.counts), rows.prefix + rows.longest))


class SpeechLLM(ChatLLM):
    """Speech encoder, adapter and LLM in one module, of which only some parameters are trained.

    Args:
        speech_encoder: waveforms to frames.
        adapter: frames to LLM embeddings, such as :class:`~blspkd_fairseq.modules.cformer.CFormer`.
        llm: a causal LLM, frozen but for its (Partial) LoRA.
        lora_scope: where the LLM's LoRA acts: on "speech" positions, on "all", or "none" (the LLM has none).
        train_speech_encoder: unfreeze the speech encoder.
        share_prefix: what all rows begin with is read once. Off, the same numbers take longer.
        product_dtype: of the matrix products of adapter, LoRA and a trained encoder, whose weights stay in float32.
            None: bfloat16 on a GPU that has it, with TF32 for what remains in float32; else float32.
        speech_encoder_dtype: of the frozen encoder; None: as the products.
        prior: of soft tokens in use, and in training if it says so; None: they go by the sound alone.
    """

    def __init__(
        self,
        speech_encoder: SpeechEncoder,
        adapter: nn.Module,
        llm: PreTrainedModel,
        lora_scope: str = "none",
        train_speech_encoder: bool = False,
        share_prefix: bool = True,
        product_dtype: torch.dtype | None = None,
        speech_encoder_dtype: torch.dtype | None = None,
        prior: LanguagePrior | None = None,
    ) -> None:
        if lora_scope not in LORA_SCOPES:
            raise ValueError(f"unknown LoRA scope {lora_scope!r}: choose from {', '.join(LORA_SCOPES)}")
        super().__init__(llm, lora_scope, share_prefix)
        self.speech_encoder = speech_encoder
        self.adapter = adapter
        self.train_speech_encoder = train_speech_encoder
        self.window_seconds = speech_encoder.max_samples / SAMPLE_RATE  # of longer speech in use
        self.product_dtype = product_dtype
        self.speech_encoder_dtype = speech_encoder_dtype
        self.prior = prior
        self.speech_encoder.requires_grad_(train_speech_encoder)
        # Whisper's position table is a fixed sinusoid in its own training, too.
        self.speech_encoder.encoder.embed_positions.requires_grad_(False)
        for name, parameter in llm.named_parameters():
            parameter.requires_grad_("lora_" in name and lora_scope != "none")
        self.trained_names = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self.speech_lengths = SpeechLengths(getattr(adapter, "halvings", None), SAMPLES_PER_FRAME)
        self.fingerprints = {"llm": fingerprint(llm)}
        if not train_speech_encoder:
            self.fingerprints["speech_encoder"] = fingerprint(speech_encoder)
        self._modal: list[nn.Module] | None = None
        self.train(self.training)
        self._modal = None  # until all is set up
        self.settle_precision()

    # ---- precision ---------------------------------------------------------------------------------------------

    @property
    def products(self) -> torch.dtype:
        """The dtype of matrix products on the device where the model is."""
        if self.product_dtype is not None:
            return usable_dtype(self.product_dtype, self.device)
        return torch.bfloat16 if self.device.type == "cuda" and has_bfloat16(self.device) else torch.float32

    def settle_precision(self) -> None:
        """Brings the frozen encoder and LoRA's products to the precision that :attr:`products` says."""
        # Where nobody chose, and nothing is faster in half precision, everything stays as it is.
        chosen = self.products if self.product_dtype is not None or self.products != torch.float32 else None
        encoder_dtype = self.speech_encoder_dtype or chosen
        if encoder_dtype is not None and not self.train_speech_encoder:
            self.speech_encoder.to(usable_dtype(encoder_dtype, self.device))
        state = getattr(self.llm, "partial_lora_state", None)
        if state is not None:
            state.products = chosen
        if self.device.type == "cuda":
            fuse_norms(self.llm)
            torch.set_float32_matmul_precision("highest" if self.product_dtype == torch.float32 else "high")
        super().settle_precision()

    @property
    def settings(self) -> dict[str, float]:
        """Options that change what the trained weights mean, and not their shapes: checkpoints hold them."""
        alpha = lora_alpha(self.llm)
        return getattr(self.adapter, "settings", {}) | ({} if alpha is None else {"lora_alpha": alpha})

    # ---- modes -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Frozen parts stay in eval mode: the teacher must have no dropout, nor the student's frozen layers.

        fairseq calls this before every update, so what has a mode is looked for once.
        """
        if self._modal is None:
            super().train(False)
            self._modal = list(self._find_modal())
        for module in self._modal:
            module.training = mode
        return self

    def _find_modal(self) -> Iterator[nn.Module]:
        """The modules that training and evaluation tell apart."""
        yield self
        yield from self.adapter.modules()
        if self.train_speech_encoder:
            yield from self.speech_encoder.modules()
        for name, module in self.llm.named_modules():
            # transformers checkpoints layers in training mode only; the flag is set on the layer itself and not on what
            # it holds, so that its dropout stays off.
            if "lora_dropout" in name or getattr(module, "gradient_checkpointing", False):
                yield module

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

    def encode(self, waveforms: Tensor, lengths: Tensor, samples: Seq[int]) -> Ragged:
        """The speech encoder's frames of waveforms ``[P, S]``; a piece's frames do not depend on its batch."""
        # A frozen encoder is in its own precision, and so is what the feature store keeps: autocast would only cast the
        # norms of one in bfloat16 to float32 and back.
        trains = self.train_speech_encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), self._autocast(trains):
            frames: Ragged = self.speech_encoder(waveforms, lengths, samples, ragged=True)
        return frames

    def adapt(
        self,
        waveforms: Tensor | None,
        lengths: Tensor,
        target_lengths: Tensor | Rows | None = None,
        samples: Seq[int] | None = None,
        features: Tensor | None = None,
        reads: bool = True,
    ) -> AdapterOutput:
        """Speech embeddings of waveforms ``[B, S]`` (fp32, 16 kHz) of ``lengths`` [B] samples.

        Args:
            waveforms, lengths: the pieces of speech.
            target_lengths: ``[B]`` tokens of each in training; by default the adapter counts, and the device is asked.
            samples: ``lengths`` as Python numbers; without them the device is asked.
            features: ``[N, D]`` the encoder's frames of all pieces, end to end, in place of the waveforms.
            reads: the LLM reads them; otherwise an adapter with soft tokens gives out what these are made of.
        """
        frames = self._frames(waveforms, lengths, samples, features)
        prior = self.prior if reads and (not self.training or self.hears_in_training) else None
        with self._autocast():
            tokens = rows_of(target_lengths) if isinstance(target_lengths, Tensor) else target_lengths
            frames = Ragged(frames.values.to(self.adapter_dtype), frames.rows)
            made = reads and prior is None  # with a prior, soft tokens are made under its posterior
            adapted = self._adapted(frames, tokens, made)
            counts = prior is not None and prior.beam and tokens is None and adapted.queries is not None
            other = self._adapted(frames, rows_of(other_counts(adapted)), made) if counts else None
        return adapted if prior is None else expect(self, adapted, prior, tokens is None, other)

    def _frames(
        self, waveforms: Tensor | None, lengths: Tensor, samples: Seq[int] | None, features: Tensor | None
    ) -> Ragged:
        samples = lengths.tolist() if samples is None else samples
        if features is not None:
            return Ragged(features, rows_of(frame_lengths(lengths), frame_counts(samples)))
        if waveforms is None:
            raise ValueError("there is no speech: give waveforms or features")
        return self.encode(waveforms, lengths, samples)

    def _adapted(self, frames: Ragged, tokens: Rows | None, reads: bool) -> AdapterOutput:
        adapt = getattr(self.adapter, "adapt", None)
        if callable(adapt):
            spared = not reads and soft_tokens_of(self.adapter) is not None
            output: AdapterOutput = adapt(frames, tokens, reads=False) if spared else adapt(frames, tokens)
            return output
        # An adapter of one's own may know padded frames alone.
        output = self.adapter(pad(*frames), frames.rows.is_padding, None if tokens is None else tokens.lengths)
        return output

    def _autocast(self, trains: bool = True) -> torch.autocast:
        """Products of weights that are trained, and so in float32, in the precision of products."""
        products = self.products
        return torch.autocast(self.device.type, products, enabled=trains and products != torch.float32)

    @property
    def hears_in_training(self) -> bool:
        """By what the LLM expects, as in use."""
        return self.prior is not None and self.prior.in_training

    @property
    def adapter_dtype(self) -> torch.dtype:
        return next(self.adapter.parameters()).dtype

    # ---- training ----------------------------------------------------------------------------------------------

    def forward(
        self,
        src_tokens: Tensor | None,
        src_lengths: Tensor,
        text: Batch | Mapping[str, Tensor],
        positions: Collection[str] = ("input", "response"),
        teacher: bool = True,
        count_tokens: bool = False,
        text_replies: Batch | Mapping[str, Tensor] | None = None,
        samples: Seq[int] | None = None,
        features: Tensor | None = None,
    ) -> SpeechLlmOutput:
        """Runs student and teacher.

        Args:
            src_tokens: ``[P, S]`` waveforms, fp32 at 16 kHz (fairseq's name for a model's source).
            src_lengths: ``[P]`` samples.
            text: the plan of the batch, or padded ids from which one is made
                (:func:`~blspkd_fairseq.data.batch.plan_from_text`).
            positions: which to return: "input" (the speech positions; needs an adapter that gives one embedding per
                transcript token) and "response" (those that predict the response). Empty: the LLM does not run.
            teacher: run the teacher, too.
            count_tokens: the adapter counts the tokens itself, as in generation, and is not told the transcript's.
            text_replies: as ``text``; the student reads its transcripts, too (``text_response`` of the output).
            samples: ``src_lengths`` as Python numbers; without them the device is asked.
            features: ``[N, D]`` the encoder's frames in place of the waveforms.
        """
        samples = src_lengths.tolist() if samples is None else samples
        if isinstance(text, Batch) and not count_tokens:
            batch = text.to(src_lengths.device)
            adapter = self.adapt(src_tokens, src_lengths, batch.pieces, samples, features, reads=bool(positions))
        else:
            if isinstance(text, Batch):
                raise ValueError("a plan knows how many tokens there are: let count_tokens be off")
            batch, adapter = self._planned(src_tokens, src_lengths, text, positions, count_tokens, samples, features)
        if not positions:
            return SpeechLlmOutput(adapter, None, None, None, batch)
        hearing, taught = self.hear(adapter, batch.student), self.teach(batch.teacher) if teacher else None
        heard: dict[str, Distillation] = {}
        if "input" in positions:
            heard["input"] = _at_speech(hearing, taught, batch)
        if "response" in positions:
            answered = hearing.index_select(0, batch.student.response)
            teaching = None if taught is None else taught.index_select(0, batch.teacher.response)
            heard["response"] = Distillation(answered, teaching, *batch.response)
        text_response = None
        if text_replies is not None:
            replies = self._plan(text_replies, samples, positions).to(src_lengths.device)
            taught = self.teach(replies.teacher) if teacher else None
            reading = self.read(replies.teacher).index_select(0, replies.teacher.response)
            teaching = None if taught is None else taught.index_select(0, replies.teacher.response)
            text_response = Distillation(reading, teaching, *replies.response)
        return SpeechLlmOutput(adapter, heard.get("input"), heard.get("response"), text_response, batch)

    def hear(self, adapter: AdapterOutput, layout: Layout) -> Tensor:
        """Hidden states ``[N, D]`` of the sequences with the speech."""
        speech = adapter.embeddings.flatten(0, 1).index_select(0, layout.source).to(self.llm.dtype)
        embeds = torch.cat([speech, self.embed(layout.ids[layout.speech :])])
        is_text = None if adapter.is_text is None else adapter.is_text.flatten().index_select(0, layout.source)
        return self.hidden(embeds, layout, self.speech_places(layout, is_text))

    def _plan(self, text: Batch | Mapping[str, Tensor], samples: Seq[int], positions: Collection[str]) -> Batch:
        if isinstance(text, Batch):
            return text
        return plan_from_text(text, samples, self.speech_lengths, "response" in positions, self.share_prefix)

    def _planned(
        self,
        src_tokens: Tensor | None,
        src_lengths: Tensor,
        text: Mapping[str, Tensor],
        positions: Collection[str],
        count_tokens: bool,
        samples: Seq[int],
        features: Tensor | None,
    ) -> tuple[Batch, AdapterOutput]:
        """A plan made here, after the adapter has counted: it asks the device."""
        replies = len(text["response_lengths"]) // max(1, len(samples))
        tokens = None if count_tokens else text["transcript_lengths"][:: max(1, replies)]
        adapter = self.adapt(src_tokens, src_lengths, tokens, samples, features)
        counts = adapter.lengths.tolist()
        plan = plan_from_text(text, samples, counts, "response" in positions, self.share_prefix)
        return plan.to(src_lengths.device), adapter


def _at_speech(hearing: Tensor, taught: Tensor | None, batch: Batch) -> Distillation:
    """The speech positions; where the teacher reads something else than what is said, there is nothing to compare."""
    if batch.alike is None:
        spoken = slice(batch.student.speech)
        return Distillation(hearing[spoken], None if taught is None else taught[spoken], *batch.transcript)
    alike = batch.alike
    teaching = None if taught is None else taught.index_select(0, alike.teacher)
    return Distillation(hearing.index_select(0, alike.student), teaching, *alike.labels)
