"""What the LLM expects, beside what is heard: a prior over soft tokens.

As speech recognisers add the logits of a language model to their own (shallow fusion, arXiv 1503.03535), the posterior
of a soft token becomes ``p(w | sound) p(w | what is before)^weight``. The language model is the LLM itself. What is
before is searched for, by a beam over whole hypotheses (:mod:`blspkd_fairseq.modules.beam_search`); or it is the soft
tokens, of all places at once: the LLM reads what was heard, and its prediction at each place helps to hear the next
one; read again, the better tokens make a better prediction.

Whether anybody speaks is for the sound to say: a piece of which it says no word, as silence, stays as it was heard.

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


@torch.no_grad()
def expect(model: "SpeechLLM", heard: AdapterOutput, prior: LanguagePrior, may_join: bool = True) -> AdapterOutput:
    """``heard`` with soft tokens under the posterior of sound and prediction, made from its queries.

    A search joins pieces that say one word, unless each is to be a token (``may_join``). The device is asked for
    lengths.
    """
    soft = soft_tokens_of(model.adapter)
    counts = heard.lengths.tolist()
    if soft is None or heard.queries is None or not any(counts):
        return heard
    # Whose logits are there at a time: those of the sound, or of all hypotheses.
    at_once = max(1, LOGITS_AT_ONCE // (len(soft.words) * max(*counts, prior.beam)))
    embeddings, said, text = [], [], []
    for begin in range(0, len(counts), at_once):
        part = slice(begin, begin + at_once)
        longest = max(counts[part])
        queries = heard.queries._replace(vectors=heard.queries.vectors[part, :longest])
        pieces = heard._replace(embeddings=heard.embeddings[part, :longest], queries=queries)
        found = _expect_at_once(model, soft, pieces, counts[part], prior, may_join)
        missing = heard.embeddings.shape[1] - longest
        embeddings.append(F.pad(found.embeddings, (0, 0, 0, missing)))
        said.append(F.pad(found.is_said, (0, missing)))
        text.append(F.pad(found.is_text, (0, missing)))
    reads = prior.beam and not prior.in_training
    heard = heard._replace(embeddings=torch.cat(embeddings), is_text=torch.cat(text) if reads else None)
    return _join_pieces(heard, torch.cat(said)) if prior.beam and may_join else heard


class _Said(NamedTuple):
    """What R rows of T pieces say.

    Attributes:
        embeddings: ``[R, T, D]``.
        is_said: ``[R, T]`` bool, where a token begins. is_text: where it is one of the LLM's own.
    """

    embeddings: Tensor
    is_said: Tensor
    is_text: Tensor


def _expect_at_once(
    model: "SpeechLLM",
    soft: SoftTokens,
    heard: AdapterOutput,
    counts: list[int],
    prior: LanguagePrior,
    may_join: bool,
) -> _Said:
    assert heard.queries is not None
    rows = rows_of(torch.tensor(counts, device=heard.embeddings.device), counts)
    is_heard = ~rows.is_padding
    if not any(counts):
        return _Said(heard.embeddings, is_heard, torch.zeros_like(is_heard))
    sound = soft.candidates(heard.queries._replace(vectors=pack(heard.queries.vectors, rows)), CANDIDATES)
    by_sound = pad(soft.mean(sound).to(heard.embeddings.dtype), rows)
    if prior.beam:
        said = _search(model, soft, sound, rows, prior, may_join)
    else:
        better = _read(model, soft, heard._replace(embeddings=by_sound), sound, rows, prior)
        said = _Said(better, is_heard, torch.zeros_like(is_heard))
    says_word = pad(soft.says_word(sound).unsqueeze(1), rows).any(1)
    return _Said(
        torch.where(says_word.unsqueeze(2), said.embeddings.to(by_sound.dtype), by_sound),
        torch.where(says_word, said.is_said, is_heard),
        said.is_text & says_word,
    )


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


def _search(
    model: "SpeechLLM", soft: SoftTokens, sound: Candidates, rows: Rows, prior: LanguagePrior, may_join: bool
) -> _Said:
    """The tokens of the best hypothesis."""
    spoken = [row for row, count in enumerate(rows.counts) if count]
    lattice = Lattice(
        pad(sound.ids, rows)[spoken],
        pad(sound.logits, rows)[spoken],
        pad(soft.words[sound.ids], rows)[spoken],
        [rows.counts[row] for row in spoken],
    )
    best = search(model, lattice, prior.opening, prior.weight, prior.beam, may_join).tokens[:, 0]
    tokens = best.new_full((len(rows.counts), rows.longest), -1)
    tokens[spoken] = best
    is_said = tokens >= 0
    return _Said(soft.embedded(tokens.clamp(min=0)) * is_said.unsqueeze(2), is_said, is_said)


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
