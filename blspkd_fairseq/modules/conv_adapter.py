"""The CNN adapter of BLSP: strided convolutions and a bottleneck (arXiv 2309.00916; github.com/cwang621/blsp)."""

import torch
from torch import Tensor, nn

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.ragged import Ragged, pack, pad, rows_of


class ConvAdapter(nn.Module):
    """Shortens encoder frames by a fixed factor, 2 for each convolution: 50 frames a second become 6.25.

    As published: convolutions of stride 2 with gated linear units, then a residual bottleneck and a LayerNorm. Ours:
    padding is masked in every layer, so that an utterance does not depend on its batch, and the output is scaled to the
    LLM's token embeddings. The embeddings are no tokens: what compares position i with token i (input KL, quantity,
    token cross-entropy) does not apply.

    Args:
        input_dim: D of the frames.
        output_dim: D of the LLM's embeddings.
        output_scale: standard deviation of the LLM's token embeddings.
        layers: convolutions.
        kernel_size: of each of them, odd.
        bottleneck: width of the bottleneck.
        dropout: in the bottleneck.
    """

    one_to_one = False

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        output_scale: float,
        layers: int = 3,
        kernel_size: int = 5,
        bottleneck: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if layers < 1 or kernel_size < 1 or kernel_size % 2 == 0 or bottleneck < 1:
            raise ValueError(
                f"the CNN adapter needs layers >= 1, an odd kernel size and a bottleneck >= 1, got {layers}, "
                f"{kernel_size} and {bottleneck}"
            )
        self.halvings = layers
        # Gates halve the channels: input_dim, then 2 x input_dim gated to input_dim, and the LLM's width at the end.
        inputs = [input_dim] * layers
        outputs = [2 * input_dim] * (layers - 1) + [2 * output_dim]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(i, o, kernel_size, stride=2, padding=kernel_size // 2)
            for i, o in zip(inputs, outputs, strict=True)
        )
        self.bottleneck = nn.Sequential(
            nn.Linear(output_dim, bottleneck), nn.GELU(), nn.Dropout(dropout), nn.Linear(bottleneck, output_dim)
        )
        self.output_norm = nn.LayerNorm(output_dim)
        self.output_scale = output_scale

    def forward(self, features: Tensor, padding_mask: Tensor, target_lengths: Tensor | None = None) -> AdapterOutput:
        """Adapts a batch.

        Args:
            features: ``[B, T, D]``.
            padding_mask: ``[B, T]`` bool, True on padding.
            target_lengths: ignored: the factor is fixed.
        """
        rows = rows_of((~padding_mask).sum(1))
        return self.adapt(Ragged(pack(features, rows), rows))

    def adapt(self, frames: Ragged, tokens: Rows | None = None) -> AdapterOutput:
        """As :meth:`forward`, of frames without padding."""
        features, padding_mask, lengths = pad(*frames), frames.rows.is_padding, frames.rows.lengths
        hidden = features.masked_fill(padding_mask.unsqueeze(2), 0.0).transpose(1, 2)  # B x D x T
        for convolution in self.convolutions:
            hidden = nn.functional.glu(convolution(hidden), dim=1)
            lengths = (lengths + 1) // 2
            beyond = torch.arange(hidden.shape[2], device=hidden.device) >= lengths.unsqueeze(1)
            hidden = hidden.masked_fill(beyond.unsqueeze(1), 0.0)
        embeddings = hidden.transpose(1, 2)
        embeddings = self.output_norm(embeddings + self.bottleneck(embeddings)) * self.output_scale
        return AdapterOutput(embeddings.masked_fill(beyond.unsqueeze(2), 0.0), lengths)
