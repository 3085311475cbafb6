"""Soft tokens: the mean of the LLM's token embeddings under a posterior over its tokens, in place of a free vector.

A linear layer on the adapter's states reaches a subspace as wide as these are, which is narrower than most LLMs: of
SmolLM2's 576 dimensions Whisper tiny's 384 hold 83 % of the embeddings' variance, and the LLM answers its own tokens
otherwise when the rest is taken out (Self-BLEU 15). A mean of embeddings lies where the LLM's inputs lie (LegoSLM,
arXiv 2505.11352).

The posterior is a softmax over the tokens of two terms: how near the adapter's vector is to the token's embedding, and
how well it fits the token's spelling (:mod:`blspkd_fairseq.modules.spelling`), by which tokens are found that no
training said.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blspkd_fairseq.modules.spelling import Spelling, number_words

LOGITS_AT_ONCE = 2**26  # 256 MiB in fp32


class TokenQueries(NamedTuple):
    """What posteriors are computed from.

    Attributes:
        vectors: ``[N, D + K]`` or ``[B, U, D + K]``.
        spelt: ``[V, K]`` spellings of all tokens, computed once for all that is asked of the queries; None where only
            some tokens are.
    """

    vectors: Tensor
    spelt: Tensor | None

    def of(self, places: Tensor) -> "TokenQueries":
        """Those at ``places`` [N], counted through the batch."""
        return self._replace(vectors=self.vectors.flatten(0, -2).index_select(0, places))


class Candidates(NamedTuple):
    """The likeliest K tokens of each of N queries, the likeliest first.

    Attributes:
        ids: ``[N, K]``.
        logits: ``[N, K]`` in fp32; -inf where fewer than K stand for text.
        embeddings: ``[N, K, D]`` the LLM's own, without its factor.
    """

    ids: Tensor
    logits: Tensor
    embeddings: Tensor


class SoftTokens(nn.Module):
    """A classifier of tokens, and the mean of their embeddings under its posterior.

    A query is ``[points | heard]``, ``[D + K]``: a vector that should lie at its token's embedding, and one whose dot
    product with the token's spelling should be large. The logit of token w with embedding E and spelling t is
    ``-sharpness / 2 |points - E_w|^2 / mean_v |E_v|^2 + heard . t_w / sqrt(K)``. The mean is under the posterior to the
    power of ``focus``: where it is flat, as for voices unlike those of the training, the token nearest to a plain mean
    is often one that nobody would have chosen.

    Args:
        table: the LLM's input embeddings, frozen; they stay the LLM's.
        tokens: as the tokenizer writes them, one for each row of the table; None where the row stands for no text,
            which is never chosen.
        input_dim: of the adapter's states.
        dim: K.
        sharpness, focus: that training begins with.

    Raises:
        ValueError: an LLM whose embeddings are no multiple of its table.
    """

    squares: Tensor
    barred: Tensor
    words: Tensor

    def __init__(
        self,
        table: nn.Module,
        tokens: Sequence[str | None],
        input_dim: int,
        dim: int = 160,
        sharpness: float = 20.0,
        focus: float = 3.0,
    ) -> None:
        super().__init__()
        self.factor = _factor_of(table)
        self._table = (table,)  # in a tuple, since a module would be a part of this one
        squares = self.embeddings.float().square().sum(1)
        none = torch.tensor([token is None for token in tokens], device=squares.device)
        self.mean_square = float(squares[~none].mean())
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("barred", torch.zeros_like(squares).masked_fill(none, -torch.inf), persistent=False)
        words = torch.tensor(number_words(tokens), device=squares.device)
        self.register_buffer("words", words, persistent=False)
        self.listen = nn.Linear(input_dim, dim)
        nn.init.zeros_(self.listen.weight)  # spelling begins by saying nothing
        nn.init.zeros_(self.listen.bias)
        self.spelling = Spelling(tokens, dim)
        self.log_sharpness = nn.Parameter(torch.tensor(sharpness).log())
        self.log_focus = nn.Parameter(torch.tensor(focus).log())
        self._spelt: tuple[object, Tensor] | None = None

    @property
    def embeddings(self) -> Tensor:
        """``[V, D]`` the LLM's table, without gradient."""
        weight: Tensor = self._table[0].weight  # type: ignore[assignment]
        return weight.detach()

    def queries(self, points: Tensor, states: Tensor, spells: bool = True) -> TokenQueries:
        """N queries from vectors ``[N, D]`` in the space of the embeddings and the adapter's states.

        Without ``spells`` only the cross-entropy can be asked of them; it spells the tokens that it is told of.
        """
        return TokenQueries(torch.cat([points, self.listen(states)], 1), self._all_spelt() if spells else None)

    def forward(self, queries: TokenQueries) -> Tensor:
        """``[N, D]`` the mean of the embeddings under the focused posterior of each of N queries."""
        table, spelt = self.embeddings, self._spelt_of(queries, None)

        def mean(rows: Tensor) -> Tensor:
            # Barred after the product: 0 x inf would be in the gradient of the focus.
            posterior = (self.log_focus.float().exp() * self._logits(rows, spelt) + self.barred).softmax(1)
            return posterior.to(table.dtype) @ table * self.factor

        return _in_parts(mean, len(self.words), queries.vectors).to(queries.vectors.dtype)

    def candidates(self, queries: TokenQueries, at_most: int) -> Candidates:
        """The ``at_most`` likeliest tokens of each of N queries."""
        logits = self._logits(queries.vectors, self._spelt_of(queries, None)) + self.barred
        likeliest = logits.topk(min(at_most, len(self.words)), dim=1)
        return Candidates(likeliest.indices, likeliest.values, F.embedding(likeliest.indices, self.embeddings))

    def mean(self, candidates: Candidates) -> Tensor:
        """``[N, D]`` as :meth:`forward`, among the candidates, and in use alone: without gradient."""
        posterior = (self.log_focus.float().exp() * candidates.logits).softmax(1)
        return (posterior.to(candidates.embeddings.dtype).unsqueeze(1) @ candidates.embeddings).squeeze(1) * self.factor

    def embedded(self, ids: Tensor) -> Tensor:
        """``[..., D]`` the LLM's own embeddings of tokens, as it reads them."""
        return F.embedding(ids, self.embeddings) * self.factor

    def says_word(self, candidates: Candidates) -> Tensor:
        """``[N]`` bool: whether the first candidate has a letter or a digit."""
        return self.words[candidates.ids[:, 0]] >= 0

    def cross_entropy(self, queries: TokenQueries, targets: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """``[N]`` nats of the tokens ``targets`` [N].

        Args:
            queries: N of them.
            targets: ids, or their indices in the vocabulary.
            vocabulary: ``[V']`` sorted ids of the tokens to discern; one that stands there again does not count
                again, and its first place is its index. None: all.
        """
        vectors, spelt, barred = queries.vectors, self._spelt_of(queries, vocabulary), self.barred
        if vocabulary is not None:
            again = F.pad(vocabulary[1:] == vocabulary[:-1], (1, 0))
            barred = barred.index_select(0, vocabulary).masked_fill(again, -torch.inf)

        def entropy(rows: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self._logits(rows, spelt, vocabulary) + barred, labels, reduction="none")

        return _in_parts(entropy, len(spelt), vectors, targets)

    def _logits(self, vectors: Tensor, spelt: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """``[N, V]`` in fp32, whatever autocast says: the products with the table run in the table's dtype.

        Those of what stands for no text are finite, too: 0 x inf would be in the gradient of what multiplies them.
        """
        table, squares = self.embeddings, self.squares
        if vocabulary is not None:
            table, squares = table.index_select(0, vocabulary), squares.index_select(0, vocabulary)
        with torch.autocast(vectors.device.type, enabled=False):
            points, heard = vectors.float().split([table.shape[1], spelt.shape[1]], 1)
            nearness = self.log_sharpness.float().exp() / self.mean_square
            logits = ((nearness / self.factor * points).to(table.dtype) @ table.t()).float()
            logits = logits - nearness / 2 * squares.float()
            return logits + (heard * spelt.shape[1] ** -0.5) @ spelt.float().t()

    def _spelt_of(self, queries: TokenQueries, vocabulary: Tensor | None) -> Tensor:
        if vocabulary is None:
            return self._all_spelt() if queries.spelt is None else queries.spelt
        return self.spelling(vocabulary) if queries.spelt is None else queries.spelt.index_select(0, vocabulary)

    def _all_spelt(self) -> Tensor:
        """``[V, K]``; in use they are computed once."""
        if torch.is_grad_enabled():
            return self.spelling()
        version = [(parameter.device, parameter._version) for parameter in self.spelling.parameters()]
        if self._spelt is None or self._spelt[0] != version:
            self._spelt = version, self.spelling()
        return self._spelt[1]


def soft_tokens_of(adapter: nn.Module) -> SoftTokens | None:
    """The adapter's soft tokens; an adapter of one's own need not say that it has none."""
    return getattr(adapter, "soft_tokens", None)


def _in_parts(function: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """The function of all rows; where their logits are large in parts, which are computed again in backward."""
    parts = list(zip(*(one.split(max(1, LOGITS_AT_ONCE // vocabulary)) for one in rows), strict=True))
    if len(parts) == 1:
        return function(*rows)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def _factor_of(table: nn.Module) -> float:
    """By how much the LLM multiplies its table."""
    weight: Tensor = table.weight  # type: ignore[assignment]
    # From all over the table: many a table begins with rows of zeros.
    ids = torch.linspace(0, len(weight) - 1, min(4096, len(weight)), device=weight.device).long()
    with torch.no_grad():
        plain, embedded = weight[ids].float(), type(table).forward(table, ids).float()
    factor = float((plain * embedded).sum() / plain.square().sum())
    if not torch.allclose(embedded, plain * factor, rtol=2e-2, atol=1e-3 * float(plain.std()) * abs(factor)):
        raise ValueError("soft tokens need an LLM whose token embeddings are the rows of one table")
    return factor
