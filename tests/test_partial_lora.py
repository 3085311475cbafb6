"""Partial LoRA: on speech positions only, and otherwise the base LLM bit for bit."""

import copy
from contextlib import nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import wake_lora
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from blspkd_fairseq import compat
from blspkd_fairseq.modules.checkpointing import enable_gradient_checkpointing
from blspkd_fairseq.modules.partial_lora import (
    ALL_POSITIONS,
    PartialLoraLinear,
    add_partial_lora,
    speech_positions,
)

MASK = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
IDS = torch.arange(14).view(2, 7) + 3


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@torch.enable_grad()
def trained(llm: PreTrainedModel) -> PreTrainedModel:
    """With Partial LoRA that has learned something."""
    add_partial_lora(llm, rank=4, alpha=8.0, dropout=0.0)
    optimizer = torch.optim.SGD([p for p in llm.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        with speech_positions(llm, MASK):
            loss = llm(IDS).logits[:, -1].logsumexp(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return llm


def test_without_a_mask_it_is_the_base_llm_bit_for_bit_after_training() -> None:
    base = llama()
    expected = base(IDS).logits
    llm = trained(copy.deepcopy(base))
    assert torch.equal(llm(IDS).logits, expected)
    with speech_positions(llm, torch.zeros_like(MASK)):
        assert torch.equal(llm(IDS).logits, expected)
    with speech_positions(llm, MASK):
        changed = (llm(IDS).logits - expected).abs().amax(2) > 1e-4
        with speech_positions(llm, None):  # blocks nest: the teacher inside the student's
            assert torch.equal(llm(IDS).logits, expected)
        assert ((llm(IDS).logits - expected).abs().amax(2) > 1e-4).equal(changed)
    assert torch.equal(llm(IDS).logits, expected)
    # Positions before the first speech position cannot have changed; those from it on have.
    assert not changed[0, :2].any() and changed[0, 2:].all()
    assert not changed[1, :1].any() and changed[1, 1:].all()


def test_equals_the_formula_on_one_layer() -> None:
    llm = trained(llama())
    layer = next(m for m in llm.modules() if isinstance(m, PartialLoraLinear))
    x = torch.randn(2, 7, 16)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + MASK.unsqueeze(2) * (x @ down.t() @ up.t()) * 2.0  # alpha / rank
    with speech_positions(llm, MASK):
        torch.testing.assert_close(layer(x), expected)
    assert up.abs().sum() > 0


def test_only_lora_is_trained_and_in_fp32() -> None:
    llm = add_partial_lora(llama().to(torch.bfloat16), rank=2)
    learned = {name: p for name, p in llm.named_parameters() if p.requires_grad}
    assert learned and all("lora_" in name and p.dtype == torch.float32 for name, p in learned.items())
    # 7 linear layers in each of 2 decoder layers, 2 matrices each; the head has none
    assert len(learned) == 2 * 7 * 2
    with speech_positions(llm, MASK):
        assert llm(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("llm", "linear_layers"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), 4),  # fused, Conv1D
        (
            Phi3ForCausalLM(
                Phi3Config(
                    vocab_size=50,
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    pad_token_id=0,
                )
            ),
            4,  # qkv_proj, o_proj, gate_up_proj, down_proj
        ),
    ],
    ids=["gpt2", "phi3"],
)
def test_finds_fused_projections(llm: PreTrainedModel, linear_layers: int) -> None:
    expected = llm.eval()(IDS).logits
    add_partial_lora(llm, rank=2)
    layers = [m for m in llm.modules() if isinstance(m, PartialLoraLinear)]
    assert len(layers) == linear_layers
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    assert torch.equal(llm(IDS).logits, expected)
    with speech_positions(llm, MASK):
        changed = (llm(IDS).logits - expected).abs().amax(2) > 1e-6
    assert not changed[0, :2].any() and changed[0, 2:].all()


def test_chosen_target_modules() -> None:
    llm = add_partial_lora(llama(), rank=2, target_modules=["q_proj", "v_proj"])
    names = {name.split(".")[-1] for name, m in llm.named_modules() if isinstance(m, PartialLoraLinear)}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="no_such_layer"):
        add_partial_lora(llama(), target_modules=["no_such_layer"])

    with pytest.raises(ValueError, match="no linear layers named foo: choose target modules from .*q_proj"):
        add_partial_lora(llama(), target_modules=["q_proj", "foo"])
    with pytest.raises(ValueError, match="dropout"):
        add_partial_lora(llama(), dropout=-1.0)


_SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**_SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=4),
        Qwen3MoeConfig(
            **_SMALL, intermediate_size=24, moe_intermediate_size=12, num_key_value_heads=2, num_experts=4, head_dim=8,
            num_experts_per_tok=2,
        ),
        OlmoeConfig(**_SMALL, intermediate_size=24, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
        Qwen2MoeConfig(
            **_SMALL, intermediate_size=24, moe_intermediate_size=12, shared_expert_intermediate_size=12,
            num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        ),
        OPTConfig(**_SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0),
    ],
    ids=["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "opt"],
)  # fmt: skip
def test_mixtures_of_experts_and_flattened_positions(config: PreTrainedConfig) -> None:
    """peft would add its own LoRA to fused experts, on text, too; OPT gives its layers [B x L, D]."""
    llm = AutoModelForCausalLM.from_config(config).eval()
    expected = llm(IDS).logits
    add_partial_lora(llm, rank=2, dropout=0.0)
    wake_lora(llm, 1.0)
    assert torch.equal(llm(IDS).logits, expected)
    with speech_positions(llm, MASK):
        changed = (llm(IDS).logits - expected).abs().amax(2) > 1e-6
    assert not changed[0, :2].any() and changed[0, 2:].all()
    assert not changed[1, :1].any() and changed[1, 1:].all()


def test_a_mask_of_another_kind_is_refused() -> None:
    for mask in (MASK.numpy(), MASK.tolist()):
        with pytest.raises(ValueError, match="the speech mask must be a tensor"):
            speech_positions(trained(llama()), mask)


def test_a_mask_of_another_shape_raises() -> None:
    llm = trained(llama())
    with speech_positions(llm, MASK), pytest.raises(ValueError, match="speech mask"):
        llm(IDS[:, :-1])
    cache = compat.cache_of(llm(IDS, use_cache=True))
    with speech_positions(llm, MASK), pytest.raises(ValueError, match="cached decoding"):
        llm(IDS[:, :1], **compat.cache_argument(cache))
    assert torch.equal(llm(IDS).logits, llm(IDS).logits)  # the failed block has put its mask away
    with pytest.raises(ValueError, match="add_partial_lora"), speech_positions(llama(), MASK):
        pass


def recomputed(llm: PreTrainedModel, generated: Tensor) -> Tensor:
    """Logits of each generated step from a full forward pass without a cache."""
    ids = torch.cat([IDS, generated], 1)
    mask = torch.cat([MASK, torch.zeros_like(generated, dtype=torch.bool)], 1)
    with speech_positions(llm, mask):
        return llm(ids, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]


def cached_generation(llm: PreTrainedModel, beams: int) -> Tensor:
    """Prefill under the mask, then plain decoding from the cache."""
    with speech_positions(llm, MASK[:, :-1]):
        cache = compat.cache_of(llm(IDS[:, :-1], use_cache=True))
    assert isinstance(cache, DynamicCache)
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    out = llm.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8,
        do_sample=False, num_beams=beams, **compat.cache_argument(cache),
    )  # fmt: skip
    return out[:, IDS.shape[1] :]


@torch.no_grad()
def test_greedy_decoding_from_the_cache_equals_full_recomputation() -> None:
    llm = trained(llama())
    generated = cached_generation(llm, beams=1)
    logits = recomputed(llm, generated)
    logits[..., 1] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits.argmax(2), generated)
    assert not torch.equal(generated, llm.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, 7:])


@torch.no_grad()
def test_beam_search_from_the_cache_equals_full_recomputation() -> None:
    llm = trained(llama())

    def best(ids: Tensor, mask: Tensor, beams: int = 3, steps: int = 8) -> list[int]:
        """Beam search over one utterance, every step recomputed from nothing."""
        hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(steps):
            grown = []
            for score, tokens in hypotheses:
                full = torch.cat([ids, torch.tensor(tokens, dtype=torch.long)])[None]
                speech = torch.cat([mask, torch.zeros(len(tokens), dtype=torch.bool)])[None]
                with speech_positions(llm, speech):
                    log_p = llm(full, use_cache=False).logits[0, -1].log_softmax(0)
                log_p[1] = -torch.inf
                grown += [(score + float(v), [*tokens, int(i)]) for v, i in zip(*log_p.topk(beams), strict=True)]
            hypotheses = sorted(grown, key=lambda pair: -pair[0])[:beams]
        return hypotheses[0][1]

    generated = cached_generation(llm, beams=3)
    assert generated.tolist() == [best(IDS[b], MASK[b]) for b in range(2)]


def test_all_positions_is_ordinary_lora() -> None:
    llm = trained(llama())
    with speech_positions(llm, ALL_POSITIONS):
        everywhere = llm(IDS).logits
    with speech_positions(llm, torch.ones_like(MASK)):
        torch.testing.assert_close(llm(IDS).logits, everywhere)


