"""Linear layers of a frozen LLM in 8 or 4 bits, by bitsandbytes (optional).

A product is made with the weights that the bits stand for, in the precision of its input, forward and backward. So
teacher and student multiply by the same numbers, no position's result depends on the rest of its batch, and nothing
waits for the device. bitsandbytes' own product in 8 bits quantises its input as well, by columns of the whole batch.
"""

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blspkd_fairseq import compat
from blspkd_fairseq.modules.fingerprint import keep_fingerprint

logger = logging.getLogger(__name__)

_BLOCK = 64  # weights of nf4 that share a scale


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that restores its weight for each product, and keeps it for none."""

    weight: nn.Parameter  # what is stored, of any shape
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @abstractmethod
    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out, in]`` that the bits stand for."""

    def forward(self, x: Tensor) -> Tensor:
        return _RestoredProduct.apply(x, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLinear":
        """Copies of a model share what is frozen."""
        return self


class Int8Linear(QuantizedLinear):
    """Eight bits for each weight, and a scale for each row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        functional = compat.import_bitsandbytes("--llm-quantization int8").functional
        stored, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scale", largest.float().div(127).unsqueeze(1))

    @torch.no_grad()
    def restored(self, dtype: torch.dtype) -> Tensor:
        return torch.mul(self.weight, self.scale, out=torch.empty_like(self.weight, dtype=dtype))


class Nf4Linear(QuantizedLinear):
    """Four bits for each weight (QLoRA's NormalFloat), and a scale for each block of 64."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.functional = compat.import_bitsandbytes("--llm-quantization nf4").functional
        stored, state = self.functional.quantize_4bit(weight.contiguous(), blocksize=_BLOCK, quant_type="nf4")
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scale", state.absmax)

    @torch.no_grad()
    def restored(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.out_features, self.in_features
        # In one row where blocks do not end with the rows: bitsandbytes 0.50 restores others there on a CPU.
        shape = torch.Size((rows, columns) if columns % _BLOCK == 0 else (rows * columns,))
        state = self.functional.QuantState(self.scale, shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
        weight: Tensor = self.functional.dequantize_4bit(self.weight, state)
        return weight.view(rows, columns)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module
        before = self.weight.device
        super()._apply(fn, recurse)
        if self.weight.device.type not in ("cpu", before.type):
            self._check_device()
        return self

    def _check_device(self) -> None:
        """Says now what would else fail in the first update."""
        try:
            self.restored(torch.float32)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise _unusable("nf4", self.weight.device, error) from error


def _unusable(kind: str, device: torch.device, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"bitsandbytes has no {kind} for this {device.type} ({reason}): install a release that has, or leave "
        "--llm-quantization out, which changes no checkpoint"
    )


_KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}
QUANTIZATIONS = ("none", *_KINDS)


class _RestoredProduct(torch.autograd.Function):
    """``x @ weight.T + bias``; the weight is restored once more for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.restored(x.dtype), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.restored(gradient.dtype), None


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of a frozen linear layer, with which a product in ``dtype`` is made."""
    if isinstance(layer, QuantizedLinear):
        return layer.restored(dtype)
    weight: Any = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def quantize_linears(llm: PreTrainedModel, kind: str) -> int:
    """Quantises the linear layers of a frozen LLM in place, but for its output head.

    Embeddings, norms, fused experts and Mamba's layers stay as they are, as does the fingerprint: it is that of the
    weights before.

    Args:
        llm: with weights that are not quantised.
        kind: of :data:`QUANTIZATIONS`.

    Returns:
        How many layers there are.

    Raises:
        ValueError: bitsandbytes is missing, or cannot work here.
    """
    if kind == "none":
        return 0
    keep_fingerprint(llm)
    names = _called_layers(llm)
    before = after = 0
    for name in names:  # one after another, so that no more than one is there twice
        layer: Any = llm.get_submodule(name)
        quantized = _quantize(layer, kind)
        llm.set_submodule(name, quantized)
        before += layer.weight.nbytes
        after += quantized.weight.nbytes + quantized.scale.nbytes
    logger.info(
        f"{len(names)} linear layers of the LLM are held in {kind}: {after / 2**20:,.0f} MiB in place of "
        f"{before / 2**20:,.0f}; checkpoints and caches are those of the LLM that is not quantised"
    )
    return len(names)


def _called_layers(llm: PreTrainedModel) -> list[str]:
    """Names of linear layers; not the head, and not those of Mamba, whose kernels take their weights."""
    head = llm.get_output_embeddings()
    mamba = [f"{name}." for name, module in llm.named_modules() if "Mamba" in type(module).__name__]
    return [
        name
        for name, module in llm.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and not name.startswith(tuple(mamba))
    ]


@torch.no_grad()
def _quantize(layer: Any, kind: str) -> QuantizedLinear:
    home = layer.weight.device
    # Hundreds of times as fast on a GPU, wherever the LLM is now.
    workplace = torch.device("cuda") if torch.cuda.is_available() else home
    weight = frozen_weight(layer, layer.weight.dtype).to(workplace)
    try:
        return _KINDS[kind](weight, layer.bias).to(home)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _unusable(kind, workplace, error) from error
