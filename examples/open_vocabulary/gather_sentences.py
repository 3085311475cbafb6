"""Fetches English sentences of an open vocabulary, filters them and deals them to training, validation and test.

    python examples/open_vocabulary/gather_sentences.py --out DIR [--limit N]

DIR/train.txt, valid.txt and test.txt have a sentence a line: what people typed to each other (chitchat-dataset: Myers
2020, MIT) and the usage examples of WordNet; train.txt its definitions, too. Those of training come in the order in
which they teach most words (exposures.py), so that the first N are those to speak; DIR/lists.txt has lists of words
that have too few sentences, of which the first belongs to the first three sentences, and so on. Those of validation and
test are in a random order. DIR/frequencies.tsv has how often words are said, DIR/filter.json counts what was left out
and why; frequent words that no kept sentence has are printed. A sentence belongs to one split for ever.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(Path(__file__).resolve().parent)]

import exposures  # noqa: E402
import fetch_recordings  # noqa: E402
from tqdm import tqdm  # noqa: E402

from blspkd_fairseq.base_models import Source, fetch  # noqa: E402
from blspkd_fairseq.cache import default_cache  # noqa: E402
from blspkd_fairseq.data.validate import sentence_key  # noqa: E402
from blspkd_fairseq.files import write_whole  # noqa: E402

SHORTEST, LONGEST = 4, 18  # words
LONGEST_PHRASE = 5  # words, of what is profane
FREQUENT = 400  # words of the chats that are known without a dictionary: "hi", "okay", "I'm"
SPLITS = {"valid": 1, "test": 1}  # percent; the rest is for training
READ_PER_SENTENCE = 300  # of each source, for a sentence of a limit: a third passes, of which a percent is validation's
DEFINITION_WEIGHT = 0.25  # of a word in a definition, beside one in what people say

# Frequent in chats, and nothing that a voice reads as it is meant.
_SLANG = """
u ur r n im ive id ill dont didnt doesnt cant couldnt wouldnt shouldnt isnt arent wasnt werent hasnt havent hadnt wont
thats whats hows wheres whos theres heres lets youre youve youll theyre weve hes shes gonna gotta wanna kinda sorta
dunno lol lmao omg idk tbh btw imo brb ppl pls plz thx ty np ya yea haha hahaha hehe hmm hm umm ooh aww bc cuz tho thru
rn af irl b c k m p s t v w x y z
"""
SLANG = frozenset(_SLANG.split())

# Of the closed classes, which WordNet leaves out; the others are frequent in chats, or adverbs.
_CLOSED_CLASS = """
against although amid among amongst anybody aside beside besides despite during either everybody everyone hers herself
himself his itself lest myself neither nobody nor ought ours ourselves onto per shall since somebody than theirs
themselves though throughout till toward towards underneath unless unlike unto until upon versus via whatever whenever
whereas wherever whether whichever whoever whom whose within won't yours yourself yourselves cannot oneself
"""
CLOSED_CLASS = frozenset(_CLOSED_CLASS.split())
_CONTRACTED = re.compile(r"(n't|'(?:ll|ve|re|d|m|s))$")

_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
"""
_ONES = _NUMBERS.split()
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER = re.compile(r"(?<![\w.,:$£€#+-])\d{1,2}(?![\w%:/-]|[.,]\d)")  # and no part of a time, a price or a name

_WORD = re.compile(r"[A-Za-z']+")
_SENTENCE = re.compile(r"[A-Za-z',; -]+[.?!]?")
_REGULAR_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("er", "e"), ("est", ""),
    ("est", "e"),
)  # fmt: skip


@dataclass(frozen=True)
class Dictionary:
    """Words that are English.

    Attributes:
        lemmas: base forms, and the irregular forms of others.
        frequent: words that need no dictionary.
        profane: words and phrases that no sentence may have.
    """

    lemmas: frozenset[str]
    frequent: frozenset[str]
    profane: frozenset[str]

    def knows(self, word: str) -> bool:
        """Whether a lower-case word is frequent, of a closed class, a base form, or made of one by rule."""
        whole = (word, _CONTRACTED.sub("", word))
        if any(one in self.frequent or one in self.lemmas or one in CLOSED_CLASS for one in whole):
            return True
        stems = (word.removesuffix(old) + new for old, new in _REGULAR_ENDINGS if word.endswith(old))
        return any(len(stem) > 1 and stem in self.lemmas for stem in stems)

    def is_profane(self, words: Sequence[str]) -> bool:
        """Whether words or phrases among them are profane: "hand" is not, what is made of it may be."""
        begins = [i for i, word in enumerate(words) if word in self.profane_beginnings]
        return any(
            " ".join(words[i : i + size]) in self.profane for i in begins for size in range(1, LONGEST_PHRASE + 1)
        )

    @cached_property
    def profane_beginnings(self) -> frozenset[str]:
        return frozenset(phrase.partition(" ")[0] for phrase in self.profane)


