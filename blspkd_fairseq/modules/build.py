"""Options of the model, and the model built from them and from pretrained parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from blspkd_fairseq import compat
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.modules.beam_search import WIDEST, check_can_search
from blspkd_fairseq.modules.cformer import ALIGNMENTS, CFormer
from blspkd_fairseq.modules.checkpointing import enable_gradient_checkpointing
from blspkd_fairseq.modules.conv_adapter import ConvAdapter
from blspkd_fairseq.modules.distillation_loss import LogitTransform
from blspkd_fairseq.modules.language_prior import LanguagePrior
from blspkd_fairseq.modules.llm_trial import check_llm
from blspkd_fairseq.modules.partial_lora import add_partial_lora
from blspkd_fairseq.modules.precision import usable_dtype
from blspkd_fairseq.modules.pretrained import load_pretrained, load_unquantized
from blspkd_fairseq.modules.quantized import QUANTIZATIONS, quantize_linears
from blspkd_fairseq.modules.soft_tokens import SoftTokens
from blspkd_fairseq.modules.speech_llm import LORA_SCOPES, SpeechLLM
from blspkd_fairseq.modules.spelling import speakable_tokens
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class _BaseModels:
    """The two that come first where options are given by position."""

    speech_encoder: str = ""
    llm: str = ""


@dataclass
class LlmOptions:
    """LLM."""

    llm: str = _option("", "causal chat LLM: a Hugging Face name such as Qwen/Qwen2.5-7B-Instruct, or a directory")
    trust_remote_code: bool = _option(False, "run code that comes with the LLM's files (only from who you trust)")
    system_prompt: str = _option("", "system message of the chat (default: what the LLM's chat template has)")
    chat_template: str = _option("", "file with a Jinja chat template in place of the tokenizer's own")
    llm_dtype: str = _option("bfloat16", "precision of the frozen LLM: float32, bfloat16 or float16")
    llm_quantization: str = _option(
        "none",
        "hold the LLM's linear layers in fewer bits: int8 or nf4, by bitsandbytes (checkpoints do not depend on it)",
    )
    gradient_checkpointing: bool = _option(False, "recompute the LLM's activations in backward: less memory, slower")
    no_shared_prefix: bool = _option(False, "recompute the common prefix of the prompts in every row (same numbers)")


@dataclass
class LoraOptions:
    """Partial LoRA. Low-rank updates of the LLM's linear layers, at the positions of speech."""

    lora_scope: str = _option("speech", "where LoRA acts in the LLM: speech (Partial LoRA), all (positions) or none")
    lora_rank: int = _option(16, "rank of LoRA")
    lora_alpha: float = _option(16.0, "LoRA's delta is scaled by alpha / rank")
    lora_dropout: float = _option(0.05, "dropout of LoRA's input")
    lora_target_modules: str = _option("", "comma-separated names of linear layers (default: all of the decoder's)")


@dataclass
class AdapterOptions:
    """Adapter. Between speech encoder and LLM."""

    adapter: str = _option("cformer", "cformer (BLSP-KD; an embedding per token), or cnn (BLSP)")
    adapter_pre_layers: int = _option(4, "transformer layers before CIF")
    adapter_post_layers: int = _option(4, "transformer layers after CIF")
    adapter_heads: int = _option(8, "attention heads of the adapter; must divide the speech encoder's width")
    adapter_ffn_dim: int = _option(0, "feed-forward width of the adapter (0: 4 x the speech encoder's width)")
    adapter_alignment: str = _option(
        "cif", "frames to tokens in the cformer: cif, or pif, a smooth alignment (after E-Paraformer)"
    )
    adapter_soft_tokens: bool = _option(
        False,
        "the cformer gives out means of the LLM's token embeddings under a posterior over its tokens, which goes by "
        "their spelling, too, so that words are heard that no training said",
    )
    adapter_prior_weight: float = _option(
        0.0,
        "in use, soft tokens go by what the LLM expects after those before them, too: the power of its prediction in "
        "their posterior (0: by the sound alone)",
    )
    adapter_prior_passes: int = _option(1, "how often the LLM reads what is heard so far, for --adapter-prior-weight")
    adapter_prior_beam: int = _option(
        0,
        "search for what is heard, with so many hypotheses at a time, in place of reading it so often: fewer errors, "
        "and a step of the LLM for each token (0: no search; 6 are good); the LLM reads what is found as text, and "
        "its LoRA acts where no word is heard",
    )
    adapter_prior_training: bool = _option(
        False,
        "hear in training as in use, by --adapter-prior-weight: the LLM's LoRA learns to read what is found, and acts "
        "on that in use, too; no gradient goes through it to the adapter, which learns by the losses of tokens and of "
        "their count",
    )
    transcript_merges: int = _option(
        0,
        "write what is heard with so many of the merges of the LLM's BPE tokenizer: rarer words become several "
        "frequent tokens, which are learnt from fewer hours (0: with all)",
    )
    adapter_conv_layers: int = _option(3, "convolutions of the cnn adapter, each of which halves the frames")
    adapter_kernel_size: int = _option(5, "kernel size of the cnn adapter")
    adapter_bottleneck: int = _option(512, "width of the cnn adapter's bottleneck")
    adapter_dropout: float = _option(0.1, "dropout of the adapter")
    product_dtype: str = _option(
        "auto",
        "matrix products of adapter and LoRA, whose weights are in float32: float32, bfloat16, or auto (bfloat16 on a "
        "GPU that has it)",
    )


