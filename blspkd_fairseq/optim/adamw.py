"""torch's fused AdamW: one kernel for all parameters, where fairseq's Adam launches eight for each.

So does the norm of the gradients: fairseq takes that of each parameter by itself. What gradients are multiplied by
before the step (the mean over a batch, clipping) the step itself applies, as that of fairseq's fp16 optimizers does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II


@dataclass
class AdamWConfig(FairseqDataclass):
    """Options of ``--optimizer adamw``; weight decay is decoupled, as in fairseq's ``adam``."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "betas"})
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    lr: list[float] = II("optimization.lr")


@register_optimizer("adamw", dataclass=AdamWConfig)
class AdamW(FairseqOptimizer):
    """See the module."""

    def __init__(self, cfg: AdamWConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.AdamW(list(params), fused=True, **self.optimizer_config)
        self._factor: float | torch.Tensor = 1.0  # of the gradients, in the next step

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What a checkpoint's optimizer takes from the command line when it is resumed."""
        betas = self.cfg.adam_betas
        return {
            "lr": next(iter(self.cfg.lr)) if isinstance(self.cfg.lr, Iterable) else self.cfg.lr,
            "betas": tuple(map(float, betas.strip("()[] ").split(","))) if isinstance(betas, str) else tuple(betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    def multiply_grads(self, c: float | torch.Tensor) -> None:
        """Has the next step multiply the gradients, which stay as they are until then."""
        self._factor = self._factor * c

    def clip_grad_norm(
        self, max_norm: float, aggregate_norm_fn: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The norm of all gradients, which the next step scales down to ``max_norm`` where that is positive."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None]) * self._factor
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            self.multiply_grads((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, closure: Callable[[], Any] | None = None, scale: float = 1.0, groups: Any = None) -> None:
        """Takes one step, with gradients over ``scale``."""
        factor = self._factor / scale
        if isinstance(factor, float):
            factor = torch.full((), factor, device=self.param_groups[0]["params"][0].device)
        self._optimizer.grad_scale = factor.float().reciprocal()  # type: ignore[attr-defined]
        self._optimizer.step(closure)
        self._factor = 1.0

    def zero_grad(self) -> None:
        """Clears the gradients, and what they were to be multiplied by."""
        super().zero_grad()
        self._factor = 1.0