# ---- filter --------------------------------------------------------------------------------------------------------


def problem(text: str, dictionary: Dictionary) -> str:
    """Why a sentence is left out, or nothing."""
    if not _SENTENCE.fullmatch(text):
        return "characters other than letters"
    words = [word.lower().strip("'") for word in _WORD.findall(text)]
    if not SHORTEST <= len(words) <= LONGEST:
        return f"not {SHORTEST} to {LONGEST} words"
    if dictionary.is_profane(words):
        return "profanity"
    if SLANG.intersection(words):
        return "slang"
    if not all(dictionary.knows(word) for word in words):
        return "an unknown word"
    return ""


def spell_numbers(text: str) -> str:
    """With whole numbers up to 99 as words: "2 dogs" is said as "two dogs"."""
    return _NUMBER.sub(lambda found: _spelt(int(found[0])), text)


def _spelt(number: int) -> str:
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_ONES[ones]}" if ones else tens


def tidy(text: str) -> str:
    """With a capital at the beginning, "I" as a capital and a mark at the end."""
    text = re.sub(r"\bi\b", "I", " ".join(text.split()))
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".?!" else ".")


def sift(texts: Iterable[str], dictionary: Dictionary, seen: set[str], counts: Counter[str]) -> Iterator[str]:
    """The sentences that pass, tidied, each once; ``counts`` says how many did not, and why."""
    for typed in texts:
        text = spell_numbers(typed)
        reason = problem(text, dictionary)
        if not reason and (key := sentence_key(text)) in seen:
            reason = "said before"
        counts[reason or "kept"] += 1
        if not reason:
            seen.add(key)
            yield tidy(text)


def split_of(text: str) -> str:
    """The split that a sentence belongs to, from its words alone."""
    place = _number(f"split {sentence_key(text)}") % 100
    for name, percent in SPLITS.items():
        if place < percent:
            return name
        place -= percent
    return "train"


def shuffled(texts: Iterable[str]) -> list[str]:
    """In an order of which every prefix is a random choice, the same whatever else is there."""
    return sorted(texts, key=lambda text: _number(f"order {text}"))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---- sources -------------------------------------------------------------------------------------------------------


def _keep_chats(package: Path, output: Path) -> None:
    """The sentences of all messages, a line each."""
    chats = json.loads((package / "chitchat_dataset" / "dataset.json").read_text(encoding="utf-8"))
    messages = (one["text"] for chat in chats.values() for turn in chat["messages"] for one in turn)
    sentences = (part.strip() for text in messages for part in re.split(r"(?<=[.?!])\s+|\n", text))
    write_whole(output / "sentences.txt", "".join(f"{' '.join(one.split())}\n" for one in sentences if one))


def _keep_words(package: Path, output: Path) -> None:
    words = (package / "better_profanity" / "profanity_wordlist.txt").read_text(encoding="utf-8")
    write_whole(output / "words.txt", words)


CHATS = Source(
    "chitchat-dataset",
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    8,
    _keep_chats,
)
PROFANITY = Source(
    "better-profanity",
    "better-profanity",
    "0.7.0",
    "bd4c529ea6aa2db1aaa50524be1ed14d0fe5c664f1fd88c8bc388c7e9f9f00e8",
    1,
    _keep_words,
)


def read_phrases(lines: str) -> frozenset[str]:
    """Words and phrases in lower case, one a line."""
    return frozenset(" ".join(line.lower().split()) for line in lines.splitlines() if line.strip())


def read_lemmas(wordnet: Path) -> frozenset[str]:
    """Single words of WordNet's index, and the irregular forms of them."""
    lemmas: set[str] = set()
    for path in sorted([*wordnet.glob("index.[anv]*"), *wordnet.glob("*.exc")]):
        for line in path.read_text(encoding="latin-1").splitlines():
            if line and not line.startswith(" "):
                lemmas.add(line.split()[0])
    return frozenset(lemmas)


def read_examples(wordnet: Path) -> Iterator[str]:
    """What stands in quotation marks in WordNet's glosses."""
    for path in sorted(wordnet.glob("data.*")):
        for line in path.read_text(encoding="latin-1").splitlines():
            yield from (found.strip() for found in re.findall(r'"([^"]+)"', line.partition("|")[2]))


