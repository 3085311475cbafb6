"""What was said, by sound and LLM together: a beam search over the pieces into which CIF cuts speech.

A hypothesis takes the pieces of a row in their order. Of each it either says a token ``w``, for the score
``log p(w | sound) + weight log p(w | what it said before)`` (shallow fusion, arXiv 1503.03535), or says on the token
before: where CIF fires too often, a word is heard twice running, and as in CTC a repeated label is one (Graves et al.,
2006). It then takes the sound's probability of that word again, and no prediction.

All rows go forward piece by piece, ``beam`` hypotheses of each, and the LLM, reading them as text, keeps its keys and
values. A hypothesis that says on a token writes a column that nobody sees. Where the sound is certain, hypotheses do
not part: the LLM reads such pieces together with the one before, since a step takes as long for one token as for ten.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blspkd_fairseq import compat
from blspkd_fairseq.modules.packed_llm import TOLERANCE, relative_difference

if TYPE_CHECKING:
    from blspkd_fairseq.modules.speech_llm import ChatLLM

WIDEST = 256  # hypotheses of a row, each of which has keys and values of its own
CONTINUED = -2.5
"""Nats of a piece that says on the token before. On 240 rows that no published figure has, -1.5 to -3 hear alike."""
CERTAIN, UNLIKELY = 0.95, 1e-4
"""Where the sound gives a token more than the former, no other one is tried, unless the piece before may say its word,
with more than the latter. So a third of the pieces take no step of the LLM, and of those 240 rows none is heard
otherwise."""
_IMPOSSIBLE = -1e30  # of scores that are added up: no hypothesis with it is chosen while there is another one


class Lattice(NamedTuple):
    """The candidates of each piece.

    Attributes:
        ids: ``[R, T, K]`` tokens, the likeliest first.
        logits: ``[R, T, K]`` of the sound, fp32.
        words: ``[R, T, K]`` which word each token writes, blanks and case aside; -1: none.
        counts: pieces of each row, 1 or more; T is the largest.
    """

    ids: Tensor
    logits: Tensor
    words: Tensor
    counts: Sequence[int]

    def at(self, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, logits and words ``[R, K]`` at one piece ``pieces`` [R] of each row."""
        rows = torch.arange(len(pieces), device=pieces.device)
        return self.ids[rows, pieces], self.logits[rows, pieces], self.words[rows, pieces]


class Hypotheses(NamedTuple):
    """The best B of each row, the best first.

    Attributes:
        tokens: ``[R, B, T]`` what each piece says; -1 where it says on the token before, and behind the row.
        scores: ``[R, B]`` nats.
    """

    tokens: Tensor
    scores: Tensor


