"""CIF in closed form against the loop that defines it."""

import math

import pytest
import torch
from torch import Tensor

from blspkd_fairseq.modules.cif import continuous_integrate_and_fire, parallel_integrate_and_fire


def slow_cif(features: Tensor, alpha: Tensor, tokens: int) -> tuple[Tensor, list[float]]:
    """One utterance in fp64, frame by frame: integrate, and fire whenever a token is full."""
    features, alpha = features.double(), alpha.double()
    out = torch.zeros(tokens, features.shape[1], dtype=torch.float64)
    ends: list[float] = []
    total = alpha.sum()
    if total <= 0:
        return out, [0.0] * tokens
    alpha = alpha * tokens / total
    token, filled = 0, 0.0
    for t, weight in enumerate(alpha.tolist()):
        left, used = weight, 0.0
        while left > 0 and token < tokens:
            share = min(left, 1.0 - filled)
            out[token] += share * features[t]
            filled, left, used = filled + share, left - share, used + share
            if filled >= 1.0 - 1e-9:
                ends.append(t + used / weight)
                token, filled = token + 1, 0.0
    return out, ends


def random_case(seed: int, batch: int = 4, frames: int = 30, high: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, frames, 5, generator=generator)
    alpha = torch.rand(batch, frames, generator=generator) * high
    lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    return features, alpha, torch.arange(frames) >= lengths.unsqueeze(1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("high", "tokens"), [(0.4, 6), (3.0, 25), (0.9, 1), (0.2, 70)])  # 70 > T
def test_equals_the_loop(seed: int, high: float, tokens: int) -> None:
    features, alpha, padding = random_case(seed, high=high)
    targets = torch.tensor([tokens, 1, max(1, tokens // 2), tokens])
    out = continuous_integrate_and_fire(features, alpha, padding, targets)
    assert out.lengths.tolist() == targets.tolist()
    for b in range(4):
        expected, ends = slow_cif(features[b], alpha[b].masked_fill(padding[b], 0), int(targets[b]))
        torch.testing.assert_close(out.embeddings[b, : targets[b]].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            out.boundaries[b, : targets[b]].double(), torch.tensor(ends).double(), atol=1e-4, rtol=0
        )
        assert not out.embeddings[b, targets[b] :].any()
        torch.testing.assert_close(out.alpha_sum[b], alpha[b][~padding[b]].sum())


def test_every_token_weighs_one_whatever_alpha_sums_to() -> None:
    _, alpha, padding = random_case(0)
    ones = torch.ones(4, 30, 1)
    out = continuous_integrate_and_fire(ones, alpha, padding, torch.tensor([3, 5, 1, 9]))
    torch.testing.assert_close(out.embeddings.squeeze(2).sum(1), torch.tensor([3.0, 5.0, 1.0, 9.0]))
    torch.testing.assert_close(out.embeddings[3].squeeze(1), torch.ones(9))


def test_length_at_inference_is_the_rounded_sum_and_at_least_one() -> None:
    alpha = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.5, 0.5, 0.4]])
    out = continuous_integrate_and_fire(torch.randn(3, 3, 2), alpha)
    assert out.lengths.tolist() == [3, 1, 1]
    assert not out.embeddings[1, 1:].any()


def test_an_item_does_not_depend_on_its_batch() -> None:
    """The published loop gives the second utterance token weights .6 and 1 here when it is not alone."""
    alpha = torch.tensor([[0.2, 2.6, 0.1, 0.1], [0.4, 0.4, 0.4, 0.8]])
    features = torch.randn(2, 4, 3)
    together = continuous_integrate_and_fire(features, alpha)
    for b in range(2):
        alone = continuous_integrate_and_fire(features[b : b + 1], alpha[b : b + 1])
        n = int(alone.lengths)
        assert torch.equal(together.embeddings[b, :n], alone.embeddings[0])
        assert torch.equal(together.boundaries[b, :n], alone.boundaries[0])


def test_silence_and_padding_give_zeros_and_finite_gradients() -> None:
    alpha = torch.zeros(3, 4)
    alpha[2] = 0.5
    alpha.requires_grad_()
    features = torch.full((3, 4, 2), float("nan"))
    features[0], features[2] = 1.0, 1.0
    features.requires_grad_()
    padding = torch.tensor([[False] * 4, [True] * 4, [False] * 4])
    out = continuous_integrate_and_fire(features, alpha, padding)
    assert out.lengths.tolist() == [1, 0, 2]
    assert not out.embeddings[:2].any()
    assert out.boundaries.tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 4.0]]
    out.embeddings.sum().backward()
    assert features.grad is not None and alpha.grad is not None
    assert features.grad.isfinite().all() and alpha.grad.isfinite().all()


