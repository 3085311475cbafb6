"""Terms of the criterion kl_distillation against their plain formulas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_llm, save_whisper, write_split

import blspkd_fairseq
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.distillation_loss import distance_cross_entropy

blspkd_fairseq.register()

from blspkd_fairseq.criterions.kl_distillation import KlDistillationConfig, KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402

WEIGHTS = (
    "response_kl",
    "input_kl",
    "quantity",
    "response_ce",
    "end_of_turn_kl",
    "response_l2",
    "token_ce",
    "token_mse",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlspKdModel, dict[str, Any]]:
    return made_world(tmp_path_factory.mktemp("world"))


def made_world(root: Path, **options: Any) -> tuple[BlspKdModel, dict[str, Any]]:
    """A model and three utterances, one of whose responses the length limit ended."""
    config = SpeechLlmConfig(
        speech_encoder=str(save_whisper(root / "whisper")), llm=str(save_llm(root / "llm")), llm_dtype="float32",
        adapter_pre_layers=1, adapter_post_layers=1, adapter_heads=2, adapter_dropout=0, lora_rank=4, lora_dropout=0,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BlspKdModel(*build_speech_llm(config)).train()
    write_split(root, "train", 3)
    rows = (root / "train.tsv").read_text(encoding="utf-8").splitlines()
    cut = ["0", "1", "0"]  # the length limit ended the second response
    lines = [rows[0] + "\tcut", *(f"{row}\t{flag}" for row, flag in zip(rows[1:], cut, strict=True))]
    (root / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = SpeechTextDataset(Manifest.load(Path(root / "train.tsv")), model.chat)
    return model, data.collater([data[row] for row in range(3)])


def criterion_of(model: BlspKdModel, **options: Any) -> KlDistillationCriterion:
    cfg = KlDistillationConfig(**{f"{name}_weight": 0.0 for name in WEIGHTS} | options)
    return KlDistillationCriterion(cfg, SimpleNamespace(chat=model.chat, target_dictionary=None))


def loss_of(model: BlspKdModel, sample: dict[str, Any], **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    loss, _, log = criterion_of(model, **options)(model, sample)
    return loss, log


def plain(model: BlspKdModel, sample: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    compared = model(**sample["net_input"], positions=("response",)).response
    weight = model.speech_llm.head[0]
    log_q, log_p = ((hidden @ weight.t()).log_softmax(1) for hidden in (compared.student, compared.teacher))
    return (log_p.exp() * (log_p - log_q)).sum(1), compared


def test_the_end_of_turn_is_weighted_by_itself(world: tuple[BlspKdModel, dict[str, Any]]) -> None:
    model, sample = world
    kl, compared = plain(model, sample)
    ends = compared.targets == model.chat.end_of_turn_id
    assert compared.rows[ends].tolist() == [0, 2]  # none where the response was cut
    loss, log = loss_of(model, sample, end_of_turn_kl_weight=2.0)
    torch.testing.assert_close(loss, 2 * kl[ends].sum())
    assert log["response_end_kl_tokens"] == 2
    both = loss_of(model, sample, end_of_turn_kl_weight=2.0, response_kl_weight=1.0)[0]
    alone = loss_of(model, sample, response_kl_weight=1.0)[0]
    torch.testing.assert_close(both, alone + loss)
    torch.testing.assert_close(alone, sum(kl[compared.rows == row].mean() for row in range(3)))


def test_hidden_states_are_drawn_to_the_teachers(world: tuple[BlspKdModel, dict[str, Any]]) -> None:
    model, sample = world
    _, compared = plain(model, sample)
    distance = (compared.student - compared.teacher).square().mean(1)
    loss, log = loss_of(model, sample, response_l2_weight=0.5)
    torch.testing.assert_close(loss, 0.5 * sum(distance[compared.rows == row].mean() for row in range(3)))
    assert log["response_l2_sum"] == pytest.approx(float(distance.detach().sum()), rel=1e-5)
    assert log["response_kl_tokens"] == 0  # no head, no KL


def test_tokens_are_told_apart_by_distances_if_asked(world: tuple[BlspKdModel, dict[str, Any]]) -> None:
    model, sample = world
    output = model(**sample["net_input"], positions=("response",))
    vectors = output.adapter.embeddings.flatten(0, 1).index_select(0, output.batch.student.source)
    table = model.speech_llm.llm.get_input_embeddings().weight.float()
    expected = distance_cross_entropy(vectors, output.batch.transcript.targets, table, 40.0)
    _, log = loss_of(model, sample, token_ce_weight=1.0, token_ce_scale=40.0)
    assert log["token_ce_sum"] == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    assert log["token_ce_sum"] != pytest.approx(loss_of(model, sample, token_ce_weight=1.0)[1]["token_ce_sum"], rel=0.1)
    with pytest.raises(ValueError, match="--token-ce-scale must not be negative"):
        loss_of(model, sample, token_ce_weight=1.0, token_ce_scale=-1.0)


@pytest.mark.parametrize("scaled", [False, True])
def test_temperature_with_and_without_its_square(world: tuple[BlspKdModel, dict[str, Any]], scaled: bool) -> None:
    model, sample = world
    _, compared = plain(model, sample)
    weight = model.speech_llm.head[0]
    log_q, log_p = ((hidden @ weight.t() / 2).log_softmax(1) for hidden in (compared.student, compared.teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(1) * (4 if scaled else 1)
    loss = loss_of(model, sample, response_kl_weight=1.0, kd_temperature=2.0, scale_by_squared_temperature=scaled)[0]
    torch.testing.assert_close(loss, sum(kl[compared.rows == row].mean() for row in range(3)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_trained_parameter_gets_a_gradient(world: tuple[BlspKdModel, dict[str, Any]], name: str) -> None:
    """Of LoRA, too, where the LLM does not run: torch's distributed training waits for each of them."""
    model, sample = world
    loss_of(model, sample, **{f"{name}_weight": 1.0})[0].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert [n for n, gradient in gradients.items() if gradient is None] == []
    runs_llm = not name.startswith(("quantity", "token"))
    assert any(bool(g.any()) for n, g in gradients.items() if "lora_" in n) == runs_llm


