"""How often words were said in training, and which sentences are worth saying next.

A word that training said n times is missed with the probability ``floor + (1 - floor) / (1 + n / half)`` (measured:
HISTORY.md, "A sixth part"). What one more exposure is worth is how much less often the word is then missed, times how
often people say it: most for words that were said now and then.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blspkd_fairseq.files import write_whole

LIST_WORDS = 8
SENTENCES_PER_LIST = 3
CLIP_COST = 3  # words that a clip costs beside its own, so that not only the shortest are chosen
SLACK = 0.99  # of the best one's value is good enough, which takes a fraction of the time

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class Choice(NamedTuple):
    """What is said next.

    Attributes:
        gain: words less that are expected to be missed, for each word that is said and three more for the clip.
        text: a sentence, or the words of a list.
        is_list: words that have nothing to do with each other.
    """

    gain: float
    text: str
    is_list: bool


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation; "don't" is one word."""
    return _WORD.findall(text.lower().replace("’", "'"))


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word is said."""
    return Counter(word for text in texts for word in words_of(text))


def write_frequencies(path: Path, frequencies: Mapping[str, float]) -> None:
    """For :func:`read_frequencies`, the most frequent words first."""
    ranked = sorted(frequencies.items(), key=lambda pair: (-pair[1], pair[0]))
    write_whole(path, "".join(f"{word}\t{times:g}\n" for word, times in ranked))


def read_frequencies(path: Path) -> dict[str, float]:
    """What :func:`write_frequencies` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {word: float(times) for word, times in (line.split("\t") for line in lines)}


class MissRate(NamedTuple):
    """How probably a word is missed.

    Attributes:
        half: exposures after which half of what can be learnt is learnt (20: measured, HISTORY.md).
        floor: what is missed however often it was said.
    """

    half: float = 20.0
    floor: float = 0.0

    def __call__(self, exposures: float) -> float:
        """Of a word that was said so often."""
        return self.floor + (1 - self.floor) / (1 + exposures / self.half)

    @classmethod
    def fit(cls, exposures: Sequence[int], missed: Sequence[bool]) -> "MissRate":
        """The rate under which what was missed is most probable: half from .1 to 10,000, floor from 0 to .5.

        Args:
            exposures: of each word of the utterances that were heard, how often training said it.
            missed: whether it was not heard.

        Raises:
            ValueError: no word was said.
        """
        if not exposures:
            raise ValueError("no word was said, so that nothing can be fitted")
        counts, was_missed = np.asarray(exposures, dtype=float), np.asarray(missed, dtype=bool)

        def likelihood(rate: "MissRate") -> float:
            missing = np.clip(rate(counts), 1e-6, 1 - 1e-6)  # type: ignore[arg-type]
            return float(np.log(np.where(was_missed, missing, 1 - missing)).sum())

        halves, floors = np.geomspace(0.1, 10_000, 151), np.linspace(0, 0.5, 51)
        return max((cls(float(half), float(floor)) for half in halves for floor in floors), key=likelihood)


class Gains:
    """What one more exposure of each word is worth, in words less that are missed."""

    def __init__(self, frequencies: Mapping[str, float], said: Mapping[str, int], rate: MissRate) -> None:
        self.frequencies, self.rate = frequencies, rate
        self.said = Counter(said)
        self._of: dict[str, float] = {}

    def of(self, word: str) -> float:
        """Of a word; it falls with every exposure."""
        if word not in self._of:
            count = self.said[word]
            self._of[word] = self.frequencies.get(word, 0) * (self.rate(count) - self.rate(count + 1))
        return self._of[word]

    def say(self, words: Iterable[str]) -> None:
        """Counts what is said."""
        for word in words:
            self.said[word] += 1
            self._of.pop(word, None)

    def missed(self) -> float:
        """The share of words, by their frequencies, that is expected to be missed."""
        missed = sum(times * self.rate(self.said[word]) for word, times in self.frequencies.items())
        return missed / sum(self.frequencies.values())


def choices(texts: Sequence[str], gains: Gains, rarest: float = 3) -> Iterator[Choice]:
    """All texts, the one of the largest gain first, and after every third a list of eight words.

    ``gains`` counts what was chosen. Lists hold the words of the largest gains that ``frequencies`` has ``rarest``
    times or more: those of which there are too few sentences. Every prefix is what is best to say in so many clips.
    """
    split = [words_of(text) for text in texts]
    each = [set(words) for words in split]
    frequent = sorted(word for word, times in gains.frequencies.items() if times >= rarest and len(word) > 2)
    sentences = _Falling(len(texts), lambda index: sum(map(gains.of, each[index])) / (CLIP_COST + len(split[index])))
    words = _Falling(len(frequent), lambda index: gains.of(frequent[index]))
    for number in range(1, len(texts) + 1):
        value, index = sentences.pop()
        gains.say(split[index])
        yield Choice(value, texts[index], False)
        if number % SENTENCES_PER_LIST == 0 and len(frequent) >= LIST_WORDS:
            listed = [words.pop() for _ in range(LIST_WORDS)]
            gains.say(frequent[place] for _, place in listed)
            for _, place in listed:
                words.push(place)
            text = " ".join(frequent[place] for _, place in listed)
            yield Choice(sum(value for value, _ in listed) / (CLIP_COST + LIST_WORDS), text, True)


class _Falling:
    """Numbers from 0 on, of which one of the largest value comes first; values may only fall."""

    def __init__(self, count: int, value: Callable[[int], float]) -> None:
        self._value = value
        self._heap = [(-value(index), index) for index in range(count)]
        heapq.heapify(self._heap)

    def push(self, index: int) -> None:
        heapq.heappush(self._heap, (-self._value(index), index))

    def pop(self) -> tuple[float, int]:
        """A largest value and whose it is: who is still the best when it is counted again is the best of all."""
        while True:
            index = heapq.heappop(self._heap)[1]
            now = self._value(index)
            if not self._heap or now >= SLACK * -self._heap[0][0]:
                return now, index
            heapq.heappush(self._heap, (-now, index))
