"""Chunked losses against the plain formulas on whole [N, V] matrices."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blspkd_fairseq.modules.distillation_loss import (
    distance_cross_entropy,
    linear_cross_entropy,
    linear_jensen_shannon,
    linear_kl_div,
    linear_kl_div_with_agreement,
)

N, D, V = 13, 6, 29


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    new = partial(torch.randn, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (new(N, D), new(N, D), new(V, D), new(V)))  # type: ignore[return-value]


def plain_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, reverse: bool
) -> Tensor:
    log_q = F.log_softmax(F.linear(student, weight, bias) / temperature, -1)
    log_p = F.log_softmax(F.linear(teacher, weight, bias) / temperature, -1)
    if reverse:
        log_q, log_p = log_p, log_q
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, N, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_kl_and_its_gradient_equal_the_plain_formula(
    chunk_size: int, temperature: float, reverse: bool, with_bias: bool
) -> None:
    student, teacher, weight, bias = case()
    head_bias = bias if with_bias else None
    scale = torch.linspace(-1, 2, N, dtype=torch.float64)  # an arbitrary gradient from above
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    kl = linear_kl_div(ours, teacher, weight, head_bias, temperature, reverse, chunk_size)
    expected = plain_kl(plain, teacher, weight, head_bias, temperature, reverse)
    torch.testing.assert_close(kl, expected)
    (kl * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_low_precision_input_gives_fp32_losses(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, weight, _ = case(dtype)
    student.requires_grad_()
    kl = linear_kl_div(student, teacher, weight)
    assert kl.dtype == torch.float32
    expected = plain_kl(student.detach().double(), teacher.double(), weight.double(), None, 1.0, False)
    torch.testing.assert_close(kl.double(), expected, atol=tolerance, rtol=tolerance)
    kl.mean().backward()
    assert student.grad is not None and student.grad.dtype == dtype


def test_identical_states_have_no_divergence_and_agree() -> None:
    student, _, weight, bias = case()
    for reverse in (False, True):
        result = linear_kl_div_with_agreement(student, student.clone(), weight, bias, reverse=reverse)
        torch.testing.assert_close(result.kl, torch.zeros(N, dtype=torch.float64), atol=1e-12, rtol=0)
        assert result.agrees.all()


def test_agreement_is_that_of_the_most_likely_words() -> None:
    student, teacher, weight, bias = case()
    expected = F.linear(student, weight, bias).argmax(1) == F.linear(teacher, weight, bias).argmax(1)
    agrees = linear_kl_div_with_agreement(student, teacher, weight, bias, temperature=3.0, chunk_size=4).agrees
    assert torch.equal(agrees, expected) and expected.any() and not expected.all()


@pytest.mark.parametrize("reverse", [False, True])
def test_words_that_the_bias_takes_out_change_nothing(reverse: bool) -> None:
    """Vocabularies are padded to round sizes, with -inf for the padding."""
    student, teacher, weight, bias = case()
    student.requires_grad_()
    padded_weight = torch.cat([weight, torch.randn(3, D, dtype=torch.float64)])
    padded_bias = torch.cat([bias, torch.full((3,), -torch.inf, dtype=torch.float64)])
    kl = linear_kl_div(student, teacher, padded_weight, padded_bias, reverse=reverse)
    torch.testing.assert_close(kl, plain_kl(student, teacher, weight, bias, 1.0, reverse))
    kl.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_no_positions_give_no_loss() -> None:
    _, _, weight, _ = case()
    empty = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    kl = linear_kl_div(empty, empty.detach(), weight)
    assert kl.shape == (0,)
    kl.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, D)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_equals_the_plain_formula(chunk_size: int, with_bias: bool) -> None:
    student, _, weight, bias = case()
    head_bias = bias if with_bias else None
    targets = torch.arange(N) * 2
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = linear_cross_entropy(ours, targets, weight, head_bias, chunk_size)
    expected = F.cross_entropy(F.linear(plain, weight, head_bias), targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    (loss**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_cross_entropy_by_distances_is_least_at_the_row_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 8, generator=generator) * torch.linspace(0.3, 2, 40).unsqueeze(1)
    targets = torch.tensor([0, 3, 39, 11])
    vectors = (table[targets] + torch.randn(4, 8, generator=generator) / 4).requires_grad_()
    loss = distance_cross_entropy(vectors, targets, table, scale=40.0, chunk_size=3)
    loss.sum().backward()

    exact = vectors.detach().double().requires_grad_()
    rows = table.double()
    distances = (exact.unsqueeze(1) - rows).square().sum(2) / rows.square().sum(1).mean()
    expected = F.cross_entropy(-20 * distances, targets, reduction="none")
    expected.sum().backward()
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(vectors.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)

    small = torch.tensor([0])  # where dot products take another row for this one
    assert (table @ table[0]).argmax() != 0
    assert distance_cross_entropy(table[:1], small, table, 400.0).item() < 1e-3


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, weight, _ = case()
    teacher.requires_grad_()
    linear_kl_div(student.requires_grad_(), teacher, weight).sum().backward()
    assert teacher.grad is None


def test_bad_arguments_are_refused() -> None:
    student, teacher, weight, bias = case()
    with pytest.raises(ValueError, match="one shape"):
        linear_kl_div(student, teacher[:-1], weight)
    with pytest.raises(ValueError, match="temperature"):
        linear_kl_div(student, teacher, weight, temperature=0.0)
    with pytest.raises(ValueError, match="head"):
        linear_kl_div(student, teacher, weight[:, :-1])
    with pytest.raises(ValueError, match="bias"):
        linear_kl_div(student, teacher, weight, bias[:-1])
    with pytest.raises(ValueError, match="chunk_size"):
        linear_kl_div(student, teacher, weight, chunk_size=0)
    with pytest.raises(ValueError, match="freeze"):
        linear_kl_div(student.requires_grad_(), teacher, weight.requires_grad_())
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(student, torch.zeros(3, dtype=torch.long), weight.detach())


# ---- generalised Jensen-Shannon divergence --------------------------------------------------------------------------


def plain_jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = (beta * p + (1 - beta) * q).log()
    return beta * (p * (p.log() - mixture)).sum(1) + (1 - beta) * (q * (q.log() - mixture)).sum(1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_and_its_gradient_equal_the_plain_formula(beta: float, temperature: float) -> None:
    student, teacher, weight, bias = case()
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    divergence = linear_jensen_shannon(ours, teacher, weight, bias, beta, temperature, chunk_size=4).kl
    p, q = (F.softmax(F.linear(hidden, weight, bias) / temperature, 1) for hidden in (teacher, plain))
    expected = plain_jensen_shannon(p, q, beta)
    torch.testing.assert_close(divergence, expected)
    scale = torch.linspace(-1, 2, N, dtype=torch.float64)
    (divergence * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_jensen_shannon_ends_at_both_kl_divergences() -> None:
    student, teacher, weight, _ = case()
    for beta, reverse in ((0.0, False), (1.0, True)):
        exact = linear_kl_div(student, teacher, weight, reverse=reverse)
        torch.testing.assert_close(linear_jensen_shannon(student, teacher, weight, beta=beta).kl, exact)
        near = abs(beta - 1e-8)
        limit = linear_jensen_shannon(student, teacher, weight, beta=near).kl / 1e-8
        torch.testing.assert_close(limit, exact, rtol=1e-3, atol=1e-3)


def test_jensen_shannon_of_words_that_are_certain_is_finite() -> None:
    student, teacher, weight, _ = case(torch.float32)
    student = (student * 1e4).requires_grad_()
    divergence = linear_jensen_shannon(student, teacher * 1e4, weight).kl
    divergence.sum().backward()
    assert divergence.isfinite().all() and student.grad is not None and student.grad.isfinite().all()
    assert float(divergence.detach().max()) <= math.log(2) + 1e-6


def test_a_teacher_of_another_width_has_its_own_head() -> None:
    student, _, weight, bias = case()
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(N, 9, generator=generator, dtype=torch.float64)
    table = torch.randn(V + 3, 9, generator=generator, dtype=torch.float64)  # padded beyond the vocabulary
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    divergence = linear_jensen_shannon(ours, teacher, weight, bias, 1.0, chunk_size=4, teacher_head=(table, None)).kl
    log_q = F.log_softmax(F.linear(plain, weight, bias), 1)
    expected = (log_q.exp() * (log_q - F.log_softmax(teacher @ table[:V].t(), 1))).sum(1)
    torch.testing.assert_close(divergence, expected)
    divergence.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    # The student's table may be the longer one as well.
    longer = linear_jensen_shannon(teacher, student, table, None, 0.5, teacher_head=(weight, bias)).kl
    assert longer.shape == (N,) and bool((longer > 0).all())


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_is_a_share(beta: float) -> None:
    student, teacher, weight, _ = case()
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        linear_jensen_shannon(student, teacher, weight, beta=beta)
