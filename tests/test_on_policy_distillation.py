"""X-OPD: roll-outs, both estimators against the analytic gradient, and the criterion through fairseq's commands."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import fairseq, load, train, train_on_two
from tiny import save_llm, save_whisper, wake_lora, write_split
from torch import Tensor, nn

import blspkd_fairseq
from blspkd_fairseq.data.batch import Batch, plan_batch
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_text, build_prompts
from blspkd_fairseq.generation.hearing import hear
from blspkd_fairseq.generation.rollouts import RolloutOptions, draw, roll_out, rollout_seed
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.language_prior import LanguagePrior
from blspkd_fairseq.modules.speech_llm import SpeechLLM, SpeechLlmOutput

blspkd_fairseq.register()

from fairseq.logging import metrics  # noqa: E402

from blspkd_fairseq.criterions import on_policy_distillation  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import (  # noqa: E402
    OnPolicyDistillationConfig,
    OnPolicyDistillationCriterion,
)
from blspkd_fairseq.data.dataset import SpeechTextDataset  # noqa: E402
from blspkd_fairseq.models.blsp_kd import BlspKdModel  # noqa: E402


class World:
    """Models and data that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"
        self.llm, self.whisper = save_llm(root / "llm"), save_whisper(root / "whisper")
        write_split(self.data, "train", 4)
        write_split(self.data, "valid", 3)

    def build(self, lora_scope: str = "speech", dtype: torch.dtype = torch.float32, lora: float = 0.3) -> BlspKdModel:
        """A model whose LoRA is already somewhere else than at zero."""
        torch.manual_seed(0)
        config = SpeechLlmConfig(
            speech_encoder=str(self.whisper), llm=str(self.llm), llm_dtype="float32", adapter_pre_layers=1,
            adapter_post_layers=1, adapter_heads=2, adapter_dropout=0, lora_scope=lora_scope, lora_rank=4,
            lora_dropout=0,
        )  # fmt: skip
        speech_llm, chat = build_speech_llm(config)
        wake_lora(speech_llm, lora)
        return BlspKdModel(speech_llm.to(dtype), chat)

    def sample(self, model: BlspKdModel, rows: list[int], drop: str = "") -> dict[str, Any]:
        data = SpeechTextDataset(Manifest.load(self.data / "train.tsv"), model.chat)
        sample = data.collater([data[row] for row in rows])
        dtype = model.speech_llm.adapter_dtype
        sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].to(dtype)
        return sample

    def train(self, save_dir: Path, *options: Any) -> str:
        return train(self.data, save_dir, self.llm, self.whisper, *options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("world"))


def criterion_of(model: BlspKdModel, **options: Any) -> OnPolicyDistillationCriterion:
    defaults = {"rollouts": 2, "rollout_max_tokens": 6, "seed": 1, "quantity_weight": 0.0}
    cfg = OnPolicyDistillationConfig(**{**defaults, **options})  # type: ignore[arg-type]
    return OnPolicyDistillationCriterion(cfg, SimpleNamespace(chat=model.chat, target_dictionary=None))


def trained_gradient(model: BlspKdModel) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


# ---- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_words_are_drawn_by_their_probability(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.0, 0.9])
    expected = (logits.double() / temperature).softmax(0)
    order = expected.argsort(descending=True)
    kept = int((expected[order].cumsum(0) < top_p).sum()) + 1
    expected[order[kept:]] = 0
    expected /= expected.sum()
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # every share once
    tokens = draw(logits.expand(100_000, -1), uniform, temperature, top_p)
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 100_000, expected.float(), atol=2e-5, rtol=0)


def test_a_draw_is_never_a_word_that_is_taken_out() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3]
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), top_p=0.5).tolist() == [3, 3]


# ---- roll-outs -----------------------------------------------------------------------------------------------------


def planned(model: BlspKdModel, sample: dict[str, Any], groups: list[list[list[int]]]) -> Batch:
    """The batch with these answers to each utterance, and as many speech embeddings as the adapter counts."""
    pairs = zip(sample["plan_rows"], groups, strict=True)
    rows = [replace(row, response=ids) for row, group in pairs for ids in group]
    inputs = sample["net_input"]
    with torch.no_grad():
        return plan_batch(rows, hear(model.speech_llm, inputs["src_tokens"], inputs["src_lengths"]).counts)