@dataclass
class SpeechEncoderOptions:
    """Speech encoder."""

    speech_encoder: str = _option("", "Whisper model: a Hugging Face name such as openai/whisper-small, or a directory")
    speech_encoder_dtype: str = _option(
        "auto", "precision of the frozen speech encoder: float32, bfloat16, float16, or auto (as --product-dtype)"
    )
    unfreeze_speech_encoder: bool = _option(False, "train the speech encoder, too")
    cache_encoder_features: bool = _option(
        False, "keep the frozen encoder's output of all training speech on disk: it hears each utterance once"
    )
    pad_to_30s: bool = _option(False, "give the encoder 30 s of input as published, not only the batch's speech")
    window_seconds: float = _option(
        0.0, "in use, longer speech is heard in windows of at most this, cut in pauses (0: what the encoder takes)"
    )


@dataclass
class SpeechLlmConfig(LlmOptions, LoraOptions, AdapterOptions, SpeechEncoderOptions, _BaseModels):
    """Options of the model. Defaults are those of BLSP-KD's published code where it has them."""


SHAPING_OPTIONS = (
    "adapter",
    "adapter_pre_layers",
    "adapter_post_layers",
    "adapter_heads",
    "adapter_ffn_dim",
    "adapter_alignment",
    "adapter_soft_tokens",
    "adapter_prior_weight",
    "adapter_prior_passes",
    "adapter_prior_beam",
    "adapter_prior_training",
    "transcript_merges",
    "adapter_conv_layers",
    "adapter_kernel_size",
    "adapter_bottleneck",
)
"""Options without which trained weights do not fit, or mean something else."""
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_target_modules")
"""... where LoRA was trained."""