@torch.no_grad()
def search(
    model: "ChatLLM", sound: Lattice, opening: Sequence[int], weight: float, beam: int, may_continue: bool = True
) -> Hypotheses:
    """The best hypotheses. The device is asked which pieces are certain.

    Args:
        model: whose LLM reads them as text, without LoRA.
        sound: R rows.
        opening: ids behind which it reads; without any, the first token goes by its sound alone.
        weight: of its prediction.
        beam: hypotheses kept at each piece, B.
        may_continue: pieces may say on the token before; otherwise each says one.
    """
    rows, pieces, _ = sound.ids.shape
    device = sound.ids.device
    sound = sound._replace(logits=sound.logits.log_softmax(2))  # log-probabilities, once for all pieces
    reader = _Reader(model, opening, rows * beam)
    first = beam * torch.arange(rows, device=device).unsqueeze(1)  # of each row's hypotheses
    scores = torch.full((rows, beam), _IMPOSSIBLE, device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((rows, beam, pieces + 1), -1, device=device)  # and a column for what is behind a row
    last = torch.full((rows, beam), -1, device=device)  # the word that was said last
    spans = list(_spans(sound))
    for number, (begin, end, width) in enumerate(spans, 1):
        ids, logits, words = sound.at(begin.clamp(max=pieces - 1))
        expected = reader.expected(ids.repeat_interleave(beam, 0)).unflatten(0, (rows, beam))
        says = scores.unsqueeze(2) + logits.unsqueeze(1) + weight * expected
        continues = scores + (_continued(logits, words, last) if may_continue else _IMPOSSIBLE)
        is_over = (begin == end).unsqueeze(1)
        scores, chosen = torch.cat(
            [
                says.masked_fill(is_over.unsqueeze(2), 2 * _IMPOSSIBLE).flatten(1),
                torch.where(is_over, scores, continues),
            ],
            1,
        ).topk(beam, 1)
        is_said = chosen < says[0].numel()
        parent = torch.where(is_said, chosen // ids.shape[1], chosen - says[0].numel())
        choice = torch.where(is_said, chosen % ids.shape[1], 0)
        last = torch.where(is_said, words.gather(1, choice), last.gather(1, parent))
        # Behind it, the pieces that are certain.
        place = begin.unsqueeze(1) + torch.arange(width, device=device)
        place = torch.where(place < end.unsqueeze(1), place, pieces)
        span = _likeliest(sound.ids, place).unsqueeze(1).repeat(1, beam, 1)
        span[:, :, 0] = torch.where(is_said, ids.gather(1, choice), -1)
        tokens = tokens.gather(1, parent.unsqueeze(2).expand_as(tokens))
        tokens.scatter_(2, place.unsqueeze(1).expand_as(span), span)
        last = torch.where((end - begin > 1).unsqueeze(1), _likeliest(sound.words, end.unsqueeze(1) - 1), last)
        if number == len(spans) and width == 1:
            break  # nobody asks what comes next
        expected = reader.go_on((first + parent).flatten(), span.flatten(0, 1)).unflatten(0, (rows, beam))
        certain = _likeliest(sound.logits, place[:, 1:]).clamp(max=0).unsqueeze(1)
        scores = scores + torch.where(span[:, :, 1:] >= 0, certain + weight * expected, 0.0).sum(2)
    scores, order = scores.sort(dim=1, descending=True)
    return Hypotheses(tokens.gather(1, order.unsqueeze(2).expand_as(tokens))[:, :, :pieces], scores)


def _spans(sound: Lattice) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of each row a piece and those behind it that are certain, ``begin`` to ``end`` [R], and how many at most.

    Rows of fewer spans have empty ones at last.
    """
    probability = sound.logits.softmax(2)
    again = (sound.words[:, 1:, :1] == sound.words[:, :-1]) & (probability[:, :-1] > UNLIKELY)
    certain = probability[:, :, 0] > CERTAIN
    certain[:, 1:] &= ~(again.any(2) & (sound.words[:, 1:, 0] >= 0))
    begins = [
        [piece for piece in range(count) if piece == 0 or not sure[piece]] + [count]
        for sure, count in zip(certain.tolist(), sound.counts, strict=True)
    ]
    most = max(map(len, begins))
    filled = torch.tensor([row + row[-1:] * (most - len(row)) for row in begins], device=sound.ids.device)
    widths = [max(row[i + 1] - row[i] for row in begins if i + 1 < len(row)) for i in range(most - 1)]
    return zip(filled[:, :-1].unbind(1), filled[:, 1:].unbind(1), widths, strict=True)


def _likeliest(values: Tensor, places: Tensor) -> Tensor:
    """``[R, n]`` of the first candidates of ``values`` [R, T, K] at ``places`` [R, n]; -1 at the place T."""
    return F.pad(values[:, :, 0], (0, 1), value=-1).gather(1, places)


def _continued(logits: Tensor, words: Tensor, last: Tensor) -> Tensor:
    """``[R, B]`` nats of saying on the words ``last`` [R, B]; candidates are ``[R, K]``."""
    again = (words.unsqueeze(1) == last.unsqueeze(2)) & (last >= 0).unsqueeze(2)
    return logits.unsqueeze(1).masked_fill(~again, _IMPOSSIBLE).logsumexp(2) + CONTINUED


class _Reader:
    """The LLM before N texts, to each of which some tokens are added at a time, or none.

    Args:
        model: its LLM.
        opening: ids before all texts.
        texts: N.
    """

    def __init__(self, model: "ChatLLM", opening: Sequence[int], texts: int) -> None:
        self.model = model
        self.seen = torch.ones(texts, len(opening), dtype=torch.long, device=model.device)
        self.hidden: Tensor | None = None
        self.cache = None
        if opening:
            ids = torch.tensor([list(opening)], device=model.device)
            output = model.llm.get_decoder()(input_ids=ids, use_cache=True)
            self.hidden, self.cache = output.last_hidden_state[:, -1].expand(texts, -1), compat.cache_of(output)
            self.cache.reorder_cache(torch.zeros(texts, dtype=torch.long, device=model.device))

    def expected(self, ids: Tensor) -> Tensor:
        """``[N, K]`` log-probabilities of the tokens ``ids`` [N, K] next, in fp32; 0 where there is nothing before."""
        return torch.zeros(ids.shape, device=ids.device) if self.hidden is None else self._after(self.hidden, ids)

    def go_on(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Text i becomes text ``parents[i]`` and behind it ``tokens[i]``, all but -1, of which the first may be one.

        Args:
            parents: ``[N]``.
            tokens: ``[N, m]``.

        Returns:
            ``[N, m - 1]`` log-probabilities of the tokens but the first, in fp32; what is at -1 means nothing.
        """
        is_said = tokens >= 0
        self.seen = torch.cat([self.seen[parents], is_said.long()], 1)
        if self.cache is not None:
            self.cache.reorder_cache(parents)
        output = self.model.llm.get_decoder()(
            input_ids=tokens.clamp(min=0),
            attention_mask=self.seen,
            position_ids=(self.seen.cumsum(1)[:, -tokens.shape[1] :] - 1).clamp(min=0),
            use_cache=True,
            **({} if self.cache is None else compat.cache_argument(self.cache)),
        )
        self.cache = compat.cache_of(output)
        hidden = output.last_hidden_state
        before = hidden[:, :1] if self.hidden is None else self.hidden[parents].unsqueeze(1)
        states = torch.cat([before, hidden], 1)
        # Of a text that said nothing first, the state before it.
        states[:, 1] = torch.where(is_said[:, :1], states[:, 1], states[:, 0])
        ends = 1 + (is_said * torch.arange(tokens.shape[1], device=tokens.device)).amax(1)
        self.hidden = states[torch.arange(len(states), device=tokens.device), ends]
        found = [self._after(states[:, i], tokens[:, i : i + 1].clamp(min=0)) for i in range(1, tokens.shape[1])]
        return torch.cat([*found, hidden.new_zeros(len(tokens), 0, dtype=torch.float32)], 1)

    def _after(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """``[N, K]`` log-probabilities of ``ids`` after the states ``[N, D]``."""
        weight, bias = self.model.head
        logits = F.linear(hidden, weight, bias).float()
        if self.model.logit_transform is not None:
            logits = self.model.logit_transform.apply_(logits)[0]
        return logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)


@torch.no_grad()
def check_can_search(model: "ChatLLM") -> None:
    """Tries whether the LLM reads on as if it read afresh, whose hypotheses change places and skip columns.

    Raises:
        ValueError: it does not, as one whose layers keep a state that cannot be left as it is.
    """
    reader, table = _Reader(model, [1, 2], 2), model.llm.get_input_embeddings()
    said, parents = torch.tensor([[3], [-1], [4], [6]]), torch.tensor([1, 0], device=model.device)
    said = torch.where(said < 0, said, said % table.num_embeddings).to(model.device)
    try:
        for tokens in said.split(2):
            reader.go_on(parents, tokens)
    except Exception as error:  # whatever an architecture raises whose cache is another
        raise ValueError(_CANNOT.format(f"{type(error).__name__}: {error}")) from error
    # The second step swaps them, the first of which said nothing in the first.
    texts = [[1, 2, int(said[2])], [1, 2, int(said[0]), int(said[3])]]
    assert reader.hidden is not None
    for hidden, text in zip(reader.hidden, texts, strict=True):
        ids = torch.tensor([text], device=model.device)
        afresh = model.llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        if not relative_difference(hidden, afresh) < TOLERANCE:
            raise ValueError(_CANNOT.format("it reads on otherwise than afresh"))


_CANNOT = "--adapter-prior-beam: this LLM cannot be searched by ({}); leave it at 0, or take an LLM of plain attention"
