"""Shows what a number of merges (fairseq-train --transcript-merges) would mean for hearing, and for the LLM's reading.

    python examples/open_vocabulary/choose_merges.py --llm LLM --spoken DIR/train.tsv --rows DIR/test.tsv \\
        [--merges 1000 2000 4000 8000 16000] [--half 20] [--floor 0.04] [--read 48]

For each number, and for all merges of the LLM's tokenizer: how many different tokens the transcripts of --spoken have,
how many a word of --rows has, and which share of those words is expected to be missed, where a word is missed if one
of its tokens is, and a token as often as exposures.py says of what was said so often. Fewer merges are heard better and
read worse: with --read N the LLM repeats the first N transcripts from those tokens (WER), and answers them, which is
compared with its answers to the text (Self-BLEU). The tokens of one word are not missed independently of each other,
and short ones sound in more ways than long ones, so that the number is to be tried near where the table says.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import sacrebleu

sys.path.append(str(Path(__file__).resolve().parent))

import exposures  # noqa: E402

from blspkd_fairseq.data.chat import ChatError, ChatFormat  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest  # noqa: E402
from blspkd_fairseq.data.prompts import resolve_prompt  # noqa: E402
from blspkd_fairseq.evaluation.metrics import word_errors  # noqa: E402
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_text  # noqa: E402
from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format, load_llm, load_tokenizer  # noqa: E402
from blspkd_fairseq.modules.speech_llm import ChatLLM  # noqa: E402

COLUMNS = "merges tokens_said tokens_a_word missed_percent repeat_wer self_bleu"


class Hearing(NamedTuple):
    """Attributes: different tokens of what was said; tokens of a word; the share of words that is missed."""

    tokens: int
    per_word: float
    missed: float


def expected(
    spoken: Sequence[str], rows: Sequence[str], encode: Callable[[str], Sequence[int]], rate: exposures.MissRate
) -> Hearing:
    """What is expected to be heard of the words of ``rows`` after training on ``spoken``."""
    said = Counter(token for text in spoken for token in encode(text))
    words = [(" " if place else "") + word for text in rows for place, word in enumerate(text.split())]
    cut = [encode(word) for word in words]
    missed = 0.0
    for tokens in cut:
        heard = 1.0
        for token in tokens:
            heard *= 1 - rate(said[token])
        missed += 1 - heard
    return Hearing(len(said), sum(map(len, cut)) / len(cut), missed / len(cut))


def read(model: ChatLLM, chat: ChatFormat, texts: Sequence[str]) -> tuple[float, list[str]]:
    """WER of repeating, in percent, and the answers, of the LLM that reads the texts as they are heard."""

    def ask(prompt: str, tokens: int) -> list[str]:
        prompts = [resolve_prompt(prompt)] * len(texts)
        options = DecodingOptions(max_new_tokens=tokens)
        groups = answer_text(model, chat, texts, prompts, options, encode=chat.encode_transcript)
        return [group[0].text for group in groups]

    counts = [word_errors(said, text) for said, text in zip(ask("repeat", 48), texts, strict=True)]
    return 100 * sum(one.errors for one in counts) / sum(one.words for one in counts), ask("chat", 40)


def make(args: argparse.Namespace) -> None:
    """The table of the module's text."""
    spoken, rows = (
        [row["src_text"] for path in paths for row in Manifest.load(path, ("src_text",), ("src_text",))]
        for paths in (args.spoken, [args.rows])
    )
    config = SpeechLlmConfig(llm=args.llm)
    tokenizer, whole = load_tokenizer(config), load_chat_format(config)
    model = ChatLLM(load_llm(config, whole)).eval() if args.read else None
    rate, texts, answers = exposures.MissRate(args.half, args.floor), rows[: args.read], [""]
    print("\t".join(COLUMNS.split()))
    for merges in (0, *sorted(set(args.merges), reverse=True)):
        chat = ChatFormat(tokenizer, transcript_merges=merges)
        found = expected(spoken, rows, chat.encode_transcript, rate)
        cells = [merges or "all", found.tokens, f"{found.per_word:.2f}", f"{100 * found.missed:.1f}", "", ""]
        if model is not None:
            wer, said = read(model, chat, texts)
            answers = answers if merges else said
            cells[-2:] = f"{wer:.1f}", f"{sacrebleu.corpus_bleu(said, [answers]).score:.1f}"
        print("\t".join(map(str, cells)), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="a Hugging Face name or a directory")
    parser.add_argument("--spoken", type=Path, nargs="+", required=True, help="manifests to train on")
    parser.add_argument("--rows", type=Path, required=True, help="manifest of what is to be heard")
    parser.add_argument("--merges", type=int, nargs="+", default=[16_000, 8_000, 4_000, 2_000, 1_000])
    parser.add_argument("--half", type=float, default=exposures.MissRate().half, help="exposures for half of it")
    parser.add_argument("--floor", type=float, default=0.04, help="share of words that is missed in any case")
    parser.add_argument("--read", type=int, default=0, metavar="N", help="the LLM reads the first N rows, too")
    args = parser.parse_args(arguments)
    if min(args.merges) < 1 or args.read < 0 or args.half <= 0 or not 0 <= args.floor < 1:
        parser.error("--merges must be at least 1, --read not negative, --half positive and --floor in [0, 1)")
    make(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ChatError) as error:
        sys.exit(f"choose_merges: {error}")
