"""Whether an LLM does with embeddings what it does with tokens: speech has none."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blspkd_fairseq import compat
from blspkd_fairseq.modules.decoder_block import KnownDecoder
from blspkd_fairseq.modules.packed_llm import relative_difference

_TOLERANCE = 0.1  # relative; a scan in half precision and its steps make .02, what is wrong makes .3 and more
_STIRRED = 0.1  # of the standard deviation of embeddings, so that they are no rows of the table


@torch.no_grad()
def check_llm(llm: PreTrainedModel, name: str) -> None:
    """Tries to read embeddings and to answer what was read, as training and decoding do it.

    Some LLMs look token ids up again in every layer; some cannot go on from embeddings that they have read, or go on
    wrongly. Layers that are known need no trial.

    Raises:
        ValueError: it does one of these things.
    """
    if KnownDecoder.fits(llm):
        return
    kind = f"{name} is an LLM of the kind {llm.config.model_type}, which"
    table = llm.get_input_embeddings()
    ids = (torch.arange(8, device=table.weight.device) % table.num_embeddings).unsqueeze(0)
    try:
        reading, expected = _read(llm, table(ids)), llm(input_ids=ids, use_cache=False).logits
        answering, likewise = _answer(llm, ids)
    except Exception as error:  # whatever an architecture raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{kind} cannot read speech and answer it: choose another LLM ({reason})") from error
    if not relative_difference(reading, expected) < _TOLERANCE:
        raise ValueError(
            f"{kind} reads tokens otherwise than their embeddings, and speech has no tokens: choose another LLM"
        )
    if not relative_difference(answering, likewise) < _TOLERANCE:
        raise ValueError(
            f"{kind} answers otherwise when it goes on from embeddings that it has read: choose another LLM"
        )


def _read(llm: PreTrainedModel, embeds: Tensor) -> Tensor:
    """Logits ``[1, L, V]`` of embeddings; some that are no token's can be read, too."""
    stirred = embeds + _STIRRED * embeds.float().std() * torch.arange(embeds.numel()).cos().view_as(embeds).to(embeds)
    llm(inputs_embeds=stirred, use_cache=False)
    logits: Tensor = llm(inputs_embeds=embeds, use_cache=False).logits
    return logits


def _answer(llm: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[2, V]`` of two tokens that follow a prompt which was read before, and those of reading all at once."""
    embeds = llm.get_input_embeddings()(ids)
    read = llm.get_decoder()(inputs_embeds=embeds[:, :-1], use_cache=True)
    assert len(read.last_hidden_state) == 1  # and no logits: the decoder is not the LLM itself
    found = llm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=2,
        max_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
        **compat.cache_argument(compat.cache_of(read)),
    )
    whole = torch.cat([ids, found.sequences[:, :1]], 1)
    return torch.cat(found.logits), llm(input_ids=whole, use_cache=False).logits[0, -2:]
