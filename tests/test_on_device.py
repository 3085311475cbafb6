"""What must hold on any device; BLSPKD_TEST_DEVICE=cuda runs it on a GPU (scripts/gpu_check.sh does)."""

import copy
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import updates
from commands import load, train, train_on_two
from tiny import wake_lora
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from updates import CASES, TinyWorld

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention import attend
from blspkd_fairseq.modules.cif import continuous_integrate_and_fire
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy, linear_kl_div
from blspkd_fairseq.modules.partial_lora import add_partial_lora, speech_positions

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """A GPU multiplies float32 as TF32 where it is let."""
    if dtype == torch.bfloat16:
        return 3e-2
    return 1e-4 if device.type == "cpu" else 5e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


def gradients(world: TinyWorld, name: str, device: torch.device, llm_dtype: str) -> tuple[float, Tensor]:
    """Loss of an update and its gradient with respect to all that is trained."""
    case = CASES[name]
    model = world.build(case, device, llm_dtype)
    with updates.fixed_rollouts():
        loss, _, _ = updates.criterion_of(case, model)(model, world.sample(model, device))
    loss.backward()
    parts = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(parts)


@pytest.mark.parametrize("llm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_the_cpu_in_float32(
    world: TinyWorld, name: str, llm_dtype: str, device: torch.device
) -> None:
    """In half precision, in which a GPU may multiply by default: 3 % of the loss, a gradient of the same direction."""
    expected, expected_gradient = gradients(world, name, CPU, "float32")
    loss, gradient = gradients(world, name, device, llm_dtype)
    is_exact = device == CPU and llm_dtype == "float32"
    assert loss == pytest.approx(expected, rel=1e-6 if is_exact else 3e-2)
    assert gradient.shape == expected_gradient.shape
    assert F.cosine_similarity(gradient, expected_gradient, 0) > (1 - 1e-6 if is_exact else 0.97)


@pytest.mark.parametrize("name", CASES)
def test_an_update_asks_the_device_for_nothing_but_what_is_logged(
    world: TinyWorld, name: str, device: torch.device
) -> None:
    model = world.build(CASES[name], device)
    criterion, optimizer = updates.criterion_of(CASES[name], model), updates.optimizer_of(model)
    with updates.fixed_rollouts():
        updates.update(model, criterion, world.sample(model, device), optimizer)  # what is looked up once
        sample = world.sample(model, device)
        with updates.no_host_reads(device):
            updates.update(model, criterion, sample, optimizer)


def test_host_reads_are_seen(device: torch.device) -> None:
    values = torch.ones(3, device=device)
    for read in (values.tolist, lambda: float(values.sum()), values.nonzero, lambda: values[values > 0]):
        with pytest.raises((updates.HostRead, RuntimeError)), updates.no_host_reads(device):
            read()
    assert float(values.sum()) == 3  # and allowed again


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_lora_off_is_the_base_llm_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval().to(device, dtype)
    ids = torch.arange(14, device=device).view(2, 7)
    llm = add_partial_lora(copy.deepcopy(base), rank=4, dropout=0.0).to(device)
    wake_lora(llm, 1.0)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2:4] = True
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(llm(ids).logits, expected)
        with speech_positions(llm, mask):
            changed = llm(ids).logits != expected
        assert torch.equal(llm(ids).logits, expected)
    assert changed.any(-1)[:, 2:].all() and not changed[:, :2].any()


# ---- modules --------------------------------------------------------------------------------------------------------


