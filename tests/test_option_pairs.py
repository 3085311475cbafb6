"""Options that touch the same part of the model, in pairs: recomputed activations must not change a number."""

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import save_llm, save_whisper, wake_lora, write_split
from torch import Tensor

import blspkd_fairseq
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm

blspkd_fairseq.register()

from blspkd_fairseq.criterions.kl_distillation import TERMS, KlDistillationConfig, KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import (  # noqa: E402
    OnPolicyDistillationConfig,
    OnPolicyDistillationCriterion,
)
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

LEVERS: dict[str, tuple[Any, ...]] = {
    "lora_scope": ("speech", "all", "none"),
    "no_shared_prefix": (False, True),
    "unfreeze_speech_encoder": (False, True),
    "adapter": ("cformer", "cnn", "pif"),
    "term": (*(term.option for term in TERMS), "all", "on_policy"),
    "llm_dtype": ("float32", "bfloat16"),
    "packed": (True, False),
}


class Case(NamedTuple):
    """A choice from each of :data:`LEVERS`."""

    lora_scope: str
    no_shared_prefix: bool
    unfreeze_speech_encoder: bool
    adapter: str
    term: str
    llm_dtype: str
    packed: bool

    @property
    def is_possible(self) -> bool:
        """Whether the criterion takes it: the CNN has no embeddings of tokens."""
        term = next((term for term in TERMS if term.option == self.term), None)
        if self.adapter == "cnn":
            return self.term == "on_policy" or (term is not None and term.position == "response")
        return True


def all_pairs() -> list[Case]:
    """Few cases in which every possible pair of choices occurs (greedily: each takes in the most that are missing)."""
    cases = [case for case in map(Case._make, product(*LEVERS.values())) if case.is_possible]
    pairs = {case: set(combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set.union(*pairs.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


class World:
    """Models and data that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.root, self.llm, self.whisper = root, save_llm(root / "llm"), save_whisper(root / "whisper")
        write_split(root, "train", 3)

    def build(self, case: Case, recompute: bool) -> BlspKdModel:
        adapter, alignment = ("cformer", "pif") if case.adapter == "pif" else (case.adapter, "cif")
        config = SpeechLlmConfig(
            speech_encoder=str(self.whisper), llm=str(self.llm), llm_dtype=case.llm_dtype, adapter_pre_layers=1,
            adapter_post_layers=1, adapter_heads=2, adapter_dropout=0.1, adapter_bottleneck=8, adapter=adapter,
            adapter_alignment=alignment, lora_rank=4, lora_dropout=0.3, lora_scope=case.lora_scope,
            no_shared_prefix=case.no_shared_prefix, unfreeze_speech_encoder=case.unfreeze_speech_encoder,
            gradient_checkpointing=recompute,
        )  # fmt: skip
        torch.manual_seed(0)
        model = BlspKdModel(*build_speech_llm(config))
        wake_lora(model)
        model.speech_llm.reads_packed = case.packed  # not, as of an LLM with other kinds of layers
        return model.train()

    def update(self, case: Case, recompute: bool, known: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss of one update, the gradients, and how often a layer of the LLM ran, recomputation included.

        With ``known``, the LLM's layers run as this package knows them, and are not counted.
        """
        model, runs = self.build(case, recompute), []
        llm = model.speech_llm
        assert llm.known_decoder is not None
        if not known:
            llm.llm.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
        data = SpeechTextDataset(
            Manifest.load(self.root / "train.tsv"), model.chat, lengths=llm.speech_lengths,
            share_prefix=llm.share_prefix,
        )  # fmt: skip
        criterion = criterion_of(model, case.term)
        criterion.check_model(llm)
        torch.manual_seed(2)  # of dropout
        loss = criterion(model, data.collater([data[row] for row in range(3)]))[0]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), gradients, len(runs)  # type: ignore[return-value]


def criterion_of(model: BlspKdModel, term: str) -> Any:
    task = SimpleNamespace(chat=model.chat, target_dictionary=None)
    if term == "on_policy":
        cfg = OnPolicyDistillationConfig(rollouts=2, rollout_max_tokens=4, seed=1, estimator="exact")
        return OnPolicyDistillationCriterion(cfg, task)
    weights = {one.option: float(term in (one.option, "all")) for one in TERMS}
    return KlDistillationCriterion(KlDistillationConfig(**weights), task)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", all_pairs(), ids=lambda case: "-".join(map(str, case)))
def test_recomputed_activations_change_no_number(world: World, case: Case) -> None:
    loss, gradients, runs = world.update(case, recompute=False)
    again, recomputed, more_runs = world.update(case, recompute=True)
    needs_llm = case.term not in ("quantity_weight", "token_ce_weight", "token_mse_weight")
    assert (more_runs > runs) == (runs > 0) == needs_llm
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == recomputed.keys() and any(bool(one.any()) for one in gradients.values())
    for name, gradient in gradients.items():
        assert gradient is not None and recomputed[name] is not None, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "case",
    [one for one in all_pairs() if one.packed and one.llm_dtype == "float32"],
    ids=lambda one: "-".join(map(str, one)),
)
def test_known_layers_change_no_number(world: World, case: Case) -> None:
    loss, gradients, _ = world.update(case, recompute=False)
    again, others, _ = world.update(case, recompute=False, known=True)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
