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
    "turn": ("Turn on", "Turn off", "Please turn on", "Please turn off"),
    "device": ("light", "fan", "heater", "radio", "camera"),
    "move": ("Open", "Close"),
    "opening": ("window", "door"),
    "room": ("kitchen", "bedroom", "garden", "office", "garage"),
    "when": ("now", "tonight", "tomorrow", "after lunch", "before dinner"),
    "number": ("three", "five", "ten", "twenty"),
    "cooked": COOKED,
    "food": (*COOKED, "milk", "bread", "sugar", "apples", "coffee"),
    "dish": ("soup", "pasta", "fish"),
    "meal": ("breakfast", "lunch", "dinner"),
    "genre": ("jazz", "piano", "rock", "happy"),
    "city": ("Paris", "London", "Berlin", "Madrid", "Tokyo", "Rome", "Chicago", "Sydney"),
    "travel": ("train", "flight", "bus"),
    "day": ("Monday", "Wednesday", "Friday", "Saturday"),
    "part": ("morning", "afternoon", "evening"),
    "falls": ("rain", "snow"),
    "contact": ("call", "visit", "meet", "thank"),
    "person": ("mother", "sister", "doctor", "teacher", "boss", "friend", "uncle"),
    "mood": ("short", "funny", "sad"),
    "hero": ("dog", "tiger", "robot", "pirate"),
}

TEMPLATES = (
    "{turn} the {device} in the {room}.",
    "{turn} the {device} in the {room} {when}.",
    "{move} the {opening} in the {room} {when}.",
    "Play some {genre} music in the {room} {when}.",
    "Play some {genre} music for my {person} {when}.",
    "I need {food}, {food} and {food}.",
    "Add {food} and {food} to my shopping list.",
    "How do I cook {dish} with {cooked} and {cooked}?",
    "Where can I buy {food} and {food} in {city}?",
    "My {person} wants {food} and {food} for {meal}.",
    "Tell my {person} to bring {food} and {food} {when}.",
    "Tell my {person} to {contact} my {person} {when}.",
    "Please invite my {person} to {meal} on {day}.",
    "Remind me in {number} minutes to {contact} my {person}.",
    "Remind me to {contact} my {person} on {day} {part}.",
    "Can my {person} {contact} me in {city} {when}?",
    "Read my {person} a {mood} story about a {hero} {when}.",
    "Will it {falls} in {city} on {day} {part}?",
    "What is the weather in {city} on {day} {part}?",
    "Book a {travel} from {city} to {city} on {day} {part}.",
    "How long is the {travel} from {city} to {city}?",
    "My {person} is going from {city} to {city} {when}.",
    "Find a quiet hotel in {city} for my {person}.",
    "My {person} and my {person} are in {city} {when}.",
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
    drawn = []
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