def test_boundary_of_the_last_token_is_where_speech_ends_not_the_silence_behind_it() -> None:
    alpha = torch.tensor([[1 / 3] * 9 + [0.0] * 5])
    out = continuous_integrate_and_fire(torch.randn(1, 14, 2), alpha)
    torch.testing.assert_close(out.boundaries, torch.tensor([[3.0, 6.0, 9.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_token_count_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    """30 s of frames; a running sum in bf16 would stop growing at 256 x alpha."""
    alpha = torch.full((2, 1500), 0.0625, dtype=dtype)  # exact in all three
    out = continuous_integrate_and_fire(torch.ones(2, 1500, 1, dtype=dtype), alpha)
    assert out.lengths.tolist() == [94, 94]  # 93.75
    assert out.embeddings.dtype == dtype and out.alpha_sum.dtype == torch.float32
    torch.testing.assert_close(out.embeddings.float(), torch.ones(2, 94, 1), atol=1e-2, rtol=0)


def test_gradients_in_float64() -> None:
    features, alpha, padding = random_case(1, batch=2, frames=8)
    features = features.double().requires_grad_()
    alpha = (alpha.double() + 0.05).requires_grad_()
    targets = torch.tensor([3, 2])

    def embeddings_and_sum(features: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        out = continuous_integrate_and_fire(features, alpha, padding, targets)
        return out.embeddings, out.alpha_sum

    assert torch.autograd.gradcheck(embeddings_and_sum, (features, alpha))


def test_shapes_are_checked() -> None:
    features, alpha = torch.randn(2, 5, 3), torch.rand(2, 5)
    for wrong in (
        {"features": features, "alpha": alpha[:, :4]},
        {"features": features, "alpha": alpha, "padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        {"features": features, "alpha": alpha, "target_lengths": torch.tensor([1])},
        {"features": features, "alpha": alpha, "target_lengths": torch.tensor([1, -1])},
        {"features": features, "alpha": alpha, "padding_mask": torch.zeros(2, 5)},
    ):
        with pytest.raises(ValueError, match="must be|must not be|needs"):
            continuous_integrate_and_fire(**wrong)


def test_no_frames_give_zeros() -> None:
    out = continuous_integrate_and_fire(torch.zeros(2, 0, 5), torch.zeros(2, 0), None, torch.tensor([3, 1]))
    assert out.embeddings.shape == (2, 3, 5) and not out.embeddings.any()
    assert out.boundaries.shape == (2, 3) and out.lengths.tolist() == [3, 1]


# ---- the smooth variant --------------------------------------------------------------------------------------------


def slow_pif(features: Tensor, alpha: Tensor, tokens: int, sharpness: float) -> Tensor:
    """One utterance, token by token and frame by frame."""
    alpha = alpha * tokens / alpha.sum()
    out = torch.zeros(tokens, features.shape[1], dtype=torch.float64)
    for u in range(tokens):
        weights = []
        for t in range(len(alpha)):
            middle = float(alpha[:t].sum() + alpha[t] / 2)
            weights.append(math.exp(-sharpness * (middle - u - 0.5) ** 2))
        for t, weight in enumerate(weights):
            out[u] += features[t] * weight / sum(weights)
    return out


@pytest.mark.parametrize("sharpness", [1.0, 6.0, 40.0])
def test_pif_equals_the_loop_whatever_it_is_batched_with(sharpness: float) -> None:
    torch.manual_seed(0)
    features, alpha = torch.randn(3, 12, 4, dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64)
    frames, tokens = torch.tensor([12, 7, 9]), torch.tensor([3, 5, 1])
    padding = torch.arange(12) >= frames.unsqueeze(1)
    features[padding] = torch.nan
    out = parallel_integrate_and_fire(features, alpha, padding, tokens, sharpness)
    sharp = continuous_integrate_and_fire(features, alpha, padding, tokens)
    assert torch.equal(out.lengths, tokens) and torch.equal(out.boundaries, sharp.boundaries)
    torch.testing.assert_close(out.alpha_sum, sharp.alpha_sum)
    for row in range(3):
        n, u = int(frames[row]), int(tokens[row])
        expected = slow_pif(features[row, :n], alpha[row, :n], u, sharpness)
        torch.testing.assert_close(out.embeddings[row, :u], expected)
        assert not out.embeddings[row, u:].any()


def test_pif_of_silence_padding_and_nothing() -> None:
    features = torch.randn(2, 5, 3, requires_grad=True)
    alpha = torch.zeros(2, 5, requires_grad=True)
    padding = torch.tensor([[False] * 5, [True] * 5])
    out = parallel_integrate_and_fire(features, alpha, padding)
    assert out.lengths.tolist() == [1, 0]
    out.embeddings.sum().backward()
    assert features.grad.isfinite().all() and alpha.grad.isfinite().all()
    assert parallel_integrate_and_fire(features[:, :0], alpha[:, :0], None, torch.tensor([2, 1])).embeddings.shape == (
        2, 2, 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="alpha"):
        parallel_integrate_and_fire(features, alpha[:, :3])


def test_pif_has_gradients_in_float64() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, a: parallel_integrate_and_fire(f, a, None, torch.tensor([2, 4])).embeddings, (features, alpha)
    )
