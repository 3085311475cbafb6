"""What people say to a voice assistant at home: English sentences from a small grammar.

    python examples/quickstart/sentences.py 10       prints ten of them

The words are few, common and unlike each other in sound, so that a small model learns to hear them in minutes. Most are
one token of the language model. A sentence belongs to one split for ever, whatever the seed and the number of others.
"""

import argparse
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence

COOKED = ("butter", "rice", "cheese", "eggs", "onions", "potatoes", "garlic")

SLOTS: dict[str, tuple[str, ...]] = {
    "turn": ("Turn on", "Turn off"),
    "device": ("light", "fan", "heater", "radio", "camera"),
    "room": ("kitchen", "bedroom", "garden", "office", "garage"),
    "when": ("now", "tonight", "tomorrow", "after lunch", "before dinner"),
    "number": ("three", "five", "ten", "twenty"),
    "cooked": COOKED,
    "food": (*COOKED, "milk", "bread", "sugar", "apples", "coffee"),
    "dish": ("soup", "pasta", "fish"),
    "meal": ("breakfast", "lunch", "dinner"),
    "city": ("Paris", "London", "Berlin", "Madrid", "Tokyo", "Rome", "Chicago", "Sydney"),
    "travel": ("train", "flight", "bus"),
    "day": ("Monday", "Wednesday", "Friday", "Saturday"),
    "part": ("morning", "afternoon", "evening"),
    "falls": ("rain", "snow"),
    "contact": ("call", "visit", "meet", "thank"),
    "person": ("brother", "sister", "doctor", "teacher", "boss", "friend", "uncle"),
    "mood": ("short", "funny", "sad"),
    "hero": ("dog", "tiger", "robot", "pirate"),
}

# Only kinds of sentences that the small LLM repeats when it reads them: on others its own mistakes hide what it hears.
TEMPLATES = (
    "{turn} the {device} in the {room}.",
    "{turn} the {device} in the {room} {when}.",
    "The {device} in the {room} is off {when}.",
    "I need {food}, {food} and {food}.",
    "Add {food} and {food} to my shopping list.",
    "We had {dish} with {cooked} and {cooked} for {meal}.",
    "My {person} cooks {dish} with {cooked} and {cooked} {when}.",
    "My {person} bought {food} and {food} in {city} on {day}.",
    "My {person} wants {food} and {food} for {meal}.",
    "Remind me in {number} minutes to {contact} my {person}.",
    "Remind me to {contact} my {person} on {day} {part}.",
    "My {person} met my {person} in {city} on {day}.",
    "My {person} is going from {city} to {city} {when}.",
    "My {person} and my {person} are in {city} {when}.",
    "Will it {falls} in {city} on {day} {part}?",
    "How long is the {travel} from {city} to {city}?",
    "Read my {person} a {mood} story about a {hero} {when}.",
    "The {hero} and the {hero} live in {city}.",
)

SPLITS = {"train": 80, "valid": 10, "test": 10}  # percent of all sentences


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to, from its hash alone."""
    percent = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big") % 100
    for name, share in SPLITS.items():
        if percent < share:
            return name
        percent -= share
    raise AssertionError("the shares add up to 100")


def sentences(n: int, seed: int, split: str | None = None) -> list[str]:
    """Draws distinct sentences; all kinds are equally likely as long as they last.

    Args:
        n: how many.
        seed: the same seed gives the same sentences, and the first k of them for a smaller n.
        split: a key of `SPLITS`; None: from all of them.

    Raises:
        ValueError: the grammar has fewer, or no such split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: choose from {', '.join(SPLITS)}")
    rng = random.Random(seed)
    # Every kind in its own random order; then one after the other from a random kind.
    kinds = [[text for text in _expand(template) if split in (None, split_of(text))] for template in TEMPLATES]
    for kind in kinds:
        rng.shuffle(kind)
    available = sum(map(len, kinds))
    if n > available:
        raise ValueError(f"{n} sentences were asked for, and the grammar has {available}: ask for fewer")
    drawn: list[str] = []
    while len(drawn) < n:
        kind = rng.choice(kinds)
        if kind:
            drawn.append(kind.pop())
    return drawn


def _expand(template: str) -> Iterator[str]:
    """All sentences of one kind; a slot that occurs twice gets two different words."""
    slots = re.findall(r"\{(\w+)\}", template)
    pattern = re.sub(r"\{\w+\}", "{}", template)
    for words in itertools.product(*(SLOTS[slot] for slot in slots)):
        if len(set(words)) == len(words):
            yield pattern.format(*words)


def vocabulary() -> list[str]:
    """All distinct words, lower case, sorted."""
    fixed = (re.sub(r"\{\w+\}", " ", template) for template in TEMPLATES)
    text = " ".join(itertools.chain(fixed, *SLOTS.values()))
    return sorted(set(re.findall(r"[a-z]+", text.lower())))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=list(SPLITS))
    args = parser.parse_args(arguments)
    print(*sentences(args.n, args.seed, args.split), sep="\n")


if __name__ == "__main__":
    main()