def test_gradient_checkpointing_recomputes_under_the_mask_of_its_forward() -> None:
    llm = trained(llama())

    def gradients() -> list[Tensor]:
        llm.zero_grad()
        with speech_positions(llm, MASK):
            loss = llm(IDS, use_cache=False).logits.square().sum()
        loss.backward()  # outside the block
        return [p.grad.clone() for p in llm.parameters() if p.grad is not None]

    expected = gradients()
    enable_gradient_checkpointing(llm)
    llm.train()
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_save_and_load(tmp_path: Path) -> None:
    llm = trained(llama())
    state = {name: p for name, p in llm.state_dict().items() if "lora_" in name}
    torch.save(state, tmp_path / "lora.pt")
    other = add_partial_lora(llama(), rank=4, alpha=8.0, dropout=0.0)
    missing = other.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert not missing.unexpected_keys
    with speech_positions(llm, MASK), speech_positions(other, MASK):
        assert torch.equal(llm(IDS).logits, other(IDS).logits)


def test_cannot_be_added_twice_or_merged() -> None:
    llm = add_partial_lora(llama())
    with pytest.raises(ValueError, match="already"):
        add_partial_lora(llm)
    with pytest.raises(ValueError, match="rank"):
        add_partial_lora(llama(), rank=0)
    with pytest.raises(ValueError, match="merged"):
        next(m for m in llm.modules() if isinstance(m, PartialLoraLinear)).merge()


# --- what transformers renamed


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_passed_by_the_name_of_the_installed_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    output = make_dataclass("Output", ["last_hidden_state", name])
    monkeypatch.setattr("transformers.modeling_outputs.BaseModelOutputWithPast", output)
    monkeypatch.setattr(compat.llm, "_cache_name", compat.llm._cache_name.__wrapped__)
    assert compat.cache_argument(3) == {name: 3}
    assert compat.cache_of(output(None, 4)) == 4


@pytest.mark.filterwarnings("error::FutureWarning")
def test_nothing_deprecated_is_called() -> None:
    llm = trained(llama())
    cached_generation(llm, beams=2)
    enable_gradient_checkpointing(llm)


def fairseq_adam(parameters: list[torch.nn.Parameter]) -> object:
    from argparse import Namespace

    from fairseq.optim.adam import FairseqAdam

    options = {"lr": [0.1], "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8, "weight_decay": 0.0}
    more = {"use_old_adam": True, "fp16_adam_stats": False, "tpu": False}
    return FairseqAdam(Namespace(**options, **more), parameters)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "foreach adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "fairseq's adam": fairseq_adam,
}


@pytest.mark.parametrize("is_one_block", [False, True], ids=["a block each", "one block"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_products_in_bf16_are_of_the_weights_as_they_are(name: str, is_one_block: bool) -> None:
    llm = trained(llama())
    llm.partial_lora_state.products = torch.bfloat16
    parameters = [p for p in llm.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](parameters)
    outer = speech_positions(llm, MASK) if is_one_block else nullcontext()
    with outer:
        for _ in range(3):
            with nullcontext() if is_one_block else speech_positions(llm, MASK):
                found = llm(IDS).logits
            fresh = add_partial_lora(llama(), rank=4, alpha=8.0, dropout=0.0)
            fresh.load_state_dict(llm.state_dict())
            fresh.partial_lora_state.products = torch.bfloat16
            with speech_positions(fresh, MASK):
                assert torch.equal(fresh(IDS).logits, found)
            optimizer.zero_grad()
            found[:, -1].logsumexp(1).sum().backward()
            before = [p.detach().clone() for p in parameters]
            optimizer.step()
            assert not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


class Casts(TorchDispatchMode):
    """Counts weights that are cast."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.places = {weight.data_ptr() for weight in weights}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.count += len(args[1])
        elif func is torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() in self.places
        return func(*args, **(kwargs or {}))


def test_a_recomputed_layer_casts_its_own_matrices_alone() -> None:
    gradients, counts = [], []
    for is_recomputed in (False, True):
        llm = trained(llama()).bfloat16()
        for parameter in (parameters := [p for p in llm.parameters() if p.requires_grad]):
            parameter.data = parameter.float()
        llm.partial_lora_state.products = torch.bfloat16
        if is_recomputed:
            enable_gradient_checkpointing(llm)
        llm.zero_grad()
        with speech_positions(llm, MASK), Casts(parameters) as forward:
            loss = llm.train()(IDS).logits[:, -1].logsumexp(1).sum()
        with Casts(parameters) as backward:
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        counts.append((forward.count, backward.count))
    assert counts == [(len(parameters), 0), (len(parameters), len(parameters))]
    assert torch.equal(*gradients)
