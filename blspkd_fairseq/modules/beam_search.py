"""What was said, by sound and LLM together: a beam search over the pieces into which CIF cuts speech.

A hypothesis takes the pieces of a row in their order. Of each it either says a token ``w``, for the score
``log p(w | sound) + weight log p(w | what it said before)`` (shallow fusion, arXiv 1503.03535), or says on the token
before: where CIF fires too often, a word is heard twice running, and as in CTC a repeated label is one (Graves et al.,
2006). It then takes the sound's probability of that word again, and no prediction.

All rows go forward piece by piece, ``beam`` hypotheses of each, and the LLM, reading them as text, keeps its keys and
values. A hypothesis that says on a token writes a column that nobody sees. Where the sound is certain, hypotheses do
not part: of a few rows the LLM reads such pieces together with the one before, since a step takes as long for some
tokens as for one. Rows that are at their end are read no further.
"""

from collections.abc import Sequence
from itertools import chain
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
TOKENS_AT_ONCE = 64
"""That a step of the LLM takes about as long for as for one."""
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

    def of(self, rows: Sequence[int]) -> "Lattice":
        """Some of the rows."""
        place = torch.tensor(rows, device=self.ids.device)
        return Lattice(self.ids[place], self.logits[place], self.words[place], [self.counts[row] for row in rows])

    def at(self, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, logits and words ``[A, K]`` at one piece ``pieces`` [A] of each of the first rows."""
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
    order, spans = _spans(sound, max(1, TOKENS_AT_ONCE // (rows * beam)))
    sound = sound.of(order)
    reader = _Reader(model, opening, rows * beam)
    first = beam * torch.arange(rows, device=device).unsqueeze(1)  # of each row's hypotheses
    now, done = _Beams.empty(rows, beam, pieces, device), list[_Beams]()
    for number, span in enumerate(spans, 1):
        active = len(span.begin)
        now, ended = now.split(active)
        done.insert(0, ended)
        ids, logits, words = sound.at(span.begin)
        expected = reader.expected(ids.repeat_interleave(beam, 0)).unflatten(0, (active, beam))
        says = (logits.unsqueeze(1) + weight * expected).masked_fill(~_may_say(span, ids), _IMPOSSIBLE)
        says_one = span.is_certain if may_continue else torch.ones_like(span.is_certain)
        on = _continued(logits, words, now.last).masked_fill(says_one.unsqueeze(1), _IMPOSSIBLE)
        now, parent, said = _extended(now, ids, words, says, on)
        places = span.places(pieces)
        now, said = _said_behind(now, sound, span, places, said)
        if number == len(spans) and span.width == 1:
            break  # nobody asks what comes next
        expected = reader.go_on((first[:active] + parent).flatten(), said.flatten(0, 1)).unflatten(0, (active, beam))
        certain = _likeliest(sound.logits[:active], places[:, 1:]).clamp(max=0).unsqueeze(1)
        gains = torch.where(said[:, :, 1:] >= 0, certain + weight * expected, 0.0).sum(2)
        now = now._replace(scores=now.scores + gains)
    back = torch.tensor(order, device=device).argsort()
    tokens, scores, _ = (torch.cat(values)[back] for values in zip(now, *done, strict=True))
    scores, best = scores.sort(dim=1, descending=True)
    return Hypotheses(tokens.gather(1, best.unsqueeze(2).expand_as(tokens))[:, :, :pieces], scores)


class _Beams(NamedTuple):
    """The hypotheses of R rows.

    Attributes:
        tokens: ``[R, B, T + 1]`` as those of :class:`Hypotheses`, and a column for what is behind a row.
        scores: ``[R, B]``.
        last: ``[R, B]`` the word that was said last.
    """

    tokens: Tensor
    scores: Tensor
    last: Tensor

    @staticmethod
    def empty(rows: int, beam: int, pieces: int, device: torch.device) -> "_Beams":
        """One hypothesis of each row, which says nothing yet."""
        scores = torch.full((rows, beam), _IMPOSSIBLE, device=device)
        scores[:, 0] = 0.0
        nothing = torch.full((rows, beam, pieces + 1), -1, device=device)
        return _Beams(nothing, scores, nothing[:, :, 0])

    def split(self, rows: int) -> "tuple[_Beams, _Beams]":
        """The first rows, and the others."""
        return _Beams(*(values[:rows] for values in self)), _Beams(*(values[rows:] for values in self))


class _Span(NamedTuple):
    """What the first A rows say in one step of the LLM: a piece, and those behind it that are certain.

    Attributes:
        begin, end: ``[A]`` which pieces. width: the most of them.
        is_certain: ``[A]`` bool, whether the first is, too.
    """

    begin: Tensor
    end: Tensor
    width: int
    is_certain: Tensor

    def places(self, pieces: int) -> Tensor:
        """``[A, width]`` the pieces; ``pieces`` behind the end."""
        place = self.begin.unsqueeze(1) + torch.arange(self.width, device=self.begin.device)
        return torch.where(place < self.end.unsqueeze(1), place, pieces)


def _spans(sound: Lattice, most: int) -> tuple[list[int], list[_Span]]:
    """The order of rows in which those of most spans come first, and their spans of at most so many pieces."""
    device = sound.ids.device
    probability = sound.logits.softmax(2)
    again = (sound.words[:, 1:, :1] == sound.words[:, :-1]) & (probability[:, :-1] > UNLIKELY)
    certain = probability[:, :, 0] > CERTAIN
    certain[:, 1:] &= ~(again.any(2) & (sound.words[:, 1:, 0] >= 0))
    certain[:, 0] = False  # nothing is before it
    is_certain = certain.tolist()
    begins = [_begins(sure[:count], most) for sure, count in zip(is_certain, sound.counts, strict=True)]
    order = sorted(range(len(begins)), key=lambda row: -len(begins[row]))
    steps = []
    for step in range(len(begins[order[0]]) - 1):
        rows = [row for row in order if step + 1 < len(begins[row])]
        bounds = [(begins[row][step], begins[row][step + 1]) for row in rows]
        sure = [is_certain[row][begin] for row, (begin, _) in zip(rows, bounds, strict=True)]
        steps.append([(*bound, one) for bound, one in zip(bounds, sure, strict=True)])
    # To the device all at once.
    table = torch.tensor([*chain.from_iterable(steps)]).to(device)
    return order, [
        _Span(part[:, 0], part[:, 1], max(end - begin for begin, end, _ in step), part[:, 2].bool())
        for part, step in zip(table.split([*map(len, steps)]), steps, strict=True)
    ]


def _begins(is_certain: Sequence[bool], most: int) -> list[int]:
    """Where spans begin, and where the last one ends."""
    begins: list[int] = []
    for piece, sure in enumerate(is_certain):
        if not sure or piece - begins[-1] == most:
            begins.append(piece)
    return [*begins, len(is_certain)]


def _may_say(span: _Span, ids: Tensor) -> Tensor:
    """``[A, 1, K]`` bool: which of the candidates; the first alone where that is certain."""
    is_first = torch.arange(ids.shape[1], device=ids.device) == 0
    return (is_first | ~span.is_certain.unsqueeze(1)).unsqueeze(1)


def _extended(
    beams: _Beams, ids: Tensor, words: Tensor, says: Tensor, continues: Tensor
) -> tuple[_Beams, Tensor, Tensor]:
    """The best hypotheses that say one piece more, whose they were, ``[A, B]``, and what it says, or -1.

    Args:
        beams: A rows.
        ids, words: ``[A, K]`` candidates.
        says: ``[A, B, K]`` nats of each. continues: ``[A, B]`` nats of saying on the token before.
    """
    beam, said = says.shape[1], says[0].numel()
    options = torch.cat([(beams.scores.unsqueeze(2) + says).flatten(1), beams.scores + continues], 1)
    scores, chosen = options.topk(beam, 1)
    is_said = chosen < said
    parent = torch.where(is_said, chosen // ids.shape[1], chosen - said)
    choice = torch.where(is_said, chosen % ids.shape[1], 0)
    last = torch.where(is_said, words.gather(1, choice), beams.last.gather(1, parent))
    tokens = beams.tokens.gather(1, parent.unsqueeze(2).expand_as(beams.tokens))
    return _Beams(tokens, scores, last), parent, torch.where(is_said, ids.gather(1, choice), -1)


def _said_behind(beams: _Beams, sound: Lattice, span: _Span, places: Tensor, said: Tensor) -> tuple[_Beams, Tensor]:
    """Hypotheses with what the span says at its places, and that, ``[A, B, width]``; its first is ``said`` [A, B]."""
    active, beam = said.shape
    tokens = _likeliest(sound.ids[:active], places).unsqueeze(1).repeat(1, beam, 1)
    tokens[:, :, 0] = said
    end = _likeliest(sound.words[:active], span.end.unsqueeze(1) - 1)
    return beams._replace(
        tokens=beams.tokens.scatter(2, places.unsqueeze(1).expand_as(tokens), tokens),
        last=torch.where((span.end - span.begin > 1).unsqueeze(1), end, beams.last),
    ), tokens


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
        """Log-probabilities of the tokens ``ids`` [n, K] next, of the first n texts, in fp32; 0 before all tokens."""
        if self.hidden is None:
            return torch.zeros(ids.shape, device=ids.device)
        return self._after(self.hidden[: len(ids)], ids)

    def go_on(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Text i becomes text ``parents[i]`` and behind it ``tokens[i]``, all but -1, of which the first may be one.

        Args:
            parents: ``[n]``; there are n texts from then on.
            tokens: ``[n, m]``.

        Returns:
            ``[n, m - 1]`` log-probabilities of the tokens but the first, in fp32; what is at -1 means nothing.
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
