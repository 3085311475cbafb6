"""Picks the sentences to speak next: those most like what the present model finds hardest.

    python examples/open_vocabulary/select_sentences.py --checkpoint MODEL --rows DIR/asked/responses/train.tsv \\
        --audio-root DIR --sentences sentences/train.txt --count 2000 --out next.txt

How hard a spoken row is: its input KL and response KL, per token. How hard a word is: the mean of that over the rows
that say it, counted where the nearest tokens lack the word, and one more row in which it is heard. Of a word that
nobody said yet, the mean of those said once. A sentence has the mean over its words of how hard they are, times the
logarithm of how often the sentences have them; a word that was picked k times counts 1/(k + 1), so that a few words do
not fill the list. Sentences that a row or a manifest of --spoken says are left out.

OUT has the sentences, the best first, OUT.words.tsv the words, and OUT.rows.tsv the rows, the hardest first.
"""

import argparse
import heapq
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent))

import hear  # noqa: E402
from transformers.models.whisper.english_normalizer import BasicTextNormalizer  # noqa: E402

from blspkd_fairseq import BlspKd  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest  # noqa: E402
from blspkd_fairseq.data.validate import sentence_key  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

_NORMALIZER = BasicTextNormalizer()


class SpokenRow(NamedTuple):
    """Attributes: words that were said and heard; KL per token, of input and response together."""

    said: list[str]
    heard: list[str]
    kl: float


class Word(NamedTuple):
    """Attributes: how hard it is (nats per token); rows that say it."""

    hardness: float
    rows: int


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    words: list[str] = _NORMALIZER(text).split()
    return words


def spoken_rows(found: Mapping[str, Sequence[Any]]) -> list[SpokenRow]:
    """From what hear.py measures."""
    rows = []
    for i, said in enumerate(found["said"]):
        parts = [found[f"{part}_kl"][i] / max(1.0, found[f"{part}_tokens"][i]) for part in ("input", "response")]
        rows.append(SpokenRow(words_of(said), words_of(found["heard"][i]), sum(parts)))
    return rows


def hard_words(rows: Sequence[SpokenRow]) -> dict[str, Word]:
    """Every word that was said."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for row in rows:
        said, heard = Counter(row.said), Counter(row.heard)
        for word, times in said.items():
            counts[word] += 1
            sums[word] += row.kl * max(0, times - heard[word]) / times  # type: ignore[assignment]
    return {word: Word(sums[word] / (count + 1), count) for word, count in counts.items()}


def of_new_words(words: Mapping[str, Word]) -> float:
    """How hard a word is that nobody said: the mean of those that were said least often."""
    fewest = min((word.rows for word in words.values()), default=0)
    known = [word.hardness for word in words.values() if word.rows == fewest]
    return sum(known) / len(known) if known else 0.0


def select(texts: Sequence[str], words: Mapping[str, Word], count: int) -> list[tuple[float, str]]:
    """The best ``count`` texts with their scores when they were picked, the best first."""
    split = [words_of(text) for text in texts]
    frequencies = Counter(word for each in split for word in each)
    new = of_new_words(words)
    hardness = {
        word: (words[word].hardness if word in words else new) * math.log1p(times)
        for word, times in frequencies.items()
    }
    picked: Counter[str] = Counter()

    def score(index: int) -> float:
        return sum(hardness[word] / (1 + picked[word]) for word in split[index]) / max(1, len(split[index]))

    # Scores only fall: who is still the best when it is counted again is the best of all.
    heap = [(-score(index), index) for index in range(len(texts))]
    heapq.heapify(heap)
    chosen: list[tuple[float, str]] = []
    while heap and len(chosen) < count:
        index = heapq.heappop(heap)[1]
        now = -score(index)
        if heap and now > heap[0][0]:
            heapq.heappush(heap, (now, index))
            continue
        chosen.append((-now, texts[index]))
        picked.update(set(split[index]))
    return chosen


def make(args: argparse.Namespace) -> None:
    """Everything in the module's text.

    Raises:
        ValueError: nothing to choose from, rows without responses, or an adapter without an embedding for each token.
    """
    manifest = Manifest.load(args.rows, ("src_text", "tgt_text"), ("src_text",))
    taken = {sentence_key(row["src_text"]) for one in (manifest, *map(Manifest.load, args.spoken)) for row in one}
    texts = [text for text in args.sentences.read_text(encoding="utf-8").splitlines() if text.strip()]
    free = [text for text in texts if sentence_key(text) not in taken]
    if not free:
        raise ValueError(f"{args.sentences} has no sentence that nobody said yet: gather more")
    model = BlspKd.from_pretrained(args.checkpoint)
    if not model.model.adapter.one_to_one:
        raise ValueError(f"{args.checkpoint} has no embedding for each token, so that no word can be said to be missed")
    rows = hear.Rows("rows", args.rows, args.audio_root, args.most_rows)
    found = hear.measure_checkpoint(model, rows, args.batch_size, {})
    spoken = spoken_rows(found)
    words = hard_words(spoken)
    chosen = select(free, words, args.count)
    hardest = sorted(zip(spoken, found["id"], found["said"], found["heard"], strict=True), key=lambda row: -row[0].kl)
    ranked = sorted(words.items(), key=lambda pair: (-pair[1].hardness, pair[0]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tables = {
        "rows": _tsv("kl id said heard", [(f"{row.kl:.4f}", *rest) for row, *rest in hardest]),
        "words": _tsv("hardness rows word", [(f"{word.hardness:.4f}", word.rows, text) for text, word in ranked]),
    }
    for name, table in tables.items():
        write_whole(Path(f"{args.out}.{name}.tsv"), table)
    write_whole(args.out, "".join(f"{text}\n" for _, text in chosen))
    print(f"{args.out}: {len(chosen)} of {len(free)} sentences; hardest words: {', '.join(t for t, _ in ranked[:8])}")


def _tsv(columns: str, rows: Sequence[Sequence[Any]]) -> str:
    lines = ["\t".join(columns.split())]
    lines += ["\t".join(" ".join(str(cell).split()) for cell in row) for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of training, or a folder of save_pretrained")
    parser.add_argument("--rows", type=Path, required=True, help="manifest of speech with the LLM's responses")
    parser.add_argument("--audio-root", type=Path, help="of audio that does not lie beside its manifest")
    parser.add_argument("--sentences", type=Path, required=True, help="texts to choose from, a line each")
    parser.add_argument("--spoken", type=Path, nargs="*", default=[], help="manifests of more speech that there is")
    parser.add_argument("--count", type=int, required=True, help="sentences to choose")
    parser.add_argument("--most-rows", type=int, default=2000, help="rows that are heard, the first ones (0: all)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.count < 1 or args.most_rows < 0 or args.batch_size < 1:
        parser.error("--count and --batch-size must be at least 1, and --most-rows not negative")
    make(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"select_sentences: {error}")
