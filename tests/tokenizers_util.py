"""Tiny tokenizers of both families, trained in a second, with the chat templates of well-known LLMs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "hello world, how are you today? I am fine, thank you.",
    "Repeat the following sentence: what time is it?",
    "Continue the following sentence in a coherent style: once upon a time",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C 0 1 2 3 4 5 6 7 8 9 < > / | _ [ ] { } ' \" . - #",
)

# Qwen2.5, SmolLM2: a system message by default.
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Qwen3: to be asked not to think.
THINKING = CHATML.replace(
    "assistant\n' }}", "assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)

# Llama 2: the template writes the first token, trims, and its brackets are ordinary text.
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system messages') }}"
    "{% elif message.role == 'user' %}{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# Vicuna and the like: no control token but the end of an answer, and text after what the user says.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ 'Question: ' + message.content + '\nAnswer in one sentence.\n' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


def bpe_tokenizer(
    texts: Iterable[str] = TEXTS, vocab_size: int = 500, chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Qwen2.5, Llama 3 and SmolLM2; ``<think>`` is an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def sentencepiece_tokenizer(
    directory: Path,
    model_type: str = "bpe",
    texts: Iterable[str] = TEXTS,
    vocab_size: int = 400,
    chat_template: str | None = LLAMA2,
    tokenizer_class: str = "",
    byte_fallback: bool = True,
) -> PreTrainedTokenizerBase:
    """A SentencePiece model, read by ``AutoTokenizer`` from a directory as that of a released LLM would be.

    Args:
        directory: is created, and holds ``tokenizer.model`` and ``tokenizer_config.json``.
        model_type: ``bpe`` (Llama 2, Mistral) or ``unigram`` (T5).
        texts: to train on.
        vocab_size: at most.
        chat_template: Jinja text.
        tokenizer_class: of transformers; default: ``LlamaTokenizer`` for BPE, its generic one for unigram.
        byte_fallback: unknown characters become bytes, not ``<unk>``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    is_t5 = tokenizer_class == "T5Tokenizer"
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if is_t5 else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(texts) * 10),
        model_prefix=str(directory / "tokenizer"),
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["<think>", "</think>"],
        minloglevel=2,
        **special,
    )
    name = tokenizer_class or ("LlamaTokenizer" if model_type == "bpe" else "PreTrainedTokenizerFast")
    config = {"tokenizer_class": name, "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "t5" if is_t5 else "llama"}))
    return AutoTokenizer.from_pretrained(directory)
