"""The CFormer: what its output depends on."""

import pytest
import torch
from torch import Tensor

from blspkd_fairseq.modules.cformer import POSITIONS, CFormer

WIDTH = 8


def build(positions: str) -> CFormer:
    torch.manual_seed(1)
    adapter = CFormer(WIDTH, 6, 0.3, pre_layers=1, post_layers=1, heads=2, dropout=0.0, positions=positions)
    return adapter.double().eval()


def adapt(adapter: CFormer, frames: Tensor, tokens: int) -> Tensor:
    """``[U, D]`` embeddings of one utterance."""
    padding = torch.zeros(1, len(frames), dtype=torch.bool)
    return adapter(frames.unsqueeze(0), padding, torch.tensor([tokens])).embeddings[0]


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_utterance_does_not_depend_on_what_it_is_batched_with(positions: str) -> None:
    adapter = build(positions)
    lengths, tokens = torch.tensor([40, 9, 0, 25]), torch.tensor([7, 2, 0, 6])
    frames = torch.randn(4, 45, WIDTH, dtype=torch.float64)  # noise in the padding, too
    padding = torch.arange(45) >= lengths.unsqueeze(1)
    together = adapter(frames, padding, tokens)
    assert torch.equal(together.lengths, tokens) and together.embeddings.isfinite().all()
    for row, (length, count) in enumerate(zip(lengths.tolist(), tokens.tolist(), strict=True)):
        if count:
            torch.testing.assert_close(together.embeddings[row, :count], adapt(adapter, frames[row, :length], count))
        assert not together.embeddings[row, count:].any()


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_within_a_token_is_heard_with_positions_only(positions: str) -> None:
    """Attention and sums know no order: without positions, frames played backwards are the same token."""
    adapter = build(positions)
    frames = torch.randn(20, WIDTH, dtype=torch.float64)
    change = (adapt(adapter, frames, 1) - adapt(adapter, frames.flip(0), 1)).abs().max()
    assert change < 1e-9 if positions == "none" else change > 1e-3


def test_gradients_reach_the_positions() -> None:
    adapter = build("conv")
    adapt(adapter, torch.randn(20, WIDTH, dtype=torch.float64), 3).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if "positions" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
