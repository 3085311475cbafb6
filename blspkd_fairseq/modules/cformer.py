"""CFormer, the adapter of BLSP-KD: transformer layers, CIF, transformer layers (arXiv 2405.19041, sec. 3.2)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.attention import attend_stacked
from blspkd_fairseq.modules.cif import continuous_integrate_and_fire, parallel_integrate_and_fire
from blspkd_fairseq.modules.ragged import Ragged, pack, pad, rows_of
from blspkd_fairseq.modules.soft_tokens import SoftTokens, TokenQueries

ALIGNMENTS = {"cif": continuous_integrate_and_fire, "pif": parallel_integrate_and_fire}


class AdapterOutput(NamedTuple):
    """What every adapter returns.

    Attributes:
        embeddings: ``[B, U, D]`` in the LLM's embedding space, zeros behind ``lengths``.
        lengths: ``[B]`` embeddings of each utterance.
        alpha: ``[B, T]`` CIF weight of each frame before rescaling, or None (an adapter without CIF).
        alpha_sum: ``[B]`` their sum, which should be the number of tokens, or None.
        boundaries: ``[B, U]`` frame at which each token ends, or None.
        queries: of which each soft token's posterior is computed, ``[B, U]`` of them, or None (an adapter without).
        is_text: ``[B, U]`` bool: where an embedding is one of the LLM's own tokens, which its LoRA leaves alone; None:
            nowhere.
    """

    embeddings: Tensor
    lengths: Tensor
    alpha: Tensor | None = None
    alpha_sum: Tensor | None = None
    boundaries: Tensor | None = None
    queries: TokenQueries | None = None
    is_text: Tensor | None = None


class CFormer(nn.Module):
    """Turns encoder frames into one embedding per token of the LLM's tokenizer.

    As published, alpha is the sigmoid of the last channel after the first layers and the other channels are
    integrated. Ours: layers are pre-norm with padding masked, a LayerNorm stands before CIF, and the output is
    normalised and scaled to the LLM's token embeddings; the published unused vocabulary head is left out.

    Args:
        input_dim: D of the frames.
        output_dim: D of the LLM's embeddings.
        output_scale: standard deviation of the LLM's token embeddings.
        pre_layers, post_layers: transformer layers before and after CIF; 0 before it means one linear layer.
        heads: attention heads.
        ffn_dim: width of the feed-forward blocks, 4 x input_dim by default.
        dropout: of the transformer layers.
        alignment: how frames become tokens: "cif", or "pif", its smooth variant.
        tokens_per_frame: speech rate that alpha starts from, 4 tokens a second at 50 frames a second by default.

    Attributes:
        soft_tokens: if there is one, what is given out is no free vector but a mean of the LLM's token embeddings.
    """

    one_to_one = True
    """Embedding i stands for token i of the transcript."""
    settings: dict[str, float]
    """Options that change what the weights mean, and not their shapes."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        output_scale: float,
        pre_layers: int = 4,
        post_layers: int = 4,
        heads: int = 8,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        alignment: str = "cif",
        tokens_per_frame: float = 0.08,
    ) -> None:
        super().__init__()
        if heads < 1 or input_dim % heads:
            raise ValueError(f"the adapter's heads ({heads}) must divide the speech encoder's width ({input_dim})")

        if min(pre_layers, post_layers, ffn_dim or 0) < 0:
            raise ValueError(
                f"the adapter's layers and feed-forward width must not be negative, got {pre_layers}, {post_layers} "
                f"and {ffn_dim}"
            )

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                PackedTransformerLayer(
                    input_dim, heads, ffn_dim or 4 * input_dim, dropout, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(count)
            )

        self.settings = {
            "adapter_heads": float(heads),
            "adapter_alignment": float(list(ALIGNMENTS).index(alignment)),
        }
        self.integrate = ALIGNMENTS[alignment]
        self.input_norm = nn.LayerNorm(input_dim)
        self.pre = layers(pre_layers) if pre_layers else nn.ModuleList([nn.Linear(input_dim, input_dim)])
        self.pre_norm = nn.LayerNorm(input_dim)
        self.rate = nn.Parameter(torch.logit(torch.tensor(tokens_per_frame)))
        self.expand = nn.Linear(input_dim - 1, input_dim)
        self.post = layers(post_layers)
        self.post_norm = nn.LayerNorm(input_dim)
        self.project = nn.Linear(input_dim, output_dim)
        self.output_norm = nn.LayerNorm(output_dim)
        self.output_scale = output_scale
        self.soft_tokens: SoftTokens | None = None

    def forward(self, features: Tensor, padding_mask: Tensor, target_lengths: Tensor | None = None) -> AdapterOutput:
        """Adapts a batch.

        Args:
            features: ``[B, T, D]``.
            padding_mask: ``[B, T]`` bool, True on padding.
            target_lengths: ``[B]`` tokens of each utterance (training); by default alpha decides.
        """
        rows = rows_of((~padding_mask).sum(1))
        tokens = None if target_lengths is None else rows_of(target_lengths)
        return self.adapt(Ragged(pack(features, rows), rows), tokens)

    def adapt(self, frames: Ragged, tokens: Rows | None = None, reads: bool = True) -> AdapterOutput:
        """As :meth:`forward`, of frames without padding; with ``tokens``, the device is asked for nothing.

        Where no LLM ``reads`` the embeddings, they are not made soft tokens.
        """
        hidden = self.input_norm(frames.values)
        for layer in self.pre:
            hidden = layer(hidden) if isinstance(layer, nn.Linear) else layer(hidden, frames.rows)
        hidden = pad(self.pre_norm(hidden), frames.rows)
        padding_mask = frames.rows.is_padding
        alpha = torch.sigmoid(hidden[..., -1].float() + self.rate).masked_fill(padding_mask, 0.0)
        targets, longest = (None, None) if tokens is None else (tokens.lengths, tokens.longest)
        cif = self.integrate(hidden[..., :-1], alpha, padding_mask, targets, longest=longest)

        rows = rows_of(cif.lengths) if tokens is None else tokens
        packed = self.expand(pack(cif.embeddings, rows))
        for layer in self.post:
            packed = layer(packed, rows)
        states = self.post_norm(packed)
        embeddings, queries = self.output_norm(self.project(states)) * self.output_scale, None
        if self.soft_tokens is not None:
            queries = self.soft_tokens.queries(embeddings, states, spells=reads)
            embeddings = self.soft_tokens(queries) if reads else embeddings
            queries = queries._replace(vectors=pad(queries.vectors, rows))
        return AdapterOutput(pad(embeddings, rows), cif.lengths, alpha, cif.alpha_sum, cif.boundaries, queries)


class PackedTransformerLayer(nn.TransformerEncoderLayer):
    """torch's pre-norm layer over packed rows ``[N, D]``: the same parameters and numbers, without padding."""

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        hidden = hidden + self.dropout1(self._attend(self.norm1(hidden), rows))
        return hidden + self._ff_block(self.norm2(hidden))

    def _attend(self, hidden: Tensor, rows: Rows) -> Tensor:
        attention = self.self_attn
        projected = nn.functional.linear(hidden, attention.in_proj_weight, attention.in_proj_bias)
        stacked = projected.unflatten(1, (3 * attention.num_heads, -1))
        dropout = attention.dropout if self.training else 0.0
        return attention.out_proj(attend_stacked(stacked, attention.num_heads, rows, dropout=dropout).flatten(1))
