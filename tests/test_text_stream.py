"""Text of tokens that come one by one: together what the whole decodes to, each token being looked at a few times."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from test_reasoning import BLOCKS, HARMONY, HARMONY_TOKENS, ids_of, with_tokens
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_util import CHATML, PLAIN, bpe_tokenizer, sentencepiece_tokenizer
from transformers import PreTrainedTokenizerFast

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.text_stream import AnswerStream, TextStream


def word_pieces(_: Path) -> PreTrainedTokenizerFast:
    """As BERT's: what goes on in a word begins with ``##``, and decoding puts spaces between words."""
    pieces = [
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
        "the",
        "##ick",
    ]
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "<|im_start|>", "<|im_end|>", *pieces])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    special = {"eos_token": "<|im_end|>", "unk_token": "[UNK]", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


TOKENIZERS: dict[str, Callable[[Path], PreTrainedTokenizerFast]] = {
    "byte-level BPE": lambda _: bpe_tokenizer(),
    "SentencePiece, BPE": sentencepiece_tokenizer,
    "SentencePiece, unigram": lambda path: sentencepiece_tokenizer(path, "unigram"),
    "T5": lambda path: sentencepiece_tokenizer(path, "unigram", chat_template=PLAIN, tokenizer_class="T5Tokenizer"),
    "WordPiece": word_pieces,
}
TEXTS = (
    "the quick brown fox",
    "naïve 日本語 🎉 and so on",
    "  two  spaces\n\nand lines",
    "a",
    " 👩\u200d👩\u200d👧 e\u0301 हिन्दी",
    "日本 語" * 40,
    "",
    "   ",
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat(TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer") / "files"))


def pushed(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("kind", [TextStream, AnswerStream])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(chat: ChatFormat, text: str, kind: type[TextStream]) -> None:
    ids = chat.encode_text(text)
    pieces = pushed(kind(chat), ids)
    assert "".join(pieces) == chat.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    control = sorted(chat.control_ids - {chat.tokenizer.unk_token_id})
    with_control = [one for token in ids for one in (token, control[0])]
    assert "".join(pushed(kind(chat), with_control)) == chat.decode(ids)


def test_a_text_is_cut_between_its_tokens_and_not_held_back(chat: ChatFormat) -> None:
    ids = chat.encode_text("the quick brown fox jumps over the lazy dog")
    pieces = pushed(AnswerStream(chat), ids)
    assert len([piece for piece in pieces if piece]) >= len(ids) - 1  # SentencePiece's space alone is no piece


@pytest.mark.parametrize("kind", [TextStream, AnswerStream])
@pytest.mark.parametrize("begin", ["", "<think>why ", "<think>so</think>"])
def test_the_work_of_a_token_does_not_grow_with_the_answer(
    kind: type[TextStream], begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat(bpe_tokenizer())
    decoded = 0
    decode = chat.tokenizer.decode

    def counting(ids: list[int], **options: bool) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, **options)

    ids = [*ids_of(chat, begin), *chat.encode_text("the lazy dog 日本語 ") * 100]
    monkeypatch.setattr(chat.tokenizer, "decode", counting)
    pushed(kind(chat), ids)
    assert decoded < 10 * len(ids)


def test_bytes_that_are_no_character_are_shown_at_the_end() -> None:
    chat = ChatFormat(bpe_tokenizer())
    first, *rest = chat.encode_text("日")
    for ids in ([first], [first, *chat.encode_text("a")], [*rest, *chat.encode_text("日")]):
        assert "".join(pushed(AnswerStream(chat), ids)) == chat.decode(ids)


def test_a_stop_string_may_come_in_parts() -> None:
    chat = ChatFormat(bpe_tokenizer())
    for stop, text, expected in (("###", "ab##c###d", "ab##c"), ("aab", "aaab", "a"), ("zz", "a z z", "a z z")):
        for kind in (TextStream, AnswerStream):
            stream = kind(chat, [stop])
            shown = "".join(stream.push(token) for token in (i for c in text for i in chat.encode_text(c)))
            assert shown + stream.finish() == expected
            assert stream.stopped == (stop in text)


@pytest.mark.parametrize("kind", ["special", "added", "text"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "answer",
    [
        "Hello!",
        " Hello!\n",
        "{0}I should greet{1}Hello!",
        "  {0}ab",
        "\n{0}so{1}\n\n  Hello! 日本語 ",
        "{0}{1}Hello!",
        "<b>bold</b> [1]",
        "a < b",
        "<",
        " [",
        "naïve 日本語 🎉",
    ],
)
def test_a_user_sees_no_reasoning_while_it_is_made(answer: str, block: tuple[str, str], kind: str) -> None:
    chat = ChatFormat(with_tokens(block, kind))
    ids = ids_of(chat, answer.format(*block))
    shown = pushed(AnswerStream(chat), ids)
    assert "".join(shown) == chat.decode_answer(ids)
    if answer == "Hello!" or answer.startswith("a "):
        assert len([one for one in shown if one]) > 1 or len(ids) == 1  # piece by piece


@pytest.mark.parametrize(
    "answer",
    [
        "Yes<think>b</think>, sir.",
        "<think>a</think>Yes<think>b</think>, sir.",
        "Yes.<think>cut off",
        "<think>a<think>b</think></think>Yes",
    ],
)
def test_several_blocks(answer: str) -> None:
    chat = ChatFormat(with_tokens(BLOCKS[0]))
    ids = ids_of(chat, answer)
    assert "".join(pushed(AnswerStream(chat), ids)) == chat.decode_answer(ids)


def test_what_was_shown_stays_where_a_mark_would_take_it_back() -> None:
    chat = ChatFormat(with_tokens(BLOCKS[0]))
    assert "".join(pushed(AnswerStream(chat), ids_of(chat, "a reason</think>\n\nYes, sir."))) == "a reasonYes, sir."


@pytest.mark.parametrize(
    "answer",
    [
        "Hello!<|return|>",
        "<|channel|>final<|message|>Hello!<|return|>",
        "<|channel|>analysis<|message|>greet<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
        "<|channel|>analysis<|message|>greet, but how",
        "<|channel|>commentary to=functions.f<|message|>{}<|end|>",
        "Hello!<|end|><|start|>assistant<|channel|>analysis<|message|>more",
        "Hello<|end|><|start|>assistant<|channel|>final<|message|>, you",
        "Hello<|end|> and more",
    ],
)
def test_of_several_channels_the_final_one_is_shown(answer: str) -> None:
    chat = ChatFormat(with_tokens(HARMONY_TOKENS), chat_template=HARMONY)
    ids = ids_of(chat, answer)
    stream = AnswerStream(chat)
    shown = "".join(stream.push(token) for token in ids)
    assert shown + stream.finish() == chat.decode_answer(ids)
    if answer.endswith("<|return|>"):
        assert shown == "Hello!"


def test_marks_that_are_added_to_sentencepiece(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(sentencepiece_tokenizer(tmp_path))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("[THINK]", "[/THINK]")])
    chat = ChatFormat(tokenizer)
    for answer in ("[THINK]so[/THINK] the lazy dog", " the lazy dog", "[THINK]so[/THINK]日本"):
        ids = ids_of(chat, answer)
        assert "".join(pushed(AnswerStream(chat), ids)) == chat.decode_answer(ids)