def plain_attention(query: Tensor, key: Tensor, value: Tensor, rows: Rows, window: int | None) -> Tensor:
    """The formula in float64, a row after another; packed in the order prefix, row 0, row 1, ..."""
    query, key, value = (one.double() for one in (query, key, value))
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    prefix = torch.arange(rows.prefix, device=query.device)
    out, start = torch.zeros_like(query), rows.prefix
    for count in (0, *rows.counts):
        places = torch.cat([prefix, torch.arange(start, start + count, device=query.device)])
        start += count
        logits = torch.einsum("qhd,khd->hqk", query[places], key[places]) * query.shape[-1] ** -0.5
        distance = torch.arange(len(places)).unsqueeze(1) - torch.arange(len(places))
        seen = (distance >= 0) | torch.tensor(not rows.causal)
        seen &= distance < (len(places) if window is None else window)
        weights = logits.masked_fill(~seen.to(logits.device), -torch.inf).softmax(-1)
        own = places if count == 0 else places[rows.prefix :]
        out[own] = torch.einsum("hqk,khd->qhd", weights, value[places])[len(places) - len(own) :]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "causal", "window"), [(0, True, None), (5, True, None), (5, True, 4), (0, True, 3), (0, False, None)]
)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (6, 2, 64), (4, 1, 128)])
def test_attention_of_packed_rows_is_the_formula(
    dtype: torch.dtype, prefix: int, causal: bool, window: int | None, heads: int, groups: int, width: int,
    device: torch.device,
) -> None:  # fmt: skip
    counts = (7, 1, 13)
    rows = Rows(torch.tensor(counts, device=device), counts, prefix, causal=causal)
    shapes = [(rows.total, heads, width), (rows.total, groups, width), (rows.total, groups, width)]
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0]).to(device, dtype)
    expected = plain_attention(*inputs, rows, window)
    expected_gradients = torch.autograd.grad((expected * upstream.double()).sum(), inputs)
    out = attend(*inputs, rows, window=window)
    tolerance = tolerance_of(dtype, device)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(torch.autograd.grad((out * upstream).sum(), inputs), expected_gradients, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < tolerance


def test_cif_is_that_of_the_cpu(device: torch.device) -> None:
    features, alpha = torch.randn(3, 40, 8), torch.rand(3, 40) * 0.4
    counts = torch.tensor([5, 9, 1])
    results = []
    for place in (CPU, device):
        inputs = [one.clone().to(place).requires_grad_() for one in (features, alpha)]
        embeddings = continuous_integrate_and_fire(*inputs, target_lengths=counts.to(place)).embeddings
        results.append([embeddings.cpu(), *(g.cpu() for g in torch.autograd.grad(embeddings.square().sum(), inputs))])
    for one, other in zip(*results, strict=True):
        tolerance = tolerance_of(torch.float32, device)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_through_the_head_are_the_formulas(dtype: torch.dtype, device: torch.device) -> None:
    student, teacher = (torch.randn(300, 64, device=device, dtype=dtype) for _ in range(2))
    weight = (torch.randn(500, 64, device=device) / 8).to(dtype)
    targets = torch.randint(500, (300,), device=device)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    log_q, log_p = exact @ weight.double().t(), teacher.double() @ weight.double().t()
    log_q, log_p = log_q.log_softmax(1), log_p.log_softmax(1)
    formulas = (log_p.exp() * (log_p - log_q)).sum(1), F.nll_loss(log_q, targets, reduction="none")
    losses = linear_kl_div(student, teacher, weight), linear_cross_entropy(student, targets, weight)
    tolerance = tolerance_of(dtype, device)
    for loss, formula in zip(losses, formulas, strict=True):
        torch.testing.assert_close(loss.double(), formula, atol=tolerance, rtol=tolerance)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        (expected,) = torch.autograd.grad(formula.sum(), exact, retain_graph=True)
        assert (gradient.double() - expected).norm() / expected.norm() < tolerance


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_share_a_device(world: TinyWorld, tmp_path: Path, device: torch.device) -> None:
    """Over NCCL where it takes two processes on a card (it refuses today), else over gloo."""
    data = world.manifest.path.parent
    options = ("--max-update", 1, "--disable-validation", "--optimizer", "sgd", "--lr", 1)
    train(data, tmp_path / "one", world.llm, world.whisper, *options, "--batch-size", 4)
    spoken = ["gloo"] if device.type == "cpu" else ["nccl", "gloo"]
    for backend in spoken:
        try:
            train_on_two(
                data, tmp_path / backend, world.llm, world.whisper, *options, "--batch-size", 2, collectives=backend,
                seconds=150 if backend == "gloo" else 40,
            )  # fmt: skip
        except (AssertionError, subprocess.TimeoutExpired):
            if backend == spoken[-1]:
                raise
            continue
        print(f"two processes spoke over {backend}")
        break
    one, two = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", backend))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-5 if device.type == "cpu" else 5e-3, rtol=1e-3, msg=key)
