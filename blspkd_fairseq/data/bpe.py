"""Byte-pair encoding with fewer merges: the same tokens, of which rarer words need several.

An adapter that makes an embedding for each token must have heard every token some dozens of times; a tokenizer of
50,000 tokens has thousands of words that hundreds of hours of speech say now and then. BPE learns its merges in the
order of their frequency (Sennrich et al. 2016), so that with the first few thousand of them frequent words stay whole,
rarer ones become pieces that other words have, too, and the LLM has an embedding for all of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def common_ends(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs of tokens at whose ends two ways of cutting a text have written the same.

    For example, of "bal, con, y, was" and "balcony, was": ``[(2, 0), (3, 1)]``, their places counted from 0.
    """
    places = {end: place for place, end in enumerate(accumulate(map(len, first)))}
    ends = enumerate(accumulate(map(len, second)))
    return [(places[end], place) for place, end in ends if end in places]


def with_fewer_merges(tokenizer: PreTrainedTokenizerBase, merges: int) -> PreTrainedTokenizerBase:
    """A tokenizer that makes the first ``merges`` merges only; ids and everything else are those of the other.

    Raises:
        ValueError: it is no BPE of the tokenizers library, or has not so many; the message goes on from its name.
    """
    layout = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    model = layout["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"has no merges ({model.get('type', 'no fast tokenizer')}, not BPE)")
    if not 0 < merges <= len(model["merges"]):
        raise ValueError(f"has {len(model['merges'])} merges: give 1 to so many, or 0 for all")
    model["merges"] = model["merges"][:merges]
    model["ignore_merges"] = False  # else a word of the vocabulary is one token, whatever the merges
    fewer = copy.deepcopy(tokenizer)
    fewer._tokenizer = Tokenizer.from_str(json.dumps(layout))
    return fewer
