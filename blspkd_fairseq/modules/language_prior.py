"""What the LLM expects, beside what is heard: a prior over soft tokens.

As speech recognisers add the logits of a language model to their own (shallow fusion, arXiv 1503.03535), the posterior
of a soft token becomes ``p(w | sound) p(w | what is before)^weight``. The language model is the LLM itself. What is
before is searched for, by a beam over whole hypotheses (:mod:`blspkd_fairseq.modules.beam_search`); or it is the soft
tokens, of all places at once: the LLM reads what was heard, and its prediction at each place helps to hear the next
one; read again, the better tokens make a better prediction.

Whether anybody speaks is for the sound to say: a piece of which it says no word, as silence, stays as it was heard.

How many pieces there are is searched for, too: CIF sums up to 7.3, say, and cuts the speech in 7, or in 8.

What a search finds are the LLM's own tokens, which it reads as text: LoRA, which learnt from soft tokens, would change
what it makes of them, and acts on the pieces that stay as they were heard. In training the adapter learns from the
sound, and all is soft; LoRA may learn to read what is searched for instead, and acts on that, too, from then on.

A piece of speech is read behind the words that a user's turn begins with, whatever the conversation, so that what is
heard depends on the sound alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blspkd_fairseq.data.batch import Batch, Layout, PlanRow, Rows, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules.beam_search import Lattice, search
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.ragged import pack, pad, rows_of
from blspkd_fairseq.modules.soft_tokens import LOGITS_AT_ONCE, Candidates, SoftTokens, soft_tokens_of

if TYPE_CHECKING:
    from blspkd_fairseq.modules.speech_llm import SpeechLLM

# The prediction is asked for the tokens that the sound finds likeliest, which spares the products with the whole
# vocabulary: the focused posterior of the published model has at most 1e-4 outside of 128, in the mean 1e-6.
CANDIDATES = 128


LEFT_OUT = 6.0
"""Nats by which the best hypothesis of fewer pieces than CIF's sum is rounded to must be the better one: each piece
costs some, and a word may be left out. On 240 rows that no published figure has, 4 to 8 hear alike."""
HOPELESS = 6.0
"""Nats by which the other number of pieces is worse by their likeliest tokens alone, so that it is not searched: a
fifth of those rows, of which it would have been taken in one of thirty."""


class LanguagePrior(NamedTuple):
    """How much the LLM's prediction counts.

    Attributes:
        weight: its power in the posterior, beside that of the sound, 1.
        passes: how often the LLM reads what is heard so far, all places at once.
        opening: ids behind which it reads; without any, the first token is heard by its sound alone.
        beam: hypotheses that are searched, in place of that; 0: none.
        in_training: hear so in training, too, without a gradient; LoRA reads what is found by it.
    """

    weight: float
    passes: int
    opening: tuple[int, ...]
    beam: int = 0
    in_training: bool = False


def other_counts(heard: AdapterOutput) -> Tensor:
    """``[B]`` the whole numbers on the other side of what CIF sums up to, 1 at least; 0 of what has no pieces."""
    assert heard.alpha_sum is not None
    step = torch.where(heard.alpha_sum > heard.lengths, 1, -1)
    return torch.where(heard.lengths > 0, (heard.lengths + step).clamp(min=1), 0)


@torch.no_grad()
def expect(
    model: "SpeechLLM",
    heard: AdapterOutput,
    prior: LanguagePrior,
    may_join: bool = True,
    other: AdapterOutput | None = None,
) -> AdapterOutput:
    """``heard`` with soft tokens under the posterior of sound and prediction, made from its queries.

    A search joins pieces that say one word, unless each is to be a token (``may_join``), and takes the pieces of
    ``other``, the same speech cut into another number of them, where these say something likelier. The device is asked
    for lengths.
    """
    soft = soft_tokens_of(model.adapter)
    if soft is None or heard.queries is None or not any(heard.lengths.tolist()):
        return heard
    if other is None:
        said = _said(model, soft, heard, prior, may_join)
    else:
        both = _paired(heard, other)
        said = _said(model, soft, both, prior, may_join, cuts=2)
        rows = _likelier(said, both.lengths)
        heard, said = _rows_of(both, rows), _Said(*(values[rows] for values in said))
    reads = prior.beam and not prior.in_training
    heard = heard._replace(embeddings=said.embeddings, is_text=said.is_text if reads else None)
    return _join_pieces(heard, said.is_said) if prior.beam and may_join else heard


class _Said(NamedTuple):
    """What R rows of T pieces say.

    Attributes:
        embeddings: ``[R, T, D]``.
        is_said: ``[R, T]`` bool, where a token begins. is_text: where it is one of the LLM's own.
        scores: ``[R]`` nats of the best hypothesis; 0 where none was searched for.
    """

    embeddings: Tensor
    is_said: Tensor
    is_text: Tensor
    scores: Tensor


def _said(
    model: "SpeechLLM",
    soft: SoftTokens,
    heard: AdapterOutput,
    prior: LanguagePrior,
    may_join: bool,
    cuts: int = 1,
) -> _Said:
    """What all rows say, of which so many ``cuts`` are of one piece of speech."""
    assert heard.queries is not None
    counts = heard.lengths.tolist()
    # Whose logits are there at a time: those of the sound, or of all hypotheses.
    at_once = cuts * max(1, LOGITS_AT_ONCE // (len(soft.words) * cuts * max(*counts, prior.beam)))
    parts = []
    for begin in range(0, len(counts), at_once):
        part = slice(begin, begin + at_once)
        longest = max(counts[part])
        queries = heard.queries._replace(vectors=heard.queries.vectors[part, :longest])
        pieces = heard._replace(embeddings=heard.embeddings[part, :longest], queries=queries)
        found = _said_at_once(model, soft, pieces, counts[part], prior, may_join, cuts)
        missing = heard.embeddings.shape[1] - longest
        parts.append(
            _Said(
                F.pad(found.embeddings, (0, 0, 0, missing)),
                F.pad(found.is_said, (0, missing)),
                F.pad(found.is_text, (0, missing)),
                found.scores,
            )
        )
    return _Said(*map(torch.cat, zip(*parts, strict=True)))


def _said_at_once(
    model: "SpeechLLM",
    soft: SoftTokens,
    heard: AdapterOutput,
    counts: list[int],
    prior: LanguagePrior,
    may_join: bool,
    cuts: int,
) -> _Said:
    assert heard.queries is not None
    rows = rows_of(torch.tensor(counts, device=heard.embeddings.device), counts)
    is_heard = ~rows.is_padding
    as_heard = _Said(heard.embeddings, is_heard, torch.zeros_like(is_heard), is_heard.new_zeros(len(counts)).float())
    if not any(counts):
        return as_heard
    sound = soft.candidates(heard.queries._replace(vectors=pack(heard.queries.vectors, rows)), CANDIDATES)
    as_heard = as_heard._replace(embeddings=pad(soft.mean(sound).to(heard.embeddings.dtype), rows))
    says_word = pad(soft.says_word(sound).unsqueeze(1), rows).any(1)[:, 0]
    if prior.beam:
        chosen = says_word if cuts == 1 else _hopeful(sound, rows, says_word)
        return _searched(model, soft, sound, rows, chosen.tolist(), as_heard, prior, may_join)
    better = _read(model, soft, heard._replace(embeddings=as_heard.embeddings), sound, rows, prior)
    return as_heard._replace(embeddings=torch.where(says_word[:, None, None], better, as_heard.embeddings))


def _read(
    model: "SpeechLLM", soft: SoftTokens, heard: AdapterOutput, sound: Candidates, rows: Rows, prior: LanguagePrior
) -> Tensor:
    """Embeddings ``[R, T, D]``, under what the LLM expects after those heard by the sound, of all places at once."""
    batch = _plan(prior.opening, rows.counts, model.share_prefix).to(heard.embeddings.device)
    before = _places_before(batch.student)
    for _ in range(prior.passes):
        hidden = model.hear(heard, batch.student)
        # What no token is before has the prediction of nothing, which is the same for all tokens.
        expected = _logits(model, F.pad(hidden, (0, 0, 1, 0)).index_select(0, before + 1), sound.ids)
        better = soft.mean(sound._replace(logits=sound.logits + prior.weight * expected))
        heard = heard._replace(embeddings=pad(better.to(heard.embeddings.dtype), rows))
    return heard.embeddings


def _searched(
    model: "SpeechLLM",
    soft: SoftTokens,
    sound: Candidates,
    rows: Rows,
    is_chosen: Sequence[bool],
    as_heard: _Said,
    prior: LanguagePrior,
    may_join: bool,
) -> _Said:
    """The tokens of the best hypothesis, in the rows that are chosen."""
    chosen = [row for row, is_one in enumerate(is_chosen) if is_one]
    if not chosen:
        return as_heard
    lattice = Lattice(pad(sound.ids, rows), pad(sound.logits, rows), pad(soft.words[sound.ids], rows), rows.counts)
    best = search(model, lattice.of(chosen), prior.opening, prior.weight, prior.beam, may_join)
    tokens = best.tokens[:, 0]
    is_said = tokens >= 0
    embeddings = (soft.embedded(tokens.clamp(min=0)) * is_said.unsqueeze(2)).to(as_heard.embeddings.dtype)
    place = torch.tensor(chosen, device=tokens.device)
    found = (embeddings, is_said, is_said, best.scores[:, 0])
    return _Said(*(values.index_copy(0, place, new) for values, new in zip(as_heard, found, strict=True)))


# ---- two numbers of pieces ------------------------------------------------------------------------------------------


def _hopeful(sound: Candidates, rows: Rows, says_word: Tensor) -> Tensor:
    """``[2 R]`` bool, of pairs of rows: the first that say a word, and the second if they may be likelier."""
    likeliest = pad(sound.logits.log_softmax(1)[:, :1], rows).sum((1, 2))
    one, other = likeliest.view(-1, 2).unbind(1)
    may_be = other - _handicap(rows.lengths) >= one - HOPELESS
    first, second = says_word.view(-1, 2).unbind(1)
    return torch.stack([first, first & second & may_be], 1).flatten()


def _likelier(said: _Said, lengths: Tensor) -> Tensor:
    """``[R]`` of each pair the row whose best hypothesis is the likelier."""
    one, other = said.scores.view(-1, 2).unbind(1)
    is_other = said.is_text[1::2].any(1) & (other - _handicap(lengths) > one)
    return 2 * torch.arange(len(one), device=one.device) + is_other


def _handicap(lengths: Tensor) -> Tensor:
    """``[R]`` of the second rows of pairs of so many pieces."""
    return torch.where(lengths[1::2] < lengths[::2], LEFT_OUT, 0.0)


def _paired(one: AdapterOutput, other: AdapterOutput) -> AdapterOutput:
    """The rows of both by turns."""
    assert one.queries is not None and other.queries is not None
    width = max(one.embeddings.shape[1], other.embeddings.shape[1])

    def both(*values: Tensor) -> Tensor:
        wide = [F.pad(v, (0, 0) * (v.dim() - 2) + (0, width - v.shape[1])) for v in values]
        return torch.stack(wide, 1).flatten(0, 1)

    boundaries = None
    if one.boundaries is not None and other.boundaries is not None:
        boundaries = both(one.boundaries, other.boundaries)
    return one._replace(
        embeddings=both(one.embeddings, other.embeddings),
        lengths=torch.stack([one.lengths, other.lengths], 1).flatten(),
        boundaries=boundaries,
        queries=one.queries._replace(vectors=both(one.queries.vectors, other.queries.vectors)),
    )


def _rows_of(both: AdapterOutput, rows: Tensor) -> AdapterOutput:
    """Rows of pairs."""
    assert both.queries is not None
    return both._replace(
        embeddings=both.embeddings[rows],
        lengths=both.lengths[rows],
        boundaries=None if both.boundaries is None else both.boundaries[rows],
        queries=both.queries._replace(vectors=both.queries.vectors[rows]),
    )


def _join_pieces(heard: AdapterOutput, is_said: Tensor) -> AdapterOutput:
    """Without the pieces in which no token begins; they are the end of the one before."""
    lengths, pieces = is_said.sum(1), is_said.shape[1]
    longest = int(lengths.max())  # nothing is wider: who asks for one row takes all of it
    kept = is_said.int().argsort(stable=True, dim=1, descending=True)  # those said, in their order, come first
    place = torch.arange(pieces, device=is_said.device)
    is_last = place + 1 >= lengths.unsqueeze(1)
    ends = torch.where(is_last, heard.lengths.unsqueeze(1), F.pad(kept[:, 1:], (0, 1))) - 1
    is_padding = (place >= lengths.unsqueeze(1)).unsqueeze(2)

    def taken(values: Tensor, places: Tensor) -> Tensor:
        places = places.clamp(min=0).unsqueeze(2).expand(-1, -1, values.shape[2])
        return values.gather(1, places).masked_fill(is_padding, 0)[:, :longest]

    assert heard.queries is not None
    boundaries = None if heard.boundaries is None else taken(heard.boundaries.unsqueeze(2), ends).squeeze(2)
    is_text = None if heard.is_text is None else taken(heard.is_text.unsqueeze(2), kept).squeeze(2)
    return heard._replace(
        embeddings=taken(heard.embeddings, kept),
        lengths=lengths,
        boundaries=boundaries,
        queries=heard.queries._replace(vectors=taken(heard.queries.vectors, kept)),
        is_text=is_text,
    )


def _logits(model: "SpeechLLM", hidden: Tensor, ids: Tensor) -> Tensor:
    """``[N, K]`` of the tokens ``ids`` [N, K] after the LLM's hidden states ``[N, D]``, in fp32."""
    weight, bias = model.head
    products = (F.embedding(ids, weight) @ hidden.unsqueeze(2)).squeeze(2)
    products = (products if bias is None else products + bias[ids]).float()
    transform = model.logit_transform
    return products if transform is None else transform.apply_(products)[0]


def _plan(opening: Sequence[int], counts: Sequence[int], share_prefix: bool) -> Batch:
    """Each piece of speech by itself behind the opening."""
    rows = [PlanRow([opening, Speech(0)], [[0] * count], [count], [], [i]) for i, count in enumerate(counts)]
    return plan_batch(rows, counts, with_response=False, share_prefix=share_prefix)


def _places_before(layout: Layout) -> Tensor:
    """``[N]`` the places that predict the N speech embeddings; -1 for those before which there is nothing."""
    rows, speech = layout.rows, layout.speech
    assert rows.order is not None and rows.place is not None
    first = layout.positions[:speech] == rows.prefix
    before = rows.order[rows.place[:speech] - 1]
    return torch.where(first, rows.order[rows.prefix - 1] if rows.prefix else -1, before)
