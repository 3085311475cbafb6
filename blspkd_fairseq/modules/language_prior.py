"""What the LLM expects, beside what is heard: a prior over soft tokens.

As speech recognisers add the logits of a language model to their own (shallow fusion, arXiv 1503.03535), the posterior
of a soft token becomes ``p(w | sound) p(w | what is before)^weight``. The language model is the LLM itself, and what is
before are the soft tokens, of all places at once: the LLM reads what was heard, and its prediction at each place helps
to hear the next one; read again, the better tokens make a better prediction.

Whether anybody speaks is for the sound to say: a piece of which it says no word, as silence, stays as it was heard.

Only in use: in training the adapter learns from the sound. A piece of speech is read behind the words that a user's
turn begins with, whatever the conversation, so that what is heard depends on the sound alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blspkd_fairseq.data.batch import Batch, Layout, PlanRow, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.ragged import pack, pad
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
        passes: how often the LLM reads what is heard so far.
        opening: ids behind which it reads; without any, the first token is heard by its sound alone.
    """

    weight: float
    passes: int
    opening: tuple[int, ...]


@torch.no_grad()
def expect(model: "SpeechLLM", heard: AdapterOutput, prior: LanguagePrior) -> AdapterOutput:
    """``heard`` with soft tokens under the posterior of sound and prediction, made from its queries.

    The device is asked for its lengths.
    """
    soft = soft_tokens_of(model.adapter)
    counts = heard.lengths.tolist()
    if soft is None or heard.queries is None or not any(counts):
        return heard
    at_once = max(1, LOGITS_AT_ONCE // (len(soft.words) * max(counts)))  # whose logits are there at a time
    embeddings = []
    for begin in range(0, len(counts), at_once):
        part = slice(begin, begin + at_once)
        longest = max(counts[part])
        queries = heard.queries._replace(vectors=heard.queries.vectors[part, :longest])
        pieces = heard._replace(embeddings=heard.embeddings[part, :longest], queries=queries)
        found = _expect_at_once(model, soft, pieces, counts[part], prior)
        embeddings.append(F.pad(found, (0, 0, 0, heard.embeddings.shape[1] - longest)))
    return heard._replace(embeddings=torch.cat(embeddings))


def _expect_at_once(
    model: "SpeechLLM", soft: SoftTokens, heard: AdapterOutput, counts: list[int], prior: LanguagePrior
) -> Tensor:
    """Embeddings ``[B, U, D]``, as those heard."""
    if not any(counts):
        return heard.embeddings
    batch = _plan(prior.opening, counts, model.share_prefix).to(heard.embeddings.device)
    before = _places_before(batch.student)
    assert heard.queries is not None
    sound = soft.candidates(heard.queries._replace(vectors=pack(heard.queries.vectors, batch.pieces)), CANDIDATES)

    def embedded(candidates: Candidates) -> Tensor:
        return pad(soft.mean(candidates).to(heard.embeddings.dtype), batch.pieces)

    tokens = by_sound = embedded(sound)
    for _ in range(prior.passes):
        hidden = model.hear(heard._replace(embeddings=tokens), batch.student)
        # What no token is before has the prediction of nothing, which is the same for all tokens.
        expected = _logits(model, F.pad(hidden, (0, 0, 1, 0)).index_select(0, before + 1), sound.ids)
        tokens = embedded(sound._replace(logits=sound.logits + prior.weight * expected))
    says_word = pad(soft.says_word(sound).unsqueeze(1), batch.pieces).any(1, keepdim=True)
    return torch.where(says_word, tokens, by_sound)


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