def run(model: BlspKdModel, sample: dict[str, Any], batch: Batch, reads: bool = False) -> SpeechLlmOutput:
    """Student and teacher at the answers of a plan."""
    plan, spec = batch.flatten()
    inputs = {**sample["net_input"], "plan": plan, "spec": spec}
    return model(**inputs, positions=("response",), text_replies=batch if reads else None)


def rolled(model: SpeechLLM, chat: Any, sample: dict[str, Any], rows: list[int], seeds: list[int]) -> list[list[int]]:
    inputs = sample["net_input"]
    options = RolloutOptions(per_prompt=len(seeds) // len(rows), max_new_tokens=12)
    with torch.no_grad():
        heard = hear(model, inputs["src_tokens"][rows], inputs["src_lengths"][rows])
    prompts = build_prompts(model, [sample["plan_rows"][row].segments for row in rows], heard)
    return roll_out(model, chat, prompts, seeds, options)


def test_rollouts_depend_on_their_seed_alone(world: World) -> None:
    model = world.build(dtype=torch.float64).eval()
    sample = world.sample(model, [0, 1, 2, 3])
    roll = lambda rows, seeds: rolled(model.speech_llm, model.chat, sample, rows, seeds)  # noqa: E731
    together = roll([0, 1, 2, 3], list(range(8)))
    assert together == roll([0, 1, 2, 3], list(range(8)))
    assert [roll([row], [2 * row, 2 * row + 1]) for row in range(4)] == [together[i : i + 2] for i in range(0, 8, 2)]
    assert roll([3, 1], [7, 6, 3, 2]) == [together[i] for i in (7, 6, 3, 2)]
    assert roll([0, 1, 2, 3], list(range(8, 16))) != together
    assert len({tuple(ids) for ids in together}) == 8  # each is another
    assert all(1 <= len(ids) <= 12 for ids in together)
    ends = set(model.chat.eos_ids)
    assert all(not ends.intersection(ids[:-1]) for ids in together)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.8)])
@pytest.mark.parametrize(("path", "scope"), [("speech", "speech"), ("speech", "all"), ("text", "all")])
def test_a_rollout_is_what_the_student_would_say_token_by_token(
    world: World, path: str, scope: str, temperature: float, top_p: float
) -> None:
    """Each token against the full forward pass of the student, hearing or reading, over the tokens before it."""
    model = world.build(scope, dtype=torch.float64).eval()
    sample = world.sample(model, [0, 1])
    criterion = criterion_of(
        model, rollouts=1, rollout_max_tokens=12, rollout_temperature=temperature, rollout_top_p=top_p
    )
    rollouts = criterion._draw(path, model, sample, [0, 1], training=True)
    with torch.no_grad():
        out = run(model, sample, planned(model, sample, [one.ids for one in rollouts]), reads=True)
        compared = out.response if path == "speech" else out.text_response
        logits = compared.student @ model.speech_llm.head[0].t()
    for row, one in enumerate(rollouts):
        seed = rollout_seed(1, path, 0, sample["rows"][row]["id"], 0)
        uniform = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tokens = draw(logits[compared.rows == row], uniform[: len(one.ids[0])], temperature, top_p)
        assert tokens.tolist() == one.ids[0]


def test_seeds_differ_in_every_part() -> None:
    parts = [(seed, path, update, key, j) for seed in (1, 2) for path in "ab" for update in (0, 1) for key in (5, 6)
             for j in range(3)]  # fmt: skip
    assert len({rollout_seed(*one) for one in parts}) == len(parts)
    assert rollout_seed(1, "speech", 2, 3) == rollout_seed(1, "speech", 2, 3) < 2**63


# ---- estimators ----------------------------------------------------------------------------------------------------


def first_tokens(model: BlspKdModel, sample: dict[str, Any], path: str = "speech") -> tuple[Tensor, Tensor]:
    """``[B, V]`` log-probabilities of the first token of the answer, of the student and of the teacher."""
    out = run(model, sample, planned(model, sample, [[row.response[:1]] for row in sample["plan_rows"]]), reads=True)
    compared = out.response if path == "speech" else out.text_response
    weight = model.speech_llm.head[0]
    return (compared.student @ weight.t()).log_softmax(1), (compared.teacher @ weight.t()).log_softmax(1)