def test_every_term_of_the_response_needs_responses() -> None:
    needs = {}
    for name in WEIGHTS:
        cfg = KlDistillationConfig(**{f"{other}_weight": float(other == name) for other in WEIGHTS})
        needs[name] = KlDistillationCriterion(cfg, SimpleNamespace(target_dictionary=None)).needs_responses
    assert [name for name in WEIGHTS if needs[name]] == [
        "response_kl", "response_ce", "end_of_turn_kl", "response_l2",
    ]  # fmt: skip


def test_soft_tokens_are_told_apart_by_their_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = made_world(tmp_path, adapter_soft_tokens=True)
    soft = model.speech_llm.adapter.soft_tokens
    torch.nn.init.normal_(soft.listen.weight)
    output = model(**sample["net_input"], positions=())
    queries = output.adapter.queries.of(output.batch.student.source)
    expected = soft.cross_entropy(queries, output.batch.transcript.targets)
    with monkeypatch.context() as patch:  # a warm-up needs no means of embeddings
        patch.setattr(type(soft), "forward", lambda *_: pytest.fail("soft tokens were made for nobody"))
        loss, log = loss_of(model, sample, token_ce_weight=1.0)
    assert log["token_ce_sum"] == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    names = {name for name, p in model.speech_llm.adapter.named_parameters() if p.requires_grad}
    loss_of(model, sample, token_mse_weight=1.0)[0].backward()
    assert names == {name for name, p in model.speech_llm.adapter.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="--token-ce-scale is of embeddings that are no soft tokens"):
        KlDistillationCriterion(
            KlDistillationConfig(token_ce_scale=20.0), SimpleNamespace(chat=model.chat, target_dictionary=None)
        ).check_model(model.speech_llm)


def test_an_update_tells_its_tokens_apart_from_drawn_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = made_world(tmp_path, adapter_soft_tokens=True)
    soft = model.speech_llm.adapter.soft_tokens
    torch.nn.init.normal_(soft.listen.weight)
    output = model(**sample["net_input"], positions=())
    ids = output.batch.transcript.targets
    drawn = torch.tensor([7, 9, 9, int(ids[0])])
    some = torch.cat([ids, drawn]).unique()
    queries = output.adapter.queries.of(output.batch.student.source)
    expected = soft.cross_entropy(queries, torch.searchsorted(some, ids), some)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    every_one = loss_of(model, sample, token_ce_weight=1.0)[1]["token_ce_sum"]
    criterion = criterion_of(model, token_ce_weight=1.0, token_negatives=4)
    losses = {training: criterion.train(training)(model, sample)[2]["token_ce_sum"] for training in (True, False)}
    assert losses[True] == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    assert losses[False] == pytest.approx(every_one, rel=1e-5) and losses[True] < losses[False]
    criterion.train()
    criterion(model, sample)[0].backward()
    assert float(soft.spelling.table.weight.grad.abs().sum()) > 0


def test_negatives_are_of_soft_tokens(world: tuple[BlspKdModel, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="--token-negatives are drawn for soft tokens"):
        criterion_of(world[0], token_ce_weight=1.0, token_negatives=5).check_model(world[0].speech_llm)
    with pytest.raises(ValueError, match="--token-negatives must not be negative"):
        criterion_of(world[0], token_ce_weight=1.0, token_negatives=-1)


def test_distillation_trains_the_posterior_through_what_the_llm_reads(tmp_path: Path) -> None:
    model, sample = made_world(tmp_path, adapter_soft_tokens=True)
    loss, _ = loss_of(model, sample, response_kl_weight=1.0)
    loss.backward()
    soft = model.speech_llm.adapter.soft_tokens
    assert float(soft.log_sharpness.grad.abs()) > 0
    assert float(soft.listen.weight.grad.abs().sum()) > 0
