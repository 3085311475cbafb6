"""What a user does not see, reasoning and channels, is no answer; and no answer depends on today's date."""

import copy
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
import tiny
from tokenizers import AddedToken
from tokenizers_util import CHATML, bpe_tokenizer
from transformers import PreTrainedTokenizerBase

from blspkd_fairseq.data.chat import ChatError, ChatFormat
from blspkd_fairseq.generation.fairseq_generator import LlmDictionary
from blspkd_fairseq.generation.responses import Request, ResponseSettings, answer_locally, response

# Qwen3, DeepSeek-R1 and most others; EXAONE Deep; Command A; OpenThinker; Magistral; Kimi; Seed; Gemma's channel.
BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
)
KINDS = ("special", "added", "text")  # what the marks are in the vocabulary

HARMONY = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
HARMONY_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")


@cache
def bare_tokenizer() -> PreTrainedTokenizerBase:
    return bpe_tokenizer()


def with_tokens(names: Sequence[str], kind: str = "special") -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(bare_tokenizer())
    if kind != "text":
        tokenizer.add_tokens([AddedToken(name, special=kind == "special", normalized=False) for name in names])
    return tokenizer


def opening(text: str, condition: str = "") -> str:
    """ChatML whose prompt for an answer goes on with ``text``, if a condition is met."""
    written = f"{{{{ {text!r} }}}}"
    written = f"{{% if {condition} %}}{written}{{% endif %}}" if condition else written
    return CHATML.replace("assistant\n' }}", "assistant\n' }}" + written)


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return list(chat.tokenizer.encode(text, add_special_tokens=False))


def prompt_of(chat: ChatFormat) -> str:
    return str(chat.tokenizer.decode(chat.prompt_ids("{speech}")[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_the_template_leaves_open_is_refused(block: tuple[str, str], kind: str) -> None:
    with pytest.raises(ChatError, match="opens .* before every answer.*--chat-template"):
        ChatFormat(with_tokens(block, kind), chat_template=opening(f"{block[0]}\n"))


@pytest.mark.parametrize("name", ["scratchpad", "plan", "inner:monologue"])
def test_any_other_block_is_refused_too(name: str) -> None:
    with pytest.raises(ChatError, match=f"opens <{name}> before every answer"):
        ChatFormat(with_tokens(()), chat_template=opening(f"<{name}>\n"))
    ChatFormat(with_tokens(()), chat_template=opening(f"<{name}></{name}>\n"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_the_template_closes_when_told_is_no_block(block: tuple[str, str], kind: str) -> None:
    """Qwen3: an empty block, if thinking is off; with it on, an open one would be refused."""
    template = opening(f"{block[0]}\n\n{block[1]}\n\n", "enable_thinking is false")
    assert prompt_of(ChatFormat(with_tokens(block, kind), chat_template=template)).endswith(f"{block[1]}\n\n")
    with pytest.raises(ChatError, match="before every answer"):
        ChatFormat(with_tokens(block, kind), chat_template=opening(f"{block[0]}\n", "enable_thinking is false"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_prompt_goes_on_as_finished_answers_do(block: tuple[str, str], kind: str) -> None:
    """Qwen3-Thinking: the prompt opens a block that answers without reasoning close."""
    begin, end = block
    message = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    said = f"{{% if message.role == 'assistant' %}}{{{{ '{begin}\n\n{end}\n\n' }}}}{{% endif %}}"
    answered = message.replace("+ message.content", "}}" + said + "{{ message.content")
    template = opening(f"{begin}\n").replace(message, answered)
    chat = ChatFormat(with_tokens(block, kind), chat_template=template)
    assert prompt_of(chat).endswith(f"<|im_start|>assistant\n{begin}\n\n{end}\n\n")
    assert prompt_of(ChatFormat(with_tokens(()))).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("generated", "seen"),
    [
        ("{0}I should greet.{1}\n\nHello!", "Hello!"),
        ("{0}I should", ""),
        ("{0}{1}Hello!", "Hello!"),
        ("Hello!", "Hello!"),
        (" Hello!\n", " Hello!\n"),
    ],
)
def test_reasoning_of_the_llm_is_not_kept(block: tuple[str, str], kind: str, generated: str, seen: str) -> None:
    chat = ChatFormat(with_tokens(block, kind))
    ids = ids_of(chat, generated.format(*block))
    assert chat.decode_answer(ids) == seen
    made = response(chat, Request("a", "text", "{speech}"), [*ids, chat.end_of_turn_id])
    assert (made.tgt_text, made.cut) == (seen, "0")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_more_than_one_block(kind: str) -> None:
    chat = ChatFormat(with_tokens(BLOCKS[0], kind))
    assert chat.decode_answer(ids_of(chat, "<think>a</think>Yes<think>b</think>, sir.")) == "Yes, sir."
    assert chat.decode_answer(ids_of(chat, "a reason</think>\n\nYes, sir.")) == "Yes, sir."
    assert chat.decode_answer(ids_of(chat, "Yes.<think>cut off")) == "Yes."


def test_fairseqs_lines_have_what_a_user_sees() -> None:
    import torch

    dictionary = LlmDictionary()
    dictionary.chat = ChatFormat(with_tokens(BLOCKS[0]))
    ids = ids_of(dictionary.chat, "<think>so\nso</think>\n\nYes,\nsir.")
    assert dictionary.string(torch.tensor([*ids, -1])) == "Yes, sir."


@pytest.mark.parametrize(
    ("generated", "seen"),
    [
        ("Hello!<|return|>", "Hello!"),
        ("<|channel|>final<|message|>Hello!<|return|>", "Hello!"),
        (
            "<|channel|>analysis<|message|>greet<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
            "Hello!",
        ),
        ("<|channel|>analysis<|message|>greet, but how", ""),
        ("<|channel|>commentary to=functions.f<|message|>{}<|end|>", ""),
        ("Hello!<|end|><|start|>assistant<|channel|>analysis<|message|>more", "Hello!"),
    ],
)
def test_harmonys_final_channel_is_the_answer(generated: str, seen: str) -> None:
    chat = ChatFormat(with_tokens(HARMONY_TOKENS), chat_template=HARMONY)
    assert prompt_of(chat).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert chat.tokenizer.decode([chat.end_of_turn_id]) == "<|return|>"
    assert chat.decode_answer(ids_of(chat, generated)) == seen


def test_templates_are_told_one_date(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ 'Today is ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML
    chat = ChatFormat(with_tokens(()), chat_template=template)
    assert chat.tokenizer.decode(chat.prompt_ids("{speech}")[0]).startswith("Today is 26 July 2024\n")
    assert datetime.now().year > 2024  # which it is not


def test_an_llm_that_reasons_before_every_answer_is_refused_at_once(tmp_path: Path) -> None:
    llm = tiny.save_llm(tmp_path / "llm")
    template = tmp_path / "r1.jinja"
    template.write_text(opening("<think>\n"))
    settings = ResponseSettings(str(llm), chat_template=str(template))
    with pytest.raises(ChatError, match="opens <think> before every answer"):
        list(answer_locally(settings, [[Request("a", "text", "{speech}")]]))