@pytest.mark.parametrize(
    ("path", "scope", "im_weight", "rollouts"),
    [("speech", "speech", 0.0, 256), pytest.param("text", "all", 1.0, 48, marks=pytest.mark.slow)],
)
def test_the_exact_estimator_is_the_analytic_gradient_and_the_sampled_one_is_unbiased(
    world: World, path: str, scope: str, im_weight: float, rollouts: int
) -> None:
    """L_cm and L_im against the reverse KL at the first token, over the whole vocabulary, by autograd."""
    model = world.build(scope, dtype=torch.float64).train()
    sample = world.sample(model, [0, 1])
    log_q, log_p = first_tokens(model, sample, path)
    (log_q.exp() * (log_q - log_p)).sum().backward()
    expected = trained_gradient(model)

    def gradient(**options: Any) -> Tensor:
        criterion = criterion_of(model, rollout_max_tokens=1, im_weight=im_weight, **options)
        criterion(model, sample)[0].backward()
        return trained_gradient(model)

    # After one token every prefix is the same, so that the exact one has nothing left to chance.
    torch.testing.assert_close(gradient(estimator="exact", rollouts=2), expected)
    groups = torch.stack([gradient(estimator="sampled", rollouts=rollouts, seed=seed) for seed in range(24)])
    error = (groups.var(0) / len(groups)).sum().sqrt()
    distance = (groups.mean(0) - expected).norm()
    assert error < 0.2 * expected.norm()  # close enough to tell it from another gradient
    assert distance < 1.6 * error
    assert (groups.mean(0) + expected).norm() > 5 * error


def test_beta_is_that_of_the_divergence_at_each_prefix(world: World) -> None:
    model = world.build(dtype=torch.float64).train()
    sample = world.sample(model, [0, 1])
    log_q, log_p = first_tokens(model, sample)
    for beta in (0.0, 0.3, 1.0):
        p, q = log_p.exp(), log_q.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        forward, reverse = (p * (log_p - log_m)).sum(), (q * (log_q - log_m)).sum()
        of_m = {0.0: (p * (log_p - log_q)).sum(), 1.0: (q * (log_q - log_p)).sum()}
        criterion = criterion_of(model, estimator="exact", beta=beta, rollout_max_tokens=1, im_weight=0.0)
        expected = of_m.get(beta, beta * forward + (1 - beta) * reverse)
        torch.testing.assert_close(criterion(model, sample)[0], expected)


