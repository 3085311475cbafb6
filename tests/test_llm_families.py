"""What transformers can make from a small configuration, read in packed rows or in padded ones, against itself."""

from typing import Any

import pytest
import torch
from tiny import wake_lora
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blspkd_fairseq.data.batch import Batch, PlanRow, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules.beam_search import check_can_search
from blspkd_fairseq.modules.build import find_logit_transform
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy
from blspkd_fairseq.modules.llm_trial import check_llm
from blspkd_fairseq.modules.partial_lora import add_partial_lora
from blspkd_fairseq.modules.speech_llm import ChatLLM

WORDS = 60
HYBRID = {"num_hidden_layers": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "gpt_oss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "gpt_neox": {},
    "qwen3_5_text": {**HYBRID, "head_dim": 8},
    "lfm2": {**HYBRID, "block_dim": 32, "layer_types": ["conv", "full_attention"] * 2},
    "jamba": {**HYBRID, "mamba_d_state": 8, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
              "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {**HYBRID, "num_local_experts": 0, "shared_intermediate_size": 64, "mamba_n_heads": 8,
                         "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                         "layer_types": ["mamba", "attention"] * 2, "layers_block_type": ["mamba", "attention"] * 2},
}  # fmt: skip
# Recurrent or convolutional layers, or positions that are added to the logits.
PADDED = {"bloom", "qwen3_5_text", "lfm2", "jamba", "granitemoehybrid"}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": WORDS, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, **sizes, **FAMILIES[kind]},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # They look token ids up in every layer.
    "gemma3n_text": ({**HYBRID, "head_dim": 8, "sliding_window": 4,
                      "layer_types": ["sliding_attention", "full_attention"] * 2,
                      "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
                      "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2},
                     "speech has no tokens"),
    "gemma4_text": ({**HYBRID, "head_dim": 8, "global_head_dim": 8, "sliding_window": 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": WORDS,
                     "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}, "cannot read speech"),
    # Their states do not go on from embeddings, or not rightly.
    "mamba": ({"state_size": 8}, "answers otherwise"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "answers otherwise"),
    "rwkv": ({"attention_hidden_size": 32}, "cannot read speech"),
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
                  "cannot read speech"),
    # Its decoder is the LLM itself.
    "llama4_text": ({**HYBRID, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                     "attention_chunk_size": 4, "intermediate_size_mlp": 64}, "cannot read speech"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_reads_and_answers_embeddings_is_taken(kind: str) -> None:
    check_llm(make(kind), kind)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_is_refused_before_anything_is_trained(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = REFUSED[kind]
    monkeypatch.setitem(FAMILIES, kind, options)
    try:
        llm = make(kind)
    except (KeyError, ValueError, ImportError, AttributeError) as error:
        pytest.skip(f"this transformers makes no {kind}: {error}")
    for name, parameter in llm.named_parameters():
        if "norm" not in name and parameter.numel() > 1 and parameter.std() < 1e-6:
            torch.nn.init.normal_(parameter, std=0.3)  # what begins at 0 hides what it would do
    with pytest.raises(ValueError, match=f"the kind {kind}.*{message}"):
        check_llm(llm, kind)


def plan(share_prefix: bool) -> Batch:
    """Conversations of one and two pieces of speech that begin alike."""
    ids = iter(torch.randint(3, WORDS, (200,), generator=torch.Generator().manual_seed(0)).tolist())

    def some(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    prefix = some(6)
    rows = [
        PlanRow([prefix + some(1), Speech(0), some(2)], [some(3)], [16_000], some(4), [0]),
        PlanRow([prefix, Speech(0), some(3), Speech(1), some(1)], [some(2), some(4)], [9_000] * 2, some(2), [1, 2]),
        PlanRow([prefix, Speech(0), some(1)], [some(1)], [4_000], some(5), [3]),
    ]
    return plan_batch(rows, share_prefix=share_prefix)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_row_is_read_as_the_plain_llm_reads_it(kind: str, share_prefix: bool) -> None:
    llm = make(kind)
    model, layout = ChatLLM(llm), plan(share_prefix).teacher
    assert model.reads_packed == (kind not in PADDED)
    assert layout.rows.prefix == (6 if share_prefix else 0)
    hidden = model.teach(layout)
    order = layout.rows.order
    prefix, *rows = layout.ids[order].split([layout.rows.prefix, *layout.rows.counts])
    places = order[layout.rows.prefix :].split(layout.rows.counts)
    with torch.no_grad():
        for ids, place in zip(rows, places, strict=True):
            whole = torch.cat([prefix, ids])[None]
            expected = llm.get_decoder()(input_ids=whole, use_cache=False).last_hidden_state[0][len(prefix) :]
            torch.testing.assert_close(hidden[place], expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(layout.positions[places[0]], torch.arange(len(prefix), len(prefix) + len(rows[0])))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss", "gpt2", "qwen3_5_text", "opt"])
def test_partial_lora_moves_what_follows_the_speech_and_the_same_with_and_without_a_shared_prefix(kind: str) -> None:
    llm = make(kind)
    targets = None if kind != "gpt_oss" else ["q_proj", "v_proj"]
    add_partial_lora(llm, rank=2, dropout=0.0, target_modules=targets)
    wake_lora(llm)
    model = ChatLLM(llm, "speech")
    found = []
    for share_prefix in (True, False):
        layout = plan(share_prefix).teacher
        embeds = model.embed(layout.ids).requires_grad_()
        student = model.hidden(embeds, layout, model.speech_places(layout))
        assert (student - model.teach(layout)).abs().max() > 1e-3
        places = torch.cat([torch.arange(layout.speech), layout.response])
        (student[places] * torch.arange(len(places)).unsqueeze(1).cos()).sum().backward()
        assert embeds.grad is not None
        gradients = [p.grad.clone() for p in llm.parameters() if p.grad is not None]
        llm.zero_grad()
        found.append((student[places].detach(), embeds.grad[: layout.speech], *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_heads_with_scaled_or_capped_logits(kind: str) -> None:
    llm = make(kind)
    transform = find_logit_transform(llm, kind)
    assert (transform is None) == (kind == "llama")
    ids = torch.arange(3, 13)
    hidden = llm.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0].detach().requires_grad_()
    weight = llm.get_output_embeddings().weight.detach()
    linear_cross_entropy(hidden, ids, weight, chunk_size=3, transform=transform).sum().backward()
    logits = llm(input_ids=ids[None]).logits[0]
    plain = hidden.detach().clone().requires_grad_()
    given = plain @ weight.t()
    if transform is not None:
        given = transform.scale * given
        given = given if transform.cap is None else transform.cap * torch.tanh(given / transform.cap)
    torch.testing.assert_close(given, logits, atol=1e-4, rtol=1e-4)
    torch.nn.functional.cross_entropy(given, ids, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, plain.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_llm_whose_state_cannot_stay_behind_is_not_searched_by(kind: str) -> None:
    model = ChatLLM(make(kind))
    if kind in PADDED and kind != "bloom":
        with pytest.raises(ValueError, match="cannot be searched by .it reads on otherwise than afresh"):
            check_can_search(model)
    else:
        check_can_search(model)
