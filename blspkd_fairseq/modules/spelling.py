"""What tokens are spelt of: so that a token that was never heard has something in common with those that were.

A token is the sum of its pieces, strings of one to three characters (as fastText, arXiv 1607.04606). Words that sound
alike are mostly spelt alike, so a classifier whose rows are made of pieces finds words that no training said, which one
with a row for each token cannot (acoustically grounded word embeddings, Settle et al., arXiv 1903.12306).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from blspkd_fairseq.data.chat import ChatFormat

LONGEST_PIECE = 3
_SPACES = str.maketrans({"Ġ": "_", "▁": "_"})  # how byte-level BPE and SentencePiece write one
_BLANKS = {**_SPACES, ord("Ċ"): "_", ord("č"): "_", ord("ĉ"): "_"}  # and how the former writes line breaks and tabs


def pieces_of(token: str) -> Iterator[str]:
    """The pieces of a token as its tokenizer writes it: strings of characters between ``<`` and ``>``, and its case."""
    written = token.translate(_SPACES)
    letters = [one for one in written if one.isalpha()]
    if letters and letters[0].isupper():
        yield "<Aa>"
        if len(letters) > 1 and all(one.isupper() for one in letters):
            yield "<AA>"
    bounded = f"<{written.lower()}>"
    for length in range(1, LONGEST_PIECE + 1):
        for start in range(len(bounded) - length + 1):
            yield bounded[start : start + length]


def number_words(tokens: Sequence[str | None]) -> list[int]:
    """Which word each token, as its tokenizer writes it, stands for; -1 where it has neither a letter nor a digit.

    Tokens that differ in blanks and case alone, as "The" and " the", stand for one word.
    """
    written = ["" if token is None else token.translate(_BLANKS).strip("_").lower() for token in tokens]
    numbers = {"": -1} | {word: i for i, word in enumerate(dict.fromkeys(written)) if any(map(str.isalnum, word))}
    return [numbers.get(word, -1) for word in written]


def speakable_tokens(chat: ChatFormat, size: int) -> list[str | None]:
    """``size`` tokens as the tokenizer writes them; None for those that no text has (control tokens, padding)."""
    count = min(size, len(chat.tokenizer))
    tokens = chat.tokenizer.convert_ids_to_tokens(list(range(count)))
    return [None if i in chat.control_ids else token for i, token in enumerate(tokens)] + [None] * (size - count)


class Spelling(nn.Module):
    """A vector for each token of a vocabulary, computed from its pieces.

    Args:
        tokens: of the vocabulary; None where there is none.
        dim: of the vectors.
        pieces: how many are known; of more, those that fewest tokens have are left out.
        piece_dim, hidden_dim: widths of the table of pieces, and of the layer behind their sum.
    """

    offsets: Tensor
    lengths: Tensor
    pieces: Tensor

    def __init__(
        self, tokens: Sequence[str | None], dim: int, pieces: int = 4096, piece_dim: int = 160, hidden_dim: int = 320
    ) -> None:
        super().__init__()
        spelt = [[] if token is None else list(pieces_of(token)) for token in tokens]
        counts = Counter(chain.from_iterable(set(one) for one in spelt))
        # Ties in the order of the alphabet: the same tokenizer always has the same table.
        known = sorted(counts, key=lambda piece: (-counts[piece], piece))[:pieces]
        index = {piece: i for i, piece in enumerate(known)}
        rows = [[index[piece] for piece in one if piece in index] for one in spelt]
        lengths = torch.tensor([len(row) for row in rows])
        self.register_buffer("pieces", torch.tensor(list(chain.from_iterable(rows))), persistent=False)
        self.register_buffer("offsets", lengths.cumsum(0) - lengths, persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)
        self.longest = int(lengths.max())
        self.table = nn.EmbeddingBag(pieces, piece_dim, mode="sum")
        nn.init.normal_(self.table.weight, std=0.1)
        self.transform = nn.Sequential(
            nn.LayerNorm(piece_dim), nn.Linear(piece_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim)
        )

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """``[V, dim]`` vectors of all tokens, or of the tokens ``ids`` [V]."""
        sums = self.table(self.pieces, self.offsets) if ids is None else self._sums(ids)
        vectors: Tensor = self.transform(sums)
        return vectors

    def _sums(self, ids: Tensor) -> Tensor:
        """``[V, piece_dim]`` of some tokens; padded, so that a device is not asked how many pieces they have."""
        places = torch.arange(self.longest, device=ids.device)
        is_piece = places < self.lengths[ids].unsqueeze(1)
        pieces = self.pieces[torch.where(is_piece, self.offsets[ids].unsqueeze(1) + places, 0)]
        weights: Tensor = self.table.weight
        return nn.functional.embedding_bag(pieces, weights, mode="sum", per_sample_weights=is_piece.to(weights.dtype))