def log_probabilities(
    model: BlspKdModel, sample: dict[str, Any], ids: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of the roll-outs (two of each utterance) by student and teacher, and the roll-out of each."""
    with torch.no_grad():
        out = run(model, sample, planned(model, sample, [ids[i : i + 2] for i in range(0, len(ids), 2)])).response
    weight = model.speech_llm.head[0]
    tokens = torch.tensor([token for one in ids for token in one]).unsqueeze(1)
    student, teacher = ((hidden @ weight.t()).log_softmax(1).gather(1, tokens)[:, 0]
                        for hidden in (out.student, out.teacher))  # fmt: skip
    return student, teacher, out.rows


def test_the_importance_ratio_is_1_the_first_time_and_that_of_both_students_later(world: World) -> None:
    model = world.build(dtype=torch.float64).train()
    sample = world.sample(model, [0, 1])
    criterion = criterion_of(model, rollout_lifetime=2, im_weight=0.0)
    first = criterion(model, sample)[0].detach()
    ids = [one for key in sample["keys"] for one in criterion._kept["speech", key].ids]
    old, teacher, rows = log_probabilities(model, sample, ids)

    def loss(new: Tensor) -> Tensor:
        """Eq. 3 and 4 by hand: mean over the tokens of a roll-out and over roll-outs, sum over utterances."""
        values = -(new - old).exp() * (teacher - new)
        return torch.stack([values[rows == row].mean() for row in range(4)]).sum() / 2

    torch.testing.assert_close(first, loss(old), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for parameter in model.speech_llm.adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    new = log_probabilities(model, sample, ids)[0]
    assert (new - old).abs().max() > 0.01
    torch.testing.assert_close(criterion(model, sample)[0].detach(), loss(new), atol=1e-6, rtol=1e-5)
    assert not criterion._kept  # used up
    criterion(model, sample)
    assert [one for rollouts in criterion._kept.values() for one in rollouts.ids] != ids


def test_validation_leaves_the_kept_rollouts_alone(world: World) -> None:
    model = world.build().train()
    sample = world.sample(model, [0, 1])
    criterion = criterion_of(model, rollout_lifetime=3, im_weight=0.0)
    criterion(model, sample)
    kept = {key: rollouts.uses for key, rollouts in criterion._kept.items()}
    criterion(model.eval(), sample)
    assert {key: rollouts.uses for key, rollouts in criterion._kept.items()} == kept != {}


def test_a_batch_that_stands_in_for_another_uses_up_nothing(world: World) -> None:
    model = world.build().train()
    sample = world.sample(model, [0, 1])
    criterion = criterion_of(model, rollout_lifetime=2, im_weight=0.0)
    criterion(model, sample | {"left_out": True})
    assert not criterion._kept
    criterion(model, sample)
    kept = dict(criterion._kept)
    criterion(model, sample | {"left_out": True})
    assert criterion._kept == kept and all(rollouts.uses == 1 for rollouts in kept.values())


def test_several_processes_keep_no_rollouts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_policy_distillation, "get_data_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match="--rollout-lifetime above 1 needs a single process"):
        criterion_of(world.build(), rollout_lifetime=2)


def test_no_agreement_is_logged_as_0(world: World) -> None:
    logs = [{"speech_agree": 0.0, "speech_compared": 4.0}, {"speech_agree": 1.0, "speech_compared": 4.0}]
    for given, expected in ((logs, 0.125), (logs[:1], 0.0)):
        with metrics.aggregate(new_root=True) as logged_metrics:
            OnPolicyDistillationCriterion.reduce_metrics(given)
        assert logged_metrics["speech_agreement"].avg == expected
    with metrics.aggregate(new_root=True) as logged_metrics:  # the sampled estimator measures none
        OnPolicyDistillationCriterion.reduce_metrics([{"speech_compared": 0.0}])
    assert "speech_agreement" not in logged_metrics


def test_the_cost_of_rollouts_is_measured_apart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world.build().train()
    clock = iter([10.0, 13.0])
    monkeypatch.setattr(on_policy_distillation.time, "perf_counter", lambda: next(clock))
    log = criterion_of(model)(model, world.sample(model, [0]))[2]
    with metrics.aggregate(new_root=True) as logged_metrics:
        OnPolicyDistillationCriterion.reduce_metrics([log, log])
    assert logged_metrics["rollout_wall"].sum == 6.0


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, False),
        ({"rollout_temperature": 0.9}, True),
        ({"rollout_top_p": 0.9}, True),
        ({"estimator": "exact"}, False),
    ],
)
def test_what_biases_the_sampled_estimator_is_said(
    world: World, options: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = world.build()
    criterion_of(model, **options).check_model(model.speech_llm)
    assert ("biases the sampled estimator" in caplog.text) == warned
    caplog.clear()
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).p = 0.1
    criterion_of(model, **options).check_model(model.speech_llm)
    assert ("dropout" in caplog.text) == (options.get("estimator") != "exact")


def test_rollouts_longer_than_the_llm_reads_are_refused(world: World) -> None:
    model = world.build().train()
    positions = model.speech_llm.llm.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"--rollout-max-tokens {positions} are longer than the {positions} pos"):
        criterion_of(model, rollout_max_tokens=positions)(model, world.sample(model, [0]))


def test_rollouts_take_frames_that_are_there(world: World) -> None:
    """With --cache-encoder-features, a batch has frames in place of waveforms."""
    model = world.build().train()
    sample = world.sample(model, [0, 1])
    inputs = sample["net_input"]
    expected = float(criterion_of(model)(model, sample)[0].detach())
    frames = model.speech_llm.encode(inputs["src_tokens"], inputs["src_lengths"], inputs["samples"]).values
    kept = sample | {"net_input": inputs | {"src_tokens": None, "features": frames}}
    model.speech_llm.speech_encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    assert float(criterion_of(model)(model, kept)[0].detach()) == pytest.approx(expected, rel=1e-5)


def test_reading_text_is_the_teacher_itself_without_lora_everywhere(world: World) -> None:
    """L_im is 0 under Partial LoRA, which is why no text roll-outs are drawn there."""
    for scope, zero in (("none", True), ("speech", True), ("all", False)):
        model = world.build(scope).eval()
        sample = world.sample(model, [0, 1, 2])
        inputs = sample["net_input"]
        out = model(**inputs, positions=("response",), text_replies=inputs["spec"].build(inputs["plan"]))
        assert torch.equal(out.text_response.student, out.text_response.teacher) == zero
        log = criterion_of(model)(model, sample)[2]
        assert log["rollouts"] == (6 if zero else 12)
        assert (log["text_tokens"] == 0) == zero
        halves = [criterion_of(model, im_weight=weight)(model, sample)[0] for weight in (0.0, 0.5, 1.0)]
        torch.testing.assert_close(halves[1], (halves[0] + halves[2]) / 2)  # eq. 5
        assert (float(halves[2]) == 0) == zero


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_under_partial_lora_the_student_answers_text_as_the_base_llm_does(world: World, mode: str) -> None:
    answers = []
    for scope in ("speech", "none"):
        model = getattr(world.build(scope, dtype=torch.float64), mode)()
        sample = world.sample(model, [0, 1, 2])
        rollouts = criterion_of(model)._draw("text", model, sample, [0, 1, 2], training=True)
        answers.append([one.ids for one in rollouts])
        layout = planned(model, sample, [one.ids for one in rollouts]).teacher
        read, taught = (reads(layout) for reads in (model.speech_llm.read, model.speech_llm.teach))
        assert torch.equal(read, taught)  # so that A_im is 0, token by token
    assert answers[0] == answers[1]


def test_answers_to_text_are_the_teachers_also_under_lora_everywhere(world: World) -> None:
    asked = (["turn on the light", "hello"], ["{speech}", "Repeat: {speech}"], DecodingOptions(max_new_tokens=8))
    answers = []
    for scope in ("all", "speech", "none"):
        model = world.build(scope, dtype=torch.float64).eval()
        answers.append([group[0].ids for group in answer_text(model.speech_llm, model.chat, *asked)])
    assert answers[0] == answers[1] == answers[2]


def test_the_teacher_stays_what_it_was(world: World) -> None:
    """In memory, after steps of an optimizer that is given everything."""
    model = world.build().train()
    criterion = criterion_of(model, teacher_llm=str(world.llm), im_weight=0.0)
    teacher = criterion._teacher[0]
    frozen = {name: p.clone() for name, p in model.speech_llm.llm.named_parameters() if "lora_" not in name}
    own = {name: p.clone() for name, p in teacher.named_parameters()}
    trained = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model, world.sample(model, [0, 1, 2]))[0].backward()
        optimizer.step()
    assert all(torch.equal(p, own[name]) for name, p in teacher.named_parameters())
    assert all(torch.equal(model.speech_llm.llm.get_parameter(name), weight) for name, weight in frozen.items())
    assert not all(torch.equal(model.get_parameter(name), weight) for name, weight in trained.items())


def test_off_policy_batches_are_the_divergence_on_the_responses(world: World) -> None:
    model = world.build().train()
    sample = world.sample(model, [0, 1, 2])
    criterion = criterion_of(model, off_policy_share=1.0, im_weight=0.0, estimator="exact", beta=0.0)
    loss, _, log = criterion(model, sample)
    out = model(**sample["net_input"], positions=("response",)).response
    weight = model.speech_llm.head[0]
    log_q, log_p = ((hidden @ weight.t()).log_softmax(1) for hidden in (out.student, out.teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    expected = sum(kl[out.rows == row].mean() for row in range(3))
    torch.testing.assert_close(loss, expected)
    assert log["rollouts"] == 0 and criterion.needs_responses
    assert log["speech_off_policy_divergence_sum"] > 0 and log["speech_divergence_sum"] == 0  # another quantity
    shares = criterion_of(model, off_policy_share=0.5)
    chosen = []
    for update in range(40):
        model.set_num_updates(update)
        chosen.append(shares._is_off_policy(model))
    assert 8 < sum(chosen) < 32
    model.eval()
    assert not shares._is_off_policy(model)


@pytest.mark.parametrize("estimator", on_policy_distillation.ESTIMATORS)
def test_off_policy_batches_may_be_an_anchor_in_the_words_of_the_responses(world: World, estimator: str) -> None:
    model = world.build().train()
    sample = world.sample(model, [0, 1, 2])
    options: dict[str, Any] = {"im_weight": 0.0, "estimator": estimator, "off_policy_cross_entropy": True}
    loss, _, log = criterion_of(model, off_policy_share=1.0, **options)(model, sample)
    out = model(**sample["net_input"], positions=("response",)).response
    surprise = torch.nn.functional.cross_entropy(
        out.student @ model.speech_llm.head[0].t(), out.targets, reduction="none"
    )
    torch.testing.assert_close(loss, sum(surprise[out.rows == row].mean() for row in range(3)))
    assert log["rollouts"] == 0 and log["speech_off_policy_divergence_sum"] == pytest.approx(surprise.sum().item())


def test_a_larger_teacher_teaches(world: World, tmp_path: Path) -> None:
    larger = save_llm(tmp_path / "larger", hidden=48, layers=3, seed=5)
    model = world.build("none").train()
    sample = world.sample(model, [0, 1])
    own = criterion_of(model, estimator="exact", im_weight=0.0)
    other = criterion_of(model, estimator="exact", im_weight=0.0, teacher_llm=str(larger), teacher_llm_dtype="float32")
    assert not list(other.parameters())  # nothing of it in the optimizer or in checkpoints
    loss, loss_of_other = own(model, sample)[0], other(model, sample)[0]
    assert float(loss_of_other) > 0 and float(loss_of_other) != pytest.approx(float(loss), rel=1e-3)
    same = criterion_of(
        model, estimator="exact", im_weight=0.0, teacher_llm=str(world.llm), teacher_llm_dtype="float32"
    )
    torch.testing.assert_close(same(model, sample)[0], loss)
    loss_of_other.backward()
    assert trained_gradient(model).abs().max() > 0
    sampled = criterion_of(
        model, im_weight=0.0, teacher_llm=str(larger), teacher_llm_dtype="float32", rollout_lifetime=2
    )
    value = sampled(model, sample)[0].detach()
    ids = [one for kept in sampled._kept.values() for one in kept.ids]  # in the order of the batch
    student_log, _, rows = log_probabilities(model, sample, ids)
    layout = planned(model, sample, [kept.ids for kept in sampled._kept.values()]).teacher
    teacher = sampled._teacher[0]
    logits = teacher.teach(layout)[layout.response] @ teacher.head[0].t()
    tokens = torch.tensor([token for one in ids for token in one]).unsqueeze(1)
    values = student_log - logits.log_softmax(1).gather(1, tokens)[:, 0]
    torch.testing.assert_close(value, torch.stack([values[rows == row].mean() for row in range(4)]).sum() / 2)
    assert all(parameter.grad is None for parameter in other._teacher[0].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "k3"}, "unknown --estimator 'k3': choose from sampled, exact"),
        ({"beta": 0.5}, "--beta needs --estimator exact"),
        ({"im_weight": 1.5}, "--im-weight must be between 0 and 1, got 1.5"),
        ({"off_policy_share": -1}, "--off-policy-share must be between 0 and 1"),
        ({"off_policy_cross_entropy": True}, "--off-policy-cross-entropy needs updates on tgt_text"),
        ({"rollout_lifetime": 0}, "--rollout-lifetime must be at least 1"),
        ({"quantity_weight": -1}, "--quantity-weight must not be negative"),
        ({"teacher_llm_dtype": "fp16"}, "unknown --teacher-llm-dtype 'fp16': choose from float32, bfloat16, float16"),
        ({"rollouts": 0}, "at least one per prompt"),
        ({"rollout_temperature": 0}, "a temperature of at least 1e-06"),
        ({"rollout_temperature": float("nan")}, "a temperature of at least 1e-06"),
        ({"rollout_top_p": 0}, "top-p"),
    ],
)
def test_options_that_make_no_sense_are_refused(world: World, options: dict[str, Any], message: str) -> None:
    model = SimpleNamespace(chat=None)
    with pytest.raises(ValueError, match=re.escape(message)):
        criterion_of(model, **options)  # type: ignore[arg-type]


def test_only_the_student_reading_text_is_refused_where_it_is_the_teacher(world: World) -> None:
    model = world.build()
    with pytest.raises(ValueError, match="--im-weight 1 trains the student reading text alone.*--lora-scope speech"):
        criterion_of(model, im_weight=1.0).check_model(model.speech_llm)
    criterion_of(model, im_weight=0.9).check_model(model.speech_llm)
    criterion_of(model, im_weight=1.0).check_model(world.build("all").speech_llm)


def test_logits_that_are_not_finite_are_said(world: World) -> None:
    model = world.build().train()
    with torch.no_grad():
        next(p for name, p in model.speech_llm.named_parameters() if "lora_B" in name).fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="logits of token 1 of the roll-outs are not finite"):
        criterion_of(model)(model, world.sample(model, [0]))


def test_padding_of_the_llms_table_is_never_drawn(world: World, tmp_path: Path) -> None:
    model = world.build(dtype=torch.float64).eval()
    tokens = len(model.chat.tokenizer)
    sample = world.sample(model, [0, 1])
    expected = rolled(model.speech_llm, model.chat, sample, [0, 1], [3, 4])
    head = model.speech_llm.llm.get_output_embeddings()
    padding = head.weight.detach().mean(0, keepdim=True).expand(50, -1)
    head.weight = nn.Parameter(torch.cat([head.weight.detach()[:tokens], padding]), requires_grad=False)
    assert rolled(model.speech_llm, model.chat, sample, [0, 1], [3, 4]) == expected


def test_a_teacher_with_other_words_is_refused(world: World, tmp_path: Path) -> None:
    model = world.build("none")
    other = save_llm(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(tokenizer.replace('"!"', '"\\u00a1!"', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="has another tokenizer than the student's LLM"):
        criterion_of(model, teacher_llm=str(other))
    with pytest.raises(ValueError, match="cannot load the tokenizer '/no/such/llm': give --teacher-llm"):
        criterion_of(model, teacher_llm="/no/such/llm")
    with pytest.raises(ValueError, match="ends a turn with .*, the student's LLM with"):
        own = SimpleNamespace(**{**vars(model.chat), "eos_ids": [3]})
        OnPolicyDistillationCriterion(
            OnPolicyDistillationConfig(seed=1, teacher_llm=str(world.llm)),
            SimpleNamespace(chat=own, target_dictionary=None),
        )


# ---- through fairseq's commands ------------------------------------------------------------------------------------

ON_POLICY = (
    "--criterion", "on_policy_distillation", "--rollouts", 2, "--rollout-max-tokens", 6, "--no-epoch-checkpoints",
)  # fmt: skip


def logged(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^epoch \d+:.* {name}=([-\d.]+)", log, re.M)]


def text_states(world: World, save_dir: Path) -> tuple[Tensor, Tensor]:
    """Hidden states of the trained LLM reading a text as its user would, and those of the base LLM."""
    model = blspkd_fairseq.BlspKd.from_pretrained(save_dir / "checkpoint_last.pt").model
    base = world.build("none")
    inputs = world.sample(base, [0])["net_input"]
    layout = inputs["spec"].build(inputs["plan"]).teacher
    with torch.no_grad():
        return model.read(layout), base.speech_llm.teach(layout)


@pytest.mark.parametrize(("estimator", "updates", "rollouts"), [("exact", 16, 4), ("sampled", 32, 8)])
def test_it_learns_from_a_warm_start_and_leaves_text_alone(
    world: World, tmp_path: Path, estimator: str, updates: int, rollouts: int
) -> None:
    world.train(tmp_path / "warm", "--max-update", 4, "--disable-validation", "--no-epoch-checkpoints")
    warm = tmp_path / "warm" / "checkpoint_last.pt"
    log = world.train(
        tmp_path / "opd", *ON_POLICY, "--finetune-from-model", warm, "--max-update", updates, "--estimator", estimator,
        "--rollouts", rollouts, "--lr", 5e-3, "--validate-interval", 100,
    )  # fmt: skip
    divergence = logged(log, "speech_divergence")
    assert len(divergence) == updates and sum(divergence[-4:]) < 0.8 * sum(divergence[:4])
    assert len(logged(log, "rollout_wall")) == updates and all(
        1 <= length <= 6 for length in logged(log, "rollout_length")
    )
    assert re.search(r"valid on 'valid' subset.*speech_divergence [\d.]+", log)
    student, base = text_states(world, tmp_path / "opd")
    assert torch.equal(student, base)
    before, after = load(warm)["model"], load(tmp_path / "opd" / "checkpoint_last.pt")["model"]
    assert before.keys() == after.keys()  # no teacher in it
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


def test_lora_everywhere_changes_text_and_is_held_to_the_teacher(world: World, tmp_path: Path) -> None:
    log = world.train(
        tmp_path, *ON_POLICY, "--lora-scope", "all", "--max-update", 6, "--disable-validation", "--lr", 1e-2
    )
    assert len(logged(log, "text_divergence")) == 6
    student, base = text_states(world, tmp_path)
    assert (student - base).abs().max() > 1e-3


def test_one_update_is_the_same_however_the_batch_is_split(world: World, tmp_path: Path) -> None:
    update = (*ON_POLICY, "--max-update", 1, "--disable-validation", "--optimizer", "sgd", "--lr", 1)
    world.train(tmp_path / "whole", *update)
    world.train(tmp_path / "split", *update, "--batch-size", 2, "--update-freq", 2)
    two = tmp_path / "two"
    train_on_two(world.data, two, world.llm, world.whisper, *update, "--batch-size", 2, backend="legacy_ddp")
    whole, split, two = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("whole", "split", "two"))
    for name, weight in whole.items():
        if not name.startswith("frozen."):
            torch.testing.assert_close(split[name], weight, atol=2e-6, rtol=1e-4)
            torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=1e-4)


def test_resumed_training_is_the_uninterrupted_one(world: World, tmp_path: Path) -> None:
    options = (*ON_POLICY, "--batch-size", 2, "--disable-validation", "--estimator", "sampled")
    world.train(tmp_path / "whole", *options, "--max-update", 5)
    world.train(tmp_path / "parts", *options, "--max-update", 3, "--save-interval-updates", 3)
    world.train(tmp_path / "parts", *options, "--max-update", 5)
    whole, parts = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("whole", "parts"))
    for name, weight in whole.items():
        if not name.startswith("frozen."):
            torch.testing.assert_close(parts[name], weight, atol=2e-6, rtol=1e-4)


def test_generation_takes_its_checkpoints(world: World, tmp_path: Path) -> None:
    more = ("--off-policy-share", 0.5, "--teacher-llm", world.llm, "--trust-remote-code")
    world.train(tmp_path, *ON_POLICY, "--max-update", 1, "--disable-validation", *more)
    output = fairseq(
        "generate", world.data, "--gen-subset", "valid", "--path", tmp_path / "checkpoint_last.pt", "--max-len-b", 3
    )
    assert len(re.findall(r"^D-\d+\t", output, re.M)) == 3


def test_without_responses_in_the_manifest(world: World, tmp_path: Path) -> None:
    write_split(tmp_path / "data", "train", 2, drop=("tgt_text",))
    run: Callable[..., str] = lambda *options: train(  # noqa: E731
        tmp_path / "data", tmp_path / "save", world.llm, world.whisper, *ON_POLICY, "--disable-validation",
        "--max-update", 1, *options,
    )  # fmt: skip
    assert "num_updates=1" in run()
    with pytest.raises(Exception, match="tgt_text"):
        run("--off-policy-share", 0.5, "--save-dir", tmp_path / "other")


def test_the_student_that_is_trained_hears_by_the_sound_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prior, priors = world.build(), LanguagePrior(0.5, 1, ()), []

    def heard(speech_llm: SpeechLLM, *arguments: Any, **options: Any) -> Any:
        priors.append(speech_llm.prior)
        return hear(speech_llm, *arguments, **options)

    monkeypatch.setattr(on_policy_distillation, "hear", heard)
    model.speech_llm.prior = prior
    for training in (True, False):
        criterion_of(model.train(training))(model, world.sample(model, [0, 1]))
    assert priors == [None, prior] and model.speech_llm.prior is prior
