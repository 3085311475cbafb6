"""The CNN adapter of BLSP."""

import pytest
import torch
from torch import nn

from blspkd_fairseq.modules.conv_adapter import ConvAdapter


def adapter(**options: int) -> ConvAdapter:
    torch.manual_seed(0)
    return ConvAdapter(6, 10, 0.2, bottleneck=4, dropout=0.0, **options).eval()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 50, 1500])
def test_output_lengths_are_those_of_the_convolutions(frames: int, layers: int) -> None:
    expected = frames
    for _ in range(layers):  # of a convolution of kernel 5, padding 2, stride 2
        expected = (expected + 2 * 2 - 5) // 2 + 1
    out = adapter(layers=layers)(torch.randn(1, frames, 6), torch.zeros(1, frames, dtype=torch.bool))
    assert out.lengths.tolist() == [expected] and out.embeddings.shape == (1, expected, 10)
    assert out.alpha is None and out.alpha_sum is None and out.boundaries is None


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    model, lengths = adapter(), [40, 7, 23]
    features = torch.randn(3, 40, 6)
    mask = torch.arange(40) >= torch.tensor(lengths).unsqueeze(1)
    out = model(features.masked_fill(mask.unsqueeze(2), float("nan")), mask)
    for b, length in enumerate(lengths):
        alone = model(features[b : b + 1, :length], mask[b : b + 1, :length])
        assert out.lengths[b] == alone.lengths[0]
        torch.testing.assert_close(out.embeddings[b, : out.lengths[b]], alone.embeddings[0])
        assert not out.embeddings[b, out.lengths[b] :].any()


def test_it_is_the_published_sequence_of_layers() -> None:
    """Convolutions with gates, residual bottleneck, LayerNorm: written out once more."""
    model = adapter()
    features = torch.randn(2, 24, 6)
    hidden = features.transpose(1, 2)
    for convolution in model.convolutions:
        value, gate = nn.functional.conv1d(hidden, convolution.weight, convolution.bias, 2, 2).chunk(2, 1)
        hidden = value * gate.sigmoid()
    hidden = hidden.transpose(1, 2)
    inner = nn.functional.gelu(model.bottleneck[0](hidden))
    expected = nn.functional.layer_norm(hidden + model.bottleneck[3](inner), (10,)) * 0.2
    out = model(features, torch.zeros(2, 24, dtype=torch.bool))
    torch.testing.assert_close(out.embeddings, expected)


def test_every_parameter_gets_a_gradient() -> None:
    model = adapter().train()
    out = model(torch.randn(2, 24, 6), torch.zeros(2, 24, dtype=torch.bool), torch.tensor([3, 4]))
    (out.embeddings * torch.randn_like(out.embeddings)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("options", [{"layers": 0}, {"kernel_size": 4}, {"kernel_size": 0}])
def test_shapes_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="odd kernel size"):
        adapter(**options)
