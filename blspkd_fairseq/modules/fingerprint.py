"""Recognises a frozen model by a sample of its weights."""

import hashlib

import torch
from torch import Tensor, nn

_TENSORS, _ELEMENTS = 16, 16
_KEPT = "frozen_fingerprint"


def fingerprint(module: nn.Module) -> Tensor:
    """A sample of the frozen weights: up to 256 numbers, fp32 on the CPU, whatever dtype the weights are in.

    Floats and no hash, so that EMA, averaging and half precision carry it through unharmed. Of a quantised model it is
    that of the weights before.
    """
    kept = getattr(module, _KEPT, None)
    if kept is not None:
        return kept.clone()
    matrices = [p for name, p in module.named_parameters() if "lora_" not in name and p.dim() > 1]
    chosen = torch.linspace(0, len(matrices) - 1, min(_TENSORS, len(matrices))).long().tolist()
    samples = []
    for index in chosen:
        flat = matrices[index].detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, _ELEMENTS, dtype=torch.float64).long()
        samples.append(flat[places.to(flat.device)].float().cpu())
    return torch.cat(samples) if samples else torch.zeros(0)


def keep_fingerprint(module: nn.Module) -> None:
    """Lets a model keep its fingerprint, whatever its weights become."""
    setattr(module, _KEPT, fingerprint(module))


def identity(module: nn.Module, *options: object) -> str:
    """A hash of all weights, their dtype and ``options``: where it is the same, so is what the module computes."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=10)
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def same_fingerprint(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: bf16 keeps 8 bits of a weight."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=2.0**-6, atol=1e-6)
