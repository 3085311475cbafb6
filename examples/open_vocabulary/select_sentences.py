"""Picks the sentences to speak next, by how often a word must be said until the present model hears it.

    python examples/open_vocabulary/select_sentences.py --checkpoint MODEL --rows DIR/asked/responses/valid.tsv \\
        --audio-root DIR --spoken DIR/train.tsv --sentences sentences --count 20000 --out next

The model hears --rows, which it was not trained on, and its misses are held against how often the manifests of
--spoken, which it was trained on, say each word: the rate of exposures.py is fitted. By that the sentences of
gather_sentences.py that nobody said yet come in the order in which they teach most, and between them lists of words
that have too few.

OUT/train.txt and OUT/lists.txt are for speak.py (valid.txt and test.txt are copied). OUT/exposures.tsv has the words
that were missed by how often they had been said, OUT/words.tsv what another exposure of each word is worth, and
OUT/rows.tsv the rows, those that the model finds hardest first: input KL and response KL, per token.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent))

import exposures  # noqa: E402
import hear  # noqa: E402
from gather_sentences import SPLITS, separated  # noqa: E402

from blspkd_fairseq import BlspKd  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest  # noqa: E402
from blspkd_fairseq.data.validate import sentence_key  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

BINS = (0, 1, 4, 11, 31, 101, 301, 1001)  # the fewest exposures of each


class SpokenRow(NamedTuple):
    """Attributes: words that were said and heard; KL per token, of input and response together."""

    said: list[str]
    heard: list[str]
    kl: float


def spoken_rows(found: Mapping[str, Sequence[Any]]) -> list[SpokenRow]:
    """From what hear.py measures."""
    rows = []
    for i, said in enumerate(found["said"]):
        parts = [found[f"{part}_kl"][i] / max(1.0, found[f"{part}_tokens"][i]) for part in ("input", "response")]
        rows.append(SpokenRow(exposures.words_of(said), exposures.words_of(found["heard"][i]), sum(parts)))
    return rows


def misses(rows: Sequence[SpokenRow], said: Mapping[str, int]) -> list[tuple[int, bool]]:
    """Of each word of the rows how often training said it, and whether it was missed."""
    pairs = []
    for row in rows:
        heard = Counter(row.heard)
        for word in row.said:
            pairs.append((said.get(word, 0), heard[word] < 1))
            heard[word] -= 1
    return pairs


def by_exposures(pairs: Sequence[tuple[int, bool]], rate: exposures.MissRate) -> list[tuple[str, int, str, str]]:
    """For each bin: exposures, words, the share that was missed and the share that is expected."""
    lines = []
    for low, high in zip(BINS, (*BINS[1:], float("inf")), strict=True):
        inside = [(count, missed) for count, missed in pairs if low <= count < high]
        if inside:
            name = f"{low} or more" if high == float("inf") else str(low) if high == low + 1 else f"{low} to {high - 1}"
            missed = sum(was_missed for _, was_missed in inside) / len(inside)
            expected = sum(rate(count) for count, _ in inside) / len(inside)
            lines.append((name, len(inside), f"{missed:.3f}", f"{expected:.3f}"))
    return lines


def make(args: argparse.Namespace) -> None:
    """Everything in the module's text.

    Raises:
        ValueError: nothing to choose from, rows without responses, or an adapter without an embedding for each token.
    """
    heard_rows = Manifest.load(args.rows, ("src_text", "tgt_text"), ("src_text",))
    trained = [row["src_text"] for manifest in args.spoken for row in Manifest.load(manifest)]
    taken = {sentence_key(text) for text in (*trained, *(row["src_text"] for row in heard_rows))}
    texts = (args.sentences / "train.txt").read_text(encoding="utf-8").splitlines()
    free = [text for text in texts if text.strip() and sentence_key(text) not in taken]
    if not free:
        raise ValueError(f"{args.sentences} has no sentence that nobody said yet: gather more")
    model = BlspKd.from_pretrained(args.checkpoint)
    if not model.model.adapter.one_to_one:
        raise ValueError(f"{args.checkpoint} has no embedding for each token, so that no word can be said to be missed")
    to_hear = hear.Rows("rows", args.rows, args.audio_root, args.most_rows)
    found = hear.measure_checkpoint(model, to_hear, args.batch_size, {})
    rows, said = spoken_rows(found), exposures.count_words(trained)
    pairs = misses(rows, said)
    rate = exposures.MissRate.fit(*zip(*pairs, strict=True))
    gains = exposures.Gains(exposures.read_frequencies(args.sentences / "frequencies.tsv"), said, rate)
    before, worth = gains.missed(), {word: gains.of(word) for word in gains.frequencies}
    chosen = list(islice(exposures.choices(free, gains), args.count))
    sentences, lists = separated(chosen)

    args.out.mkdir(parents=True, exist_ok=True)
    hardest = sorted(zip(rows, found["id"], found["said"], found["heard"], strict=True), key=lambda row: -row[0].kl)
    ranked = sorted(worth.items(), key=lambda pair: (-pair[1], pair[0]))
    write_whole(args.out / "exposures.tsv", _tsv("exposures words missed expected", by_exposures(pairs, rate)))
    write_whole(args.out / "words.tsv", _tsv("gain exposures word", [(f"{v:.5f}", said[w], w) for w, v in ranked]))
    write_whole(args.out / "rows.tsv", _tsv("kl id said heard", [(f"{row.kl:.4f}", *rest) for row, *rest in hardest]))
    for name in (*(f"{split}.txt" for split in SPLITS), "frequencies.tsv"):
        shutil.copyfile(args.sentences / name, args.out / name)
    for name, texts in (("train", sentences), ("lists", lists)):
        write_whole(args.out / f"{name}.txt", "".join(f"{text}\n" for text in texts))
    print(f"missed: {100 * rate.floor:.0f} % of the words always, of the rest half of those said {rate.half:.1f} times")
    print(f"{args.out}: {len(chosen)} clips, {len(lists)} of them lists, from {len(free)} sentences")
    print(
        f"expected to be missed: {100 * before:.1f} % of the words, and {100 * gains.missed():.1f} % with these clips"
    )


def _tsv(columns: str, rows: Sequence[Sequence[Any]]) -> str:
    lines = ["\t".join(columns.split())]
    lines += ["\t".join(" ".join(str(cell).split()) for cell in row) for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of training, or a folder of save_pretrained")
    parser.add_argument("--rows", type=Path, required=True, help="manifest of held-out speech with the LLM's responses")
    parser.add_argument("--audio-root", type=Path, help="of audio that does not lie beside its manifest")
    parser.add_argument("--spoken", type=Path, nargs="+", required=True, help="manifests that it was trained on")
    parser.add_argument("--sentences", type=Path, required=True, help="folder of gather_sentences.py")
    parser.add_argument("--count", type=int, required=True, help="clips to speak: sentences, and lists of words")
    parser.add_argument("--most-rows", type=int, default=2000, help="rows that are heard, the first ones (0: all)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="folder for speak.py --sentences")
    args = parser.parse_args(arguments)
    if args.count < 1 or args.most_rows < 0 or args.batch_size < 1:
        parser.error("--count and --batch-size must be at least 1, and --most-rows not negative")
    make(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"select_sentences: {error}")