def adopt_options(config: Any, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Takes over from a trained model what its weights ask for, where the user has left an option at its default.

    Args:
        config: options of the model to build, changed in place.
        trained: those of the trained model.

    Returns:
        What was changed.
    """
    defaults = SpeechLlmConfig()
    had_lora = trained.get("lora_scope", "speech") != "none"
    names = ("speech_encoder", "llm", *SHAPING_OPTIONS, *(LORA_OPTIONS if had_lora else ()))
    changed = {
        name: trained[name]
        for name in names
        if name in trained and getattr(config, name) == getattr(defaults, name) != trained[name]
    }
    for name, value in changed.items():
        setattr(config, name, value)
    return changed


def _build_cformer(config: SpeechLlmConfig, input_dim: int, output_dim: int, output_scale: float) -> nn.Module:
    return CFormer(
        input_dim,
        output_dim,
        output_scale,
        pre_layers=config.adapter_pre_layers,
        post_layers=config.adapter_post_layers,
        heads=config.adapter_heads,
        ffn_dim=config.adapter_ffn_dim or None,
        dropout=config.adapter_dropout,
        alignment=config.adapter_alignment,
    )


def _build_cnn(config: SpeechLlmConfig, input_dim: int, output_dim: int, output_scale: float) -> nn.Module:
    return ConvAdapter(
        input_dim,
        output_dim,
        output_scale,
        layers=config.adapter_conv_layers,
        kernel_size=config.adapter_kernel_size,
        bottleneck=config.adapter_bottleneck,
        dropout=config.adapter_dropout,
    )


ADAPTERS: dict[str, Callable[[SpeechLlmConfig, int, int, float], nn.Module]] = {
    "cformer": _build_cformer,
    "cnn": _build_cnn,
}


def build_speech_llm(config: SpeechLlmConfig) -> tuple[SpeechLLM, ChatFormat]:
    """Loads the pretrained parts and joins them.

    Returns:
        The model, whose adapter and LoRA are freshly initialised, and the chat format of its LLM.

    Raises:
        ValueError: an option that is unknown, or a model that cannot be loaded; it names the option.
    """
    _check(config)
    chat = load_chat_format(config)
    llm = load_llm(config, chat)
    scale = _embedding_scale(llm)
    if config.lora_scope != "none":
        targets = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
        add_partial_lora(llm, config.lora_rank, config.lora_alpha, config.lora_dropout, targets or None)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(llm)

    encoder = _load_speech_encoder(config)
    adapter = ADAPTERS[config.adapter](config, encoder.output_dim, llm.config.hidden_size, scale)
    if config.adapter_soft_tokens:
        table = llm.get_input_embeddings()
        tokens = speakable_tokens(chat, table.num_embeddings)
        adapter.soft_tokens = SoftTokens(table, tokens, encoder.output_dim)
    model = SpeechLLM(
        encoder,
        adapter,
        llm,
        config.lora_scope,
        config.unfreeze_speech_encoder,
        share_prefix=not config.no_shared_prefix,
        product_dtype=DTYPES.get(config.product_dtype),
        speech_encoder_dtype=DTYPES.get(config.speech_encoder_dtype),
        prior=_prior(config, llm, chat),
    )
    if config.adapter_prior_beam:
        check_can_search(model)
    model.window_seconds = min(config.window_seconds or model.window_seconds, model.window_seconds)
    return model, chat


def _prior(config: SpeechLlmConfig, llm: PreTrainedModel, chat: ChatFormat) -> LanguagePrior | None:
    """What the LLM's prediction counts for in hearing."""
    if not config.adapter_prior_weight:
        return None
    predicted, embedded = llm.get_output_embeddings().weight.shape[0], llm.get_input_embeddings().weight.shape[0]
    if predicted != embedded:
        raise ValueError(
            f"--adapter-prior-weight needs an LLM that predicts the tokens that it reads: {config.llm} predicts "
            f"{predicted} and reads {embedded}"
        )
    opening = tuple(chat.bare_opening())
    return LanguagePrior(
        config.adapter_prior_weight,
        config.adapter_prior_passes,
        opening,
        config.adapter_prior_beam,
        config.adapter_prior_training,
    )


def load_chat_format(config: SpeechLlmConfig) -> ChatFormat:
    """The chat format of the LLM that the options name, without loading the LLM."""
    return ChatFormat(
        load_tokenizer(config),
        system=config.system_prompt or None,
        chat_template=read_chat_template(config),
        transcript_merges=config.transcript_merges,
    )


def read_chat_template(config: SpeechLlmConfig) -> str | None:
    """The template in place of the tokenizer's own, if there is one.

    Raises:
        ValueError: the file cannot be read.
    """
    if not config.chat_template:
        return None
    try:
        with open(config.chat_template, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"--chat-template {config.chat_template} cannot be read: {error.strerror}") from error


def load_tokenizer(config: SpeechLlmConfig, option: str = "llm") -> Any:
    """The tokenizer of the LLM that the options name; ``option`` is the one that an error names."""
    return load_pretrained(AutoTokenizer, config.llm, option, "tokenizer", config.trust_remote_code)


def load_llm(config: SpeechLlmConfig, chat: ChatFormat, option: str = "llm") -> PreTrainedModel:
    """The LLM that the options name, with a generation configuration that decodes as it is told and no other way.

    ``option`` is the one that an error names.

    Raises:
        ValueError: it cannot be loaded, embeds fewer tokens than its tokenizer has, cannot read embeddings and answer
            them, or its head is of an unknown kind.
    """
    llm = load_unquantized(
        AutoModelForCausalLM, config.llm, option, "LLM", config.trust_remote_code, dtype=DTYPES[config.llm_dtype]
    )
    if len(chat.tokenizer) > llm.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"the tokenizer of {config.llm} has {len(chat.tokenizer)} tokens but the LLM embeds only "
            f"{llm.get_input_embeddings().num_embeddings}: the files of two models are mixed in one directory"
        )
    if not torch.cuda.is_available():  # where there is a GPU, the LLM is on its way there
        llm.to(usable_dtype(llm.dtype, torch.device("cpu")))
    # What Hugging Face ships as defaults (sampling, repetition penalty) would change results without anyone asking.
    llm.generation_config = GenerationConfig(eos_token_id=chat.eos_ids, pad_token_id=chat.eos_ids[0])
    compat.use_fast_cpu_attention(llm)
    check_llm(llm, config.llm)
    quantize_linears(llm, config.llm_quantization)
    llm.logit_transform = find_logit_transform(llm, config.llm)
    return llm