def read_definitions(wordnet: Path) -> Iterator[str]:
    """The parts of WordNet's glosses before the examples, without what stands in brackets."""
    for path in sorted(wordnet.glob("data.*")):
        for line in path.read_text(encoding="latin-1").splitlines():
            gloss = re.sub(r"\([^)]*\)", "", line.partition("|")[2].partition('"')[0])
            yield from (" ".join(part.split()) for part in gloss.split(";") if part.strip())


def frequent_words(texts: Iterable[str], count: int = FREQUENT) -> frozenset[str]:
    """The most frequent words."""
    words = Counter(word.lower().strip("'") for text in texts for word in _WORD.findall(text))
    return frozenset(word for word, _ in words.most_common(count))


def unsaid(typed: Iterable[str], kept: Iterable[str], count: int = 20) -> list[str]:
    """The words most frequent in what people typed that no kept sentence has: what a filter should not have lost."""
    said = exposures.count_words(kept)
    words = exposures.count_words(typed).most_common()
    return [word for word, _ in words if word not in said and word not in SLANG][:count]


def frequencies_of(said: Iterable[str], defined: Iterable[str]) -> dict[str, float]:
    """How often each word is said, those in definitions counted less."""
    weighted = {word: float(count) for word, count in exposures.count_words(said).items()}
    for word, count in exposures.count_words(defined).items():
        weighted[word] = weighted.get(word, 0) + DEFINITION_WEIGHT * count
    return weighted


def teaching(texts: Sequence[str], frequencies: Mapping[str, float], limit: int) -> tuple[list[str], list[str]]:
    """Sentences in the order in which they teach most words, ``limit`` of them (0: all), and the lists between them."""
    gains = exposures.Gains(frequencies, {}, exposures.MissRate())
    count = min(limit or len(texts), len(texts))
    count += count // exposures.SENTENCES_PER_LIST
    chosen = list(tqdm(islice(exposures.choices(texts, gains), count), "choosing", count, unit="clip"))
    return separated(chosen)


def separated(chosen: Sequence[exposures.Choice]) -> tuple[list[str], list[str]]:
    """The sentences, and the lists as they are spoken."""
    return [one.text for one in chosen if not one.is_list], [tidy(one.text) for one in chosen if one.is_list]


# ---- command -------------------------------------------------------------------------------------------------------


def make(out: Path, cache: Path, limit: int) -> None:
    """Fetches, filters, deals and writes; prints what was left out."""
    chats, profanity = fetch(cache, (CHATS, PROFANITY))
    wordnet = fetch_recordings.fetch_debian(cache / "wordnet", ("wordnet-base",)) / "usr/share/wordnet"
    most = READ_PER_SENTENCE * limit or None
    typed = (chats / "sentences.txt").read_text(encoding="utf-8").splitlines()[:most]
    profane = read_phrases((profanity / "words.txt").read_text(encoding="utf-8"))
    dictionary = Dictionary(read_lemmas(wordnet), frequent_words(typed), profane)
    seen: set[str] = set()
    counts: dict[str, Counter[str]] = {"chats": Counter(), "WordNet": Counter(), "WordNet's definitions": Counter()}
    said = [
        *sift(typed, dictionary, seen, counts["chats"]),
        *sift(islice(read_examples(wordnet), most), dictionary, seen, counts["WordNet"]),
    ]
    definitions = sift(islice(read_definitions(wordnet), most), dictionary, seen, counts["WordNet's definitions"])
    spoken, defined = ([text for text in texts if split_of(text) == "train"] for texts in (said, definitions))
    frequencies = frequencies_of(spoken, defined)
    train, lists = teaching([*spoken, *defined], frequencies, limit)
    written = {"train": train, "lists": lists}
    written |= {split: shuffled(text for text in said if split_of(text) == split)[: limit or None] for split in SPLITS}
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in written.items():
        write_whole(out / f"{name}.txt", "".join(f"{text}\n" for text in texts))
        print(f"{out / name}.txt: {len(texts)} {'lists' if name == 'lists' else 'sentences'}")
    exposures.write_frequencies(out / "frequencies.tsv", frequencies)
    write_whole(out / "filter.json", json.dumps(counts, indent=1) + "\n")
    print(f"frequent words that no sentence has: {', '.join(unsaid(map(spell_numbers, typed), said))}")
    for source, found in counts.items():
        print(f"{source}: " + ", ".join(f"{count} {reason}" for reason, count in found.most_common()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument(
        "--limit", type=int, default=0, help="sentences of each split, of a part of what there is (default: all)"
    )
    args = parser.parse_args(arguments)
    if args.limit < 0:
        parser.error(f"--limit must not be negative, got {args.limit}")
    make(args.out, args.cache, args.limit)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"gather_sentences: {error}")