def _load_speech_encoder(config: SpeechLlmConfig) -> SpeechEncoder:
    return load_pretrained(
        SpeechEncoder,
        config.speech_encoder,
        "speech-encoder",
        "speech encoder",
        can_trust=False,
        pad_to_30s=config.pad_to_30s,
    )


def _check(config: SpeechLlmConfig) -> None:
    for option in ("speech_encoder", "llm"):
        if not getattr(config, option):
            raise ValueError(f"--{option.replace('_', '-')} is missing: a Hugging Face name or a local directory")
    choices = {
        "adapter": tuple(ADAPTERS),
        "adapter_alignment": tuple(ALIGNMENTS),
        "lora_scope": LORA_SCOPES,
        "llm_dtype": tuple(DTYPES),
        "llm_quantization": QUANTIZATIONS,
        "speech_encoder_dtype": ("auto", *DTYPES),
        "product_dtype": ("auto", "float32", "bfloat16"),
    }
    for option, allowed in choices.items():
        value = getattr(config, option)
        if value not in allowed:
            raise ValueError(f"unknown --{option.replace('_', '-')} {value!r}: choose from {', '.join(allowed)}")
    if config.adapter != "cformer" and config.adapter_alignment != "cif":
        raise ValueError(
            f"--adapter-alignment {config.adapter_alignment} aligns tokens in the cformer: the {config.adapter} "
            "adapter has none"
        )
    if config.adapter != "cformer" and config.adapter_soft_tokens:
        raise ValueError(
            f"--adapter-soft-tokens needs an embedding for each token: the {config.adapter} adapter has none"
        )
    if config.adapter_prior_weight and not config.adapter_soft_tokens:
        raise ValueError("--adapter-prior-weight is of the posterior of soft tokens: add --adapter-soft-tokens")
    if config.adapter_prior_weight < 0 or config.adapter_prior_passes < 1:
        raise ValueError(
            f"--adapter-prior-weight must not be negative and --adapter-prior-passes be at least 1, got "
            f"{config.adapter_prior_weight} and {config.adapter_prior_passes}"
        )
    if not 0 <= config.adapter_prior_beam <= WIDEST:
        raise ValueError(f"--adapter-prior-beam must be 0 to {WIDEST}, got {config.adapter_prior_beam}")
    if not config.adapter_prior_weight and (config.adapter_prior_beam or config.adapter_prior_training):
        asked = "beam" if config.adapter_prior_beam else "training"
        raise ValueError(
            f"--adapter-prior-{asked} goes by what the LLM expects: give --adapter-prior-weight, which says how much "
            f"that counts, or leave out --adapter-prior-{asked}"
        )
    if config.cache_encoder_features and config.unfreeze_speech_encoder:
        raise ValueError("--cache-encoder-features needs a frozen speech encoder: leave out --unfreeze-speech-encoder")


def _embedding_scale(llm: PreTrainedModel) -> float:
    """Standard deviation of the token embeddings as the decoder receives them (some LLMs scale them)."""
    table = llm.get_input_embeddings()
    count, device = table.num_embeddings, table.weight.device
    ids = torch.linspace(0, count - 1, min(count, 4096), device=device).long()
    with torch.no_grad():
        return float(table(ids).float().std())


def find_logit_transform(llm: PreTrainedModel, name: str) -> LogitTransform | None:
    """What the LLM does to the product of hidden states and head; None for nothing.

    The losses apply the head themselves, so it is tried, with the factors and caps that configurations name.

    Raises:
        ValueError: it is none of these.
    """
    head, config = llm.get_output_embeddings(), llm.get_decoder().config
    device = llm.get_input_embeddings().weight.device
    ids = torch.tensor([[0, 1]], device=device)
    with torch.no_grad():
        hidden = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        actual = llm(input_ids=ids).logits.float()
        plain = None if head is None else head(hidden).float()
    factors = {float(getattr(config, key, None) or 1.0) for key in ("logit_scale", "lm_head_multiplier")}
    factors |= {1.0, 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)}
    caps = {getattr(config, "final_logit_softcapping", None), None}
    for factor, cap in sorted(product(factors, caps), key=lambda pair: pair != (1.0, None)):
        transform = LogitTransform(factor, cap)
        if plain is not None and torch.allclose(transform.apply_(plain.clone())[0], actual, rtol=1e-2, atol=1e-2):
            return None if (factor, cap) == (1.0, None) else transform
    raise ValueError(
        f"the logits of {name} ({config.model_type}) are no function of its last hidden states that distillation "
        "through the output head knows (linear, scaled or soft-capped): choose another LLM"
    )
